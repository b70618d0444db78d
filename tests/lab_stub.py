"""A study whose jobs train nothing, for the tests of the lab."""

from dsv3_jax.config import replace
from experiments.lab import RUNS_FOLDER, FollowUp, Study, fingerprints
from experiments.lab import study as study_file
from experiments.lab.claims import Claim

# A study's script without training: the variant "bad" fails, and each job appends a line to "called".
STUB = """
import json, os, sys, time
from pathlib import Path
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    job = json.loads(line)
    os.dup2(os.open(job["folder"] + ".log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    with open("called", "a") as file:
        print(job["variant"], job["seed"], sorted(job["needed_folders"]), job["alone"], file=file)
    with open("processes", "a") as file:
        print(os.getpid(), file=file)
    while Path("wait").exists():
        time.sleep(0.05)
    if job["variant"] == "bad" and not Path("fixed").exists():
        sys.exit("Traceback and so on\\nthe loss is not finite")
    numbers = {"val_loss": 1.0 + job["seed"] + {"second": 0.25}.get(job["variant"], 0)}
    if job["alone"]:
        numbers = json.loads(Path(job["record"]).read_text())["numbers"] | {"speed": 7.0}
    record = {"numbers": numbers, "curves": {}, "steps": 1, "seconds": 1.0, "commit": "0123abc", "dirty": False}
    record["parameters"] = {"total": 1000, "active": 100, "cache_bytes": 8}
    Path(job["record"]).write_text(json.dumps(record))
    print(0, file=answers, flush=True)
while Path("hangs").exists():
    time.sleep(0.05)
"""
PAGE = "# A question?\n\n<!-- results -->\nold\n<!-- /results -->\n\n## Verdict\n\n**Agrees, in\nshort.** It does.\n"


def diffs(base):
    return {
        "first": base,
        "second": replace(base, steps=7),
        "bad": replace(base, steps=8),
        "heads": FollowUp(
            ("bad",), lambda trunk: replace(base, steps=9, model=replace(base.model, mtp_depth=1), trunk=trunk)
        ),
    }


def fake_repository(tmp_path, monkeypatch):
    """A repository with one study, whose jobs the stub does."""
    folder = tmp_path / "experiments" / "01_fake"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(STUB)
    (folder / "README.md").write_text(PAGE)
    (tmp_path / "experiments" / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    (tmp_path / RUNS_FOLDER).mkdir(parents=True)
    monkeypatch.setattr(study_file, "make_tokenizer", lambda run, root: None)  # the stub reads none
    monkeypatch.setattr(study_file, "_backend", lambda: "cpu")
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "the text")
    return tmp_path


def make_study(repo, **changes):
    script = str(repo / "experiments" / "01_fake" / "run.py")
    claims = (Claim("the second is lower", "second", "first"),)
    settings = {"script": script, "question": "A question?", "published": "yes", "variants": diffs, "claims": claims}
    return Study(**settings | changes)


def called(repo):
    """Return the jobs since the last call."""
    path = repo / "called"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines
