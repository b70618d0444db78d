"""Training by pairs: a row trains two layers for four steps, and is compared with itself otherwise.

resumed     Two steps, stop, restore, two steps: state and metrics are those of four steps, bit for
            bit. A checkpoint holds all that a step depends on.
plain       The first steps on one device, without microbatches or recomputation and by the simplest
            kernels give the same metrics up to rounding: an `Execution`, a mesh and microbatches
            change nothing else. In float32 the bound is `TIGHT`, else `WIDE`, and counts are not
            compared.
policy      The sampler of GRPO and its trainer compute the same log-probabilities, in float32
            without 8-bit products.
loaded      The model that a reader loads, on one device and on the row's mesh, has the loss on
            held-out text that the run reported.

Two settings that cannot be combined are refused by one sentence, before the run has a folder.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optax
from models import random_model
from released import INT4, Cell, write_folder
from runs import assert_bitwise, rows_of, save_run, write_text

import dsv3_jax as ds
from dsv3_jax import hf
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig, RunConfig, from_dict, to_dict
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.shape import parse_mesh
from dsv3_jax.runs import start as starts
from dsv3_jax.runs.chats import read_chats
from dsv3_jax.runs.checkpoint import Checkpoints
from dsv3_jax.runs.folder import read_run
from dsv3_jax.runs.open_model import measured_on

from .covering import Row, refusal
from .settings import FACTORS, MODEL, RUN

TIGHT, WIDE = 1e-3, 0.1  # of a metric's size
# metrics that count nothing
SMOOTH = {"loss", "mtp_loss", "feature_loss", "balance_loss", "grad_norm"}
MISMATCH = {"mismatch", "max_mismatch", "sampler_kl"}
RELEASED = ("float32", "bfloat16", "FP8", "int4")


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with other values, by names with dots; all at once, so in any order."""
    values = to_dict(config)
    for name, value in changes.items():
        *folders, key = name.split(".")
        inner = values
        for folder in folders:
            inner = inner[folder]
        inner[key] = value
    return from_dict(type(config), values)


def mesh_of(row: Row) -> Any:
    """The devices of a row; None means one."""
    mesh = row["mesh"].split(", ")[0]
    return None if mesh == "none" else sharding.make_mesh(**parse_mesh(mesh))


class Plan:
    """A row as the package sees it. Raises: ValueError where the package refuses it.

    Args: scratch: a folder for texts, starts and runs.
    """

    def __init__(self, row: Row, scratch: Path):
        self.row, self.scratch, changes = row, scratch, {}
        for name, value in row.items():
            changes |= FACTORS[name][value]
        self.kind = row["start"].split(",")[0]
        name = hashlib.blake2b(repr(row).encode(), digest_size=6).hexdigest()
        self.folder = scratch / "rows" / name
        if self.kind != "none":
            changes["trunk" if self.kind == "trunk" else "start"] = str(self.folder / "start")
        how = row["how"].replace(",", "").split()[0]
        changes["data.paths"] = (str(scratch / how.replace("warm-up", "text")),)
        if self.kind in RELEASED:
            changes["data.tokenizer"] = str(scratch / "tokenizer.json")
        self.run = changed(RUN, changes)
        if self.run.data.format == "chat" and self.kind == "none":
            read_chats(self.run, self.folder)  # refuses it
        self.check_start()
        self.mesh = mesh_of(row)
        self.options: dict[str, Any] = {"mesh": self.mesh, "quiet": True, "report": False}
        if row["optimizer"] == "optax":
            self.options["optimizer"] = optax.lion(1e-3)
        if self.mesh is not None:
            sharding.check_run(self.mesh, self.run)
        prepare(self.run.execution, mesh=self.mesh)  # refuses kernels

    @cached_property
    def start_model(self) -> ModelConfig:
        """The model of the start: heads are new on a trunk, and indexers in their warm-up."""
        model = self.run.model
        if self.kind == "trunk":
            model = replace(model, mtp_depth=0, mtp_kind="deepseek", mtp_input="normed")
        if self.run.indexer_stage == "warm":
            without = {key: getattr(MODEL, key) for key in vars(MODEL) if key.startswith("index_")}
            model = replace(model, attention="mla", **without)
        return model

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of a released start."""
        dtype = "float32" if self.kind == "float32" else "bfloat16"
        config = config_to_dict(self.start_model, fp8=self.kind == "FP8", dtype=dtype)
        kimi = {"model_type": "kimi_k2", "torch_dtype": "float32", "quantization_config": INT4}
        return config | (kimi if self.kind == "int4" else {})

    def check_start(self) -> None:
        """Refuse a start that this run cannot begin with, or that has no released format."""
        if self.kind == "none":
            return
        released = self.kind in RELEASED
        model = hf.config_from_dict(self.config) if released else self.start_model
        data = replace(RUN.data, tokenizer=self.run.data.tokenizer)
        theirs = replace(RUN, model=model, data=data)
        four_bits, weights = self.kind == "int4", lambda job: None
        start = starts.Start(
            "start", theirs, plain_settings(), released, weights, four_bits=four_bits
        )
        starts.check_start(self.run, start)

    def write_start(self) -> None:
        """Write the folder that the run begins with: random numbers throughout, biases too."""
        folder = self.folder / "start"
        if self.kind == "none":
            return
        if self.kind == "int4":
            write_folder(folder, Cell("Kimi K2-Thinking", self.config))
        elif self.kind in RELEASED:
            how: dict[str, Any] = {"fp8": True} if self.kind == "FP8" else {"dtype": self.kind}
            hf.save(random_model(self.start_model), folder, quiet=True, **how)
        else:
            save_run(folder, replace(RUN, model=self.start_model))
        if self.kind in RELEASED:
            shutil.copy(self.scratch / "tokenizer.json", folder)

    @property
    def exact(self) -> bool:
        """Whether all is computed in float32: rounding turns last digits into other choices."""
        run = self.run
        dtypes = {run.execution.compute_dtype, run.grpo.cache_dtype or "float32"}
        precisions = {run.execution.precision, run.model.index_precision}
        rounds = run.grpo.sampler_weights is not None
        return dtypes == {"float32"} and precisions == {"none"} and not rounds

    def plain(self) -> RunConfig:
        """The same run on one device, by the simplest kernels.

        Microbatches stay where the Switch loss or an expert's capacity is computed for each of
        them.
        """
        run = self.run
        kept = run.model.capacity_factor is not None or run.model.balance.switch_alpha > 0
        dtype, precision = run.execution.compute_dtype, run.execution.precision
        kernels = "xla,grouped_swiglu=dense" if precision == "none" else "xla"
        execution = ds.Execution(dtype, kernels=kernels, precision=precision)
        parts = run.optim.microbatches if kept else 1
        return replace(run, execution=execution, optim=replace(run.optim, microbatches=parts))


def write_data(scratch: Path) -> None:
    """Write what rows train on: texts, shards, chats, tasks, and a tokenizer of bytes."""
    text = write_text(scratch / "text")
    (scratch / "tokenizer.json").write_text(byte_tokenizer_json())
    chat = [{"role": "user", "content": "$?"}, {"role": "assistant", "content": "$"}]
    task = {"prompt": "$+1=", "answer": "[\x00-\x3f]"}  # a random model is partly right
    for name, record in {"chats": {"messages": chat}, "GRPO": task}.items():
        (scratch / name).mkdir()
        lines = (json.dumps(record).replace("$", str(i)) for i in range(48))
        (scratch / name / "rows.jsonl").write_text("\n".join(lines))
    words = "--row-tokens 32 --val-fraction 0.3 --shard-mb 0.01"
    argv = ["data", "tokenize", text, "--out", str(scratch / "shards"), *words.split()]
    assert main(argv) == 0


def check_row(row: Row, scratch: Path) -> str:
    """Do one row.

    Returns: "done", or "refused: " and the sentence.
    Raises: AssertionError where two results differ, and whatever else goes wrong.
    """
    if sentence := refusal(Plan, row, scratch):
        return f"refused: {sentence}"
    plan = Plan(row, scratch)
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    plan.write_start()
    out = plan.folder / "whole"
    try:
        result = ds.train.fit(plan.run, out, **plan.options)
    except ValueError as error:
        if out.exists():
            raise AssertionError(f"refused after the run had begun: {error}") from error
        return f"refused: {error}"
    if not result.finished:
        raise KeyboardInterrupt  # a signal stopped it
    _check_resumed(plan)
    _check_plain(plan)
    _check_loaded(plan, result.evaluation["val_loss"])
    shutil.rmtree(plan.folder)
    return "done"


def _state(plan: Plan, name: str) -> Any:
    folder, optimizer = plan.folder / name, plan.options.get("optimizer")
    run = read_run(folder)
    with Checkpoints(folder, run, read_only=True, optimizer=optimizer) as checkpoints:
        return checkpoints.restore()


def _check_resumed(plan: Plan) -> None:
    out = plan.folder / "parts"
    assert ds.train.fit(plan.run, out, stop_after=2, **plan.options).step == 2
    assert ds.train.fit(plan.run, out, **plan.options).resumed_from == 2
    assert_bitwise(_state(plan, "parts"), _state(plan, "whole"))
    assert rows_of(out) == rows_of(plan.folder / "whole"), "metrics of the resumed run differ"


def _check_plain(plan: Plan) -> None:
    if plan.run.grpo.group and not plan.exact:
        return  # other answers are sampled after another rounding
    ds.train.fit(plan.plain(), plan.folder / "plain", stop_after=2, **plan.options | {"mesh": None})
    got, want = (rows_of(plan.folder / name) for name in ("whole", "plain"))
    for a, b in zip(got[:2], want, strict=True):
        named = a.keys() & b.keys() - MISMATCH  # a mesh has measures of its own
        for key in sorted(named if plan.exact else named & SMOOTH):
            x, y = np.asarray(a[key], np.float64), np.asarray(b[key], np.float64)
            size = np.abs(y).max(initial=1.0 if key in ("loss", "mtp_loss") else 1e-3)
            apart, bound = np.abs(x - y).max(initial=0), TIGHT if plan.exact else WIDE
            assert apart <= bound * size, f"step {a['step']}: {key}={x}, plain {y}"
    if plan.run.grpo.group and plan.run.grpo.updates == 1:
        assert max(row.get("max_mismatch", 0) for row in got) < 1e-4, got


def _check_loaded(plan: Plan, wanted: float) -> None:
    out = plan.folder / "whole"
    batches = measured_on(read_run(out).data, out).val_batches(plan.run.eval_batches)
    # A start in 8 or 16 bits that is frozen takes its adapters in these bits.
    bound = TIGHT if plan.exact and plan.kind not in ("bfloat16", "FP8", "int4") else WIDE
    # A reader shards no length of rows.
    on_mesh = plan.mesh is not None and plan.run.execution.layout.length == "none"
    for mesh in (None, plan.mesh) if on_mesh else (None,):
        model, words = ds.load_model(out, mesh), ds.load_text(out).tokenizer
        with sharding.use_mesh(mesh):
            found = ds.evaluate.evaluate(model, batches, words, mesh=mesh)["val_loss"]
        assert abs(found - wanted) <= bound * wanted, f"val_loss={found}, of the run {wanted}"
