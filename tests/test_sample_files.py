"""`dsv3 generate --prompts`: a stopped command resumes to the same file; broken lines are named."""

import itertools
import json
import os
import re
from types import SimpleNamespace

import pytest
from runs import by_command

from dsv3_jax.cli.sample import write_samples
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.decoding import generate
from dsv3_jax.hf.tensor_files import write_json

RECORDS = [{"prompt": "def f", "answer": [1.5, "é"]}, {"prompt": "x"}]
RECORDS += [{"id": 7, "prompt": "for in range(9)"}]
BOS = {"add_bos_token": True, "bos_token": "<eos>"}
BROKEN = {
    "[1]": "bad.jsonl, line 2, is not an object",
    '{"prompt": ""}': "bad.jsonl, line 2: \"prompt\" is '', not a text",
    '{"prompt": "x", "text": 1}': "bad.jsonl, line 2: key 'text' is one that the output adds",
    '{"messages": "x"}': 'line 2: "prompt" is None, not a text, and there is no list "messages"',
    '{"messages": [{"role": "user", "content": "x"}]}': "has no chat template",
    '{"prompt"': "bad.jsonl, line 2, is not JSON",
}


@pytest.fixture
def sample(whole, tmp_path, monkeypatch):
    """A command of the finished run, stopped after some parts: (exit code, lines, stderr)."""
    all_parts = generate.generate_in_parts

    def command(prompts, out, *options, parts=None, model=whole.folder):
        def some(*args, **settings):
            yield from itertools.islice(all_parts(*args, **settings), parts)
            if parts:
                raise KeyboardInterrupt

        monkeypatch.setattr(generate, "generate_in_parts", some)
        words = "--prompts", tmp_path / prompts, "--out", tmp_path / out, "--max-new-tokens", 24
        code, _, err = by_command("generate", model, *words, *options)
        lines = (tmp_path / out).read_text().splitlines() if (tmp_path / out).exists() else []
        return code, list(map(json.loads, lines)), err

    return command


@pytest.mark.long
def test_a_stopped_command_resumes_to_the_same_file(whole, sample, tmp_path):
    """That of a released model is the file of the run that it was made of."""
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, RECORDS)))
    how = "--samples", 2, "--temperature", 1.5, "--batch-size", 2
    code, want, err = sample("in.jsonl", "whole.jsonl", *how)
    assert code == 0 and "6 texts; " in err and want[0]["text"] != want[1]["text"]
    for row, line in enumerate(want):
        assert line | RECORDS[row // 2] == line and line["sample"] == row % 2
        assert line["logprob"] < -1 and (line["tokens"] == 24 or line["ended"])
    part, hf = tmp_path / "out.jsonl.part", tmp_path / "hf"
    assert by_command("convert", whole.folder, hf)[0] == 0
    assert sample("in.jsonl", "out.jsonl", *how, model=hf, parts=3)[:2] == (130, [])
    kept = part.read_bytes()
    assert 1 < kept.count(b"\n") < 7
    part.write_bytes(kept + b'{"row": 5, "li')  # killed while it wrote
    code, lines, err = sample("in.jsonl", "out.jsonl", *how, "--seed", 1, model=hf)
    assert (code, lines) == (2, []) and "seed=1 is not the 0 that" in err
    assert part.read_bytes().startswith(kept)
    code, lines, _ = sample("in.jsonl", "out.jsonl", *how, model=hf)
    assert code == 0 and not part.exists()
    for line, other in zip(lines, want, strict=True):
        assert line == other | {"logprob": pytest.approx(other["logprob"])}

    # A model that changes at its place is another one.
    (tmp_path / "out.jsonl").unlink()
    part.write_bytes(kept)
    weights = next(hf.glob("*.safetensors"))
    swapped = (hf / "tokenizer.json").read_text().replace('"a":97,"b":98', '"a":98,"b":97')
    for change, said in (  # the first setting that differs is named: the last one changes first
        (lambda: os.utime(weights, (0, 0)), "weights="),
        (lambda: write_json(hf / "tokenizer_config.json", BOS), "add_bos=True"),
        (lambda: write_json(hf / "generation_config.json", {"eos_token_id": 7}), "stop_ids="),
        (lambda: (hf / "tokenizer.json").write_text(swapped), "tokenizer="),
    ):
        change()
        code, _, err = sample("in.jsonl", "out.jsonl", *how, model=hf)
        assert code == 2 and re.search(f"{said}.* is not the ", err), err


DAMAGE = {  # of the lines of rows 0 to 4 → the rows that are drawn again
    "a letter is changed": (lambda a, b, *more: [a, b.replace(b'"1', b'"9'), *more], [1, 5]),
    "two lines are one": (lambda a, b, c, *more: [a, b + b" " + c, *more], [1, 2, 5]),
    "a line stands twice": (lambda *lines: [*lines, lines[-1]], [5]),
}


@pytest.mark.parametrize(("damage", "again"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_sampled_again(tmp_path, monkeypatch, capsys, damage, again):
    """The other lines are kept, and the output is that of a command that was not stopped."""
    drawn: list[int] = []

    def complete(model, prompts, config, done, total):
        for row in sorted(set(range(total)) - done):
            if row == model:
                raise KeyboardInterrupt
            drawn.append(row)
            yield row, [*str(row).encode(), 256], [-1.0]

    def write(name, stop=None):
        drawn.clear()
        text = SimpleNamespace(tokenizer=ByteTokenizer(), stop_ids=(256,))
        config = SimpleNamespace(samples=2)
        write_samples(stop, text, RECORDS, [[1]] * 3, config, tmp_path / name, {"seed": 0})
        return (tmp_path / name).read_bytes()

    monkeypatch.setattr("dsv3_jax.cli.sample.complete", complete)
    whole = write("whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        write("out.jsonl", stop=5)
    part = tmp_path / "out.jsonl.part"
    head, *lines = part.read_bytes().splitlines()
    part.write_bytes(b"\n".join([head, *damage(*lines), b'1234 {"row": 5, "li']))
    assert write("out.jsonl") == whole
    assert drawn == again
    said = f"damaged lines in {part}: 1; texts to sample: {len(again)}"
    assert (said in capsys.readouterr().err) == (len(again) > 1)


def test_a_broken_line_is_named(sample, tmp_path):
    for line, sentence in BROKEN.items():
        (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n' + line)
        code, lines, err = sample("bad.jsonl", "out.jsonl")
        assert (code, lines) == (2, []) and sentence in err and err.count("\n") == 1
