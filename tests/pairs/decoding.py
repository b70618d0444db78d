"""Decoding by pairs: a row decodes prompts of several lengths, and each alone in the plainest way.

greedy      The text of each prompt is the plain one: alone, on one device, without drafts. Drafts,
            a batch and a mesh change no text at temperature 0.
sampled     A text depends on seed, prompt and sample alone. Without drafts and with "lookup" it is
            the plain one, with other drafts that of the same drafts alone.
log p       The log-probabilities of equal texts are equal, the model's own too.
routing     The experts likewise.

The plain way has no cache where the row's cache has float32, else the row's cache, and its dtype.
In bfloat16 numbers are not compared, a sampled text may be another one, and a greedy token another
one where both are about as likely (`NEAR`), but for one text of a row. Rounding sends one token in
forty to another expert, on one device as on a mesh, and its logits then move by up to five standard
deviations in place of 0.04.
"""

import math
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import forward, random_model
from runs import on_mesh

import dsv3_jax as ds
from dsv3_jax.config import RunConfig
from dsv3_jax.config.execution import CacheDtype, CacheKind
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.sampling import Sampling

from . import settings
from .covering import Row, refusal
from .settings import bases, named
from .training import changed, mesh_of

PROMPTS = [[66, 7, 190, 3, 3, 80, 21], [5, 9], [250, 17, 6, 200, 31], [4]]
NEW, SEED = 7, 3
NEAR = 0.5  # of the logits' standard deviation


def of_model(*names: str, without: str = "-") -> dict[str, dict[str, dict[str, Any]]]:
    """Factors of training that make the model, but for values with some text in their name."""
    return {
        name: {key: of for key, of in settings.FACTORS[name].items() if without not in key}
        for name in names
    }


FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "draft": {
        "none": {},
        "mtp": {"draft": "mtp"},
        "mtp, 2": {"draft": "mtp", "draft_length": 2},
        "lookup": {"draft": "lookup", "draft_length": 3},
        "model": {"draft": "model", "draft_length": 2},
    },
    "sampling": {
        "greedy": {},
        "0.8": {"temperature": 0.8},
        "top 5": {"temperature": 0.8, "top_k": 5},
        "p 0.7": {"temperature": 1.0, "top_p": 0.7},
    },
    "samples": {"1": {}, "3": {"samples": 3}},
    "cache": {"default": {}} | named("cache", get_args(CacheKind)),
    "cache dtype": {"default": {}} | named("cache_dtype", get_args(CacheDtype)),
    "batch": {"all": {}, "1": {"batch_size": 1}, "2": {"batch_size": 2}},
    "log p": {"no": {}, "yes": {"logprobs": True}},
    "routing": {"no": {}, "yes": {"return_routing": True}},
    "stop": {"none": {}, "half": {"stop_tokens": list(range(0, 260, 2))}},
    **of_model("attention", "layers", "sizes", "heads"),
    **of_model("router", without="sigmoid, "),
    **of_model("capacity", "tied", "positions"),
    **of_model("mesh", without="length"),
    **of_model("dtype", "precision", "kernels"),
}
BASES = bases(
    FACTORS,
    "draft=none",
    "sampling=0.8",
    "heads=deepseek",
    "attention=mha",
    "heads=medusa",
    "sampling=0.8; heads=deepseek",
)


class Plan:
    """A row as the package sees it. Raises: ValueError where the package refuses it."""

    def __init__(self, row: Row, scratch: Path):
        of_run, self.asked = {}, {}
        for name, value in row.items():
            (of_run if name in settings.FACTORS else self.asked).update(FACTORS[name][value])
        self.run: RunConfig = changed(settings.RUN, of_run)
        self.mesh = mesh_of(row)
        if self.mesh is not None:
            sharding.check_model(self.mesh, self.run.model)
        prepare(self.run.execution, mesh=self.mesh)  # refuses kernels
        self.exact = self.run.execution.compute_dtype == "float32"
        self.draft = self.asked.pop("draft", None)
        cfg, asked = self.run.model, dict(self.asked)
        names = ("temperature", "top_k", "top_p")
        sampling = Sampling(**{name: asked.pop(name) for name in names if name in asked})
        own = None if self.draft == "model" else self.draft
        ds.DecodeConfig(NEW, sampling, draft=own, seed=SEED, **asked).check(cfg, PROMPTS)
        if self.draft and asked.get("cache") == "none":
            ds.DecodeConfig(NEW, draft="lookup", cache="none")  # refuses it
        if asked.get("cache") != "none":
            pick_kind(cfg, asked.get("cache"))


def model_of(plan: Plan, mesh: Any, **changes: Any) -> Any:
    """A random model, on a mesh or on one device."""
    execution = plan.run.execution
    model = random_model(ds.replace(plan.run.model, **changes), 0, execution)
    return model if mesh is None else on_mesh(model, mesh, execution.layout.fsdp)


def check_row(row: Row, scratch: Path) -> str:
    """Do one row. Returns and raises as `training.check_row`."""
    if sentence := refusal(Plan, row, scratch):
        return f"refused: {sentence}"
    plan = Plan(row, scratch)
    model, alone = (model_of(plan, mesh) for mesh in (plan.mesh, None))
    draft, draft_alone = plan.draft, plan.draft
    if plan.draft == "model":  # much like the model, so that some of its drafts are right
        draft, draft_alone = (
            model_of(plan, mesh, num_layers=2, mtp_depth=0) for mesh in (plan.mesh, None)
        )
    found = ds.generate(model, PROMPTS, NEW, seed=SEED, draft=draft, **plan.asked)

    samples, greedy = plan.asked.get("samples", 1), "temperature" not in plan.asked
    same = {name: value for name, value in plan.asked.items() if name != "batch_size"}
    rounded = plan.asked.get("cache_dtype", "float32") != "float32"
    if greedy or plan.draft in (None, "lookup"):
        draft_alone = None
        same.pop("draft_length", None)
        same |= {} if rounded else {"cache": "none"}
    apart = [0.0]
    for i, prompt in enumerate(PROMPTS):
        plain = ds.generate(alone, [prompt], NEW, seed=SEED, draft=draft_alone, **same)
        for k in range(samples):
            text = i * samples + k
            if found.tokens[text] == plain.tokens[k]:
                if plan.exact:
                    check_numbers(found, text, plain, k, bound=1e-3 if rounded else 1e-4)
                continue
            said = f"{prompt} → {found.tokens[text]}, alone {plain.tokens[k]}"
            assert not plan.exact, said
            if greedy:
                apart.append(how_far_apart(alone, prompt, found.tokens[text], plain.tokens[k]))
                assert math.isfinite(apart[-1]), said
    assert all(x < NEAR for x in sorted(apart)[:-1]), f"texts are {np.round(apart, 2)} apart"
    return "done"


def check_numbers(found: Any, i: int, plain: Any, k: int, bound: float) -> None:
    """Compare what two requests say of one text; log-probabilities in nats."""
    for name in ("logprobs", "model_logprobs"):
        if (of := getattr(found, name)) is not None:
            worst = np.abs(np.subtract(of[i], getattr(plain, name)[k])).max()
            assert worst < bound, f"text {i}: {name} differ by {worst:.2g} from the plain ones"
    if found.expert_ids is not None:
        ids, wanted = found.expert_ids[i], plain.expert_ids[k]
        np.testing.assert_array_equal(np.sort(ids, -1), np.sort(wanted, -1))


def how_far_apart(model: Any, prompt: list[int], found: list[int], wanted: list[int]) -> float:
    """How far apart the logits of the first tokens are that differ, in standard deviations."""
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if at is None:
        return math.inf  # one text is longer
    # the model without 8-bit products, as decoding computes it
    execution = ds.replace(model.execution, precision="none")
    graph = nnx.graphdef(abstract(model.cfg, execution, model.kernels.in_compute_dtype))
    out = forward(nnx.merge(graph, nnx.state(model)), jnp.array([prompt + wanted[:at]]))
    logits = np.asarray(out.logits[0, -1], np.float64)
    return abs(logits[found[at]] - logits[wanted[at]]) / logits.std()
