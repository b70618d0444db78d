"""The files of `dsv3 generate MODEL --prompts FILE.jsonl --out OUT.jsonl`: samples of many prompts.

While texts are missing the output is OUT.jsonl.part: a line with the settings, then one for each
text that is complete. The same command resumes.
"""

import json
import reprlib
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dsv3_jax.data.text_files import json_lines
from dsv3_jax.host.files import (
    naming,
    never_through_a_link,
    parse_json,
    read_bytes,
    write_atomic,
)
from dsv3_jax.host.lock import acquire

# keys of the output beside the prompt's own
ADDED = ("sample", "text", "tokens", "logprob", "ended")
MAX_LINE = 2**23  # bytes
PART = 16  # tokens between two looks at which texts are complete


def write_samples(
    model: Any,
    text: Any,
    records: Sequence[dict],
    prompts: list,
    config: Any,
    out: Path,
    settings: dict[str, Any],
) -> None:
    """Write a line for each text: its prompt's keys, and `ADDED`.

    Args: prompts: the tokens of the records' prompts; settings: what the texts depend on, to
        compare after a stop.
    """
    total = len(prompts) * config.samples
    part = Path(f"{out}.part")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with (
        acquire(out.absolute().parent, f".{out.name}.lock", out),
        resumed(part, settings, total) as (file, lines),
    ):
        for row, tokens, logprobs in complete(model, prompts, config, set(lines), total):
            shown = text.tokenizer.bytes_of(token for token in tokens if token not in text.stop_ids)
            added = {
                "sample": row % config.samples,
                "text": shown.decode("utf-8", "replace"),
                "tokens": len(tokens),
                "logprob": round(sum(logprobs), 4),  # further digits depend on the batch
                "ended": tokens[-1] in text.stop_ids,
            }
            lines[row] = json.dumps(records[row // config.samples] | added)

            # A line with its checksum: after a stop, a torn or damaged one is seen.
            content = f'{{"row": {row}, "line": {lines[row]}}}'.encode()
            file.write(b"%08x %s\n" % (zlib.crc32(content), content))
            file.flush()

        write_atomic(out, "".join(lines[row] + "\n" for row in range(total)))
        part.unlink()


def read_prompts(
    path: Path, text: Any, *, raw: bool = False
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield the objects of a JSONL file, and the ids that the model continues.

    A text "prompt" is encoded as it is. Messages, of the key "messages" or "prompt", are rendered
    as `dsv3 chat` does; an assistant's turn at their end is left out.

    Args: text: the model's `TextSettings`; raw: as of `TextSettings.encode`, for texts alone.
    Raises: ValueError with the number of a line that is no such object, or has tools that the
        template does not read.
    """
    from dsv3_jax.chat.examples import asked_ids, located
    from dsv3_jax.chat.messages import read_tools

    record = None
    for location, record in json_lines(path, MAX_LINE):
        _check_record(record, location)
        prompt = record.get("prompt")
        is_text = isinstance(prompt, str)
        if not is_text and raw:
            raise ValueError(f"raw={raw} is for prompts of text, and {location} has messages")

        with located(location):
            tools = None if is_text else read_tools(record.get("tools"))
            if tools and not text.chat.reads_tools:
                raise ValueError(
                    "tools are for a chat template that reads them, and this one does not"
                )
            ids = text.encode(prompt, raw=raw) if is_text else asked_ids(record, text)
        yield record, ids or []

    if record is None:
        raise ValueError(f"{path} holds no prompt")


def _check_record(record: Any, location: str) -> None:
    """Check that a line is an object with a prompt, to which the output can add its keys."""
    if not isinstance(record, dict):
        raise ValueError(f"{location}, is not an object")

    prompt = record.get("prompt")
    is_chat = isinstance(prompt, list) or isinstance(record.get("messages"), list)
    if not (prompt if isinstance(prompt, str) else is_chat):
        raise ValueError(
            f'{location}: "prompt" is {reprlib.repr(prompt)}, not a text, '
            'and there is no list "messages"'
        )
    if taken := record.keys() & set(ADDED):
        raise ValueError(f"{location}: key {min(taken)!r} is one that the output adds; rename it")


@contextmanager
def resumed(
    part: Path, settings: dict[str, Any], total: int
) -> Iterator[tuple[IO[bytes], dict[int, str]]]:
    """Open the unfinished file to add to it; cut off a torn last line, and pass over damaged ones.

    Returns: in a `with` statement, (the file, its lines of the output by row).
    Raises: ValueError for other settings, or another file.
    """
    # Bytes after the last line's end are torn: the process stopped while it wrote them.
    data = read_bytes(part, None) if part.exists() else b""
    size = data.rfind(b"\n") + 1
    head, *rows = data[: max(size - 1, 0)].split(b"\n")

    # The first line has the settings. Another one counts if its checksum is right.
    try:
        before = dict(parse_json(head)) if size else settings
        found = [parse_json(row[9:]) for row in rows if row[:9] == b"%08x " % zlib.crc32(row[9:])]
        lines = {row["row"]: json.dumps(row["line"]) for row in found}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{part} is not an unfinished file of samples: {error}; delete it"
        ) from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}={value!r} is not the {before.get(name)!r} that {part} was begun with; "
                "delete it, or name another out"
            )

    if damaged := len(rows) - len(found):
        print(
            f"damaged lines in {part}: {damaged}; texts to sample: {total - len(lines)}",
            file=sys.stderr,
        )
    with naming(part), open(part, "ab", opener=never_through_a_link) as file:
        file.truncate(size)
        if not size:
            file.write(json.dumps(settings).encode() + b"\n")
        yield file, lines


def complete(
    model: Any, prompts: list, config: Any, done: set[int], total: int
) -> Iterator[tuple[int, list, list]]:
    """Decode the texts that are not done, with a progress bar.

    Returns: of each as it ends, (its row, its tokens, their log-probabilities at temperature 1).
    """
    from dsv3_jax.decoding.generate import generate_in_parts
    from dsv3_jax.report.progress import transfer

    if len(done) == total:
        return

    # The bar begins where the last command stopped; the speed counts what is new.
    ended = len(done)
    count = 0
    start = 0.0
    speed = 0.0
    with transfer("texts", total) as advance:
        advance(ended)
        for result in generate_in_parts(model, prompts, config, part=PART, skip=done):
            start = start or time.perf_counter()  # after the first part, which compiles
            new = result.ended[ended - len(done) :]
            for row in new:
                logprobs = result.model_logprobs[row] if result.model_logprobs else []
                yield row, result.tokens[row], logprobs

            ended += len(new)
            count += sum(len(result.tokens[row]) for row in new)
            speed = count / max(time.perf_counter() - start, 1e-9)
            advance(len(new), f"{ended} of {total} texts, {speed:,.0f} tokens/s")
    print(f"{total} texts; {speed:,.0f} tokens/s", file=sys.stderr)
