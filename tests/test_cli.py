"""The command line: bad input gets one sentence and exit code 2, and nothing is overwritten.

All commands run in one process of their own without the tests' import hook, which would refuse wrong types with its own
messages before the command line can.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import cheap_compiles, environment, finished, flags, rows_of, start, unhooked_cli

from dsv3_jax.cli import bench, chat, common, convert, demo, eval, generate, info, runs, stats, tokenizer, train
from dsv3_jax.cli import main as cli
from dsv3_jax.config import Execution, Layout
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.decoding.generate import generate as decode
from dsv3_jax.kernels import choose
from dsv3_jax.planning.plan import PlanOptions
from dsv3_jax.presets import MODELS
from dsv3_jax.report.progress import Progress
from dsv3_jax.training.checkpoint import load_run
from dsv3_jax.training.run_folder import claim

# Reads a list of commands, answers with a list of [exit code, stdout, stderr]. CUDA before a command pretends that the
# default device is one.
SERVER = """
import contextlib, io, json, sys, traceback
from dsv3_jax.cli import main as cli
from dsv3_jax.kernels import choose
platform_of, answers = choose.platform_of, []
for argv in json.load(sys.stdin):
    choose.platform_of = platform_of
    if argv and argv[0] == "CUDA":
        choose.platform_of, argv = lambda mesh=None: "cuda", argv[1:]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    answers.append([code, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
"""

# Command: its options.
OPTIONS = {
    "demo": demo.Demo,
    "train": train.Train,
    "eval": eval.Eval,
    "stats": stats.Stats,
    "generate": generate.Generate,
    "chat": chat.Chat,
    "bench decode": bench.Decode,
    "convert": convert.Convert,
    "runs check": runs.Check,
    "plan": PlanOptions,
    "info": info.Info,
    "tokenizer": tokenizer.TokenizerArgs,
}

# name: (command, what the sentence must hold). {…} are the paths of `Place`.
BAD = {
    "command": ("fly", "command 'fly' is not one of demo, train"),
    "near command": ("trian tiny", "did you mean 'train'?"),
    "option": ("--fly", "'--fly'"),
    "preset": ("train v9 --out {new}", "'v9' is not one of tiny"),
    "preset of info": ("info v9", "'v9' is not one of tiny"),
    "near preset": ("train tinny --out {new}", "did you mean 'tiny'?"),
    "no preset": ("train --out {new}", "argument PRESET is missing"),
    "no folder": ("train tiny", "option '--out' is missing"),
    "no run": ("eval", "argument RUN is missing"),
    "one argument too many": ("eval {run} more", "argument 'more' is one too many"),
    "key": ("train tiny --out {new} --model.foo 3", "option '--model.foo' is not one of dsv3 train"),
    "key of info": ("info tiny --foo 3", "option '--foo' is not one of dsv3 info"),
    "near key": ("train tiny --out {new} --model.num-expert=3", "did you mean '--model.num-experts'?"),
    "nested key": ("train tiny --out {new} --learning-rate 3", "did you mean '--optim.learning-rate'?"),
    "deeply nested key": ("train tiny --out {new} --fsdp", "did you mean '--execution.layout.fsdp'?"),
    "key of another group": ("train tiny --out {new} --model.steps 3", "did you mean '--steps'?"),
    "moved dtype": (
        "train tiny --out {new} --model.compute-dtype bfloat16",
        "option '--model.compute-dtype' is --execution.compute-dtype now",
    ),
    "moved remat": ("train tiny --out {new} --model.remat full", "'--model.remat' is --execution.remat now"),
    "moved dispatch": ("train tiny --out {new} --model.dispatch dense", "is --execution.kernels now, as in"),
    "moved layout": ("train tiny --out {new} --model.layout.fsdp", "is --execution.layout.fsdp now"),
    "moved exchange": ("plan tiny --layout.exchange gather", "'--layout.exchange' is --layout.expert-comm now"),
    "moved slack": ("info tiny --layout.slack 2", "is --execution.layout.capacity-slack now"),
    "no memory": ("train v3 --out {new}", "training state of 8.192 TB does not fit in this host's memory of "),
    "no memory for means in float32": (
        "train v3 --out {new} --optim.moments-dtype float32",
        "training state of 10.92 TB does not fit in this host's memory of ",
    ),
    "kernels": ("train tiny --out {new} --execution.kernels best", "kernels='best' is not one of auto"),
    "kernels of an op": (
        "train tiny --out {new} --execution.kernels product=dense",
        "'dense' is not one of cpu, xla, ",
    ),
    "kernels of another device": (
        "CUDA train tiny --out {new} --execution.kernels cpu",
        "kernels='cpu' is not available on cuda in precision='none': ",
    ),
    "kernels of another dtype": (
        "train tiny --out {new} --execution.kernels cpu --execution.compute-dtype bfloat16",
        "kernels='cpu' does not serve causal_attention in bfloat16 with devices=1: it is for float32 on one device",
    ),
    "kernels of another precision": (
        "train tiny --out {new} --execution.kernels cpu --execution.precision fp8",
        "kernels='cpu' is not available on cpu in precision='fp8': grouped_swiglu has fp8; use 'auto' or 'xla'",
    ),
    "precision": ("train tiny --out {new} --execution.precision fp16", "fp16"),
    "kernels for one device": (
        "train tiny --out {new} --execution.kernels cpu --mesh data=2",
        "kernels='cpu' does not serve causal_attention in float32 with devices=2",
    ),
    "kernels to generate": (
        "CUDA generate {run} --kernels blocks",
        "kernels='blocks' is not available on cuda in precision='none': ",
    ),
    "kernels to evaluate": ("eval {run} --kernels best", "kernels='best' is not one of auto"),
    "kernels for stats": ("stats {run} --out {new} --kernels best", "kernels='best' is not one of auto"),
    "kernels to time": ("bench decode {run} --kernels best", "kernels='best' is not one of auto"),
    "kernels to list": (
        "CUDA info tiny --kernels --execution.kernels cpu",
        "kernels='cpu' is not available on cuda in precision='none': ",
    ),
    "type": ("train tiny --out {new} --steps abc", "option '--steps': 'abc' is not a whole number"),
    "number": ("train tiny --out {new} --optim.eps abc", "option '--optim.eps': 'abc' is not a number"),
    "choice": ("train tiny --out {new} --model.attention best", "option '--model.attention': 'best' is not one of mla"),
    "near choice": ("train tiny --out {new} --execution.remat ful", "did you mean 'full'?"),
    "router": ("train tiny --out {new} --model.router sigmod", "router='sigmod' is not one of sigmoid"),
    "long value": ("train tiny --out {new} --model.attention " + "x" * 200, "'" + "x" * 200 + "'"),
    "no value": ("train tiny --out {new} --data.paths --steps 3", "option '--data.paths' needs a value"),
    "too many experts": ("train tiny --out {new} --model.experts-per-token 99", "experts_per_token=99"),
    "groups": ("train tiny --out {new} --model.num-groups 3", "num_groups=3 does not divide num_experts=16"),
    "odd rope": ("info tiny --rope-head-dim 7", "rope_head_dim=7 is odd"),
    "too long": ("train tiny --out {new} --data.seq-len 4096", "seq_len=4096 is more than"),
    "microbatches": ("train tiny --out {new} --optim.microbatches 3", "microbatches=3 does not divide"),
    "optimizer": (
        "train tiny --out {new} --optim.name moun",
        "optim name='moun' is not one of adamw, muon; did you mean",
    ),
    "mesh": ("train tiny --out {new} --mesh rows=2", "mesh='rows=2' is not of the form data=N,expert=N"),
    "preset of plan": ("plan v9", "'v9' is not one of tiny"),
    "mesh of plan": ("plan tiny --mesh rows=2", "mesh='rows=2' is not of the form data=N,expert=N"),
    "memory": ("plan tiny --memory 80", "memory='80'"),
    "device": ("plan tiny --device abacus", "abacus"),
    "no trunk": ("train tiny --out {new} --trunk {absent}", "folder='{absent}' is neither a run"),
    "trunk without checkpoint": ("train tiny --out {new} --trunk {claimed}", "folder='{claimed}' holds no checkpoint"),
    "another trunk": (
        "train tiny --out {new} --trunk={run} --model.num-heads 4",
        "model.num_heads=4 is not that of trunk='{run}', 2",
    ),
    "trunk of another vocabulary": (
        "train tiny --out {new} --trunk {run} --model.vocab-size 300",
        "model.vocab_size=300 is not that of trunk='{run}', 260",
    ),
    "trunk of other tokens": (
        "train tiny --out {new} --trunk {run} --data.tokenizer {words}",
        "data.tokenizer='{words}' gives ids another meaning than that of trunk='{run}'",
    ),
    "trunk without heads": (
        "train tiny --out {new} --trunk {run} --model.mtp-depth 0",
        "mtp_depth=0 leaves nothing to train on the frozen trunk '{run}'",
    ),
    "option without value": ("train tiny --out {new} --trunk", "option '--trunk' needs a value"),
    "no start": ("train tiny --out {new} --start {absent}", "folder='{absent}' is neither a run"),
    "start without checkpoint": ("train tiny --out {new} --start {claimed}", "folder='{claimed}' holds no checkpoint"),
    "start of another model": (
        "train tiny --out {new} --start={run} --model.dim 12",
        "model.dim=12 is not that of start='{run}', 8",
    ),
    "start and trunk": ("train tiny --out {new} --start {run} --trunk {run}", "start='{run}' or on trunk='{run}'"),
    "learning rate": ("train tiny --out {new} --optim.learning-rate inf", "learning_rate=inf is outside"),
    "two EAGLE heads": (
        "info tiny --mtp-kind eagle --mtp-depth 2",
        "mtp_depth=2 is more than the 1 of mtp_kind='eagle'",
    ),
    "no data": ("train tiny --out {new} --data.paths {absent}", "{absent}"),
    "empty file": ("train tiny --out {new} --data.paths {empty}", "{empty}"),
    "empty folder": ("train tiny --out {new} --data.paths {hollow}", "{hollow}"),
    "not UTF-8": ("train tiny --out {new} --data.paths {latin}", "{latin} is not UTF-8: byte 3 is 0xe9"),
    "one document": ("train tiny --out {new} --data.paths {one}", "val_fraction="),
    "no tokenizer": ("train tiny --out {new} --data.paths {text} --data.tokenizer {absent}", "{absent}"),
    "no tokenizer either": ("train tiny --out {new} --data.paths {text} --data.tokenizer {one}", "{one}"),
    "large tokenizer": (
        "train tiny --out {new} --data.paths {text} --data.tokenizer {words}",
        "vocab_size=260 is below the tokenizer's 280 ids",
    ),
    "another run": ("train tiny --out {run}", "data.batch_size=8 is not that of the run in {run}, 4"),
    "other files": ("train tiny --out {text} --data.paths {text}", "out='{text}' holds other files"),
    "a file": ("train tiny --out {one} --data.paths {text}", "out='{one}' is a file"),
    "eval of nothing": ("eval {absent}", "folder='{absent}' is neither a run"),
    "eval of no checkpoint": ("eval {claimed}", "folder='{claimed}' holds no checkpoint"),
    "eval of no batches": ("eval {run} --batches 0", "batches=0"),
    "eval of no data": ("eval {run} --paths {absent}", "{absent}"),
    "generate from nothing": ("generate {text}", "folder='{text}' is neither a run (no run.json) nor released"),
    "chat with nothing": ("chat {text}", "folder='{text}' is neither a run (no run.json) nor released"),
    "chat without a template": ("chat {run}", "{run} has no chat template"),
    "generate from no checkpoint": ("generate {claimed}", "folder='{claimed}' holds no checkpoint"),
    "long prompt": (
        "generate {run} --prompt " + "x" * 70,
        "max_new_tokens=256 does not fit: the longest prompt has 70",
    ),
    "no prompt": ("generate {run} --prompt=", "prompt 0 is empty"),
    "temperature": ("generate {run} --max-new-tokens 4 --temperature -1", "temperature=-1.0"),
    "top p": ("generate {run} --max-new-tokens 4 --top-p 0", "top_p=0.0 is not"),
    "no cache": ("generate {run} --max-new-tokens 4 --cache best", "best"),
    "no cache dtype": ("generate {run} --max-new-tokens 4 --cache-dtype int3", "int3"),
    "no draft length": (
        "generate {run} --max-new-tokens 4 --draft mtp --draft-length 0",
        "draft_length=0 is not an int of 1 or above",
    ),
    "long draft": (
        "generate {run} --max-new-tokens 4 --draft mtp --draft-length 99",
        "draft_length=99 of up to 99 tokens does not fit",
    ),
    "draft of nothing": ("generate {run} --max-new-tokens 4 --draft {absent}", "folder='{absent}' is neither a run"),
    "no benchmark": ("bench", "the name of a benchmark is missing"),
    "benchmark": ("bench fly {run}", "benchmark 'fly' is not one of decode"),
    "bench of nothing": ("bench decode {absent}", "folder='{absent}' is neither a run"),
    "bench of no cache": ("bench decode {run} --cache best", "best"),
    "bench of no new tokens": ("bench decode {run} --new-tokens 1", "new_tokens=1"),
    "eval of no such step": (
        "eval {run} --step 3",
        "step=3 has no checkpoint in {run}/checkpoints; there are",
    ),
    "generate from no such step": ("generate {run} --step 3", "step=3 has no checkpoint in"),
    "convert no such step": ("convert {run} {new} --step 3", "step=3 has no checkpoint in"),
    "train from no such step": ("train tiny --out {new} --step x", "'x'"),
    "no folder of runs": ("runs list {absent}", "does not exist; name a folder with runs"),
    "subcommand": ("runs chek {run}", "subcommand 'chek' is not one of list, check; did you mean 'check'?"),
    "check of nothing": ("runs check {absent}", "folder='{absent}' holds no run"),
    "convert nothing": ("convert {absent} {new}", "{absent} is neither a run"),
    "convert to what is there": ("convert {run} {text}", "{text} exists and is not an empty folder"),
    "convert to no dtype": ("convert {run} {new} --dtype int8", "int8"),
    "tokenizer is there": ("tokenizer {one} --paths {text}", "out='{one}' exists already"),
    "small vocabulary": ("tokenizer {new} --paths {text} --vocab-size 100", "vocab_size=100"),
    "tokenizer of no data": ("tokenizer {new} --paths {absent}", "{absent}"),
}
GOOD = {
    **{f"help of {command}": f"{command} --help" for command in (*OPTIONS, "bench", "runs")},
    "help": "--help",
    "nothing": "",
    "info": "info v3",
    "changed info": "info v3 --mtp-depth 0",
    "info of heads": "info v3 --mtp-kind medusa --mtp-depth 3",
    "info in float32": "info v3 --execution.compute-dtype float32",
    "kernels here": "info tiny --kernels",
    "kernels of XLA": "info tiny --kernels --execution.kernels xla",
    "kernels of CUDA": "CUDA info tiny --kernels",
    "eval": "eval {run} --batches 2",
    "eval of caches": "eval {run} --batches 1 --cache-dtype int8",
    "greedy": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0",
    "greedy by XLA": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0 --kernels xla",
    "drafted": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0 --draft mtp --draft-length 2",
    "on a mesh": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0 --mesh data=2,expert=2,tensor=2",
    "bench": "bench decode {run} --context 16 --new-tokens 4 --draft none mtp --rounds 1 --kernels xla",
    "check": "runs check {run}",
    "tokenizer": "tokenizer {made} --paths {text} --vocab-size 280",
    "tokenizer again": "tokenizer {made} --paths {text} --vocab-size 270 --force",
}


@dataclass(frozen=True)
class Place:
    """Files for the commands."""

    run: str  # a finished run
    text: str  # a folder of documents
    new: str  # never created
    absent: str
    empty: str
    hollow: str
    latin: str
    one: str
    words: str
    claimed: str
    made: str


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles():
        yield root


@pytest.fixture(scope="module")
def whole(root):
    return finished(root)


@pytest.fixture(scope="module")
def place(root, whole) -> Place:
    folder = root / "cli"
    folder.mkdir()
    names = {name: str(folder / name) for name in Place.__dataclass_fields__}
    place = Place(**names | {"run": str(whole.folder), "text": whole.run.data.paths[0]})
    Path(place.empty).write_text("")
    Path(place.hollow).mkdir()
    Path(place.latin).write_bytes(b"caf\xe9 and more")
    Path(place.one).write_text("one document")
    claim(place.claimed, whole.run)
    from dsv3_jax.data.tokenizer import train_bpe

    train_bpe(["a b c d e f g h i j k l m n o p " * 9, "the same words, the same words " * 9], 280, place.words)
    return place


def contents(place: Place) -> dict[Path, bytes]:
    roots = map(Path, (place.run, place.text, Path(place.new).parent))
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def answers(root, place) -> dict[str, tuple[int, str, str]]:
    """The answers to all commands of GOOD and BAD, and under "files" the files before and after."""
    before = contents(place)
    lines = {name: line for name, (line, _) in BAD.items()} | GOOD
    argv = [[word.format(**vars(place)) for word in line.split()] for line in lines.values()]
    found = subprocess.run(
        [sys.executable, "-c", SERVER], input=json.dumps(argv), env=environment(root), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    files = {"files": (0, before, contents(place))}
    return dict(zip(lines, map(tuple, json.loads(found.stdout)), strict=True)) | files


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(answers, place, name):
    code, out, err = answers[name]
    assert (code, out) == (2, ""), err
    assert err.startswith("dsv3: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert BAD[name][1].format(**vars(place)) in err
    assert len(err) < 400 and not re.search(r"Traceback|╭|│|  ", err), err


def test_bad_input_writes_nothing(answers, place):
    _, before, after = answers["files"]
    made = Path(place.made)
    assert after.pop(made)  # of GOOD
    boards = [path for path in after if "tensorboard" in path.parts]
    assert {p: b for p, b in after.items() if p not in boards} == {p: b for p, b in before.items() if p not in boards}
    assert not Path(place.new).exists() and not Path(place.absent).exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", ["--out", "--short"]),
        ("train", ["--out", "--steps", "--model.router", "--optim.learning-rate", "--data.paths", "--mesh", "--trunk"]),
        ("train", ["--execution.kernels", "--execution.precision", "--execution.layout.fsdp"]),
        ("eval", ["RUN", "--batches", "--paths", "--kernels"]),
        ("stats", ["RUN", "--draws", "--kernels", "--text", "--worth", "--against", "--tokens", "--devices"]),
        ("generate", ["MODEL", "--raw", "--prompt", "--temperature", "--top-p", "--mesh", "--kernels"]),
        ("chat", ["MODEL", "--system", "--draft", "--temperature", "/reset", "conversation again"]),
        ("bench", ["dsv3 bench decode RUN"]),
        ("bench decode", ["--batch", "--cache-dtype", "--draft-length", "--json", "--kernels"]),
        ("runs", ["dsv3 runs [SUBCOMMAND", "check RUN"]),
        ("runs check", ["RUN"]),
        ("convert", ["--step", "--dtype", "--no-mtp", "--allow-nonfinite"]),
        ("plan", ["--mesh", "--decode-batch", "--device", "--memory", "--target", "--num-experts", "--layout.fsdp"]),
        ("info", ["--mtp-depth", "--num-experts", "--kernels", "--execution.compute-dtype"]),
        ("tokenizer", ["--vocab-size", "--force"]),
    ],
)
def test_help_lists_options(answers, command, options):
    code, out, err = answers[f"help of {command}"]
    assert (code, err) == (0, "")
    assert "default: )" not in re.sub(r"[│\s]+", " ", out)
    for option in options:
        assert option in out


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_has_a_help_text(answers, command):
    """In words, and at its own place; the parser and the search for unknown options know the same ones."""
    out = answers[f"help of {command}"][1]
    lines, places = [line.strip() for line in out.splitlines()], {}
    for i, line in enumerate(lines):
        for name in re.findall(r"--[a-z][\w.-]*", line.split("  ")[0]) if line.startswith("--") else ():
            places.setdefault(name, i)  # later ones are within a help text
    assert places.keys() == common.options_of(OPTIONS[command]).keys()
    starts = sorted({*places.values(), len(lines)})
    for name, i in places.items():
        text = " ".join(lines[i : starts[starts.index(i) + 1]]).split(name, 1)[1]
        text = re.split(r"\((?:default|required)", text)[0]
        words = re.findall(r"(?<![\w{|\[(,.-])[a-z][a-z']+(?![\w}|.-])", text)
        assert len(words) >= 2, f"{name} has no help text: {text}"


@pytest.mark.parametrize("command", OPTIONS)
def test_a_help_text_is_one_paragraph(answers, command):
    """A line ends where the next word has no room, and not where the source's line ended."""
    padded = [line for line in answers[f"help of {command}"][1].splitlines() if len(line) == 80]
    assert padded or command == "runs check"  # whose texts are short
    for line, after in itertools.pairwise(padded):
        inset = len(line) - len(line.lstrip())
        if inset >= 6 and after[:inset].isspace() and not after[inset].isspace():
            assert len(line.rstrip()) + 1 + len(after.split()[0]) > 80, (line, after)


def test_every_command_is_a_file_and_in_the_usage(answers):
    files = {path.stem for path in Path(cli.__file__).parent.glob("[a-z]*.py")} - {"common", "main"}
    assert files == cli.COMMANDS.keys()
    for name in ("help", "nothing"):
        code, out, err = answers[name]
        assert (code, err) == (0, "")
        assert all(f"\n  {command} " in out for command in cli.COMMANDS)
        assert ", ".join(MODELS) in " ".join(out.split())


def test_info_is_the_reports_model(answers):
    code, out, err = answers["info"]
    assert (code, err) == (0, "")
    lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines())
    assert lines["model"] == "v3"
    assert lines["total parameters"] == "671B"
    assert lines["active parameters"].startswith("36.63B a token (5.5%)")
    assert lines["routed experts"] == "653.9B"
    assert lines["MTP modules"].startswith("11.61B more")
    assert "35136 numbers" in lines["cache"] and lines["cache"].startswith("70.27KB a token (bfloat16")
    assert "71.1 times as much" in lines["cache, as MHA"]
    code, out, err = answers["info of heads"]
    assert (code, err) == (0, "") and re.search(r"Medusa heads +154\.1M more parameters, 2\.934B active", out)
    code, out, err = answers["changed info"]
    assert (code, err) == (0, "") and "v3, changed" in out and "MTP" not in out
    code, out, err = answers["info in float32"]
    assert (code, err) == (0, "") and re.search(r"cache +140\.5KB a token \(float32", out)


def test_kernels_are_listed_with_the_one_that_runs_here(answers):
    for name, platform, kernels in (
        ("kernels here", "cpu", "auto"), ("kernels of XLA", "cpu", "xla"), ("kernels of CUDA", "cuda", "auto"),
    ):  # fmt: skip
        code, out, err = answers[name]
        assert (code, err) == (0, "")
        title, heads, *lines = out.splitlines()
        assert title.startswith(f"kernels='{kernels}' on {platform}, float32") and "runs here" in heads
        chosen = choose.prepare(Execution(kernels=kernels), platform=platform)
        said = [line.split()[:2] for line in lines[: len(choose.TABLE)]]
        assert said == [list(pair) for pair in chosen.chosen().items()]
        listed = ["not available: " if "cpu" in dict(chosen.missing) else "ready; they are for float32 on one device"]
        states = [line for line in lines if line.startswith("The C++ kernels (cpu) are ")]
        assert [any(state in line for line in states) for state in listed] == [(platform, kernels) == ("cpu", "auto")]


def test_execution_has_options():
    unhooked_cli()
    argv = "tiny --out x --execution.kernels xla --execution.compute-dtype bfloat16 --execution.layout.fsdp"
    options = sys.modules["dsv3_jax.cli.train"].options([*argv.split(), "--execution.precision", "mxfp8"])
    assert options.run.execution == Execution("bfloat16", kernels="xla", layout=Layout(fsdp=True), precision="mxfp8")


def test_eval_says_what_training_said(answers, whole):
    code, out, err = answers["eval"]
    assert (code, err) == (0, "")
    (row,) = [row for row in rows_of(whole.folder) if row["step"] == whole.run.steps and "val_loss" in row]
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["step"] == str(whole.run.steps)
    for name in ("val_loss", "val_bits_per_byte", "max_vio_global"):
        assert lines[name] == f"{row[name]:.4f}"
    assert lines["mtp_acceptance"] == f"{row['mtp_acceptance'][0]:.4f}"
    for domain, bits in row["bits_per_byte_by_domain"].items():
        assert f"{domain} {bits:.4f}" in lines["bits_per_byte_by_domain"]


def test_generate_is_greedy_decoding_and_names_the_kernels(answers, whole):
    code, out, err = answers["greedy"]
    model, tokenizer = load_run(whole.folder).model, ByteTokenizer()
    assert (code, err) == (0, model.kernels.describe() + "\n")
    (tokens,) = decode(model, [tokenizer.encode("abc")], 20, stop_tokens=(tokenizer.eos_id,)).tokens
    assert out == "abc" + tokenizer.decode(tokens) + "\n" and len(tokens) > 3


def test_a_drafted_text_is_the_same_and_tells_how_many_drafts_were_accepted(answers):
    code, out, err = answers["drafted"]
    assert code == 0 and out == answers["greedy"][1]
    kernels, drafts = err.splitlines()
    assert kernels.startswith("kernels for cpu: ")
    assert re.fullmatch(r"drafts accepted: \d+% \d+%; \d\.\d\d tokens a step, [\d,]+ tokens/s", drafts)


def test_a_text_from_a_mesh_or_other_kernels_is_the_same(answers):
    for name in ("on a mesh", "greedy by XLA"):
        code, out, err = answers[name]
        assert (code, out) == answers["greedy"][:2]
        assert err.startswith("kernels for cpu: ") and " cpu: " not in err.removeprefix("kernels for cpu:")


def test_bench_shows_kernels_and_progress(answers):
    code, out, err = answers["bench"]
    assert code == 0 and out.startswith("kernels for cpu: ")
    cells = [f"batch 1, context 16, cache latent float32, draft {draft}" for draft in ("none", "mtp 1")]
    *lines, last = err.splitlines()
    assert lines == [f"compile {i}/2: {cell}" for i, cell in enumerate(cells, 1)] + [f"round 1/1: {c}" for c in cells]
    assert "bandwidth" in last


def test_steps_are_printed_with_the_time_left(capsys):
    with Progress(400) as progress:
        for step in (1, 11, 400):
            progress.update(step, {"loss": 1.0})
    first, later, last = capsys.readouterr().out.splitlines()
    assert first == "step 1  loss 1.000" and last == "step 400  loss 1.000"
    assert re.fullmatch(r"step 11  loss 1\.000  \d+ seconds? left", later)


def test_check_says_that_checkpoints_are_whole(answers):
    code, out, err = answers["check"]
    assert (code, err) == (0, "")
    assert out.count(": whole, ") == 2 and "metrics.jsonl: " in out


def test_eval_through_caches(answers):
    code, out, err = answers["eval of caches"]
    assert (code, err) == (0, "")
    note, exact, rounded = out.splitlines()[-3:]
    assert "documents attend to one another" in note and "differ from val_loss" in note
    assert re.match(r"through float32 cache +\d\.\d{4} \(\+0\.000%\), greedy tokens the same 100\.00%", exact)
    assert re.match(r"through int8 cache +\d\.\d{4} \([+-]\d\.\d{3}%\), greedy tokens the same \d+\.\d\d%", rounded)


def test_tokenizer_is_made(answers, place):
    code, out, err = answers["tokenizer"]
    assert (code, err) == (0, "") and "280 tokens" in out and re.search(r"\d\.\d\d bytes a token", out)
    code, out, err = answers["tokenizer again"]
    assert (code, err) == (0, "") and "270 tokens" in out
    assert len(json.loads(Path(place.made).read_text())["model"]["vocab"]) == 270


@pytest.mark.long
def test_the_flags_of_a_run_are_the_run(whole, root, tmp_path):
    """Every changed key, given by hand, is the same run: it has the finished run's folder for its own."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    process = start(["train", "tiny", "--out", str(folder), *flags(whole.run)], root)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"resumed from the checkpoint of step {whole.run.steps}" in out


def test_a_process_of_its_own_ends_with_the_code(root):
    process = start(["info", "v9"], root)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("dsv3: preset='v9' is not one of tiny") and err.count("\n") == 1


def test_absent_devices_are_left_out_where_only_their_compilers_are(monkeypatch):
    """The CPU is chosen if there is a compiler, no device, and no wish of the user's."""
    for installed, nodes, wish, chosen in (
        ("libtpu", [], None, "cpu"),
        ("jax_cuda13_plugin", [], None, "cpu"),
        (None, [], None, None),
        ("libtpu", ["/dev/accel0"], None, None),
        ("libtpu", [], "tpu", "tpu"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cli.importlib.util, "find_spec", lambda name, installed=installed: name == installed or None)
            patch.setattr(cli.glob, "glob", lambda pattern, nodes=nodes: nodes)
            patch.setattr(cli.sys, "platform", "linux")
            patch.setattr(cli.sys, "modules", {name: module for name, module in sys.modules.items() if name != "jax"})
            patch.delenv("JAX_PLATFORMS", raising=False)
            if wish is not None:
                patch.setenv("JAX_PLATFORMS", wish)
            cli.leave_out_absent_devices()
            assert cli.os.environ.get("JAX_PLATFORMS") == chosen
            patch.delenv("JAX_PLATFORMS", raising=False)
