"""What a campaign attacks: good files, made by the command line, and commands that read them."""

import contextlib
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import runs
from pyarrow import parquet

from dsv3_jax.chat.text_settings import PLAIN_TEMPLATE

LIMIT_S = 30.0  # CPU seconds above a command's usual ones


class Command(NamedTuple):
    """A command's words, and the folder that it writes."""

    words: str
    often: int = 1  # weight among the commands
    stdin: bytes = b""
    code: int = 0
    out: str = "out"

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.words)


def train(out: str, **changes: Any) -> str:
    flags = shlex.join(runs.flags(runs.make_run("text", **{"keep": 3} | changes)))
    return f"train tiny --out {out} --data.tokenizer tokenizer.json {flags}"


TOKENIZE = (
    "data tokenize text --row-tokens 16 --val-fraction 0.3 --tokenizer tokenizer.json "
    "--shard-mb 0.002"
)
MAKE = (
    "tokenizer tokenizer.json --vocab-size 260 --paths text",
    train("run"),
    "convert run released --dtype float32",
    f"{TOKENIZE} --out shards",
)
MORE = "--steps 3 --save-every 1 --log-every 1"
GRPO = (
    "--grpo.checker judge:is_right --grpo.group 2 --grpo.max-new-tokens 4 --data.batch-size 4 "
    "--data.seq-len 32"
)
JUDGE = """import itertools, pathlib
names = {"calls": itertools.count(), "n": -1, "text": "", "row": {}, "right": True}
mood = compile(pathlib.Path("mood.py").read_text(), "mood.py", "exec")
exec(mood, names)

def is_right(text, row):
    names.update(n=next(names["calls"]), text=text, row=row, right=len(text) % 2 == 0)
    exec(mood, names)
    return names["right"]
"""
COMMANDS = (
    Command("tokenizer out --vocab-size 262 --paths text", 3),
    Command(f"{TOKENIZE} --out out", 7),
    Command(
        "data tokenize chats.jsonl --out out --format chat --start released --val-fraction 0.3", 5
    ),
    Command(
        "data tokenize chats.parquet --out out --format chat --start released --val-fraction 0.3", 2
    ),
    Command("data tokenize rows.parquet --out out --row-tokens 16 --val-fraction 0.3", 3),
    Command(f"{TOKENIZE} --out half", 4, out="half"),
    Command("data check shards", 8),
    Command("runs list .", 8),
    Command("runs check run", 5),
    Command("convert released out", 2),
    Command("convert run out --dtype float32", 4),
    Command("info tiny", 2),
    Command("plan tiny --mesh nothing=2", 2, code=2),
    Command("train tiny --data.paths nowhere --out out", 2, code=2),
    Command(f"{train('out')} --data.format shards --data.paths shards", 2),
    Command(train("stopped"), out="stopped"),
    Command(
        f"train sft --start released --data.paths chats.jsonl --out out --data.seq-len 64 {MORE}"
    ),
    Command(f"train grpo --start released --data.paths tasks --out out {GRPO} {MORE}"),
    Command("eval run --batches 1"),
    Command("eval run --tasks tasks --shots 1"),
    Command("stats run --out out --draws 5 --batches 1"),
    Command("generate run --max-new-tokens 8", 2),
    Command("generate released --max-new-tokens 8", 2),
    Command(
        "generate run --prompts tasks/rows.jsonl --samples 2 --max-new-tokens 4 --batch-size 4 "
        "--out out",
        3,
    ),
    Command("chat released --max-new-tokens 8", 2, stdin=b"hello\n/reset\nto be\n"),
)


def make_home(home: Path, server: "Server", log: str) -> None:
    """Write texts and chats, and what `MAKE` makes of them. Args: log: for the touched paths."""
    runs.write_text(home / "text")
    answer = {"role": "assistant", "content": "It is."}
    # all chats differ
    chats = [{"messages": [{"role": "user", "content": f"Is it {i}?"}, answer]} for i in range(40)]
    rows = [{"text": f"row {i} x = 1", "domain": f"d{i % 3}", "id": i} for i in range(9)]
    for name, table in (("rows", rows * 9), ("chats", chats)):
        parquet.write_table(pyarrow.Table.from_pylist(table), home / f"{name}.parquet")
    more = {"domain": "d", "tools": [{"name": "add", "arguments": {"a": 1}}]}
    tasks = [
        {"prompt": f"row {i}", "answer": f"{i}", "context": f"row {i}", "continuation": "x"}
        for i in range(3)
    ]
    (home / "tasks").mkdir()
    for name, lines in (
        ("chats", [c | more for c in chats]),
        ("tasks/rows", tasks),
        ("text/rows", rows),
    ):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "judge.py").write_text(JUDGE)
    (home / "mood.py").write_text("# mood\n")  # what the reward function does before it answers
    for words in MAKE:
        done = server.run(
            Trial(home, Command(words), shlex.split(words), request={"log": log}, limit=600)
        )
        assert done.code == 0, done
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "do_sample": True}
    (home / "released" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "model_max_length": 64})
    )
    (home / "released" / "generation_config.json").write_text(json.dumps(sampling))
    (home / "released" / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    shutil.copy(home / "tokenizer.json", home / "released")
    shutil.copytree(home / "run", home / "stopped")
    shutil.rmtree(home / "stopped" / "checkpoints" / str(runs.STEPS))
    shutil.copytree(home / "shards", home / "half", ignore=shutil.ignore_patterns("manifest.json"))


@dataclass
class Trial:
    """A command in a folder, what disturbs it, and how it must end."""

    folder: Path
    command: Command
    argv: list[str]
    stdin: bytes | None = b""
    # out, err: path, "head", "terminal", None for closed
    streams: dict[str, str | None] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)  # more words for the server
    limit: float = LIMIT_S
    kills: Sequence[float] = (float("inf"),)  # seconds: it runs again after each
    out: str = "out"  # what it writes
    name: str = ""  # in the table
    what: str = ""  # what was changed
    path: Path | None = None  # the changed path, which a sentence names
    codes: Sequence[int] = (0, 2)  # exit codes that are good; none: all of them
    same: bool = False  # if it ends well, its result is the usual one
    again: bool = False  # undisturbed, it then ends well, or refuses what was changed
    changed: dict[Path, bytes] = field(default_factory=dict)  # what another result may come from
    # done then, before it runs again; returns what fell short
    between: Callable[[], set[str]] = set
    early: bool = False  # what is refused is refused before much work


class Answer(NamedTuple):
    """The end of a command."""

    code: int | None  # None: it was stopped, because it hung or took too much memory
    out: str
    err: str
    fault: str | None
    cpu: float
    left: list[int]  # processes that outlived it by some seconds


class Server:
    """The process of server.py, and the watch over the children that it forks."""

    def __init__(self, scratch: Path):
        # of stdout, stderr
        self._scratch, self._ends = scratch, dict[str, tuple[int, threading.Thread, bytearray]]()
        (scratch / "tmp").mkdir(parents=True)
        (scratch / "tmp").chmod(0o777)  # also for a user who may not write elsewhere
        (scratch / "canary").write_text("sings")
        paths = {"TMPDIR": str(scratch / "tmp"), "CANARY": str(scratch / "canary")}
        words = {
            "TERM": "xterm",
            "COLUMNS": "120",
            "PYTHONWARNINGS": "ignore",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        environment = runs.environment(scratch) | paths | words
        program = [
            sys.executable,
            str(Path(__file__).with_name("server.py")),
            runs.SPEND_NO_SECONDS,
        ]
        streams = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        self._process = subprocess.Popen(program, env=environment, text=True, **streams)
        self._process.stdout.readline()  # it is ready

    def ask(self, request: dict) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, trial: Trial) -> int:
        """Start a command. Returns: its process."""
        (self._scratch / "in").write_bytes(trial.stdin or b"")
        streams = [None if trial.stdin is None else str(self._scratch / "in")]
        for name in ("out", "err"):
            path = trial.streams.get(name, str(self._scratch / name))
            (self._scratch / name).write_bytes(b"")
            if path in ("head", "terminal"):
                reader, end = pty.openpty() if path == "terminal" else os.pipe()
                seen = bytearray()
                thread = threading.Thread(
                    target=collect, args=(reader, seen, path == "head"), daemon=True
                )
                thread.start()
                self._ends[name], path = (end, thread, seen), f"/proc/{os.getpid()}/fd/{end}"
            streams.append(path)
        return self.ask(
            {"argv": trial.argv, "folder": str(trial.folder), "streams": streams, **trial.request}
        )

    def run(self, trial: Trial, kill_after: float = float("inf")) -> Answer:
        """Run a command to its end, or stop it after some seconds."""
        pid, fault, idle, before, polls = self.start(trial), None, 0, 0.0, 0
        while (done := self.ask({"poll": pid})) is None:
            time.sleep(0.05)
            polls += 1
            if polls % 4 == 0:  # a look at all processes of the machine takes some milliseconds
                _, cpu, memory = usage(pid)
                idle, before = (idle + 1 if cpu == before else 0), cpu
                hangs = cpu > trial.limit or idle > 300  # it does nothing for a minute
                fault = fault or ("hangs" if hangs else "memory" if memory > 2 << 30 else None)
            if fault:
                os.killpg(pid, 9)
            elif polls * 0.05 > kill_after:
                os.kill(pid, 9)
        polls = 60
        while (left := usage(pid)[0]) and (polls := polls - 1):
            time.sleep(0.1)
        for one in left:
            os.kill(one, 9)
        shown = {}
        for name, (end, thread, seen) in self._ends.items():
            os.close(end)
            thread.join(10)
            shown |= {name: bytes(seen)} if trial.streams[name] == "terminal" else {}
        self._ends.clear()
        texts = (shown.get(name, (self._scratch / name).read_bytes()) for name in ("out", "err"))
        out, err = (text.decode(errors="replace") for text in texts)
        return Answer(None if fault else done[0], out, err, fault, done[1], left)

    def leftovers(self) -> list[str]:
        """Names of deleted temporary files outside the folder; "followed" if a link was."""
        folder, canary, sings = self._scratch / "tmp", self._scratch / "canary", "sings"
        found = [path.name for path in folder.iterdir()]
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # a link that leads to it
        found += ["followed"] if canary.read_text(errors="replace") != sings else []
        canary.write_text(sings)
        return found


def collect(reader: int, seen: bytearray, once: bool) -> None:
    """Read a terminal or pipe to its end, or once, then close it."""
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while piece := os.read(reader, 1 << 16):
            seen += piece
            if once:
                break
    os.close(reader)


def usage(pid: int) -> tuple[list[int], float, float]:
    """(Living processes, CPU seconds, resident bytes) of a command's session."""
    found: list[int] = []
    ticks = pages = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(path.parent.name))
                ticks, pages = ticks + int(fields[11]) + int(fields[12]), pages + int(fields[21])
    return found, ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")


def result(folder: Path, top: str, out: str) -> dict[str, str]:
    """A command's result: lines of its output, hashes of what it wrote but for checkpoints."""
    # times differ
    lines = re.sub(r"[\d.,]+ ?(s|ms|tokens/s|(second|minute|hour)s?)\b", "#", out).splitlines()
    found = {f"line {i}": " ".join(line.split()) for i, line in enumerate(lines)}
    for path in sorted((folder / top).rglob("*")) if (folder / top).is_dir() else [folder / top]:
        if path.is_file() and "checkpoints" not in path.relative_to(folder).parts:
            content = path.read_bytes()
            # the order of keys says nothing
            with contextlib.suppress(ValueError, RecursionError, AttributeError):
                rows = (
                    runs.rows_of(path.parent)
                    if path.name == "metrics.jsonl"
                    else json.loads(content)
                )
                content = json.dumps(rows, sort_keys=True).encode()
            found[f"out/{path.relative_to(folder / top)}"] = hashlib.sha256(content).hexdigest()
    return found
