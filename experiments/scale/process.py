"""Run each case in its own process, as a process can set its number of fake devices only once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def work(case: Callable[..., dict]) -> bool:
    """In a worker, run the command line's case and print its result. Returns False elsewhere."""
    if sys.argv[1:2] != ["--case"]:
        return False
    print("RESULT " + json.dumps(case(**json.loads(sys.argv[2]))))
    return True


def run(script: str, **case) -> dict:
    """Run `script`'s case in a worker. Returns its result, or {"failed": its last error line}."""
    command = [sys.executable, script, "--case", json.dumps(case)]
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if results:
        return json.loads(results[-1].removeprefix("RESULT "))
    last = " ".join(done.stderr.strip().splitlines()[-1:])[-300:]
    return {"failed": last or f"exit code {done.returncode}"}


def save(path: Path, results: dict) -> None:
    """Write results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)
    )
