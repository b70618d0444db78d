"""What a campaign attacks: commands, the good files that they read, and their usual results."""

import contextlib
import json
import os
import re
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import runs

from dsv3_jax.chat.text_settings import PLAIN_TEMPLATE

LIMIT_S = 60.0  # CPU seconds of a command above its usual time


class Command(NamedTuple):
    """A command's words, and the folder that it writes."""

    words: str
    weight: int = 1  # among the commands; above 1 it is fast, and its options are tried too
    out: str = "out"

    @property
    def argv(self) -> list[str]:
        return self.words.split()

    @property
    def resumes(self) -> bool:  # from what a killed one leaves
        return self.words.startswith(("train", "data"))


def train(out: str, steps: int = runs.STEPS) -> str:
    flags = " ".join(runs.flags(runs.make_run("text", keep=3, steps=steps)))
    return f"train tiny --out {out} --data.tokenizer tokenizer.json {flags}"


ROWS = "--row-tokens 16 --val-fraction 0.3 --shard-mb 0.002"
TOKENIZE = f"data tokenize text --tokenizer tokenizer.json {ROWS}"
CHATS = "--format chat --start released --val-fraction 0.3"
MORE = "--out out --steps 3 --save-every 1 --log-every 1"
PROMPTS = "--prompts prompts.jsonl --samples 2 --max-new-tokens 4 --batch-size 4"
COMMANDS = (
    Command("tokenizer out --vocab-size 262 --paths text", 3),
    Command(f"{TOKENIZE} --out out", 9),
    Command(f"data tokenize chats.jsonl --out out {CHATS}", 6),
    Command("data check shards", 8),
    Command("runs list made", 8),
    Command("runs check made/run", 5),
    Command("convert released out", 2),
    Command("convert made/run out --dtype float32", 4),
    Command(f"{train('out')} --data.format shards --data.paths shards"),
    Command(train("made/run", 2 * runs.STEPS), out="made/run"),
    Command(f"train sft --start released --data.paths chats.jsonl --data.seq-len 64 {MORE}"),
    Command("eval made/run --batches 1"),
    Command("stats made/run --out out --draws 5 --batches 1"),
    Command("generate made/run --max-new-tokens 8", 2),
    Command("generate released --max-new-tokens 8", 2),
    Command(f"generate made/run --out out {PROMPTS}", 3),
)
# How the good files are made, and which of them commands read.
MAKING = {
    "tokenizer tokenizer.json --vocab-size 260 --paths text": "tokenizer.json|shards|made|released",
    f"{TOKENIZE} --out shards": "shards|made|released",
    train("made/run"): "made|released",
    "convert made/run released --dtype float32": "released",
}


class Answer(NamedTuple):
    """The end of a command."""

    code: int  # or -signal
    out: str
    err: str
    seconds: float
    memory: int  # KiB


class Home:
    """The good files, a copy of them for each trial, and the usual end of each command."""

    def __init__(self, root: Path, beginnings: tuple[str, ...]):
        # the good files are made where the copies will be: a run knows the place of its text
        self.root, self.home, self.folder = root, root / "home", root / "trial"
        self.temporary = root / "tmp"
        self.commands = [x for x in COMMANDS if x.words.startswith(beginnings)]
        self.make_files()
        self.folder.rename(self.home)
        self._usual = dict[Command, tuple[float, dict[Path, str | bytes]]]()

    def make_files(self) -> None:
        """Write texts and chats; by commands a tokenizer, shards, a run and a released folder."""
        runs.write_text(self.folder / "text")
        turns = [
            {"role": "user", "content": "Is it $?"},
            {"role": "assistant", "content": "It is."},
        ]
        for name, record in {
            "chats": {"messages": turns, "tools": [{"name": "add", "arguments": {"a": 1}}]},
            "prompts": {"prompt": "a $", "id": "$"},
            "text/rows": {"text": "row $ x = 1", "domain": "d", "id": "$"},
        }.items():
            lines = [json.dumps(record).replace("$", str(i)) for i in range(40)]
            (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

        asked = " ".join(command.words for command in self.commands)
        for words, read in MAKING.items():
            if re.search(read, asked):
                answer = self.run(words.split())
                assert answer.code == 0, (words, answer)
        if (released := self.folder / "released").exists():
            shutil.copy(self.folder / "tokenizer.json", released)
            settings = {"eos_token": "<eos>", "model_max_length": 64}
            (released / "tokenizer_config.json").write_text(json.dumps(settings))
            (released / "chat_template.jinja").write_text(PLAIN_TEMPLATE)

    def copy(self) -> None:
        """Make a new copy of the good files."""
        for folder in (self.folder, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home, self.folder)
        self.temporary.mkdir()

    def inputs(self, command: Command) -> list[Path]:
        """Files that the words of a command name, or that are below a folder that they name."""
        tops = [self.home / word for word in dict.fromkeys(command.argv)]
        found = [path for top in tops for path in (top, *sorted(top.rglob("*")))]
        return [path.relative_to(self.home) for path in found if path.is_file()]

    def usual(self, command: Command) -> tuple[float, dict[Path, str | bytes]]:
        """Seconds of a command that finds compiled programs, and its result but for what varies."""
        if command not in self._usual:
            results = []
            for _ in range(2):
                self.copy()
                answer = self.run(command.argv)
                assert answer.code == 0, (command, answer)
                results.append(self.result(command).items())
            self._usual[command] = answer.seconds, dict(results[0] & results[1])
        return self._usual[command]

    def result(self, command: Command) -> dict[Path, str | bytes]:
        """What a command wrote, but for checkpoints."""
        top = self.folder / command.out
        found: dict[Path, str | bytes] = {}
        for path in (top, *sorted(top.rglob("*"))):
            if path.is_file() and "checkpoints" not in path.parts:
                found[path] = path.read_bytes()
            if path.name == "metrics.jsonl":
                with contextlib.suppress(ValueError):  # it may be damaged
                    found[path] = str(runs.rows_of(path.parent))  # without the clock
        return found

    def unlike(self, command: Command) -> bool:
        """Whether a result is not the usual one; print the files."""
        found, (_, wanted) = self.result(command), self.usual(command)
        other = sorted(path for path, content in wanted.items() if found.get(path) != content)
        print(*(f"  unlike the usual result: {path}\n" for path in other), sep="", end="")
        return bool(other)

    def parts(self, command: Command) -> list[Path]:
        """Temporary files that are left; a request with --prompts resumes from its own."""
        found = [x for x in self.folder.rglob("*") if re.search(r"\.part|-checkpoint-tmp", x.name)]
        if "--prompts" in command.argv:
            found = [x for x in found if not x.name.startswith(command.out)]
        return [*found, *self.temporary.iterdir()]

    def run(self, argv: list[str], limit: float = 600, kill: float = float("inf")) -> Answer:
        """Run a command to its end, or kill it after some seconds, or beyond some CPU seconds."""
        begin = time.monotonic()
        more = {"TMPDIR": str(self.temporary), "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
        how = {"cwd": self.folder, "env": runs.environment(self.root) | more}
        with (self.root / "out").open("w+") as out, (self.root / "err").open("w+") as err:
            process = runs.start(argv, self.root, stdout=out, stderr=err, **how)
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (int(limit), -1))
            end = threading.Timer(min(kill, 100 + 3 * limit), process.kill)
            end.start()
            _, status, used = os.wait4(process.pid, 0)
            end.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = ((self.root / name).read_text(errors="replace") for name in ("out", "err"))
        return Answer(process.returncode, *texts, time.monotonic() - begin, used.ru_maxrss)
