"""What a campaign attacks: commands, and the good files that they read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import runs

from dsv3_jax.chat.text_settings import PLAIN_TEMPLATE


class Command(NamedTuple):
    """A command's words, and the folder that it writes."""

    words: str
    often: int = 1  # weight among the commands
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


def make_files(folder: Path, commands: list[Command], run: Callable[[list[str]], object]) -> None:
    """Write texts and chats; by commands a tokenizer, shards, a run, a released folder."""
    runs.write_text(folder / "text")
    turns = [{"role": "user", "content": "Is it $?"}, {"role": "assistant", "content": "It is."}]
    for name, record in {
        "chats": {"messages": turns, "tools": [{"name": "add", "arguments": {"a": 1}}]},
        "prompts": {"prompt": "a $", "id": "$"},
        "text/rows": {"text": "row $ x = 1", "domain": "d", "id": "$"},
    }.items():
        lines = [json.dumps(record).replace("$", str(i)) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    asked = " ".join(command.words for command in commands)
    if not any(name in asked for name in ("tokenizer.json", "shards", "made", "released")):
        return
    run("tokenizer tokenizer.json --vocab-size 260 --paths text".split())
    run(f"{TOKENIZE} --out shards".split())
    if "made" not in asked and "released" not in asked:
        return
    run(train("made/run").split())
    run("convert made/run released --dtype float32".split())
    shutil.copy(folder / "tokenizer.json", folder / "released")
    settings = json.dumps({"eos_token": "<eos>", "model_max_length": 64})
    (folder / "released" / "tokenizer_config.json").write_text(settings)
    (folder / "released" / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
