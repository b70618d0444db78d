"""Training runs that tests share: some thousand parameters, a page of text, seconds to compile."""

import contextlib
import fcntl
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, random_model

from dsv3_jax.cli.main import main
from dsv3_jax.config import Balance, DataConfig, ModelConfig, OptimConfig, RunConfig, to_dict
from dsv3_jax.host.mirror import fetched
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.presets import recipe
from dsv3_jax.report import speed
from dsv3_jax.runs import loop, steps
from dsv3_jax.runs.checkpoint import Checkpoints, open_checkpoints
from dsv3_jax.runs.folder import claim, read_run
from dsv3_jax.training.state import Job, TrainState, init_optimizer

# Two sparse layers and an MTP block, so that every kind of router bias is there; little else, to
# compile fast.
MODEL = ModelConfig(
    vocab_size=260, dim=8, num_layers=2, num_dense_layers=0, dense_dim=10, num_heads=2,
    q_latent_dim=None, kv_latent_dim=5, nope_head_dim=4, rope_head_dim=2, v_head_dim=3,
    num_experts=8, experts_per_token=2, num_shared_experts=1, expert_dim=6,
    num_groups=2, groups_per_token=1, balance=Balance(bias_rate=1e-2, sequence_alpha=1e-2),
    max_positions=64, mtp_depth=1, init_std=0.2,
)  # fmt: skip
STEPS = 12
CLOCK = ("tokens_per_s", "mfu")  # of a row
HERE = Path(__file__).parents[1]


def shared(root: Path) -> Path:
    """The folder of the session, for all its processes.

    `root` here and below is the folder of this process, `tmp_path_factory.getbasetemp()`.
    """
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


def compiled_programs(root: Path) -> Path:
    """The folder of the session's compiled programs; of several sessions if one is named."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or shared(root) / "programs")


def write_text(folder: Path) -> str:
    """A folder of short documents of two domains, some shorter than a row."""
    rng = np.random.default_rng(5)
    words = ["def", "return", "x", "y = 2", "é", "for", "in", "range(9):", "\n"]
    for i in range(40):
        path = folder / ("code" if i % 2 else "prose") / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = " ".join(rng.choice(words, size=rng.integers(3, 40)))
        path.write_text(f"{i} {text}", encoding="utf-8")
    return str(folder)


def write_lines(file: Path, records: Iterable) -> str:
    """Write JSON lines. Returns: the file's name."""
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


def make_run(text: str, **changes) -> RunConfig:
    """A run on `text`; only another model, execution, optimizer or `steps` compiles a new step."""
    data = DataConfig(paths=(text,), seq_len=16, batch_size=4, val_fraction=0.3)
    optim = OptimConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2)
    often = {"eval_every": 6, "eval_batches": 2, "save_every": 4, "keep": 2, "log_every": 1}
    run = RunConfig(MODEL, execution=DENSE, data=data, optim=optim, steps=STEPS, **often)
    return replace(run, **changes)


def fresh_state(run: RunConfig, step: int = 0) -> TrainState:
    """A new state in each call, since a step donates it: parameters and signed biases by NumPy."""
    model = random_model(run.model, execution=run.execution)
    params, bias = nnx.split(model, nnx.Param, RouterBias)[1:]
    return new_state(run, params, bias, step)


def new_state(run: RunConfig, params: nnx.State, bias: nnx.State, step: int = 0) -> TrainState:
    """The state of a run with these parameters, uncompiled; the optimizer begins with zeros."""
    opt = jax.eval_shape(lambda: init_optimizer(Job(run), params))
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), opt)
    return TrainState(params, bias, zeros, jnp.asarray(step, jnp.int32))


def save_run(folder: Path, run: RunConfig, step: int = 7) -> RunConfig:
    """Make the folder of a run with a checkpoint of random weights. Returns: its run."""
    run = claim(folder, run)
    state = fresh_state(run, step)
    state = replace(state, opt=jax.tree.map(lambda x: x + 1, state.opt))  # no new optimizer's
    with Checkpoints(folder, run) as checkpoints:
        checkpoints.save(state, {}, wait=True)
    return run


def last_state(folder: Path | str, run: RunConfig | None = None) -> tuple[TrainState, dict]:
    """The state and the data position of a run's last checkpoint, also of one in a bucket."""
    folder = fetched(folder)
    with open_checkpoints(folder, run or read_run(folder), read_only=True) as checkpoints:
        return checkpoints.restore()


def packed_batch(
    rng: np.random.Generator, segment_ids: np.ndarray, vocab_size: int = 260
) -> dict[str, jax.Array]:
    """Random tokens in documents of those segments, each counting its positions from 0."""
    starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
    columns = np.arange(segment_ids.shape[1])[None]
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    tokens = rng.integers(0, vocab_size, segment_ids.shape)
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


def documents(
    rows: int, length: int, most: int = 3, *, padding=(), seed: int = 0, vocab_size: int = 260
) -> dict[str, jax.Array]:
    """A batch: each row has 1 to `most` documents. `padding`: pairs (row, places at its end)."""
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(1, most + 1, (rows, length)), axis=1)
    for row, places in padding:
        segment_ids[row, -places:] = 0
    return packed_batch(rng, segment_ids, vocab_size)


def on_mesh(tree, mesh: jax.sharding.Mesh, fsdp: bool = False):
    """A state, or variables, where a mesh has them."""
    return jax.device_put(tree, sharding.state_sharding(tree, mesh, fsdp=fsdp))


@dataclass(frozen=True)
class Finished:
    """A run trained to its end."""

    run: RunConfig
    folder: Path
    fitted: loop.FitResult
    said: str  # what it printed


@cache
def finished(root: Path) -> Finished:
    """A copy of the one complete run, trained once a session; other runs are compared with it."""
    text, made, kept = (shared(root) / "finished" / name for name in ("text", "run", "kept"))
    text.mkdir(parents=True, exist_ok=True)
    with (text.parent / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be training it
        if not kept.exists():
            for (module, name), part in SECONDS.items():
                patch.setattr(module, name, part)
            kept.write_bytes(pickle.dumps(said_by(loop.fit, make_run(write_text(text)), made)))
    folder = Path(shutil.copytree(made, root / "finished run"))
    return Finished(make_run(str(text)), folder, *pickle.loads(kept.read_bytes()))


def refused(sentence: str) -> contextlib.AbstractContextManager:
    """Expect a ValueError with these words, a regular expression."""
    return pytest.raises(ValueError, match=sentence)


def said_by(function, *args) -> tuple[object, str]:
    """(The result of `function`, the text that it prints.)"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function(*args)
    return result, out.getvalue()


def by_command(*argv, lines: str = "") -> tuple[int, str, str]:
    """Run `dsv3 …` in this process, with these lines of stdin.

    Returns: (exit code, stdout, stderr).
    """
    out, err = io.StringIO(), io.StringIO()
    to_out, to_err = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with to_out, to_err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


# `fit` spends seconds on these, however short the training: the machine's FLOP/s, pictures, the
# order-2 baseline.
PLACES = ((speed, "gemm_flops"), (steps, "draw"), (steps, "order2_of"))
SECONDS = {place: getattr(*place) for place in PLACES}
SPEND_NO_SECONDS = """
from dsv3_jax.report import speed
from dsv3_jax.runs import steps
speed.gemm_flops, steps.draw, steps.order2_of = lambda dtype: 1e9, lambda *_: [], lambda *_: 0.0
"""


def spend_no_seconds() -> None:
    """Let `fit` leave these out in this process, for good; `finished` does not."""
    exec(SPEND_NO_SECONDS, {})


def flags(run: RunConfig) -> list[str]:
    """The command line's words for what `run` changes of the recipe `tiny`."""
    return list(_flags(to_dict(run), to_dict(recipe("tiny")), ""))


def _flags(values: dict, usual: dict, prefix: str) -> Iterator[str]:
    for key, value in values.items():
        name = (prefix + key).replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, usual[key], f"{prefix}{key}.")
        elif value == usual[key]:
            continue
        elif isinstance(value, bool):
            *groups, last = name.split(".")
            yield "--" + (name if value else ".".join([*groups, "no-" + last]))
        else:
            words = value if isinstance(value, list | tuple) else [value]
            yield from ("--" + name, *map(str, words))


def environment(root: Path) -> dict[str, str]:
    """For another process, without import hook and with this session's compiled programs."""
    return os.environ | {
        "PYTHONPATH": str(HERE),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_COMPILATION_CACHE_DIR": str(compiled_programs(root)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def dsv3(before: str) -> tuple[str, str]:
    """The program `dsv3` that first runs `before`."""
    return "-c", f"{before}\nimport sys\nfrom dsv3_jax.cli import main\nsys.exit(main.main())\n"


def start(
    argv: list[str], root: Path, program: Sequence[str] | None = None, **settings
) -> subprocess.Popen:
    """`dsv3 …` in a separate process, or another Python program with these words.

    Training leaves out what SPEND_NO_SECONDS does.

    Args: settings: of Popen, in place of the usual ones.
    """
    if program is None:
        program = dsv3(SPEND_NO_SECONDS) if argv[0] == "train" else ("-m", "dsv3_jax.cli")
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": HERE}
    usual["env"] = environment(root)
    return subprocess.Popen([sys.executable, *program, *argv], **usual | settings)


def rows_of(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without `CLOCK`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def assert_near(got, want, share: float = 1e-5) -> None:
    """Leaves differ by at most this share of their largest entry: sums in another order."""
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        atol, where = share * np.abs(b).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=where)


def assert_same_step(got, want, share: float = 1e-5) -> None:
    """(State, metrics) of two steps: counts exactly, values up to float32 sums' order."""
    (state, metrics), (want_state, want_metrics) = got, want
    np.testing.assert_array_equal(metrics["load"], want_metrics["load"])
    for name in ("loss", "mtp_loss", "balance_loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)
    assert_near(state.opt.mu, want_state.opt.mu, share)  # the first: 0.1 times the gradient


def assert_bitwise(left, right) -> None:
    """Two trees have the same structure, and every leaf the same bytes (NaN equals NaN)."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    paths = jax.tree_util.tree_leaves_with_path(left)
    for (path, a), b in zip(paths, jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        one, two = (a.dtype, a.shape, a.tobytes()), (b.dtype, b.shape, b.tobytes())
        assert one == two, jax.tree_util.keystr(path)
