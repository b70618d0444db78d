"""The command line: what is wrong gets one sentence and exit code 2, and nothing is written over.

All commands run in one process of their own, without the tests' import hook, which would refuse wrong types in its own
words before the command line can.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import cheap_compiles, environment, finished, flags, rows_of, start

from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.decoding.generate import generate
from dsv3_jax.training.checkpoint import claim, load_model

# Reads a list of commands, answers with a list of [exit code, stdout, stderr].
SERVER = """
import contextlib, io, json, sys, traceback
from dsv3_jax.cli import main as cli
answers = []
for argv in json.load(sys.stdin):
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

COMMANDS = ("demo", "train", "eval", "generate", "bench", "convert", "plan", "info", "tokenizer")

# name: (command, what the sentence must hold). {…} are the paths of `Place`.
BAD = {
    "command": ("fly", "'fly' is not one of demo, train"),
    "option": ("--fly", "'--fly'"),
    "preset": ("train v9 --out {new}", "'v9' is not one of tiny"),
    "preset of info": ("info v9", "'v9' is not one of tiny"),
    "no preset": ("train --out {new}", "needs the name of a preset"),
    "no folder": ("train tiny", "--out"),
    "key": ("train tiny --out {new} --model.foo 3", "--model.foo"),
    "key of info": ("info tiny --foo 3", "--foo"),
    "type": ("train tiny --out {new} --steps abc", "abc"),
    "choice": ("train tiny --out {new} --model.router best", "best"),
    "too many experts": ("train tiny --out {new} --model.experts-per-token 99", "experts_per_token=99"),
    "groups": ("train tiny --out {new} --model.num-groups 3", "num_groups=3 does not divide num_experts=16"),
    "odd rope": ("info tiny --rope-head-dim 7", "rope_head_dim=7 is odd"),
    "too long": ("train tiny --out {new} --data.seq-len 4096", "seq_len=4096 is more than"),
    "microbatches": ("train tiny --out {new} --optim.microbatches 3", "microbatches=3 does not divide"),
    "mesh": ("train tiny --out {new} --mesh rows=2", "mesh 'rows=2' is not of the form data=N,expert=N"),
    "preset of plan": ("plan v9", "'v9' is not one of tiny"),
    "mesh of plan": ("plan tiny --mesh rows=2", "mesh 'rows=2' is not of the form data=N,expert=N"),
    "memory": ("plan tiny --memory 80", "memory '80' is not of the form 80GB or 95.7GiB"),
    "device": ("plan tiny --device abacus", "abacus"),
    "no trunk": ("train tiny --out {new} --trunk {absent}", "{absent} holds no run"),
    "trunk without checkpoint": ("train tiny --out {new} --trunk {claimed}", "{claimed} holds no checkpoint"),
    "another trunk": ("train tiny --out {new} --trunk={run} --model.num-heads 4", "{run} has model.num_heads 2, not 4"),
    "trunk of another vocabulary": (
        "train tiny --out {new} --trunk {run} --model.vocab-size 300",
        "{run} has model.vocab_size 260, not 300",
    ),
    "trunk of other tokens": (
        "train tiny --out {new} --trunk {run} --data.tokenizer {words}",
        "{run} has the tokenizer 'bytes', whose ids are not those of '{words}'",
    ),
    "trunk without heads": (
        "train tiny --out {new} --trunk {run} --model.mtp-depth 0",
        "mtp_depth=0 leaves nothing to train on the frozen trunk '{run}'",
    ),
    "option without value": ("train tiny --out {new} --trunk", "--trunk"),
    "no start": ("train tiny --out {new} --start {absent}", "{absent} holds no run"),
    "start without checkpoint": ("train tiny --out {new} --start {claimed}", "the run {claimed} holds no checkpoint"),
    "start of another model": ("train tiny --out {new} --start={run} --model.dim 12", "{run} has model.dim 8, not 12"),
    "start and trunk": ("train tiny --out {new} --start {run} --trunk {run}", "start='{run}' or on trunk='{run}'"),
    "two EAGLE heads": ("info tiny --mtp-kind eagle --mtp-depth 2", "mtp_depth=2 must be 1"),
    "no data": ("train tiny --out {new} --data.paths {absent}", "{absent}"),
    "empty file": ("train tiny --out {new} --data.paths {empty}", "{empty}"),
    "empty folder": ("train tiny --out {new} --data.paths {hollow}", "{hollow}"),
    "not UTF-8": ("train tiny --out {new} --data.paths {latin}", "{latin} is not UTF-8: byte 3 is 0xe9"),
    "one document": ("train tiny --out {new} --data.paths {one}", "leave none for training"),
    "no tokenizer": ("train tiny --out {new} --data.paths {text} --data.tokenizer {absent}", "{absent}"),
    "no tokenizer either": ("train tiny --out {new} --data.paths {text} --data.tokenizer {one}", "{one}"),
    "large tokenizer": (
        "train tiny --out {new} --data.paths {text} --data.tokenizer {words}",
        "the tokenizer has 280 ids, more than the model's vocab_size=260",
    ),
    "another run": ("train tiny --out {run}", "its data.batch_size is 4, not "),
    "other files": ("train tiny --out {text} --data.paths {text}", "{text} holds other files"),
    "a file": ("train tiny --out {one} --data.paths {text}", "{one} is a file"),
    "eval of nothing": ("eval {absent}", "{absent} holds no run"),
    "eval of no checkpoint": ("eval {claimed}", "{claimed} holds no checkpoint"),
    "eval of no batches": ("eval {run} --batches 0", "batches=0"),
    "eval of no data": ("eval {run} --paths {absent}", "{absent}"),
    "generate from nothing": ("generate {text}", "{text} holds no run"),
    "generate from no checkpoint": ("generate {claimed}", "{claimed} holds no checkpoint"),
    "long prompt": ("generate {run} --prompt " + "x" * 70, "70 tokens and 256 new ones do not fit"),
    "no prompt": ("generate {run} --prompt=", "prompt 0 is empty"),
    "temperature": ("generate {run} --max-new-tokens 4 --temperature -1", "temperature=-1.0"),
    "top p": ("generate {run} --max-new-tokens 4 --top-p 0", "top_p=0.0 is outside"),
    "no cache": ("generate {run} --max-new-tokens 4 --cache best", "best"),
    "no cache dtype": ("generate {run} --max-new-tokens 4 --cache-dtype int3", "int3"),
    "no draft length": ("generate {run} --max-new-tokens 4 --draft mtp --draft-length 0", "draft_length=0 is below 1"),
    "long draft": ("generate {run} --max-new-tokens 4 --draft mtp --draft-length 99", "draft_length=99 does not fit"),
    "draft of nothing": ("generate {run} --max-new-tokens 4 --draft {absent}", "{absent} holds no run"),
    "no benchmark": ("bench", "needs the name of a benchmark: there is decode"),
    "benchmark": ("bench fly {run}", "benchmark 'fly' is not there: there is decode"),
    "bench of nothing": ("bench decode {absent}", "{absent} holds no run"),
    "bench of no cache": ("bench decode {run} --cache best", "best"),
    "bench of no new tokens": ("bench decode {run} --new-tokens 1", "new_tokens=1"),
    "convert nothing": ("convert {absent} {new}", "{absent} is neither a run"),
    "convert a run to a run": ("convert {run} {new} --to run", "{run} is a run already"),
    "convert to what is there": ("convert {run} {text}", "{text} is there already"),
    "convert to no dtype": ("convert {run} {new} --dtype int8", "int8"),
    "tokenizer is there": ("tokenizer {one} --paths {text}", "{one} is there already"),
    "small vocabulary": ("tokenizer {new} --paths {text} --vocab-size 100", "vocab_size=100"),
    "tokenizer of no data": ("tokenizer {new} --paths {absent}", "{absent}"),
}
GOOD = {
    **{f"help of {command}": f"{command} --help" for command in COMMANDS},
    "help of bench decode": "bench decode --help",
    "help": "--help",
    "nothing": "",
    "info": "info v3",
    "changed info": "info v3 --mtp-depth 0",
    "info of heads": "info v3 --mtp-kind medusa --mtp-depth 3",
    "eval": "eval {run} --batches 2",
    "eval of caches": "eval {run} --batches 1 --cache-dtype int8",
    "greedy": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0",
    "drafted": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0 --draft mtp --draft-length 2",
    "on a mesh": "generate {run} --prompt abc --max-new-tokens 20 --temperature 0 --mesh data=2,expert=2,tensor=2",
    "tokenizer": "tokenizer {made} --paths {text} --vocab-size 280",
    "tokenizer again": "tokenizer {made} --paths {text} --vocab-size 270 --force",
}


@dataclass(frozen=True)
class Place:
    """Files that the commands meet."""

    run: str  # a finished run
    text: str  # a folder of documents
    new: str  # nothing yet, and never
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
    with cheap_compiles(root):
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
    """What every command of GOOD and BAD answers, and under "files" what was there before and after."""
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
        ("eval", ["--batches", "--paths"]),
        ("generate", ["--prompt", "--temperature", "--top-p", "--mesh"]),
        ("bench", ["dsv3 bench decode RUN"]),
        ("bench decode", ["--batch", "--cache-dtype", "--draft-length", "--json"]),
        ("convert", ["--to", "--dtype", "--shard-mb", "--no-mtp", "--allow-nonfinite"]),
        ("plan", ["--mesh", "--decode-batch", "--device", "--memory", "--target", "--num-experts", "--layout.fsdp"]),
        ("info", ["--mtp-depth", "--num-experts"]),
        ("tokenizer", ["--vocab-size", "--force"]),
    ],
)
def test_help_lists_options(answers, command, options):
    code, out, err = answers[f"help of {command}"]
    assert (code, err) == (0, "")
    for option in options:
        assert option in out


def test_help_lists_commands(answers):
    for name in ("help", "nothing"):
        code, out, err = answers[name]
        assert (code, err) == (0, "")
        assert all(f"\n  {command} " in out for command in COMMANDS)
        assert "tiny, lab, mini, v2_lite, v2, v3" in out


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


def test_generate_is_greedy_decoding(answers, whole):
    code, out, err = answers["greedy"]
    assert (code, err) == (0, "")
    model, words = load_model(whole.folder)[0], ByteTokenizer()
    (tokens,) = generate(model, [words.encode("abc")], 20, stop_tokens=(words.eos_id,)).tokens
    assert out == "abc" + words.decode(tokens) + "\n" and len(tokens) > 3


def test_a_drafted_text_is_the_same_and_tells_how_many_stood(answers):
    code, out, err = answers["drafted"]
    assert code == 0 and out == answers["greedy"][1]
    assert re.fullmatch(r"drafts that stood: \d+% \d+%; \d\.\d\d tokens a step, [\d,]+ tokens/s\n", err)


def test_a_text_from_a_mesh_is_the_same(answers):
    assert answers["on a mesh"] == answers["greedy"]


def test_eval_through_caches(answers):
    code, out, err = answers["eval of caches"]
    assert (code, err) == (0, "")
    exact, rounded = (line for line in out.splitlines() if line.startswith("through"))
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
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"resumed from the checkpoint of step {whole.run.steps}" in out


def test_a_process_of_its_own_ends_with_the_code(root):
    process = start(["info", "v9"], root)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("dsv3: preset 'v9' is not one of tiny") and err.count("\n") == 1
