"""Input of others is refused in one sentence that names it, soon and with little memory."""

import io
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import refused, start, write_lines

from dsv3_jax.chat.checkers import CHECKERS, Checker
from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import TEXT_FILES, plain_settings, read_settings, with_template
from dsv3_jax.cli import common
from dsv3_jax.cli import main as cli
from dsv3_jax.cli.tokenize import Tokenize, tokenize
from dsv3_jax.config import ConfigError, DataConfig, RunConfig, from_dict, replace, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.manifest import MANIFEST, read_manifest
from dsv3_jax.data.special_tokens import read_object
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf import tensor_files
from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.released_folder import ReleasedFolder
from dsv3_jax.host import signals
from dsv3_jax.host.files import atomic_folder, check_writable, parse_json
from dsv3_jax.host.signals import asked_to_stop
from dsv3_jax.kernels import choose
from dsv3_jax.presets import preset, recipe
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import claim, read_run
from dsv3_jax.runs.loop import fit
from dsv3_jax.runs.open_model import load_text
from dsv3_jax.stats.reporting import report

pytestmark = pytest.mark.usefixtures("soon")


# A program of the user's


def test_a_signal_or_an_exit_in_the_users_program_ends_a_command(monkeypatch, capsys):
    """Training itself notes Ctrl-C and SIGTERM, and saves. Python ends with 1 after a text."""

    def interrupt(text, row):
        raise KeyboardInterrupt

    def stop(text, row):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "dispatch", lambda argv: Checker("own").check("text", {}, "line 3"))
    for function, code in ((stop, 143), (interrupt, 130)):
        monkeypatch.setitem(CHECKERS, "own", (function, str))
        assert cli.main([]) == code
    monkeypatch.setattr(cli, "dispatch", lambda argv: sys.exit("the server is down"))
    assert (cli.main([]), capsys.readouterr().err) == (1, "dsv3: the server is down\n")


# Lines and values


def test_a_line_beyond_the_bound_is_refused(tmp_path):
    (file := tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    os.truncate(file, 70_000_000)  # the second line
    with refused(r"a\.jsonl, line 2, is longer than [\d,]+ bytes"):
        load_corpus(DataConfig((str(file),)))


def test_every_reader_of_json_asks_the_same_function(tmp_path):
    chats = DataConfig((str(tmp_path / "b.jsonl"),), format="chat", seq_len=8, batch_size=1)
    settings = tmp_path / "tokenizer_config.json"
    for name, text, read in (
        ("a.jsonl", '{"text": NaN}', lambda: load_corpus(DataConfig((str(tmp_path / "a.jsonl"),)))),
        ("b.jsonl", '{"tools": NaN}', lambda: load_examples(chats, plain_settings())),
        ("run.json", '{"format": 2, "run": NaN}', lambda: read_run(tmp_path)),
        (MANIFEST, "NaN", lambda: read_manifest(tmp_path)),
        ("config.json", '{"model_type": NaN}', lambda: ReleasedFolder(tmp_path)),
        (settings.name, '{"chat_template": NaN}', lambda: read_object(settings)),
        ("tokenizer.json", '{"model": NaN}', lambda: tokenizer.load(f"{tmp_path}/tokenizer.json")),
    ):
        (tmp_path / name).write_text(text)
        with refused(name):
            read()


# Files of a wrong kind


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_pipe_folder_or_device_in_place_of_a_file(tmp_path, make):
    """None of the files that say how text is read counts as absent, and none is waited for."""
    for name in (*TEXT_FILES, "additional_chat_templates/a.jinja"):
        folder = tmp_path / name.replace("/", "-")
        (folder / "additional_chat_templates").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if name != "tokenizer.json":
            (folder / "tokenizer.json").write_text(byte_tokenizer_json())
        make(folder / name)
        only_loaded = name in ("tiktoken.model", "additional_chat_templates/a.jinja")
        for read in (load_text,) if only_loaded else (load_text, read_settings):
            with pytest.raises((ValueError, OSError), match=str(folder)):
                read(folder)
    make(tmp_path / "a.jinja")
    with refused("a.jinja' cannot be read: .* is not a file"):
        with_template(plain_settings(), str(tmp_path / "a.jinja"))


# Targets


def test_a_target_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """Here it is below a file. Nothing is computed, and no kernel is compiled."""
    monkeypatch.setattr(choose, "prepare", lambda *_, **__: pytest.fail("it computes"))
    (tmp_path / "file").write_text("")
    claim(tmp_path / "run", recipe("tiny"))
    out, run = tmp_path / "file" / "out", str(tmp_path / "run")
    for work in (lambda: fit(recipe("tiny"), out), lambda: report(run, out)):
        with pytest.raises(OSError, match="Not a directory"):
            work()
    for words in ("tokenizer", "convert run", "data tokenize run --out", "stats run --tokens"):
        assert cli.main([*words.replace("run", run).split(), str(out)]) == 2


def test_a_name_that_no_file_can_have_is_refused_before_the_work(tmp_path):
    """It is not UTF-8, which Orbax and ArrayRecord need, or a folder's instead of a file's."""
    with refused("is a folder"):
        check_writable(tmp_path)
    out, run = tmp_path / "ev\udcff", tmp_path / "run\udcff"
    claim(tmp_path / "run", recipe("tiny"))
    (tmp_path / "run").rename(run)
    tokenizing = Tokenize((str(tmp_path),), out)
    for work in (
        lambda: fit(recipe("tiny"), out),
        lambda: tokenize(tokenizing),
        lambda: load_run(run),
    ):
        with refused("is not UTF-8"):
            work()
    with refused("paths='.* holds a control character"):
        tokenize(replace(tokenizing, paths=(str(out),)))
    assert not out.exists()


# Streams


# what takes stdout's place is closed by nobody
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_that_leaves_ends_a_command_silently(monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(["info", "tiny"]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_is_ascii_gets_the_names_of_other_letters(monkeypatch):
    for encoding, text in (("ascii", "COMMAND \\u2026"), ("utf-8", "COMMAND …")):
        with io.TextIOWrapper(io.BytesIO(), encoding) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert cli.main(["--help"]) == 0
            print("ev\udcff", file=stream, flush=True)
            written = stream.buffer.getvalue().decode(encoding)
        assert text in written and written.endswith("ev\\udcff\n")


# Configurations, JSON, released folders and texts


HUGE = 10**399


def changed(values: dict, new: Iterator, *kinds: type):
    """(Key, a copy with a new value there) of each value of these types, also of inner ones."""
    for key, old in values.items():
        if isinstance(old, dict):
            yield from ((name, values | {key: inner}) for name, inner in changed(old, new, *kinds))
        elif type(old) in kinds:
            yield key, values | {key: next(new)}


def test_every_number_of_a_run_is_finite():
    names, new = [], itertools.cycle((float("nan"), HUGE, -HUGE))
    for name, values in changed(to_dict(recipe("tiny")), new, float, int):
        names.append(name)
        with pytest.raises(ConfigError, match=name):
            from_dict(RunConfig, values)
    assert len(names) > 50 and "original_max_positions" in names


@pytest.mark.parametrize("value", [float("nan"), HUGE, -1, []], ids=lambda x: repr(x)[:9])
def test_every_key_of_a_config_json(value):
    """No value is a crash, and none becomes a model with another number than the file's."""
    kinds = (int, float, str, bool, type(None))
    for key, values in changed(config_to_dict(preset("v3")), itertools.repeat(value), *kinds):
        try:
            cfg = config_from_dict(values)
        except ConfigError:
            continue
        assert np.isfinite([x for x in vars(cfg).values() if type(x) is float]).all(), key
        assert cfg.num_layers + cfg.num_experts + cfg.mtp_depth < 2_000, key


def test_json_is_refused():
    for text, sentence in (
        ("", "Expecting value"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100_000 + "]" * 100_000, "64 deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "64 deep"),
        ('["\\ud83d\\ude42", "\\ud83d"]', "half a surrogate pair"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": [-1e999]}', "-1e999 is no number"),
        ("1" * 101, "an integer has 101 digits"),
        (b"\xff", "can't decode byte 0xff"),
    ):
        with refused(sentence):
            parse_json(text)
    assert parse_json(b'["\\ud83d\\ude42", 1000000000000000019884624838656]') == ["🙂", int(1e30)]
    assert parse_json("{}".encode("utf-8-sig")) == {}  # as editors of Windows write it


def test_a_model_of_more_tensors_than_there_are(tmp_path):
    """Its tensors are not listed: they would be 30,000 million."""
    sizes = {"num_hidden_layers": 9_000, "n_routed_experts": 10**6, "hidden_size": 1}
    tensor_files.write_json(tmp_path / tensor_files.CONFIG, config_to_dict(preset("tiny")) | sizes)
    tensor_files.write_shards(tmp_path, {"a": ((1,), "float32")}, 1000, [np.zeros(1, "float32")])
    begin = time.process_time()
    with refused(r"config.json.* num_layers=9000, num_experts=1000000"):
        ReleasedFolder(tmp_path)
    assert time.process_time() - begin < 5


def test_dead_links_and_linked_folders_are_passed_over_and_names_of_domains_can_be_printed(
    tmp_path, capsys
):
    rows = [{"text": f"text {i}", "domain": "\x1b[31m[/]"} for i in range(4)]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "gone\x1b[2J.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "circle").symlink_to(tmp_path)
    corpus = load_corpus(DataConfig(paths=(str(tmp_path),)))
    assert len(corpus.train + corpus.val) == 4 and corpus.domains == ("\ufffd[31m[/]",)
    said = capsys.readouterr().err
    assert said.count("a link that leads nowhere") == 2
    assert f"{tmp_path}/circle': a link to a folder" in said
    assert "gone\\x1b[2J.txt" in said and "\x1b" not in said


def test_a_sentence_is_short_and_plain():
    long = common.sentence(ValueError("begin " + "x" * 10**6 + " end"))
    assert len(long) <= common.MAX_SENTENCE and long.startswith("begin x")
    absent = FileNotFoundError(2, "No such file", "\ud800\u202e é\n漢")
    assert common.sentence(absent) == "No such file: '\\ud800\\u202e é\\n漢'"


# Signals


class Lost:
    """Gets SIGTERM where Python drops what its handler raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def convert(argv):
    with atomic_folder(Path(argv[0]) / "out") as part:
        (part / "a.txt").write_text("half")
        signal.raise_signal(signal.SIGTERM)


def train(argv):
    Lost()
    with asked_to_stop():
        pytest.fail("it trains")


@pytest.mark.parametrize("command", [convert, train, lambda argv: Lost() and None])
def test_sigterm_ends_a_command_and_leaves_no_temporary_folder(monkeypatch, tmp_path, command):
    """Also where the exception that it raises is lost."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    monkeypatch.setattr(cli, "dispatch", command)
    assert cli.main([str(tmp_path)]) == 143 and not signals.terminated.is_set()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_slice_of_the_campaign(tmp_path):
    signal.alarm(300)  # a dozen processes
    words = ["-m", "tests.campaign", *"--seed 5 --trial 0 2 --commands tokenizer".split()]
    out, err = (campaign := start(words, tmp_path, program=())).communicate()
    kinds = set(re.findall(r"^\d+: as it must: (\w+)", out, re.MULTILINE))
    assert campaign.returncode == 0 and kinds == {"files", "options", "kills"}, out + err
