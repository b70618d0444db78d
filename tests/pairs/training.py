"""Training by pairs: a row trains two layers for four steps, and is compared with itself otherwise.

resumed     Two steps, stop, restore, two steps: state and metrics are those of four steps, bit for
            bit. A checkpoint holds all that a step depends on.
plain       The first steps on one device, without microbatches or recomputation and by the simplest
            kernels give the same metrics up to rounding: an `Execution`, a mesh and microbatches
            change nothing else. In float32 the bound is `TIGHT`, else `WIDE`, and counts are not
            compared.
policy      The sampler of GRPO and its trainer compute the same log-probabilities, in float32
            without 8-bit products.
loaded      The model that a reader loads has the loss on held-out text that the run reported.
decoded     Greedy text of prompts of several lengths, with the model's own drafts and on the row's
            mesh, is that of each prompt alone, on one device, without drafts or cache. In bfloat16
            another token may come instead where both are about as likely (`NEAR`), but for one text
            of a row. Rounding sends one token in forty to another expert, on one device as on a
            mesh, and its logits then move by up to five standard deviations in place of 0.04.

Two settings that cannot be combined are refused by one sentence, before the run has a folder.
"""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from models import forward, random_model
from released import INT4, Cell, write_folder
from runs import assert_bitwise, fresh_state, rows_of, unhooked_cli, write_text

import dsv3_jax as ds
from dsv3_jax import hf
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.config import ModelConfig, RunConfig, from_dict, to_dict
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.shape import parse_mesh
from dsv3_jax.model.transformer import abstract
from dsv3_jax.runs import start as starts
from dsv3_jax.runs.chats import read_chats
from dsv3_jax.runs.checkpoint import Checkpoints
from dsv3_jax.runs.folder import claim, read_run
from dsv3_jax.runs.open_model import measured_on

from .covering import Row, refusal
from .settings import BASES as BASES
from .settings import FACTORS, MODEL, RUN

TIGHT, WIDE = 1e-3, 0.1  # of a metric's size
# metrics that count nothing
SMOOTH = {"loss", "mtp_loss", "feature_loss", "balance_loss", "grad_norm"}
MISMATCH = {"mismatch", "max_mismatch", "sampler_kl"}
NEAR = 0.5  # of the logits' standard deviation
DONE = "trained"
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
        how = row["how"].split(",")[0].split(" at")[0]
        changes["data.paths"] = (str(scratch / how.replace("warm-up", "text")),)
        if self.kind in RELEASED:
            changes["data.tokenizer"] = str(scratch / "tokenizer.json")
        self.run = changed(RUN, changes)
        if self.run.data.format == "chat" and self.run.start is None:
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
            run = claim(folder, replace(RUN, model=self.start_model))
            with Checkpoints(folder, run) as checkpoints:
                checkpoints.save(fresh_state(run, 7), {}, wait=True)
        if self.kind in RELEASED:
            shutil.copy(self.scratch / "tokenizer.json", folder)

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
    """Write what rows train on, once: texts, shards, chats, tasks, and a tokenizer of bytes."""
    if (scratch / "tokenizer.json").exists():
        return
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    text = scratch / "text"
    text.mkdir()
    write_text(text)
    chat = [{"role": "user", "content": "$?"}, {"role": "assistant", "content": "$"}]
    task = {"prompt": "$+1=", "answer": "[\x00-\x3f]"}  # a random model is partly right
    for name, record in {"chats": {"messages": chat}, "GRPO": task}.items():
        (scratch / name).mkdir()
        lines = (json.dumps(record).replace("$", str(i)) for i in range(48))
        (scratch / name / "rows.jsonl").write_text("\n".join(lines))
    words = "--row-tokens 32 --val-fraction 0.3 --shard-mb 0.01"
    argv = ["data", "tokenize", str(text), "--out", str(scratch / "shards"), *words.split()]
    assert unhooked_cli().main(argv) == 0
    # last: it says that all is there
    (scratch / "tokenizer.json").write_text(byte_tokenizer_json())


def check_row(row: Row, scratch: Path) -> str:
    """Do one row.

    Returns: "trained", or "refused: " and the sentence.
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
    _check_policy(plan)
    _check_loaded(plan, result)
    _check_decoded(plan)
    shutil.rmtree(plan.folder)
    return "trained"


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


def _exact(plan: Plan) -> bool:
    return plan.run.execution.compute_dtype == "float32" and plan.run.execution.precision == "none"


def _check_plain(plan: Plan) -> None:
    if plan.run.grpo.group and not _exact(plan):
        return  # other answers are sampled after another rounding
    ds.train.fit(plan.plain(), plan.folder / "plain", stop_after=2, **plan.options | {"mesh": None})
    got, want = (rows_of(plan.folder / name)[:2] for name in ("whole", "plain"))
    for a, b in zip(got, want, strict=True):
        named = a.keys() & b.keys() - MISMATCH  # a mesh has measures of its own
        for key in sorted(named if _exact(plan) else named & SMOOTH):
            x, y = np.asarray(a[key], np.float64), np.asarray(b[key], np.float64)
            size = np.abs(y).max(initial=1.0 if key in ("loss", "mtp_loss") else 1e-3)
            apart, bound = np.abs(x - y).max(initial=0), TIGHT if _exact(plan) else WIDE
            assert apart <= bound * size, f"step {a['step']}: {key}={x}, plain {y}"


def _check_policy(plan: Plan) -> None:
    if plan.run.grpo.group and _exact(plan):
        rows = rows_of(plan.folder / "whole")
        worst = max(row["max_mismatch"] for row in rows if "max_mismatch" in row)
        assert worst < 1e-4, f"max_mismatch={worst}"


def _check_loaded(plan: Plan, result: Any) -> None:
    """Evaluate the loaded model, on one device."""
    model, out = ds.load_model(plan.folder / "whole"), plan.folder / "whole"
    source = measured_on(read_run(out).data, out)
    found = ds.evaluate.evaluate(
        model, source.val_batches(plan.run.eval_batches), ds.load_text(out).tokenizer
    )
    wanted = result.evaluation["val_loss"]
    # A start in 8 or 16 bits that is frozen takes its adapters in these bits.
    bound = TIGHT if _exact(plan) and plan.kind not in ("bfloat16", "FP8", "int4") else WIDE
    apart = abs(found["val_loss"] - wanted)
    assert apart <= bound * wanted, f"val_loss={found['val_loss']}, of the run {wanted}"


PROMPTS = [[66, 7, 190, 3, 3, 80, 21], [5, 9], [250, 17, 6, 200, 31]]
NEW = 6


def _check_decoded(plan: Plan) -> None:
    # What shards the length of rows shards no cache.
    mesh = plan.mesh if plan.run.execution.layout.length == "none" else None
    model, alone = (ds.load_model(plan.folder / "whole", mesh) for mesh in (mesh, None))
    draft = "mtp" if model.cfg.mtp_depth else None
    found = ds.generate(model, PROMPTS, NEW, draft=draft).tokens
    exact = plan.run.execution.compute_dtype == "float32"
    apart = []
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        wanted = ds.generate(alone, [prompt], NEW, cache="none").tokens[0]
        apart.append(texts_apart(alone, prompt, tokens, wanted, exact=exact))
    check_near(apart)


def in_compute_dtype(model: Any) -> Any:
    """The model without 8-bit products, as decoding computes it."""
    execution = ds.replace(model.execution, precision="none")
    graphdef = nnx.graphdef(abstract(model.cfg, execution, model.kernels.in_compute_dtype))
    return nnx.merge(graphdef, nnx.state(model))


def texts_apart(
    model: Any, prompt: list[int], found: list[int], wanted: list[int], *, exact: bool
) -> float:
    """How far apart the logits of the first tokens are that differ, in standard deviations.

    0 for equal texts. Raises: AssertionError if they differ and are to be equal.
    """
    if found == wanted:
        return 0.0
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    assert at is not None and not exact, f"{prompt} → {found}, alone {wanted}"
    out = forward(in_compute_dtype(model), jnp.array([prompt + wanted[:at]]))
    logits = np.asarray(out.logits[0, -1], np.float64)
    apart = abs(logits[found[at]] - logits[wanted[at]]) / logits.std()
    assert math.isfinite(apart), f"{prompt} → {found}, alone {wanted}: {apart:.2g} apart"
    return apart


def check_near(apart: list[float]) -> None:
    """Texts that are rounded differ where two tokens are about as likely, but for one of them."""
    assert all(x < NEAR for x in sorted(apart)[:-1]), f"texts are {np.round(apart, 2)} apart"
