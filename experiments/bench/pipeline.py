"""The data pipeline: tokens a second and memory of `dsv3 data tokenize` and of reading its shards.

python experiments/bench/pipeline.py                       # 100 MB and 1 GB of text, then deleted
python experiments/bench/pipeline.py --megabytes 100 5000  # other sizes
python experiments/bench/pipeline.py --tokenizer bpe       # 4,096 tokens of bytes, learnt from it

The text is the standard library's sources, over and over, each copy with a number, as JSONL. One
process tokenizes; one process reads batches as training does. CPU seconds are of all its threads,
so a busy machine counts less than it does by the clock.
"""

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEQ_LEN, BATCH = 512, 16
READ_S = 30.0  # seconds of reading

# Reads batches of shards, and prints tokens, CPU seconds, and resident megabytes after 1, 2, …
# tenths of the time.
READER = """
import json, sys, time
from dsv3_jax.config import DataConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.source import open_source
folder, spec, seq_len, batch, seconds = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])

def anonymous():  # file pages are left out: the system takes them back when it needs room
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000

shape = dict(seq_len=int(seq_len), batch_size=int(batch))
cfg = DataConfig(paths=(folder,), format="shards", tokenizer=spec, **shape)
source = open_source(cfg, tokenizer.load(spec))
batches = source.train_batches(None)
next(batches)
begin, cpu, tokens, memory = time.monotonic(), time.process_time(), 0, [anonymous()]
while (passed := time.monotonic() - begin) < seconds:
    found = next(batches)
    tokens += found["tokens"].size
    if passed > len(memory) * seconds / 10:
        memory.append(anonymous())
cpu, wall = time.process_time() - cpu, time.monotonic() - begin
print(json.dumps({"tokens": tokens, "cpu": cpu, "wall": wall, "memory": memory}))
"""


def write_text(folder: Path, megabytes: float) -> int:
    """Write JSONL files of about so many megabytes of text.

    Returns: bytes of text.
    """
    sources = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        if "site-packages" not in path.parts and path.stat().st_size < 200_000
    ]
    folder.mkdir()
    written, copy = 0, 0
    while written < megabytes * 1e6:
        with (folder / f"{copy:05d}.jsonl").open("w") as file:
            for text in sources:
                text = f"# copy {copy}\n{text}"
                file.write(json.dumps({"text": text, "domain": f"d{len(text) % 4}"}) + "\n")
                written += len(text.encode())
                if written >= megabytes * 1e6:
                    break
        copy += 1
    return written


def measured(argv: list[str]) -> tuple[str, float, float, float]:
    """Run a process to its end.

    Returns: (its output, CPU seconds, seconds that pass, peak resident megabytes with children).
    """
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        ["/usr/bin/env", *argv], cwd=ROOT, check=True, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, cpu, time.monotonic() - begin, after.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        nargs="+",
        default=[100, 1000],
        help="ascending sizes of the text",
    )
    parser.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes")
    parser.add_argument(
        "--place", help="folder for the files; None means the system's for temporary ones"
    )
    args = parser.parse_args()
    python = ["JAX_PLATFORMS=cpu", sys.executable]
    print(
        "| text, MB | tokens | tokenize, tokens/s a core | peak memory, MB "
        "| read, tokens/s a core | memory while reading, MB: first, last |\n"
        "|---|---|---|---|---|---|"
    )
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory(dir=args.place, prefix="pipeline-") as name:
            text, shards, spec = Path(name, "text"), Path(name, "shards"), "bytes"
            size = write_text(text, megabytes)
            if args.tokenizer == "bpe":
                spec = str(Path(name, "tokenizer.json"))
                learn = ["-m", "dsv3_jax.cli", "tokenizer", spec, "--vocab-size", "4096", "--paths"]
                measured([*python, *learn, str(text / "00000.jsonl")])
            command = ["-m", "dsv3_jax.cli", "data", "tokenize", str(text)]
            options = ["--out", str(shards), "--tokenizer", spec, "--row-tokens", "4096"]
            _, cpu, _, peak = measured([*python, *command, *options])
            tokens = json.loads((shards / "manifest.json").read_text())["tokens"]
            argv = ["-c", READER, str(shards), spec, str(SEQ_LEN), str(BATCH), str(READ_S)]
            out = json.loads(measured([*python, *argv])[0].splitlines()[-1])
            first, *_, last = out["memory"]
            print(
                f"| {size / 1e6:,.0f} | {tokens:,} | {tokens / cpu:,.0f} | {peak:,.0f} "
                f"| {out['tokens'] / out['cpu']:,.0f} | {first:,.0f}, {last:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
