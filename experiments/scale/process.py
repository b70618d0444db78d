"""Runs one case of an experiment in a process of its own: how many fake devices there are is settled once a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def work(case: Callable[..., dict]) -> bool:
    """In a worker, print the result of the case that its command line holds. False where this is no worker."""
    if sys.argv[1:2] != ["--case"]:
        return False
    print("RESULT " + json.dumps(case(**json.loads(sys.argv[2]))))
    return True


def run(script: str, **case) -> dict:
    """The result of `script`'s case for these arguments, from a worker; {"failed": its last words} if it fails."""
    command = [sys.executable, script, "--case", json.dumps(case)]
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if found:
        return json.loads(found[-1].removeprefix("RESULT "))
    return {"failed": " ".join(done.stderr.strip().splitlines()[-1:])[-300:] or f"exit code {done.returncode}"}


def save(path: Path, results: dict) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lines of a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
