"""The command line: bad input gets one sentence and exit code 2, and nothing is overwritten."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from runs import by_command, rows_of

from dsv3_jax.cli import main as cli
from dsv3_jax.cli import options, train
from dsv3_jax.cli.common import all_devices, guarded
from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.data.batches import one_row
from dsv3_jax.data.tokenizer import ByteTokenizer, train_bpe
from dsv3_jax.decoding.generate import generate as decode
from dsv3_jax.kernels import choose, table
from dsv3_jax.presets import MODELS, recipe
from dsv3_jax.report.progress import say, text_console
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.evaluate import evaluate
from dsv3_jax.runs.folder import read_run

COMMANDS = (
    "demo", "train", "eval", "stats", "generate", "chat", "convert", "runs list", "runs check",
    "data tokenize", "data check", "data example", "plan", "info", "tokenizer",
)  # fmt: skip
# Refused in one sentence: what it must hold. {…} are the paths of `place`.
BAD = {
    "--fly": "command '--fly' is not one of demo",
    "stats": "Missing from dsv3 stats: RUN a folder that",
    "generate {run} --promt abc": "option --promt is unknown; did you mean --prompt or --prompts?",
    "train tiny --out {new} --optim.rate 3": (
        "option --optim.rate is unknown; did you mean --optim.learning-rate"
    ),
    "train tiny --out {new} stesp=5": "'stesp=5' is no option, and no argument is left for it; did",
    "train tiny --out {new} --temperature 3": (
        "option --temperature may be --data.temperature or --grpo.temperature; name one"
    ),
    "train tiny --out {new} layout.fsdp=no": "execution.layout.fsdp=no is neither true nor false",
    "train tiny --out {new} --steps": "Missing value for argument '--steps'",
    "train tiny --out {new} --steps abc": "--steps: invalid literal for int() with base 10: 'abc'",
    "train tiny --config {run} --out {new}": "takes the place of PRESET 'tiny'; leave one out",
    "train tiny --out {new} --report wandb": "not installed: pip install wandb",
    "eval {run} --paths {absent} --paths {text}": "--paths is given twice; name all after one",
    "info tiny --kernels --check": "choose one",
    "info v9": "'v9' is not one of tiny",
    "train --out {new}": "argument PRESET is missing",
    "runs list {absent}": "is no folder; name one with runs",
    "runs chek {run}": "subcommand 'chek' is not one of list, check; did you mean 'check'?",
    "train v3 --out {new}": "training state of 8.192 TB does not fit in this host's memory of ",
    "plan tiny --memory 80": "memory='80'",
    "train sft --out {new}": "preset 'sft' fine-tunes a model",
    "train sft --start {run} --out {new}": "has no chat template; train with one, --data",
    "train tiny --out {new} --processes 2": "--processes and --process-id need --cluster",
    "train tiny --out {new} --profile 5:2": "profile='5:2' is not START:STOP",
    "train tiny --out {new} --profile 9:12 --steps 9": "profile=(9, 12) begins after the last",
    "train tiny --out {new} --tokenizer {words}": "vocab_size=260 is below the tokenizer's",
    "eval {run} --batches 0": "batches=0",
    "eval {run} --limit 2": "shots, limit and out are for tasks; add --tasks FOLDER or --lm-eval",
    "eval {run} --lm-eval piqa --tasks {text}": "choose one",
    "eval {run} --tasks {text} --cache-dtype int8": "cache_dtype=('int8',) is for held-out text",
    "eval {run} --lm-eval piqa --paths {text}": "paths=('{text}',) is for held-out text, not for t",
    "eval {run} --lm-eval piqa": "which is not installed: pip install lm_eval",
    "stats {run} --devices 3 --out {new}": "devices=3 does not divide the 8 experts",
    "stats {run} --tokens rows.parquet": "tokens='rows.parquet' does not end in .npz",
    "generate {run} --samples 2": "samples=2 is for --prompts FILE.jsonl --out OUT.jsonl",
    "generate {run} --draft-length 2": "draft_length=2 is for --draft mtp, lookup or a folder",
    "generate {run} --cache none --cache-dtype int8": "cache_dtype='int8' is for a cache, not for",
    "generate {run} --prompts {one}": "prompts and out go together",
    "generate {run} --prompts {one} --out {one}": "'{one}' exists; delete it, or name another file",
    "generate {run} --dtype bfloat16": "dtype='bfloat16' is for released models",
    "generate {text}": "folder='{text}' is neither a run (no run.json) nor released",
    "chat {run}": "{run} has no chat template",
    "data tokenize {one} --format chat --start {run} --tokenizer {words} --out {new}": "choose one",
    "convert {run} {text}": "{text} exists and is not an empty folder",
    "convert {run} {new} --parts 2": "parts=2 is for a mixture; give --experts too",
    "tokenizer {one} --paths {text}": "out='{one}' exists already",
    "tokenizer {new} --paths {text} --vocab-size 100": "vocab_size=100",
}
GOOD = {
    **{f"help of {command}": f"{command} --help" for command in (*COMMANDS, "runs", "data")},
    "long help": "train tiny --help-verbose",
    **{f"long {command}": f"{command} --help-verbose" for command in ("train sft", "generate")},
    "help": "--help",
    "info": "info v3",
    "changed info": "info v3 --mtp-depth 0 --execution.compute-dtype float32",
    "kernels here": "info tiny --kernels",
    "kernels of CUDA": "CUDA info tiny --kernels",
    "eval": "eval {run} --batches 2 --cache-dtype int8",
    "eval of a document": "eval {run} --paths {one}",
    "eval of many rows": "eval {run} --paths {rows}",
    "eval of so many": "eval {run} --paths {rows} --batches 99",
    "greedy": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0",
}


@pytest.fixture(scope="module")
def place(root, whole) -> dict[str, str]:
    """A finished run, a folder of documents, names that stay free, a document, a tokenizer."""
    folder = root / "cli"
    folder.mkdir()
    places = {name: str(folder / name) for name in ("new", "absent", "one", "rows", "words")}
    Path(places["one"]).write_text("one document")
    Path(places["rows"]).write_text("".join(map(str, range(1000))))
    texts = ["a b c d e f g h i j k l m n o p " * 9, "the same words, " * 18]
    train_bpe(texts, 280, places["words"])
    return places | {"run": str(whole.folder), "text": whole.run.data.paths[0]}


def contents(place) -> dict[Path, bytes]:
    roots = map(Path, (place["run"], place["text"], Path(place["new"]).parent))
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if "tensorboard" not in path.parts}


@pytest.fixture(scope="module")
def answers(place) -> dict[str, tuple[int, str, str]]:
    """The answers to all commands of GOOD and BAD, and under "files" the files before and after."""
    found, before = {}, contents(place)
    for name, line in ({line: line for line in BAD} | GOOD).items():
        words = [word.format(**place) for word in line.split()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "100")
            for package in ("wandb", "lm_eval"):
                patch.setitem(sys.modules, package, None)  # not installed
            if words[:1] == ["CUDA"]:  # the default device pretends to be one
                patch.setattr(choose, "platform_of", lambda mesh=None: "cuda")
                words = words[1:]
            found[name] = by_command(*words)
    return found | {"files": (0, before, contents(place))}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_sentence(answers, place, line):
    code, out, err = answers[line]
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"dsv3: .{,390}\n", err), err
    assert BAD[line].format(**place) in err


def test_bad_input_writes_nothing(answers, place):
    _, before, after = answers["files"]
    assert before == after
    assert not Path(place["new"]).exists() and not Path(place["absent"]).exists()


def test_a_help_text_fits_two_screens(answers):
    """A screen has 24 lines of 100 columns. The text explains own options, and lists a run's."""
    for command in COMMANDS:
        code, out, err = answers[f"help of {command}"]
        assert (code, err) == (0, "")
        rows = sum(max(1, -(-len(line) // 100)) for line in out.splitlines())
        assert 5 < rows <= 48, command
    assert answers["long train sft"][:1] == answers["long generate"][:1] == (0,)
    verbose, out = answers["long help"][1], answers["help of train"][1]
    assert "--optim.learning-rate" in verbose and "  learning-rate=0.003" in out
    assert "--model.qk-norm" in verbose and "  no-qk-norm" in out


def test_options_have_several_spellings():
    for words in (
        "--optim.learning-rate 0.5 --data.batch-size 4 --steps 50 --execution.layout.fsdp",
        "--lr 0.5 --batch-size=4 --steps=50 --fsdp",
        "optim.lr=0.5 data.batch_size=4 steps=50 layout.fsdp=true",
        "learning_rate=0.5 --data.batch_size 4 steps=50 --layout.fsdp=True",
    ):
        run = train.options(["tiny", "--out", "new", *words.split()]).run
        assert (run.optim.learning_rate, run.data.batch_size, run.steps) == (0.5, 4, 50)
        assert run.execution.layout.fsdp


def test_the_value_of_an_option_is_no_setting():
    names = options.names_of(train.Train)
    for line in ("--out steps=50", "--data.template thinking=true", "--out=steps=50"):
        assert options.spelled(line.split(), names) == line.split()
    assert options.spelled(["no-fsdp=true"], names) == ["--execution.layout.no-fsdp"]
    assert options.spelled(["--layout.fsdp=false"], names) == ["--execution.layout.no-fsdp"]


def test_a_runs_file_is_a_recipe(whole):
    run = read_run(whole.folder)
    for place in (whole.folder, whole.folder / "run.json"):
        words = ["--config", str(place), "--out", "new"]
        assert train.options(words).run == train.options([*words, "--start", "None"]).run == run
        changed = train.options([*words, "--lr", "0.5", "steps=3"]).run
        assert changed == replace(run, steps=3, optim=replace(run.optim, learning_rate=0.5))


def test_every_command_is_a_file_and_in_the_usage(answers):
    files = {path.stem for path in Path(cli.__file__).parent.glob("[a-z]*.py")}
    parts = {"common", "demo_end", "main", "options", "sample", "tokenize", "trackers"}
    assert files - parts == cli.COMMANDS.keys()
    code, out, err = answers["help"]
    assert (code, err) == (0, "") and all(f"\n  {command} " in out for command in cli.COMMANDS)
    assert ", ".join(MODELS) in out and out.count("\n") < 30


def test_info_is_the_reports_model(answers):
    code, out, err = answers["info"]
    assert (code, err) == (0, "")
    for words in (
        "total parameters  .*671B\n",
        r"active parameters  .*36\.63B a token \(5\.5%\)",
        r"MTP modules  .*11\.61B more",
        r"cache  .*70\.27KB a token \(bfloat16",
    ):
        assert re.search(rf"^ *{words}", out, re.MULTILINE), words
    code, out, err = answers["changed info"]
    assert (code, err) == (0, "") and "v3, changed" in out and "MTP" not in out
    assert re.search(r"cache +140\.5KB a token \(float32", out)


@pytest.mark.parametrize("name, platform", [("kernels here", "cpu"), ("kernels of CUDA", "cuda")])
def test_kernels_are_listed_with_the_one_that_runs_here(answers, name, platform):
    code, out, err = answers[name]
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "") and f"kernels='auto' on {platform}, float32" in out
    chosen = choose.prepare(Execution(), platform=platform).chosen()
    assert all(rows[op].split()[0] == chosen[op] for op in table.TABLE)


def test_eval_says_what_training_said(answers, whole):
    code, out, err = answers["eval"]
    assert (code, err) == (0, "")
    row = [row for row in rows_of(whole.folder) if "val_loss" in row][-1]
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["step"] == str(whole.run.steps)
    for name in ("val_loss", "val_bits_per_byte", "max_vio_global"):
        assert lines[name] == f"{row[name]:.4f}"
    assert lines["mtp_acceptance"] == f"{row['mtp_acceptance'][0]:.4f}"
    for domain, bits in row["bits_per_byte_by_domain"].items():
        assert f"{domain} {bits:.4f}" in lines["bits_per_byte_by_domain"]
    note, exact, rounded = out.splitlines()[-3:]
    assert "documents attend to one another" in note and "differ from val_loss" in note
    assert re.match(
        r"through float32 cache .* \(\+0\.000%\), greedy tokens the same 100\.00%", exact
    )
    assert re.match(r"through int8 cache .*%\), greedy tokens the same \d+\.\d\d%", rounded)


def test_eval_reads_all_of_other_text(answers, whole):
    row = one_row([*b"one document", ByteTokenizer().eos_id])
    loss = evaluate(load_run(whole.folder).model, [row], ByteTokenizer())["val_loss"]
    assert f"val_loss                  {loss:.4f}\n" in answers["eval of a document"][1]
    assert answers["eval of many rows"] == answers["eval of so many"]


def test_generate_is_greedy_decoding_and_names_the_kernels(answers, whole):
    code, out, err = answers["greedy"]
    model, tokenizer = load_run(whole.folder).model, ByteTokenizer()
    assert (code, err) == (0, model.kernels.describe() + "\n")
    (tokens,) = decode(model, [tokenizer.encode("abc")], 20, stop_tokens=(tokenizer.eos_id,)).tokens
    assert out == "abc" + tokenizer.decode(tokens) + "\n" and len(tokens) > 3


@pytest.mark.parametrize("of_terminal", [True, False])
def test_codes_of_a_model_or_a_folder_are_visible_on_a_terminal(of_terminal, monkeypatch):
    """Titles, the clipboard, letters' direction; line ends stay. A pipe gets the text as it is."""
    text, seen = "\x1b]52;c;\x1b\\ \x9b2J \u202e é\n", "\\x1b]52;c;\\x1b\\ \\x9b2J \\u202e é\n"
    stream = io.StringIO()
    stream.isatty = lambda: of_terminal
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "dumb")
    say(text)
    text_console().print(text)
    assert stream.getvalue() == (seen if of_terminal else text) + seen + "\n"


def test_a_platform_without_devices_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    of_jax = compile("assert None", ".../xla_bridge.py", "exec")
    assert guarded(lambda: exec(of_jax)) == 2
    assert capsys.readouterr().err.startswith("dsv3: JAX_PLATFORMS='cuda' finds no device here")


CACHE, PLATFORMS = "JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS"
MEMORY, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
MOST, KEPT = {MEMORY: "0.92"}, "dsv3_jax/programs"
SETTINGS = [  # an installed compiler, device files, the user's variables, ours
    (None, [], {}, MOST),
    ("libtpu", [], {}, MOST | {PLATFORMS: "cpu"}),  # JAX would look for the device
    ("libtpu", [], {PLATFORMS: "tpu"}, MOST),
    ("libtpu", ["/dev/accel0"], {}, MOST | {CACHE: KEPT}),
    (None, ["/dev/nvidia0"], {OLD: ".5"}, {CACHE: KEPT}),  # JAX refuses to start with both names
    (None, ["/dev/nvidia0"], {MEMORY: ".5", CACHE: "mine"}, {}),
    (None, ["/dev/nvidia0"], {PLATFORMS: "cpu"}, MOST),
]


@pytest.mark.parametrize("compiler, nodes, given, ours", SETTINGS)
def test_what_jax_reads_at_its_start_is_set_unless_the_user_says_otherwise(
    monkeypatch, tmp_path, compiler, nodes, given, ours
):
    before, given = jax.config.jax_compilation_cache_dir, {"XDG_CACHE_HOME": str(tmp_path)} | given
    monkeypatch.setattr(cli.sys, "platform", "linux")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == compiler or None)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: nodes)
    monkeypatch.setattr(cli.os, "environ", dict(given))
    jax.config.update("jax_compilation_cache_dir", given.get(CACHE))
    try:
        for settle in (cli.leave_out_absent_devices, cli.take_gpu_memory, cli.keep_programs):
            settle()
        assert jax.config.jax_compilation_cache_dir == cli.os.environ.get(CACHE)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    expected = {name: value.replace(KEPT, f"{tmp_path}/{KEPT}") for name, value in ours.items()}
    assert cli.os.environ == given | expected


def test_training_takes_all_devices_but_a_cpus(monkeypatch, capsys):
    tiny = recipe("tiny")
    assert all_devices(tiny) is None and capsys.readouterr().out == ""
    monkeypatch.setattr(choose, "platform_of", lambda mesh=None: "cuda")
    assert dict(all_devices(tiny).shape) == {"data": 8, "expert": 1, "tensor": 1}
    assert capsys.readouterr().out == "training on the 8 devices here; --mesh data=1 uses one\n"
    odd = replace(tiny, optim=replace(tiny.optim, microbatches=2))
    with pytest.raises(ConfigError, match="batch_size/microbatches=4 rows"):
        all_devices(odd)
