"""The accelerator benchmark: parts are kept, resumed, skipped and judged; and a run at toy sizes on the CPU.

Most tests give `run.py` a worker that measures nothing, so they need no device and no time.
"""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from runs import environment

from dsv3_jax.cli import common, train
from dsv3_jax.config import ConfigError, replace
from dsv3_jax.kernels import choose, low_precision
from dsv3_jax.presets import recipe
from dsv3_jax.training.step import Job, abstract_state, make_step
from experiments.accel import parts, run

ROOT = Path(__file__).parents[1]
H100 = "NVIDIA H100 80GB HBM3"
CARD = {"kind": H100, "platform": "cuda", "versions": {"jax": "0.12"}, "driver": None}
# The worker's figures of each part.
FIGURES = {
    "bounds": [
        {"name": "matrix product", "value": 800e12, "unit": "FLOP/s", "against": "sheet flops", "bound": "product"},
        {"name": "copy", "value": 3e12, "unit": "B/s", "against": "sheet bytes", "bound": "copy"},
    ],
    "exact": [{"name": "ids that differ", "value": 0, "unit": "ids", "bar": "equal"}],
    "layer": [{"name": "a layer", "value": 640e12, "unit": "FLOP/s", "against": "product", "bar": "layer"}],
    "decode": [{"name": "a step", "value": 2.4e12, "unit": "B/s", "against": "copy", "bar": "decode"}],
}


class FakeWorker:
    """Answers as `run.Worker` does; `measured` lists the parts that were asked for."""

    card, toy = CARD, False
    figures = FIGURES
    measured: list = []

    def __init__(self, toy):
        type(self).measured = []

    def measure(self, part, seconds):
        self.measured.append(part)
        yield {"doing": f"the {part}"}
        for figure in self.figures.get(part, ()):
            if isinstance(figure, str):
                raise run.Failed(figure)
            yield {"figure": dict(figure)}

    def close(self):
        """Nothing runs that would have to end."""


@pytest.fixture
def worker(monkeypatch):
    """A worker class that a test may change."""
    fake = type("Fake", (FakeWorker,), {})
    monkeypatch.setattr(run, "Worker", fake)
    return fake


def said(argv):
    """(Exit code, the text that the command prints on both streams.)"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run.main(argv)
    return code, out.getvalue()


def main(path, *argv):
    return said(["--out", str(path), *argv])


def states(path):
    return {name: part["state"] for name, part in json.loads(path.read_text())["parts"].items()}


def row(printed, name):
    return next(line for line in printed.splitlines() if name in line)


# Without a device


def test_the_parts_have_times_and_measurements():
    assert list(run.PARTS) == list(parts.PARTS) and set(run.FRESH) < set(run.PARTS)
    assert all(kind in run.DEVICES for kind in run.SHEETS.values())


def test_figures_are_divided_by_their_bounds_and_judged(worker, tmp_path):
    code, printed = main(tmp_path / "r.json", "--parts", *FIGURES)
    assert code == 0 and "MISSED" not in printed
    layer, step = row(printed, "a layer"), row(printed, "a step")
    assert "640 TFLOP/s" in layer and "800 TFLOP/s matrix product" in layer and "0.80" in layer
    assert "≥ 0.70 met" in layer and "≥ 2 TB/s met" in step and "0.81" in row(printed, "989 TFLOP/s data sheet")


def test_the_file_is_written_after_each_figure(worker, tmp_path, monkeypatch):
    path, seen = tmp_path / "r.json", []
    save = run.save

    def spy(results, path):
        save(results, path)
        seen.append(sum(len(part["figures"]) for part in json.loads(path.read_text())["parts"].values()))

    monkeypatch.setattr(run, "save", spy)
    assert main(path, "--parts", "bounds", "layer")[0] == 0
    assert [n for i, n in enumerate(seen) if n not in seen[:i]] == [1, 2, 3]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("bar", ["layer", "decode", "equal"])
def test_a_missed_bar_is_exit_code_1(worker, tmp_path, monkeypatch, bar):
    limits = {"most": -1} if bar == "equal" else {"least": 1e15}
    monkeypatch.setitem(run.BARS, bar, replace(run.BARS[bar], **limits))
    code, printed = main(tmp_path / "r.json", "--parts", *FIGURES)
    assert code == 1 and printed.count("MISSED") == 2  # in the table and below it


def test_bars_of_speed_are_for_one_device_and_equality_for_all(worker, tmp_path):
    worker.card = CARD | {"kind": "NVIDIA H200"}
    worker.figures = FIGURES | {"layer": [FIGURES["layer"][0] | {"value": 1e12}]}
    code, printed = main(tmp_path / "r.json", "--parts", *FIGURES)
    assert code == 0 and "≥" not in printed and "No bars of speed are set for NVIDIA H200" in printed
    assert "≤ 0 met" in printed and "data sheet" not in printed
    worker.figures = FIGURES | {"exact": [FIGURES["exact"][0] | {"value": 2}]}
    assert main(tmp_path / "r.json", "--parts", "exact")[0] == 1


def test_a_figure_with_a_bar_that_could_not_be_measured_misses_it(worker, tmp_path):
    worker.figures = FIGURES | {"layer": [{"name": "a layer", "value": math.nan, "bar": "layer"}]}
    code, printed = main(tmp_path / "r.json", "--parts", "layer")
    assert code == 1 and "the value is nan" in row(printed, "a layer") and "MISSED" in printed


def test_an_implementation_that_is_not_there_is_no_failure(worker, tmp_path):
    worker.figures = FIGURES | {"loss": [{"name": "loss, splash", "value": None, "why": "not available here: no TPU"}]}
    code, printed = main(tmp_path / "r.json", "--parts", "loss")
    assert code == 0 and "not available here: no TPU" in printed


def test_a_part_that_fails_says_so_and_the_others_go_on(worker, tmp_path):
    path = tmp_path / "r.json"
    worker.figures = FIGURES | {"layer": [FIGURES["layer"][0], "the process ended with code -6"]}
    code, printed = main(path, "--parts", *FIGURES)
    assert code == 1 and "layer: failed at the layer: the process ended with code -6" in printed
    assert states(path) == {"bounds": "done", "exact": "done", "layer": "failed", "decode": "done"}
    assert "a layer" in printed  # what it measured before is kept


def test_resume_keeps_what_is_done(worker, tmp_path):
    path = tmp_path / "r.json"
    worker.figures = FIGURES | {"layer": ["no"]}
    main(path, "--parts", "exact", "layer")
    worker.figures = FIGURES
    assert main(path, "--resume", "--parts", *FIGURES)[0] == 0 and worker.measured == ["layer", "decode"]
    assert main(path, "--resume", "--parts", *FIGURES)[0] == 0 and worker.measured == []
    # without it, the chosen parts are measured again, and the others are kept
    assert main(path, "--parts", "layer")[0] == 0 and worker.measured == ["layer"]
    assert set(states(path)) == set(FIGURES)


def test_the_bounds_are_measured_where_they_are_missing(worker, tmp_path):
    main(tmp_path / "r.json", "--parts", "layer")
    assert worker.measured == ["bounds", "layer"]


def test_results_of_another_device_are_neither_mixed_nor_resumed(worker, tmp_path):
    path = tmp_path / "r.json"
    main(path, "--parts", "exact")
    worker.card = CARD | {"kind": "TPU v5p"}
    code, printed = main(path, "--resume")
    assert code == 2 and "is of another device" in printed and printed.count("\n") == 2  # and the line of the start
    main(path, "--parts", "layer")
    assert set(states(path)) == {"bounds", "layer"}


def test_parts_that_no_longer_fit_are_skipped_and_said(worker, tmp_path):
    path = tmp_path / "r.json"
    code, printed = main(path, "--parts", "bounds", "decode", "--minutes", "0.3")
    assert code == 0 and states(path) == {"bounds": "done", "decode": "skipped"}
    assert "decode: skipped: 18 s are left, and it takes 60 s or more" in printed


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--parts", "atention"], "part 'atention' is not one of bounds, exact, .*; did you mean 'attention'?"),
        (["--minutes", "0"], "minutes=0 is not a positive number"),
        (["--minutes", "nan"], "minutes=nan is not a positive number"),
        (["--out", "{folder}"], "is a folder; name a file"),
        (["--resume", "--out", "{text}"], "holds no results of this command; name another file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(worker, tmp_path, argv, sentence):
    (tmp_path / "text").write_text("[]")
    argv = [word.format(folder=tmp_path, text=tmp_path / "text") for word in argv]
    code, printed = said(argv)
    lines = [line for line in printed.splitlines() if "starting the device" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("run.py: ")
    assert all(piece in lines[0] for piece in sentence.split(".*"))


def test_a_worker_that_takes_too_long_or_dies_is_replaced(tmp_path, monkeypatch):
    """A real process, whose program answers one part, hangs in the next and dies in a third."""
    (tmp_path / "parts.py").write_text(
        "import json, os, sys, time\n"
        "print(json.dumps({'card': {}, 'toy': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    if 'exact' in line: time.sleep(60)\n"
        "    if 'layer' in line: os._exit(7)\n"
        "    print(json.dumps({'figure': {'process': os.getpid()}}), flush=True)\n"
        "    print(json.dumps({'done': True}), flush=True)\n"
    )
    monkeypatch.setattr(run, "HERE", tmp_path)
    worker = run.Worker(toy=True)
    try:
        first = list(worker.measure("bounds", 60))
        with pytest.raises(run.Failed, match="the time was over, after 1 s"):
            list(worker.measure("exact", 0.6))
        second = list(worker.measure("bounds", 60))
        with pytest.raises(run.Failed, match="the process ended with code 7"):
            list(worker.measure("layer", 60))
        third, again, fresh = (list(worker.measure(part, 60)) for part in ("bounds", "bounds", "step"))
    finally:
        worker.close()
    assert first != second != third and third == again != fresh


# On the CPU


def test_a_missing_implementation_is_told_by_the_table(monkeypatch):
    monkeypatch.setattr(
        choose, "TABLE", choose.TABLE | {"cross_entropy": (
            choose.Implementation("quick", lambda: None, why_not=lambda target: "there is no quick here"),
            choose.Implementation("far", lambda: None, platforms=("tpu",)),
            *choose.TABLE["cross_entropy"],
        )}
    )  # fmt: skip
    found = dict(parts.backends("cross_entropy"))
    assert list(found) == ["quick", "xla"] and isinstance(found["xla"], parts.Recorder)
    assert found["quick"].startswith("not available here: ") and "there is no quick here" in found["quick"]


def test_an_implementation_that_fails_leaves_the_others(monkeypatch):
    def breaks(*_):
        raise TypeError("it cannot\nrun")

    row = choose.Implementation("breaks", breaks)
    monkeypatch.setattr(choose, "TABLE", choose.TABLE | {"cross_entropy": (row, *choose.TABLE["cross_entropy"])})
    figures = [found for found in parts.loss(parts.toy()) if isinstance(found, parts.Figure)]
    assert figures[0].value is None and figures[0].why == "failed: it cannot run"
    assert figures[1].value > 0 and figures[1].ran == {"cross_entropy": "xla"}


def test_products_in_8_bits_are_measured_and_compared(monkeypatch):
    """A kernel that forgets the scales of one operand is far away from the emulation; on a CPU there is none."""
    figures = [found for found in parts.eight_bits(parts.toy()) if isinstance(found, parts.Figure)]
    by_name = {figure.name.split("gradients, ")[1]: figure for figure in figures}
    assert [name for name, figure in by_name.items() if figure.value] == [
        f"{precision}, auto" for precision in ("none", "fp8", "fp8_ue8m0", "mxfp8")
    ]
    assert "'hopper' is not available for cpu" in by_name["fp8, product=hopper"].why

    def wrong(a, a_scales, c, c_scales, dtype):
        return (a.astype(jnp.float32) @ c.astype(jnp.float32).T * c_scales[:1]).astype(dtype)

    recipe = replace(low_precision.FP8, scaled_product=wrong)
    row = choose.Implementation("hopper", partial(low_precision.product, recipe=recipe), precision="fp8", by_name=True)
    rows = [row for row in choose.TABLE["product"] if row.name != "hopper"]
    monkeypatch.setattr(choose, "TABLE", choose.TABLE | {"product": (row, *rows)})
    figures = {f.name.split("gradients, ")[1]: f for f in parts.eight_bits(parts.toy()) if isinstance(f, parts.Figure)}
    found = figures["fp8, product=hopper"]
    assert found.ran == {"product": "hopper"} and float(found.note.split()[0]) > 0.1


def test_an_implementation_that_does_not_fit_gets_no_figure(monkeypatch):
    row = choose.Implementation("large", lambda: None, fits=lambda *_, **__: False)
    monkeypatch.setattr(choose, "TABLE", choose.TABLE | {"cross_entropy": (row, *choose.TABLE["cross_entropy"])})
    large, xla = (found for found in parts.loss(parts.toy()) if isinstance(found, parts.Figure))
    assert large.value is None and "does not fit these shapes, and xla ran instead" in large.why
    assert xla.value > 0 and "xla (chosen)" in xla.name and "chosen" not in large.name


@pytest.mark.long
@pytest.mark.parametrize("part", ["bounds", "layer", "attention", "grouped", "loss", "decode"])
def test_a_part_can_be_traced_at_its_full_size(part, monkeypatch):
    """Shapes, dtypes and limits are right there, too, where no device is at hand."""
    monkeypatch.setattr(parts, "seconds_of", lambda call, *_, **__: call() is None or 1.0)
    found = []
    jax.eval_shape(lambda: found.extend(parts.PARTS[part](parts.full())))
    figures = [figure for figure in found if isinstance(figure, parts.Figure)]
    assert figures and not any(figure.why.startswith("failed") for figure in figures)
    assert any(figure.value for figure in figures)


def test_a_training_step_can_be_traced_at_its_full_size():
    sizes = parts.full()
    config = parts.train_run(sizes.step, *sizes.step_batch)
    batch = jax.eval_shape(lambda: parts.random_batch(sizes.step, *sizes.step_batch))
    _, metrics = jax.eval_shape(make_step(Job(config, kernels=parts.kernels_for())), abstract_state(Job(config)), batch)
    assert metrics["loss"].shape == ()


def test_drawn_numbers_are_random_in_every_slice():
    key = jax.random.key(0)
    x = parts.draw(key, (3, 50), "float32", 2.0)
    assert x.shape == (3, 50) and 1.5 < float(x.std()) < 2.5
    assert len({float(n) for n in x.reshape(-1)}) == 150


def test_different_bits_are_counted():
    left = {"a": jax.numpy.array([0.0, 1.0, math.nan]), "b": jax.numpy.ones(2, jax.numpy.bfloat16)}
    right = {"a": jax.numpy.array([-0.0, 1.0, math.nan]), "b": jax.numpy.array([1, 1.01], jax.numpy.bfloat16)}
    assert int(parts._different_numbers(left, left)) == 0 and int(parts._different_numbers(left, right)) == 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All parts at toy sizes, by the command itself: (exit code, what it printed, its file)."""
    folder = tmp_path_factory.mktemp("accel")
    env = environment(tmp_path_factory.getbasetemp()) | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, str(ROOT / "experiments/accel/run.py"), "--out", str(folder / "toy.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "toy.json").read_text())


@pytest.mark.long
def test_every_part_yields_finite_numbers(measured):
    code, printed, found = measured
    assert code == 0, printed
    assert found["toy"] and found["card"]["platform"] == "cpu" and found["card"]["versions"]["jax"] == jax.__version__
    assert list(found["parts"]) == list(run.PARTS)
    for name, part in found["parts"].items():
        values = [figure["value"] for figure in part["figures"] if "why" not in figure]
        assert part["state"] == "done" and values, name
        assert all(math.isfinite(value) and value >= 0 for value in values), name
        refused = [figure["why"] for figure in part["figures"] if "why" in figure]
        assert all(why.startswith("not available here: ") for why in refused), refused
    assert "Toy sizes" in printed and "MISSED" not in printed


@pytest.mark.long
def test_each_implementation_and_batch_is_there(measured):
    names = [figure["name"] for part in measured[2]["parts"].values() for figure in part["figures"]]
    for wanted in (
        "ragged_dot",
        "dense",
        "(chosen), forward and backward",
        "batch 1, 32 cached",
        "batch 3, MTP drafts",
    ):
        assert any(wanted in name for name in names), wanted
    ran = {op for part in measured[2]["parts"].values() for figure in part["figures"] for op in figure.get("ran", ())}
    assert {"causal_attention", "cached_attention", "grouped_swiglu", "cross_entropy", "optimizer"} <= ran


# Beside it: all devices, and the Makefile


def test_training_takes_all_devices_but_a_cpus(monkeypatch, capsys):
    run_config = recipe("tiny")
    assert common.all_devices(run_config) is None and capsys.readouterr().out == ""
    monkeypatch.setattr(choose, "platform_of", lambda mesh=None: "cuda")
    mesh = common.all_devices(run_config)
    assert dict(mesh.shape) == {"data": 8, "expert": 1, "tensor": 1}
    assert capsys.readouterr().out == "training on the 8 devices here, 1 rows on each; --mesh data=1 uses one\n"
    odd = replace(run_config, optim=replace(run_config.optim, microbatches=2))
    with pytest.raises(ConfigError, match="batch_size/microbatches=4 rows are not divisible by the 8 devices here"):
        common.all_devices(odd)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert common.all_devices(odd) is None


def test_train_without_a_mesh_hands_all_devices_to_fit(monkeypatch, tmp_path, capsys):
    meshes = []
    monkeypatch.setattr(choose, "platform_of", lambda mesh=None: "cuda")
    monkeypatch.setattr("dsv3_jax.train.fit", lambda run, out, mesh, **_: meshes.append(mesh))
    for mesh in (None, "data=1"):  # not parsed: the tests' import hook refuses the parser's placeholders
        args = train.Train(run=recipe("tiny"), out=tmp_path, mesh=mesh)
        monkeypatch.setattr(train, "options", lambda argv, args=args: args)
        assert train.run([]) == 0
    assert [mesh.size for mesh in meshes] == [8, 1]
    assert capsys.readouterr().out.count("training on the 8 devices here") == 1


def make(*argv):
    command = ["make", "--dry-run", *argv, f"PYTHON={sys.executable}", "VENV=nowhere"]
    # If make runs these tests, these would reach the inner make.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("accelerator", ["cuda13", "tpu"])
@pytest.mark.parametrize("target", ["demo", "demo-short"])
def test_make_demo_installs_what_a_device_needs_and_finds_it(target, accelerator):
    code, plan, _ = make(target, f"ACCELERATOR={accelerator}")
    assert code == 0
    install, check, demo = (plan.index(text) for text in (f"'jax[{accelerator}]'", "jax.devices()", "dsv3 demo"))
    assert install < check < demo
    assert not any(name in plan for name in ("JAX_PLATFORMS", "XLA_FLAGS", "MALLOC_"))


def test_make_demo_is_for_the_cpu_without_one():
    code, plan, _ = make("demo")
    assert code == 0 and "jax[" not in plan and "jax.devices()" not in plan


def test_make_refuses_an_unknown_accelerator():
    code, plan, error = make("demo", "ACCELERATOR=cuda99")
    assert code == 2 and plan == ""
    assert "ACCELERATOR='cuda99' is not one of cuda13 cuda12 tpu" in error and error.count("\n") == 1
