"""Templates, lines, files, manifests of others are refused: one sentence, soon, little memory."""

import io
import os
import re
import signal
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from runs import unhooked_cli
from texts import USER

from dsv3_jax.chat import sandbox
from dsv3_jax.chat.checkers import Checker
from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.template import ChatTemplate
from dsv3_jax.chat.text_settings import (
    PLAIN_TEMPLATE,
    TEXT_FILES,
    plain_settings,
    read_settings,
    with_template,
)
from dsv3_jax.cli.tokenize import Tokenize, tokenize
from dsv3_jax.config import ConfigError, DataConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.manifest import MANIFEST, read_manifest
from dsv3_jax.data.special_tokens import read_object
from dsv3_jax.data.tokenizer import ByteTokenizer, byte_tokenizer_json
from dsv3_jax.hf.released_folder import ReleasedFolder
from dsv3_jax.host.files import check_writable
from dsv3_jax.host.signals import handled
from dsv3_jax.kernels import choose
from dsv3_jax.presets import recipe
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import claim, read_run
from dsv3_jax.runs.loop import fit
from dsv3_jax.runs.open_model import load_text
from dsv3_jax.stats.reporting import report

EOS = {"eos_token": "<eos>"}


@pytest.fixture(autouse=True)
def soon():
    """What hangs fails."""
    with handled(lambda *_: pytest.fail("it takes more than a minute"), signal.SIGALRM):
        signal.alarm(60)
        yield
        signal.alarm(0)


# Chat templates


LOOP = "{% for i in range(99999) %}"
DOUBLE = "{% set n = namespace(s='a', i=9) %}{% for i in range(40) %}"
TREES = "{% set n = namespace(s=[0], i=[0]) %}{% for i in range(40) %}"
TREES += "{% set n.s = [n.s, n.s] %}{% set n.i = [n.i, n.i] %}{% endfor %}"
ENDLESS = {
    "runs for more than": [
        "{% set s = 'a' * 10**6 %}" + LOOP + "{% if 'b' in s %}{% endif %}{% endfor %}",
        DOUBLE + "{% set n.i = n.i * n.i %}{% endfor %}",
        "{{ 9 ** 999999999 }}",
        # C code that no signal interrupts: two trees of 2^40 leaves, keys of one hash, large powers
        TREES + "{{ n.s == n.i }}",
        TREES + "{{ n.s in [n.i] }}",
        "{{ dict(range(0, 99999 * (2**61 - 1), 2**61 - 1) | batch(2) | list) | length }}",
        "{{ ('9' * 4300) | int ** 99999 % 7 }}",
    ],
    "fails with RecursionError": ["{% macro f(n) %}{{ f(n-1) }}{% endmacro %}{{ f(1) }}"],
    "takes more than": [
        "{{ 'a' * 10**9 }}",
        "{% set s %}" + LOOP + "literal " * 9999 + "{% endfor %}{% endset %}",
        DOUBLE + "{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**5) }}",
        "{{ [1] | tojson(indent=10**8) }}",
    ],
}


@pytest.mark.parametrize(
    ("sentence", "source"), [(key, source) for key, some in ENDLESS.items() for source in some]
)
def test_a_template_ends(monkeypatch, sentence, source):
    """Range bombs, recursion, ways to a large value, in any thread; at a part of the limits."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "MAX_BYTES", 2**25)
    work = lambda: ChatTemplate(source, ByteTokenizer(), EOS).text([USER])  # noqa: E731
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ValueError, match=f"^the chat template {sentence}"),
    ):
        pool.submit(work).result()
    assert plain_settings().chat.text([USER])  # the next one has a process that lives


def test_an_interrupted_template_answers_no_later_question(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 5)
    slow = ChatTemplate(
        "{% for i in range(99999) %}{% if i in range(i) %}{% endif %}{% endfor %}a", ByteTokenizer()
    )
    with handled(signal.default_int_handler, signal.SIGALRM), pytest.raises(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        slow.text([USER])
    assert ChatTemplate("b", ByteTokenizer()).text([USER]) == "b"


TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(80)]


def test_a_long_chat_takes_linear_time(monkeypatch):
    """Without `{% generation %}` a turn is compared after few turns as if after all before it."""
    template = ChatTemplate(
        re.sub("{% (end)?generation %}", "", PLAIN_TEMPLATE), ByteTokenizer(), EOS
    )
    rendered, run = [], ChatTemplate._run
    count = lambda self, some, *rest: rendered.append(len(some)) or run(self, some, *rest)  # noqa: E731
    monkeypatch.setattr(ChatTemplate, "_run", count)
    long = [{"role": "system", "content": "s"}, *TURNS, {"role": "user", "content": "last"}]
    found = template.render(long, assistant_mask=True)
    assert sum(rendered) < 30 * len(long)
    monkeypatch.setattr("dsv3_jax.chat.template._PART", 1000)
    assert found == template.render(long, assistant_mask=True) and sum(found.mask) > 200


def test_turns_whose_parts_do_not_join_are_compared_after_all_turns_before():
    source = "{% for m in messages %}{{ loop.index ~ m.role[0] ~ m.content ~ '|' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ messages | length + 1 }}a{% endif %}"
    template = ChatTemplate(source, ByteTokenizer())
    ids, mask = template.render(TURNS[:40], assistant_mask=True)
    text = bytes(i for i, ours in zip(ids, mask, strict=True) if ours).decode()
    assert text == "".join(f"turn {i}|" for i in range(1, 40, 2))


# Reward functions


REWARDS = """
import signal, sys
class Mute(Exception):
    def __str__(self):
        1 / 0
    __repr__ = __str__
def leaves(text, row):
    sys.exit("the server is down")
def generates(text, row):
    raise GeneratorExit
def is_mute(text, row):
    raise Mute
def returns(text, row):
    return Mute()
def closes(text, row):
    sys.stdout.close()
    return True
def is_stopped(text, row):
    signal.raise_signal(signal.SIGTERM)
def is_interrupted(text, row):
    raise KeyboardInterrupt
"""


# nobody closes what takes its place
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaves", "SystemExit: the server is down"),
        ("generates", "GeneratorExit"),
        ("is_mute", "rewards.Mute"),
        ("returns", "ZeroDivisionError"),
        ("closes", "ValueError: it closes stdout"),
    ],
)
def test_a_reward_function_that_ends_the_process_ends_the_run_alone(
    tmp_path, monkeypatch, name, said
):
    """Training saves before it raises this; Ctrl-C and SIGTERM pass."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(
        ValueError, match=f"^grpo checker='rewards:{name}' fails at line 3 with {said}"
    ):
        Checker(f"rewards:{name}").check("text", {}, "line 3")
    print("it can be said")
    with pytest.raises(
        ConfigError, match="^grpo checker='leaving:f' cannot be imported: SystemExit: 0$"
    ):
        Checker("leaving:f")


@pytest.mark.parametrize(
    ("name", "code"), [("is_stopped", 143), ("is_interrupted", 130), ("leaves", 2)]
)
def test_ctrl_c_and_sigterm_end_a_command_that_runs_a_reward_function(
    tmp_path, monkeypatch, capsys, name, code
):
    """Training itself notes them, and saves."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    main = unhooked_cli()
    monkeypatch.setattr(
        main, "dispatch", lambda argv: Checker(f"rewards:{name}").check("text", {}, "line 3")
    )
    assert main.main([]) == code and bool(capsys.readouterr().err) == (code == 2)


def test_a_program_that_ends_the_process_with_a_text(monkeypatch, capsys):
    """Python prints the text and ends with 1."""
    main = unhooked_cli()
    monkeypatch.setattr(main, "dispatch", lambda argv: sys.exit("the server is down"))
    assert (main.main([]), capsys.readouterr().err) == (1, "dsv3: the server is down\n")


# Lines and values


CHATS = DataConfig(format="chat", paths=("given below",), seq_len=8, batch_size=1)
READ = {
    "documents": lambda path: load_corpus(DataConfig((path,))),
    "chats": lambda path: load_examples(replace(CHATS, paths=(path,)), plain_settings()),
    "shards": lambda path: tokenize(Tokenize((path,), Path(path).with_name("shards"))),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_a_line_of_200_megabytes_is_refused_before_it_takes_memory(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "b"}\n')
    os.truncate(file, 200_000_000)  # the second line
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, is longer than [\d,]+ bytes"):
        read(str(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150_000_000


def json_doors(folder: Path):
    """Readers of users' JSON: the function, the file, and its text around a value."""
    yield READ["documents"], folder / "a.jsonl", '{"text": %s}'
    yield READ["chats"], folder / "b.jsonl", '{"messages": [], "tools": %s}'
    yield lambda path: read_run(folder), folder / "run.json", '{"format": 2, "run": %s}'
    yield lambda path: read_manifest(folder), folder / MANIFEST, "%s"
    yield lambda path: ReleasedFolder(folder), folder / "config.json", '{"model_type": %s}'
    yield (
        lambda path: read_object(Path(path)),
        folder / "tokenizer_config.json",
        '{"chat_template": %s}',
    )
    yield lambda path: tokenizer.load(path), folder / "tokenizer.json", '{"model": %s}'


def test_json_that_no_program_should_write(tmp_path):
    for value in (
        "[" * 400 + "]" * 400,
        '{"a":' * 1000 + "1" + "}" * 1000,
        '"\\ud800"',
        "1" * 5000,
        "NaN",
        "1e999",
    ):
        for read, file, text in json_doors(tmp_path):
            file.write_text(text % value)
            with pytest.raises(ValueError, match=file.name):
                read(str(file))
    with pytest.raises(ValueError, match="paths='.udcff' holds"):
        READ["shards"]("\udcff")


def with_parts(folder: Path, **parts):
    """A tokenizer of bytes with another normalizer or pre-tokenizer."""
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer_json())
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.save(str(folder / "tokenizer.json"))
    return tokenizer.load(str(folder))


def test_a_normalizer_that_makes_a_book_of_a_letter(tmp_path):
    """Those of released models pass."""
    made = tokenizers.normalizers
    replace, runs = made.Replace, made.Replace(tokenizers.Regex(" {2,}"), " ")
    doubles = made.Sequence([replace(tokenizers.Regex("(?=q)"), "q")] * 30)
    for normalizer in (
        replace("", "a" * 1000),
        replace("q", "a" * 10**6),
        doubles,
        made.Prepend("a" * 1000),
    ):
        with pytest.raises(
            ValueError, match="tokenizer.json' has a normalizer that may make .* letters of one"
        ):
            with_parts(tmp_path, normalizer=normalizer)
    usual = [
        made.Prepend("▁"),
        replace(" ", "▁"),
        made.NFKC(),
        replace("``", '"'),
        runs,
        replace("\n", "<0x0A>"),
    ]
    assert with_parts(tmp_path, normalizer=made.Sequence(usual)).encode("a") == [*"▁a".encode()]


def test_a_panic_of_the_library_is_one_sentence(tmp_path):
    """Its regular expressions give up on such a text, and Rust's panic is no Exception."""
    slow = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a|aa)+$"), "isolated")
    words = with_parts(tmp_path, pre_tokenizer=slow)
    for encode in (
        words.encode,
        words.encode_prompt,
        words.encode_with_specials,
        words.encode_plain,
    ):
        with pytest.raises(ValueError, match="the tokenizer cannot encode .*aaa!'.*: Onig"):
            encode("a" * 60 + "!")


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
    with pytest.raises(ValueError, match="a.jinja' cannot be read: .* is not a file"):
        with_template(plain_settings(), str(tmp_path / "a.jinja"))


# Targets


def test_a_target_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """Here it is below a file. Nothing is computed, and no kernel is compiled."""

    def compute(*_, **__):
        raise AssertionError("it computes")

    monkeypatch.setattr(choose, "prepare", compute)
    (tmp_path / "file").write_text("")
    claim(tmp_path / "run", recipe("tiny"))
    out, run, main = tmp_path / "file" / "out", str(tmp_path / "run"), unhooked_cli().main
    for work in (lambda: fit(recipe("tiny"), out), lambda: report(run, out)):
        with pytest.raises(OSError, match="Not a directory"):
            work()
    for argv in (
        ["tokenizer", str(out)],
        ["convert", run, str(out)],
        ["data", "tokenize", run, "--out", str(out)],
        ["stats", run, "--tokens", str(out)],
    ):
        assert main(argv) == 2


@pytest.mark.parametrize("name", ["ev\udcff", "folder"])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(tmp_path, name):
    """It is not UTF-8, which Orbax and ArrayRecord need, or a folder's instead of a file's."""
    claim(tmp_path / "run", recipe("tiny"))
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "folder").mkdir()
    out = tmp_path / name
    sentence = "is a folder" if name == "folder" else "is not UTF-8"
    with pytest.raises(ValueError, match=sentence):
        check_writable(out)
    if name != "folder":
        (tmp_path / "run").rename(tmp_path / f"run{name}")
        shards = Tokenize((str(tmp_path / "text.jsonl"),), out)
        for work in (
            (fit, recipe("tiny"), out),
            (tokenize, shards),
            (load_run, tmp_path / f"run{name}"),
        ):
            with pytest.raises(ValueError, match=sentence):
                work[0](*work[1:])
        assert not out.exists()


# Streams


# nobody closes what takes their place
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_closed_streams(monkeypatch, capsys):
    """The long test of the command line closes those of a process."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    main = unhooked_cli().main
    with monkeypatch.context() as patch:
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, None)
        assert main(["info", "v9"]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        assert main(["info", "tiny"]) == 141
    assert capsys.readouterr().err == ""


def test_output_that_is_ascii_gets_the_names_of_other_letters(monkeypatch):
    for encoding, text in (("ascii", "COMMAND \\u2026"), ("utf-8", "COMMAND …")):
        with io.TextIOWrapper(io.BytesIO(), encoding) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert unhooked_cli().main(["--help"]) == 0
            print("ev\udcff", file=stream, flush=True)
            written = stream.buffer.getvalue().decode(encoding)
        assert text in written and written.endswith("ev\\udcff\n")


def test_a_full_disk_behind_the_errors_keeps_the_exit_code(monkeypatch):
    """Python would end with 120: it tries to write once more at the end."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", full := Full())
    assert unhooked_cli().main(["convert", "nowhere", "out"]) == 2
    assert sys.stderr is not full
    sys.stderr.close()
