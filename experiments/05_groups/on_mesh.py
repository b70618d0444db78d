"""Run a trained model on a mesh of 8 CPU devices, one a group of experts, and count bytes sent.

python experiments/05_groups/on_mesh.py RUN_FOLDER      prints one line of JSON
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import Layout, replace
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.rounds import later_size, round_size
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.planning import devices
from dsv3_jax.planning.traffic import traffic
from dsv3_jax.runs.checkpoint import load_run
from experiments import apart
from experiments.lab.tasks import Facts, TaskSource

DEVICES = 8


@partial(jax.jit, static_argnames="graphdef")
def routing_of(graphdef, state, batch):
    """Return each token's experts [L, B, T, K] and its sent copies [L], empty slots too."""
    model = nnx.merge(graphdef, state)
    out = model.forward_hidden(batch["tokens"], batch["segment_ids"], batch["positions"])
    return out.routing.expert_ids, out.metrics["sparse"]["tokens_sent"]


def measure(folder):
    """Return, of one layer's forward pass, mean over layers: rounds, copies and bytes a token."""
    mesh = sharding.make_mesh(expert=DEVICES)
    trained, run, _ = load_run(folder, mesh)
    execution = replace(run.execution, layout=Layout(expert_comm="all_to_all"))
    model = Transformer(run.model, execution, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(trained))
    [batch] = TaskSource(Facts(), run.data).val_batches(1)
    rows = jax.NamedSharding(mesh, jax.P(("data", "expert")))
    batch = {
        key: jax.device_put(batch[key], rows) for key in ("tokens", "segment_ids", "positions")
    }
    graphdef, state = nnx.split(model)
    with jax.set_mesh(mesh):
        program = routing_of.lower(graphdef, state, batch).compile()
        ids, sent = (np.asarray(x) for x in program(state, batch))
    tokens = ids[0, :, :, 0].size // DEVICES  # of a device
    layers, size = len(sent), round_size(run.model, execution.layout, tokens, DEVICES)
    later_rounds = (sent * tokens / (DEVICES - 1) - size.tokens) / later_size(size, most=1).tokens
    np.testing.assert_allclose(later_rounds, later_rounds.round(), atol=1e-2)
    # The program has a layer's first round by itself, later ones in a loop of unknown length.
    found = [c for c in traffic(program, dict(mesh.shape)).collectives if c.kind == "all-to-all"]
    first, later = (sum(c.wire for c in found if c.known == known) for known in (True, False))
    nbytes = first + later * later_rounds.sum() / layers
    return {
        "rounds": float(1 + later_rounds.mean()),
        "copies": float(copies(ids, run.model.num_experts // DEVICES).mean()),
        "bytes": float(nbytes / layers / tokens),
    }


def copies(ids, held):
    """Count the other devices of a token's experts: ids [L, B, T, K] → [L, B, T].

    Devices split the rows B.
    """
    home = np.arange(ids.shape[1]) // (ids.shape[1] // DEVICES)
    reached = (ids // held)[..., None] == np.arange(DEVICES)  # [L, B, T, K, devices]
    away = np.arange(DEVICES) != home[:, None, None]  # [B, 1, devices]
    return (reached.any(-2) & away).sum(-1)


if __name__ == "__main__":
    devices.fake_cpus(DEVICES)
    sys.exit(apart.answer(measure(Path(folder)) for folder in sys.argv[1:]))
