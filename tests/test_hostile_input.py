"""Input that others wrote is refused quickly, in a sentence that names it; names appear as they are."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from runs import environment

from dsv3_jax.chat import text_settings
from dsv3_jax.cli import common
from dsv3_jax.cli import main as cli
from dsv3_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, Yarn, from_dict, replace, to_dict
from dsv3_jax.data import special_tokens, tokenizer
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.files import atomic_folder, check_regular, parse_json, read_json
from dsv3_jax.hf import files
from dsv3_jax.hf.config_json import config_from_dict, config_to_dict
from dsv3_jax.hf.conversion import convert
from dsv3_jax.hf.open_model import released_run
from dsv3_jax.hf.reading import ReleasedFolder
from dsv3_jax.hf.table import tensor_table
from dsv3_jax.presets import preset, recipe
from dsv3_jax.report import run_plots
from dsv3_jax.report.metrics import METRICS_FILE, parse_rows
from dsv3_jax.report.progress import text_console
from dsv3_jax.stats import plots
from dsv3_jax.training.run_folder import claim, read_run
from tests.campaign.table import Table
from tests.campaign.trials import trials

TINY = preset("tiny")
RUN = to_dict(recipe("tiny"))
HUGE = 10**399


def places(values: dict, kinds: tuple[type, ...], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
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


@pytest.mark.parametrize("value", [float("nan"), 1e39, HUGE], ids=lambda x: str(x)[:9])
def test_every_number_of_a_run_is_finite(value):
    numbers = places(RUN, (float, int))
    assert len(numbers) > 50 and ("model", "yarn", "factor") in numbers
    for path in numbers:
        with pytest.raises(ConfigError, match=path[-1]):
            from_dict(RunConfig, changed(RUN, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.num_layers", 10**9),
        ("model.num_experts", 10**9),
        ("model.mtp_depth", 10**9),
        ("model.rope_head_dim", 10**9),
        ("model.dim", 2**40),
        ("model.vocab_size", 2**31),
        ("model.rope_theta", 0.5),
        ("model.norm_eps", 1e-60),  # 0 in float32
        ("model.routed_scale", 1e20),
        ("model.yarn.beta_fast", 0.0),
        ("data.seed", 2**63),
        ("data.seed", -1),
        ("data.batch_size", 2**31 - 1),
        ("data.tokenizer", "a\x1b[31m"),
        ("data.paths", ["a\ud800"]),
        ("seed", 2**63),
        ("steps", 2**31),
        ("execution.kernels", ["auto"]),
        ("model", None),
        ("model.router", [[]]),
    ],
)
def test_numbers_and_names_out_of_range(path, value):
    with pytest.raises(ConfigError, match=path.split(".")[-1]):
        from_dict(RunConfig, changed(RUN, tuple(path.split(".")), value))


def test_yarn_needs_a_base_above_1():
    assert replace(TINY, rope_theta=1.0).rope_theta == 1
    with pytest.raises(ConfigError, match="rope_theta=1.0 is not above 1"):
        replace(TINY, rope_theta=1.0, yarn=Yarn(factor=2.0))


RELEASED = config_to_dict(preset("v3"))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), HUGE, 10**9, -1, [], {}, "1", True], ids=lambda x: repr(x)[:9]
)
def test_every_key_of_a_config_json(value):
    """No value is a crash, and none becomes a model with another number than the file's."""
    for path in places(RELEASED, (int, float, str, bool, type(None))):
        try:
            cfg = config_from_dict(changed(RELEASED, path, value))
        except ConfigError:
            continue
        assert np.isfinite([x for x in vars(cfg).values() if type(x) is float]).all(), path
        assert cfg.num_layers + cfg.num_experts + cfg.mtp_depth < 2_000, path


@pytest.mark.parametrize("key", ["model_type", "mlp_layer_types", "rope_scaling", "quantization_config", "text_config"])
@pytest.mark.parametrize(
    "value", [[], {"rope_type": []}, 3, {"rope_type": 1, "quant_method": "compressed-tensors"}, "x"], ids=repr
)
def test_keys_that_hold_objects(key, value):
    with pytest.raises(ConfigError):
        config_from_dict(RELEASED | {key: value})


def test_int4_groups_may_be_anything():
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {}}}
    for weights in ("x", [], 3, {"num_bits": []}):
        quantization["config_groups"] = {"a": {"weights": weights}}
        with pytest.raises(ConfigError, match="weights has num_bits"):
            config_from_dict(RELEASED | {"quantization_config": quantization})


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 70 + "]" * 70, "64 deep"),
        ("[" * 100_000 + "]" * 100_000, "64 deep"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"\\udc00": [1]}', "half a surrogate pair"),
        ('["\\ud83d\\ude42", "\\ud83d"]', "half a surrogate pair"),
        ("[NaN]", "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("1" * 101, "an integer has 101 digits"),
        ("9" * 5000, "an integer has 5,000 digits"),
    ],
    ids=range(11),
)
def test_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_is_accepted():
    assert parse_json(b'["\\ud83d\\ude42", 1000000000000000019884624838656]') == ["🙂", int(1e30)]
    with pytest.raises(ValueError, match="can't decode byte 0xff"):
        parse_json(b"\xff")


def test_a_name_that_occurs_twice_takes_linear_time():
    names = ",".join(f'"{i}":1' for i in range(60_000))
    begin = time.process_time()
    with pytest.raises(ValueError, match="'59999' occurs twice"):
        parse_json(f'{{{names},"59999":1}}')
    assert time.process_time() - begin < 2  # 0.1 s; by the square it was 20 s


def make_pipe(path: Path):
    os.mkfifo(path)


def make_socket(path: Path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # 107 bytes at most


def make_hole(path: Path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "bytes, more than": make_hole,
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.json"
    KINDS[kind](path)
    with pytest.raises(ValueError, match=f"a.json (is|has .*) ?{kind}"):
        read_json(path)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_in_a_regular_file(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / METRICS_FILE
    KINDS[kind](path)
    with pytest.raises(ValueError, match=f"{METRICS_FILE} (is|has .*) ?{kind}"):
        parse_rows(path)


# Released folders


def released(folder: Path, table: files.Table, **changes) -> Path:
    """A folder with a config.json, and tensors of zeros."""
    files.write_json(folder / files.CONFIG, config_to_dict(TINY) | changes)
    files.write_shards(folder, table, 1000, lambda name: np.zeros(table[name][0], table[name][1]))
    return folder


def test_a_model_of_more_tensors_than_there_are(tmp_path):
    """Its tensors are not listed: they would be 30,000 million."""
    folder = released(
        tmp_path, {"a": ((1,), "float32")}, num_hidden_layers=9_000, n_routed_experts=10**6, hidden_size=1
    )
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"config.json.* num_layers=9000, num_experts=1000000"):
        ReleasedFolder(folder)
    assert time.process_time() - begin < 5


def test_changed_headers_are_refused(tmp_path):
    """Nothing of a header that was changed at random is read as something else, but for names."""
    table = {"a": ((2, 3), "float32"), "b": ((5,), "bfloat16"), "c": ((128, 2), "float8_e4m3fn")}
    files.write_shards(tmp_path, table, 10**9, lambda n: np.zeros(table[n][0], table[n][1]))
    [path] = tmp_path.glob("*.safetensors")
    raw, good, rng = path.read_bytes(), files.read_header(path), np.random.default_rng(0)
    assert good["c"].dtype.name == "float8_e4m3fn" and good["b"].start == good["a"].start + 24
    for _ in range(400):
        changed = bytearray(raw)
        changed[rng.integers(8 + int.from_bytes(raw[:8], "little"))] = rng.integers(256)
        path.write_bytes(bytes(changed))
        with contextlib.suppress(ValueError):
            assert [t[1:] for t in files.read_header(path).values()] == [t[1:] for t in good.values()]


def test_a_link_to_itself(tmp_path):
    (tmp_path / files.CONFIG).symlink_to(files.CONFIG)
    with pytest.raises(ValueError, match="config.json"):
        files.open_folder(tmp_path)


# Tokenizers


def write_tokenizer(folder: Path, change=lambda values: None) -> Path:
    """A tokenizer.json of whole words, changed."""
    words = {"<eos>": 0, "to": 1, "be": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="be"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<eos>"])
    values = json.loads(inner.to_str())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def split_by(pattern: str):
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda values: values.update(pre_tokenizer=rule)


TOKENIZERS = {
    "id": (lambda f: write_tokenizer(f, lambda v: v["model"]["vocab"].update(far=2**30)), "has id 1073741824"),
    "unknown token": (lambda f: write_tokenizer(f, lambda v: v["model"].update(unk_token="?")), "cannot encode text"),
    "pattern": (lambda f: write_tokenizer(f, split_by("(a+)+$|(a|a)*b")), "cannot encode text"),
    "type": (lambda f: write_tokenizer(f, lambda v: v.update(model=[])), "cannot be read"),
    "depth": (lambda f: (f / "tokenizer.json").write_text("[" * 10**5), "cannot be read"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(tmp_path, name):
    make, message = TOKENIZERS[name]
    make(tmp_path)
    for use in (tokenizer.load, lambda path: tokenizer.keep_copy(path, tmp_path / "copy")):
        with pytest.raises(ValueError, match=message) as info:
            use(str(tmp_path))
        assert "tokenizer.json" in str(info.value)
    assert not (tmp_path / "copy").exists()


def test_an_end_of_document_that_is_no_token(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(ValueError, match="ends documents with id 3, but its ids end at 2"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "config.json").write_text(f'{{"eos_token_id": {10**30}}}')
    with pytest.raises(ValueError, match=f"eos_token_id={10**30}"):
        special_tokens.end_ids(tmp_path, "config.json")


def test_a_tokenizer_of_more_ids_than_the_model(tmp_path):
    write_tokenizer(tmp_path)
    assert Path(released_run(tmp_path, TINY).data.tokenizer).name == "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer.json has vocab_size=3, more than the model's vocab_size=2"):
        released_run(tmp_path, replace(TINY, vocab_size=2))


def test_a_byte_level_token_of_other_characters(tmp_path):
    """As in the library, such a token is its own text."""
    trained = tokenizer.train_bpe(["to be"], 260, str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"]["漢 "] = trained.vocab_size
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert tokenizer.load(str(tmp_path)).decode([trained.vocab_size]) == "漢 "


@pytest.mark.parametrize("added", [{"x": "a"}, {str(2**30): "a"}, {"1": {"content": 3}}, {"1": None}], ids=repr)
def test_special_tokens_of_tiktoken(tmp_path, added):
    (tmp_path / "tiktoken.model").write_text("YQ== 0\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json has added_tokens_decoder"):
        tokenizer.load(str(tmp_path))


def test_a_long_run_does_not_slow_the_training_of_a_tokenizer(tmp_path):
    begin = time.process_time()
    trained = tokenizer.train_bpe(["[" * 150_000, "to be"], 261, str(tmp_path / "t.json"))
    assert time.process_time() - begin < 4  # 0.1 s; by the square it was 15 s
    assert trained.decode(trained.encode("[to be")) == "[to be"


@pytest.mark.parametrize("text", ["1e999", "true", '"1"', "2.5"])
def test_sampling_defaults(tmp_path, text):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"top_k": {text}}}')
    with pytest.raises(ValueError, match="generation_config.json has top_k="):
        text_settings.read_released(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", '{"temperature": "hot"}', "temperature"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "names eos_token='<end>'"),
    ],
)
@pytest.mark.parametrize("to", ["run", "hf"])
def test_a_conversion_checks_the_files_of_the_text(tmp_path, name, text, message, to):
    cfg = replace(TINY, num_layers=1, mtp_depth=0)
    folder = tmp_path / "released"
    folder.mkdir()
    table = tensor_table(cfg)
    files.write_json(folder / files.CONFIG, config_to_dict(cfg))
    files.write_shards(folder, table, 10**9, lambda n: np.zeros(table[n][0], files.STORED_DTYPES["BF16"]))
    write_tokenizer(folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out", to=to, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


# Runs


@pytest.mark.parametrize(
    "text", ["null", "[" * 10**5, "[]", "{}", '{"model": null}', '{"a": 1, "a": 2}', "\xff", "NaN"]
)
def test_run_json(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError):
        read_run(tmp_path)


def test_a_run_json_with_nan(tmp_path):
    claim(tmp_path, recipe("tiny"))
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps(changed(json.loads(path.read_text()), ("run", "optim", "learning_rate"), 7)).replace("7", "1e999")
    )
    with pytest.raises(ConfigError, match="learning_rate=inf is not a finite"):
        read_run(tmp_path)


# Texts


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_texts_are_regular_files(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    KINDS[kind](tmp_path / "b.txt")
    for path in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(ValueError, match=f"b.txt is {kind}"):
            load_corpus(DataConfig(paths=(str(path),)))


def test_links_that_lead_nowhere_are_passed_over(tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    corpus = load_corpus(DataConfig(paths=(str(tmp_path),)))
    assert len(corpus.train + corpus.val) == 4
    assert "passed over 2 links that lead nowhere, such as 'gone.txt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ["[" * 10**5, '{"text": ' + "[" * 500 + "]" * 500 + "}", '{"text": "a", "n": ' + "9" * 5000 + "}",
     '{"text": "a", "domain": "' + "d" * 201 + '"}'],
    ids=["deep", "deep text", "digits", "domain"],
)  # fmt: skip
def test_lines_of_jsonl(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        load_corpus(DataConfig(paths=(str(tmp_path / "a.jsonl"),)))


def test_names_of_domains_can_be_printed(tmp_path):
    rows = [{"text": f"text {i}", "domain": "\x1b[31m\u202e[/]"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_corpus(DataConfig(paths=(str(tmp_path),))).domains == ("\ufffd[31m\ufffd[/]",)


# Printed text and drawn pages


def test_a_sentence_is_short_and_plain():
    long = common.sentence(ValueError("begin " + "x" * 10**6 + " end"))
    assert len(long) <= common.MAX_SENTENCE and long.startswith("begin x")
    assert common.sentence(ValueError("a\x1b[31m\ud800\u202e é\n漢")) == "a\\x1b[31m\\ud800\\u202e é 漢"
    middle = common.sentence(ValueError("a" * 400 + "b" * 400 + "c" * 90))
    assert len(middle) <= common.MAX_SENTENCE and middle.startswith("a" * 300) and middle.endswith("c" * 90)


def test_fail_prints_codes_written_out(capsys):
    assert common.fail("\x1b]0;title\x07") == 2
    assert capsys.readouterr().err == "dsv3: \\x1b]0;title\\x07\n"


def test_markup_is_text(capsys):
    text_console().print("[/] [slug] [b]x[/b] :smile:")
    assert capsys.readouterr().out == "[/] [slug] [b]x[/b] :smile:\n"


def test_names_in_pictures_are_no_formulas(tmp_path):
    names = ["$x^{$", "$\\frac$", "漢字"]
    load = np.ones((3, 1, 2))
    plots.domain_lift(load, names, ["layer 0"], tmp_path / "a.png")
    figure = run_plots.routing_heatmap(load[0], tmp_path / "b.png", title="$^$", domain_loads={"$_$": load[1]})
    assert figure.axes[0].get_title() == "$^$" and (tmp_path / "b.png").stat().st_size > 1000


def test_a_model_of_one_expert_is_drawn(tmp_path):
    figure = run_plots.routing_heatmap([[3], [0]], tmp_path / "load.png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["MaxVio", "0.00", "no load"]


# Signals


def test_sigterm_leaves_no_temporary_folder(tmp_path, monkeypatch):
    def convert(argv):
        with atomic_folder(tmp_path / "out") as part:
            (part / "a.txt").write_text("half")
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(cli, "dispatch", convert)
    with pytest.raises(SystemExit, match="143"):
        cli.main([])
    assert not list(tmp_path.iterdir())


def test_devices_are_named():
    with pytest.raises(ValueError, match="/dev/null is a device"):
        check_regular(os.devnull)


# Campaign: (seconds, its trials that are made however long they take). A trial that began is let to its end.
SLICES = {
    "inputs": (5, 10),
    "damage kills writers disks": (4, 1),
    "models": (5, 1),
    "sanitizers": (1, 1),
    "fuzz": (2, 5),
}


@pytest.mark.long
@pytest.mark.parametrize("names", SLICES)
def test_a_part_of_the_campaigns(tmp_path, names):
    seconds, least = SLICES[names]
    words = ["--minutes", str(seconds / 60), "--least", str(least), "--seed", "7"]  # not the seed of its README.md
    record = tmp_path / "record.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign", *words, "--record", str(record), "--only", *names.split()],
        cwd=Path(__file__).parents[1],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried = Counter()
    for row in map(json.loads, record.read_text().splitlines()):
        tried[row["campaign"].split()[0]] += row["count"]
    for name in names.split():
        assert tried[name] >= least or "left out" in done.stdout, done.stdout


def test_a_campaign_goes_on_where_it_stopped(tmp_path):
    record, made = tmp_path / "record.jsonl", []
    for least in (2, 1):
        table = Table(record, seed=3)
        for number, rng in trials("kills", time.monotonic(), 3, table, least):
            made.append((number, rng.random()))
            table.add("killed: train", ["hangs"] if number == 1 else [])
    assert [number for number, _ in made] == [0, 1, 2] and len(set(made)) == 3
    assert (table.tried, table.fell_short) == (3, 1)
    assert Table(record, seed=4).tried == 0
    assert "| killed: train | 3 | 0 | 1 |" in str(Table(record, seed=3))


def test_model_config_has_a_bound_for_every_integer():
    """No size is left out: each is refused far above what can be allocated."""
    for item in dataclasses.fields(ModelConfig):
        if item.type in (int, "int"):
            with pytest.raises(ConfigError):
                replace(TINY, **{item.name: 2**31})
