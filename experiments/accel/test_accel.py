"""The accelerator benchmark: with parts that measure nothing, traced, and at toy sizes."""

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from runs import environment

from dsv3_jax.kernels.table import TABLE, Implementation
from experiments import apart, cards
from experiments.accel import measuring, model_parts, op_parts, run, table

ROOT = Path(__file__).parents[2]
FIGURES = {
    "bounds": [dict(name="product", value=800e12, unit="FLOP/s", bound="product")],
    "right": [dict(name="product=xla", value=0.5, unit="times", bar="right", note="why")],
    "layer": [dict(name="a layer", value=640e12, unit="FLOP/s", against="product", bar="layer")],
    "exact": [dict(name="ids that differ", value=0, unit="ids", bar="equal")],
}


class Fake:
    """In place of the parts' processes, 20 s each: `figures` by part; a text is a failure."""

    def __init__(self, monkeypatch, path):
        self.card = {"kind": table.H100, "platform": "cuda", "versions": {"jax": "0.12"}}
        self.figures, self.measured, self.path, self.now = FIGURES, [], path, 0
        monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(apart, "result", lambda command: self.card)
        monkeypatch.setattr(run, "replies_of", self.replies_of)
        monkeypatch.setattr(run, "take_gpu_memory", lambda: None)
        monkeypatch.setattr(run, "SETTINGS", {})

    def replies_of(self, part, seconds):
        self.measured.append(part)
        self.now += 20
        for found in self.figures.get(part, ()):
            if isinstance(found, str):
                raise apart.Failed(found)
            yield {"figure": dict(found)}

    def run(self, *argv):
        """(Exit code, the text that the command prints on both streams.)"""
        self.measured, out = [], io.StringIO()
        words = ["--out", self.path, *argv]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = run.main([str(word) for word in words])
            except SystemExit as exit:  # of argparse
                code = exit.code
        return code, out.getvalue()

    def parts(self):
        return json.loads(self.path.read_text())["parts"]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return Fake(monkeypatch, tmp_path / "results.json")


def test_figures_are_judged_by_their_bars(fake, tmp_path):
    code, printed = fake.run("--parts", *FIGURES)
    layer = next(line for line in printed.splitlines() if "a layer" in line)
    assert code == 0 and "640 TFLOP/s" in layer and "0.80" in layer and "≥ 0.70 met" in layer
    (folder := tmp_path / "cards").mkdir()
    table.write_cards(json.loads(fake.path.read_text()), folder)
    right, speed = (card["figures"] for card in cards.read_cards(folder))
    assert right["that are right"] == 1 and speed == {"a layer": "640 TFLOP/s, 0.80 of bound"}
    for part, value in (("layer", 1e12), ("exact", 2), ("right", 2)):
        fake.figures = FIGURES | {part: [FIGURES[part][0] | {"value": value}]}
        code, printed = fake.run("--parts", *FIGURES)
        assert code == 1 and printed.count("MISSED") == 2  # in the table and below it
    fake.figures = FIGURES | {"layer": [dict(name="one (chosen)", value=None, why="failed: it")]}
    code, printed = fake.run("--parts", *FIGURES)
    assert code == 1 and "MISSED: one (chosen) (failed: it)" in printed


def test_another_device_has_no_bars_of_speed_and_figures_of_its_own(fake):
    fake.run("--parts", *FIGURES)
    fake.card = fake.card | {"kind": "NVIDIA H200"}
    code, printed = fake.run("--parts", "layer", "exact")
    assert code == 0 and "≥" not in printed and "≤ 0 met" in printed
    assert list(fake.parts()) == ["bounds", "layer", "exact"]


def test_a_part_that_fails_is_left_for_the_next_run(fake):
    fake.figures = FIGURES | {"layer": [FIGURES["layer"][0], "the process ended with code -6"]}
    code, printed = fake.run("--parts", *FIGURES)
    assert code == 1 and "the process ended with code -6" in printed
    assert "What is left: --parts layer\n" in printed
    whys = {name: part["why"] for name, part in fake.parts().items()}
    assert {name for name, why in whys.items() if why} == {"layer"}
    assert len(fake.parts()["layer"]["figures"]) == 1  # what it measured before
    fake.figures = FIGURES
    assert fake.run("--parts", "layer")[0] == 0
    assert fake.measured == ["layer"] and list(fake.parts()) == list(FIGURES)


def test_nothing_begins_when_the_time_is_over(fake):
    code, printed = fake.run("--minutes", "0.6")
    assert code == 0 and fake.measured == list(fake.parts()) == ["bounds"]
    assert f"What is left: --parts {' '.join([*run.PARTS][1:])}\n" in printed


def test_bad_input_is_exit_code_2(fake, tmp_path):
    bad = ["--parts", "atention"], ["--minutes", "nan"], ["--minutes", "0.1"], ["--out", tmp_path]
    for argv in bad:
        code, printed = fake.run(*argv)
        assert code == 2 and printed.splitlines()[-1].startswith("run.py: ")


@pytest.mark.parametrize(
    "program, seconds, said",
    [
        ("import os; print('[1]', flush=True); os._exit(3)", 60, "ended with code 3"),
        ("import time; print('[1]', flush=True); time.sleep(60)", 1, "time was over, after 1 s"),
        ("from experiments import apart; apart.answer(x or 1 / 0 for x in ([1], 0))", 60, "Zero"),
    ],
)
def test_a_process_that_crashes_hangs_or_raises_is_one_sentence(program, seconds, said):
    replies = apart.replies([sys.executable, "-c", program], seconds)
    with pytest.raises(apart.Failed, match=said):
        assert next(replies) == [1]
        next(replies)


def test_each_implementation_has_a_figure_or_a_reason(monkeypatch):
    rows = (
        Implementation("absent", lambda: None, why_not=lambda target: "there is no such chip"),
        Implementation("breaks", lambda *_: 1 / 0),
        Implementation("large", lambda *_: None, fits=lambda *_: False),
    )
    monkeypatch.setitem(TABLE, "cross_entropy", (*TABLE["cross_entropy"], *rows))
    figures = [f for f in op_parts.ops(["cross_entropy"]) if isinstance(f, measuring.Figure)]
    found = {figure.name.split(", ")[3].split(" ")[0]: figure for figure in figures}
    assert "there is no such chip" in found["absent"].why
    assert found["breaks"].why == "failed: division by zero"
    assert "does not fit these shapes, and" in found["large"].why
    assert found["xla"].value > 0 and "(chosen)" in found["xla"].name


@pytest.mark.long
@pytest.mark.parametrize("part", ["layer", "attention", "decode"])
def test_a_part_can_be_traced_at_its_full_size(part, monkeypatch):
    """Shapes, dtypes and limits are right there too, without a device."""
    for module in (measuring, model_parts):
        monkeypatch.setattr(module, "seconds_of", lambda call, **_: call() is None or 1.0)
    found = []
    jax.eval_shape(lambda: found.extend(run.PARTS[part]()))
    figures = [figure for figure in found if isinstance(figure, measuring.Figure)]
    assert any(figure.value for figure in figures)
    assert not any(figure.why.startswith("failed") for figure in figures)


@pytest.mark.rare
def test_every_part_yields_finite_numbers_at_toy_sizes(tmp_path):
    out, env = tmp_path / "toy.json", environment(tmp_path) | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, str(ROOT / "experiments/accel/run.py"), "--out", str(out)]
    command += ["--minutes", "30"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    found = json.loads(out.read_text())
    assert done.returncode == 0 and found["toy"], done.stdout + done.stderr
    assert list(found["parts"]) == list(run.PARTS), done.stdout + done.stderr
    for name, part in found["parts"].items():
        whys = [figure["why"] for figure in part["figures"] if "why" in figure]
        values = [figure["value"] for figure in part["figures"] if "why" not in figure]
        assert not part["why"] and values, name
        assert all(math.isfinite(v) and v >= 0 for v in values), name
        assert all(why.startswith("not available") for why in whys)


@pytest.mark.long
def test_a_machine_that_lacks_packages(tmp_path):
    """The model, a step, `generate` and the benchmark run; a command says what it lacks."""
    program = """
import sys
absent = ["grain", "array_record", "tyro", "docstring_parser"]
absent += ["tensorboardX", "zlib_ng", "tokamax", "huggingface_hub"]
sys.modules.update(dict.fromkeys(absent))  # importing them raises ModuleNotFoundError
import jax
import numpy as np
import dsv3_jax as ds
from dsv3_jax.cli import main
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step
from experiments.accel import model_parts, run
from experiments.random_data import batch_of
from flax import nnx
cfg = run.PLAIN
assert len(ds.generate(ds.Transformer(cfg, rngs=nnx.Rngs(0)), [[1, 2]], 3).tokens[0]) == 3
job = Job(model_parts.train_run(cfg, 2, 32))
jax.eval_shape(make_step(job), abstract_state(job), batch_of(np.ones((2, 32), int)))
code = main.main(["train", "tiny"])
del sys.modules["tyro"]
sys.exit(10 * code + main.main(["runs", "check", "nowhere"]))
"""
    env = environment(tmp_path) | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 22, done.stderr
    for name, line in zip(("tyro", "docstring_parser"), done.stderr.splitlines()[-2:], strict=True):
        assert line.startswith("dsv3: ") and f"'{name}'" in line
