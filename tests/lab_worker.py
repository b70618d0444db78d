"""A worker of the lab that trains nothing, for the tests of its commands. The variant "bad" fails until it is fixed."""

import json
import os
import sys
from pathlib import Path


def serve(pipe, folder, cores):
    """Replace `experiments.lab.work.serve`: each job appends a line to "called"."""
    os.chdir(folder.parent.parent)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        with open("called", "a") as file:
            print(job.variant, job.seed, sorted(job.needed_folders), job.alone, os.getpid(), file=file)
        if job.variant == "bad" and not Path("fixed").exists():
            Path(job.log).write_text("Traceback and so on\nthe loss is not finite\n")
            sys.exit(1)
        numbers = {"val_loss": 1.0 + job.seed + {"second": 0.25}.get(job.variant, 0)}
        if job.alone:
            numbers = json.loads(Path(job.record).read_text())["numbers"] | {"speed": 7.0}
        record = {"numbers": numbers, "curves": {}, "steps": 1, "seconds": 1.0, "commit": "0123abc", "dirty": False}
        record["parameters"] = {"total": 1000, "active": 100, "cache_bytes": 8}
        Path(job.record).write_text(json.dumps(record))
        pipe.send(0)
