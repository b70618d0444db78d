"""The accelerator benchmark: with a worker that measures nothing, traced, and at toy sizes."""

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from runs import environment

from dsv3_jax.cli import common
from dsv3_jax.config import ConfigError, replace
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.table import TABLE, Implementation
from dsv3_jax.presets import recipe
from experiments import cards
from experiments.accel import measuring, model_parts, run, table, worker
from experiments.accel.sizes import full, toy

ROOT = Path(__file__).parents[2]
CARD = {"kind": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.12"}}
FIGURES = {
    "bounds": [
        {
            "name": "matrix product",
            "value": 800e12,
            "unit": "FLOP/s",
            "against": "sheet flops",
            "bound": "product",
        },
        {"name": "copy", "value": 3e12, "unit": "B/s", "against": "sheet bytes", "bound": "copy"},
    ],
    "right": [
        {
            "name": "product=xla",
            "value": 0.5,
            "unit": "times",
            "bar": "right",
            "note": "what is wrong",
        }
    ],
    "layer": [
        {"name": "a layer", "value": 640e12, "unit": "FLOP/s", "against": "product", "bar": "layer"}
    ],
    "exact": [{"name": "ids that differ", "value": 0, "unit": "ids", "bar": "equal"}],
}


@pytest.fixture
def fake(monkeypatch):
    class Worker:
        """Answers as `run.Worker` does; `measured` lists the parts that were asked for."""

        card, toy, figures = CARD, False, FIGURES

        def __init__(self):
            Worker.measured = []

        def measure(self, part, seconds):
            self.measured.append(part)
            for figure in self.figures.get(part, ()):
                if isinstance(figure, str):
                    raise run.Failed(figure)
                yield {"figure": dict(figure)}

        def close(self):
            """Nothing runs that would have to end."""

    monkeypatch.setattr(run, "Worker", Worker)
    return Worker


def said(*argv):
    """(Exit code, the text that the command prints on both streams.)"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run.main([str(word) for word in argv])
    return code, out.getvalue()


def test_figures_are_judged_by_their_bars(fake, tmp_path):
    path = tmp_path / "r.json"
    code, printed = said("--out", path, "--parts", *FIGURES)
    layer = next(line for line in printed.splitlines() if "a layer" in line)
    assert code == 0 and "640 TFLOP/s" in layer and "0.80" in layer and "≥ 0.70 met" in layer
    (folder := tmp_path / "cards").mkdir()
    table.write_cards(json.loads(path.read_text()), folder)
    right, speed = (card["figures"] for card in cards.read_cards(folder))
    assert right["that are right"] == 1 and speed == {"a layer": "640 TFLOP/s, 0.80 of bound"}
    for part, value in (("layer", 1e12), ("exact", 2), ("right", 2)):
        fake.figures = FIGURES | {part: [FIGURES[part][0] | {"value": value}]}
        code, printed = said("--out", path, "--parts", *FIGURES)
        assert code == 1 and printed.count("MISSED") == 2  # in the table and below it
    fake.card, fake.figures = CARD | {"kind": "NVIDIA H200"}, FIGURES
    code, printed = said("--out", tmp_path / "other.json", "--parts", *FIGURES)
    # Bars of speed are for one device.
    assert code == 0 and "≥" not in printed and "≤ 0 met" in printed
    assert said("--out", path, "--resume")[0] == 2  # results of two devices are not mixed


def test_a_part_that_fails_is_measured_again_on_resume(fake, tmp_path):
    path = tmp_path / "r.json"
    fake.figures = FIGURES | {"layer": [FIGURES["layer"][0], "the process ended with code -6"]}
    code, printed = said("--out", path, "--parts", *FIGURES)
    assert code == 1 and "the process ended with code -6" in printed
    assert fake.measured == list(FIGURES)
    found = json.loads(path.read_text())["parts"]
    states = {name: part["state"] for name, part in found.items()}
    assert states == dict.fromkeys(FIGURES, "done") | {"layer": "failed"}
    assert len(found["layer"]["figures"]) == 1  # what it measured before
    fake.figures = FIGURES
    for measured in (["layer"], []):
        assert said("--out", path, "--resume", "--parts", *FIGURES)[0] == 0
        assert fake.measured == measured


def test_nothing_begins_when_the_time_is_over_and_resume_goes_on(fake, tmp_path):
    path = tmp_path / "r.json"
    code, printed = said("--out", path, "--minutes", "0.2")
    # It says how long each program compiles.
    assert code == 0 and fake.measured == ["bounds"] and "programs take" in printed
    assert json.loads(path.read_text())["parts"]["right"]["state"] == "skipped"
    said("--out", path, "--resume")
    assert fake.measured == list(run.PARTS)[1:]


def test_bad_input_is_exit_code_2(fake, tmp_path):
    for argv in (
        ["--parts", "atention"],
        ["--minutes", "nan"],
        ["--minutes", "0.1"],
        ["--out", tmp_path],
    ):
        code, printed = said(*argv)
        assert code == 2 and printed.splitlines()[-1].startswith("run.py: ")


def test_each_implementation_has_a_figure_or_a_reason(monkeypatch):
    rows = (
        Implementation("absent", lambda: None, why_not=lambda target: "there is no such chip"),
        Implementation("breaks", lambda *_: 1 / 0),
        Implementation("large", lambda *_: None, fits=lambda *_: False),
    )
    monkeypatch.setitem(TABLE, "cross_entropy", (*TABLE["cross_entropy"], *rows))
    figures = [found for found in worker.loss(toy()) if isinstance(found, measuring.Figure)]
    found = {figure.name.split("gradients, ")[1].split(" ")[0]: figure for figure in figures}
    assert "there is no such chip" in found["absent"].why
    assert found["breaks"].why == "failed: division by zero"
    assert "does not fit these shapes, and" in found["large"].why
    assert found["xla"].value > 0 and "(chosen)" in found["xla"].name


@pytest.mark.long
@pytest.mark.parametrize(
    "part", ["layer", "attention", "more_grouped", "few_rows", "loss", "decode"]
)
def test_a_part_can_be_traced_at_its_full_size(part, monkeypatch):
    """Shapes, dtypes and limits are right there too, without a device."""
    for module in (measuring, model_parts):
        monkeypatch.setattr(module, "seconds_of", lambda call, *_, **__: call() is None or 1.0)
    found = []
    jax.eval_shape(lambda: found.extend(worker.PARTS[part](full())))
    figures = [figure for figure in found if isinstance(figure, measuring.Figure)]
    assert any(figure.value for figure in figures)
    assert not any(figure.why.startswith("failed") for figure in figures)
    assert run.COMPILING.exists() and part in json.loads(run.COMPILING.read_text())["parts"]


@pytest.mark.rare
def test_every_part_yields_finite_numbers_at_toy_sizes(tmp_path):
    out, env = tmp_path / "toy.json", environment(tmp_path) | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, str(ROOT / "experiments/accel/run.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    found = json.loads(out.read_text())
    assert done.returncode == 0 and found["toy"], done.stdout + done.stderr
    assert list(found["parts"]) == list(run.PARTS), done.stdout + done.stderr
    for name, part in found["parts"].items():
        values = [figure["value"] for figure in part["figures"] if "why" not in figure]
        assert part["state"] == "done" and values, name
        assert all(math.isfinite(v) and v >= 0 for v in values), name
        assert all(
            figure.get("why", "not available").startswith("not available")
            for figure in part["figures"]
        )


@pytest.mark.long
def test_a_machine_that_lacks_packages(tmp_path):
    """The model, a step, `generate` and the benchmark run; a command says what it lacks."""
    program = """
import sys
absent = ["grain", "array_record", "tyro", "docstring_parser"]
absent += ["tensorboardX", "zlib_ng", "tokamax", "huggingface_hub"]
sys.modules.update(dict.fromkeys(absent))  # importing them raises ModuleNotFoundError
import jax
import dsv3_jax as ds
from dsv3_jax.cli import main
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step
from experiments.accel import model_parts, random_data, run, sizes, worker
from flax import nnx
cfg = sizes.toy().decode
assert len(ds.generate(ds.Transformer(cfg, rngs=nnx.Rngs(0)), [[1, 2]], 3).tokens[0]) == 3
job = Job(model_parts.train_run(cfg, 2, 32))
jax.eval_shape(make_step(job), abstract_state(job), random_data.random_batch(cfg, 2, 32))
code = main.main(["train", "tiny"])
del sys.modules["tyro"]
sys.exit(10 * code + main.main(["runs", "check", "nowhere"]))
"""
    env = environment(tmp_path) | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 22, done.stderr
    for name, line in zip(("tyro", "docstring_parser"), done.stderr.splitlines()[-2:], strict=True):
        assert line.startswith("dsv3: ") and f"'{name}'" in line


# Beside it: all devices, and the Makefile


def test_training_takes_all_devices_but_a_cpus(monkeypatch, capsys):
    run_config = recipe("tiny")
    assert common.all_devices(run_config) is None and capsys.readouterr().out == ""
    monkeypatch.setattr(choose, "platform_of", lambda mesh=None: "cuda")
    assert dict(common.all_devices(run_config).shape) == {"data": 8, "expert": 1, "tensor": 1}
    assert capsys.readouterr().out == "training on the 8 devices here; --mesh data=1 uses one\n"
    odd = replace(run_config, optim=replace(run_config.optim, microbatches=2))
    with pytest.raises(ConfigError, match="batch_size/microbatches=4 rows"):
        common.all_devices(odd)


@pytest.mark.parametrize(
    "accelerator, code, said",
    [("tpu", 0, "'jax[tpu]>=0.11'"), ("cuda99", 2, "ACCELERATOR='cuda99'")],
)
def test_make_demo_installs_what_a_device_needs(monkeypatch, accelerator, code, said):
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of a make that runs these tests
        monkeypatch.delenv(name, raising=False)
    command = [
        "make",
        "--dry-run",
        "demo",
        f"ACCELERATOR={accelerator}",
        f"PYTHON={sys.executable}",
        "VENV=nowhere",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and said in done.stdout + done.stderr
