"""What a campaign attacks: good files, made by the command line, and commands that read them."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import runs
from pyarrow import parquet

from dsv3_jax.chat.text_settings import PLAIN_TEMPLATE


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


def train(out: str) -> str:
    flags = shlex.join(runs.flags(runs.make_run("text", keep=3)))
    return f"train tiny --out {out} --data.tokenizer tokenizer.json {flags}"


ROWS = "--row-tokens 16 --val-fraction 0.3"
TOKENIZE = f"data tokenize text {ROWS} --tokenizer tokenizer.json --shard-mb 0.002"
CHATS = "--format chat --start released --val-fraction 0.3"
MORE = "--out out --steps 3 --save-every 1 --log-every 1"
GRPO = "--grpo.checker regex --grpo.group 2 --grpo.max-new-tokens 4"
BATCH = "--data.batch-size 4 --data.seq-len 32"
PROMPTS = "--prompts tasks/rows.jsonl --samples 2 --max-new-tokens 4 --batch-size 4"
MAKE = {  # good files, in the order in which they are made
    "tokenizer.json": "tokenizer tokenizer.json --vocab-size 260 --paths text",
    "run": train("run"),
    "released": "convert run released --dtype float32",
    "shards": f"{TOKENIZE} --out shards",
}
COMMANDS = (
    Command("tokenizer out --vocab-size 262 --paths text", 3),
    Command(f"{TOKENIZE} --out out", 7),
    Command(f"data tokenize chats.jsonl --out out {CHATS}", 5),
    Command(f"data tokenize chats.parquet --out out {CHATS}", 2),
    Command(f"data tokenize rows.parquet --out out {ROWS}", 3),
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
    Command(f"train sft --start released --data.paths chats.jsonl --data.seq-len 64 {MORE}"),
    Command(f"train grpo --start released --data.paths tasks {GRPO} {BATCH} {MORE}"),
    Command("eval run --batches 1"),
    Command("eval run --tasks tasks --shots 1"),
    Command("stats run --out out --draws 5 --batches 1"),
    Command("generate run --max-new-tokens 8", 2),
    Command("generate released --max-new-tokens 8", 2),
    Command(f"generate run --out out {PROMPTS}", 3),
    Command("chat released --max-new-tokens 8", 2, stdin=b"hello\n/reset\nto be\n"),
)
# What a command with this word reads too.
READS = {"run": ["text", "tokenizer.json"], "stopped": ["text", "tokenizer.json"], "list": ["run"]}


def make_home(home: Path, commands: list[Command], make: Callable[[Command], None]) -> None:
    """Write texts, chats and tables, and of `MAKE` what the commands read."""
    runs.write_text(home / "text")
    answer = {"role": "assistant", "content": "It is."}
    chats = [{"messages": [{"role": "user", "content": f"Is it {i}?"}, answer]} for i in range(40)]
    more = {"domain": "d", "tools": [{"name": "add", "arguments": {"a": 1}}]}
    rows = [{"text": f"row {i} x = 1", "domain": f"d{i % 3}", "id": i} for i in range(9)]
    task = {"prompt": "row $", "answer": "[\x00-\x3f]", "context": "row $", "continuation": "x"}
    tasks = [{key: value.replace("$", str(i)) for key, value in task.items()} for i in range(3)]
    with_tools = [chat | more for chat in chats]
    (home / "tasks").mkdir()
    for name, lines in {"chats": with_tools, "tasks/rows": tasks, "text/rows": rows}.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, table in {"chats": chats, "rows": rows * 9}.items():
        parquet.write_table(pyarrow.Table.from_pylist(table), home / f"{name}.parquet")

    wanted = {word for command in commands for word in command.argv}
    wanted |= {name for word in wanted for name in READS.get(word, ())}
    wanted |= {"run"} if {"stopped", "released"} & wanted else set()
    wanted |= {"shards"} if "half" in wanted else set()
    for name, words in MAKE.items():
        if name in wanted or (name == "tokenizer.json" and wanted & {"run", "shards"}):
            make(Command(words))
    if "released" in wanted:
        sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "do_sample": True}
        text = {"eos_token": "<eos>", "model_max_length": 64}
        for name, values in {"tokenizer": text, "generation": sampling}.items():
            name += "_config.json"
            (home / "released" / name).write_text(json.dumps(values))
        (home / "released" / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
        shutil.copy(home / "tokenizer.json", home / "released")
    if "run" in wanted:
        shutil.copytree(home / "run", home / "stopped")
        shutil.rmtree(home / "stopped" / "checkpoints" / str(runs.STEPS))
    if "shards" in wanted:
        sealed = shutil.ignore_patterns("manifest.json")
        shutil.copytree(home / "shards", home / "half", ignore=sealed)
