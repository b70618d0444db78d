"""Input of others is refused quickly, in a sentence that names it: one example for each door."""

import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import HERE, environment

from dsv3_jax.cli import common
from dsv3_jax.cli import main as cli
from dsv3_jax.config import ConfigError, DataConfig, RunConfig, from_dict, to_dict
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.hf import tensor_files
from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.released_folder import ReleasedFolder
from dsv3_jax.host import signals
from dsv3_jax.host.files import atomic_folder, parse_json
from dsv3_jax.host.signals import asked_to_stop
from dsv3_jax.presets import preset, recipe

TINY = preset("tiny")
RUN = to_dict(recipe("tiny"))
RELEASED = config_to_dict(preset("v3"))
HUGE = 10**399


def places(
    values: dict, kinds: tuple[type, ...], path: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """Paths of a dictionary's values of some types."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += places(value, kinds, (*path, key))
        elif type(value) in kinds:
            found.append((*path, key))
    return found


def changed(values: dict, path: tuple[str, ...], value) -> dict:
    """A copy with another value at a path."""
    first, *rest = path
    return values | {first: changed(values[first], tuple(rest), value) if rest else value}


# Configurations


def test_every_number_of_a_run_is_finite():
    numbers = places(RUN, (float, int))
    assert len(numbers) > 50 and ("model", "yarn", "factor") in numbers
    for path, value in zip(numbers, itertools.cycle((float("nan"), HUGE, -HUGE)), strict=False):
        with pytest.raises(ConfigError, match=path[-1]):
            from_dict(RunConfig, changed(RUN, path, value))


@pytest.mark.parametrize("value", [float("nan"), HUGE, -1, [], "1"], ids=lambda x: repr(x)[:9])
def test_every_key_of_a_config_json(value):
    """No value is a crash, and none becomes a model with another number than the file's."""
    for path in places(RELEASED, (int, float, str, bool, type(None))):
        try:
            cfg = config_from_dict(changed(RELEASED, path, value))
        except ConfigError:
            continue
        assert np.isfinite([x for x in vars(cfg).values() if type(x) is float]).all(), path
        assert cfg.num_layers + cfg.num_experts + cfg.mtp_depth < 2_000, path


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100_000 + "]" * 100_000, "64 deep"),
        ('["\\ud83d\\ude42", "\\ud83d"]', "half a surrogate pair"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": [-1e999]}', "-1e999 is no number"),
        ("1" * 101, "an integer has 101 digits"),
        (b"\xff", "can't decode byte 0xff"),
    ],
    ids=range(8),
)
def test_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    assert parse_json(b'["\\ud83d\\ude42", 1000000000000000019884624838656]') == ["🙂", int(1e30)]


# Released folders


def test_a_model_of_more_tensors_than_there_are(tmp_path):
    """Its tensors are not listed: they would be 30,000 million."""
    sizes = {"num_hidden_layers": 9_000, "n_routed_experts": 10**6, "hidden_size": 1}
    tensor_files.write_json(tmp_path / tensor_files.CONFIG, config_to_dict(TINY) | sizes)
    tensor_files.write_shards(tmp_path, {"a": ((1,), "float32")}, 1000, [np.zeros(1, "float32")])
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"config.json.* num_layers=9000, num_experts=1000000"):
        ReleasedFolder(tmp_path)
    assert time.process_time() - begin < 5


# Runs and texts


def test_links_that_lead_nowhere_are_passed_over_and_names_of_domains_can_be_printed(
    tmp_path, capsys
):
    rows = [{"text": f"text {i}", "domain": "\x1b[31m[/]"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "gone\x1b[2J.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    corpus = load_corpus(DataConfig(paths=(str(tmp_path),)))
    assert len(corpus.train + corpus.val) == 4 and corpus.domains == ("\ufffd[31m[/]",)
    said = capsys.readouterr().err
    assert said.count("a link that leads nowhere") == 2
    assert "gone\\x1b[2J.txt" in said
    assert "\x1b" not in said


def test_a_sentence_is_short_and_plain():
    long = common.sentence(ValueError("begin " + "x" * 10**6 + " end"))
    assert len(long) <= common.MAX_SENTENCE and long.startswith("begin x")
    assert (
        common.sentence(FileNotFoundError(2, "No such file", "in.jsonl"))
        == "No such file: 'in.jsonl'"
    )
    assert (
        common.sentence(ValueError("a\x1b[31m\ud800\u202e é\n漢"))
        == "a\\x1b[31m\\ud800\\u202e é 漢"
    )


# Signals


def test_sigterm_leaves_no_temporary_folder(tmp_path, monkeypatch):
    def convert(argv):
        with atomic_folder(tmp_path / "out") as part:
            (part / "a.txt").write_text("half")
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(cli, "dispatch", convert)
    assert cli.main([]) == 143
    assert not list(tmp_path.iterdir())


class Lost:
    """Gets SIGTERM where Python drops what its handler raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def train(argv):
    with asked_to_stop():
        raise AssertionError("it trains")


def restore(argv):
    raise RuntimeError("of asyncio")


@pytest.mark.parametrize("command", [train, restore, lambda argv: 0])
def test_a_sigterm_whose_exception_is_lost_still_ends_the_command(monkeypatch, capfd, command):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    monkeypatch.setattr(cli, "dispatch", lambda argv: (Lost(), command(argv))[1])
    assert cli.main([]) == 143 and not signals.terminated.is_set()
    assert capfd.readouterr().err == ""


@pytest.mark.long
def test_a_slice_of_the_campaign(tmp_path):
    """A trial of each room but one, on commands that compile nothing."""
    words = ["--seed", "5", "--trial", "0", "10", "--commands", "tokenizer", "data", "runs check"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign", *words],
        cwd=HERE, env=environment(tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count(" trials ") == 10, done.stdout + done.stderr
