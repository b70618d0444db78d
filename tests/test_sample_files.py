"""`dsv3 generate --prompts`: a stopped command resumes to the same file; broken lines are named."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest
from runs import by_command

from dsv3_jax.cli.sample import write_samples
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.decoding import generate

RECORDS = [{"prompt": "def f", "answer": [1.5, "é"]}, {"prompt": "x"}]
RECORDS += [{"id": 7, "prompt": "for in range(9)"}]
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
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, RECORDS)))
    how = "--samples", 2, "--temperature", 1.5
    code, want, err = sample("in.jsonl", "whole.jsonl", *how)
    assert code == 0 and "6 texts; " in err and want[0]["text"] != want[1]["text"]
    for row, line in enumerate(want):
        assert line | RECORDS[row // 2] == line and line["sample"] == row % 2
        assert line["logprob"] < -1 and (line["tokens"] == 24 or line["ended"])
    part, how = tmp_path / "out.jsonl.part", (*how, "--batch-size", 2)
    assert sample("in.jsonl", "out.jsonl", *how, parts=3)[:2] == (130, [])
    kept = part.read_bytes()
    assert 1 < kept.count(b"\n") < 7
    part.write_bytes(kept + b'{"row": 5, "li')  # killed while it wrote
    code, lines, err = sample("in.jsonl", "out.jsonl", *how, "--seed", 1)
    assert (code, lines) == (2, []) and "seed=1 is not the 0 that" in err
    assert part.read_bytes().startswith(kept)
    code, lines, _ = sample("in.jsonl", "out.jsonl", *how)
    assert code == 0 and not part.exists()
    for line, other in zip(lines, want, strict=True):
        assert line == other | {"logprob": pytest.approx(other["logprob"])}
    # A released model that changes at its place is another one.
    hf = tmp_path / "hf"
    assert by_command("convert", whole.folder, hf)[0] == 0
    assert sample("in.jsonl", "hf.jsonl", *how, parts=2, model=hf)[0] == 130
    again = lambda: sample("in.jsonl", "hf.jsonl", *how, model=hf)  # noqa: E731
    words = (hf / "tokenizer.json").read_text()
    bos = {"add_bos_token": True, "bos_token": "<eos>"}
    for file, content, said in (
        ("tokenizer.json", swapped(words), "tokenizer='"),
        ("generation_config.json", json.dumps({"eos_token_id": 7}), "stop_ids=[7, "),
        ("tokenizer_config.json", json.dumps(bos), "add_bos=True is not the False"),
    ):
        before = (hf / file).read_bytes() if (hf / file).exists() else b"{}"
        (hf / file).write_text(content)
        code, _, err = again()
        assert code == 2 and said in err and "is not the " in err, err
        (hf / file).write_bytes(before)
    for weights in hf.glob("*.safetensors"):
        os.utime(weights, (0, 0))
    code, _, err = again()
    assert code == 2 and "weights=[" in err and "is not the [" in err


def swapped(words: str) -> str:
    """A tokenizer.json in which two ids have changed places."""
    values = json.loads(words)
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return json.dumps(values)


OTHER = b'{"row": 1, "line": {"a": 1}}'
DAMAGE = {
    "a letter is changed": lambda a, b, *rest: [a, b.replace(b'"text": "1', b'"text": "9'), *rest],
    "zeros after a loss of power": lambda a, b, *rest: [a, b"\0" * 40, *rest],
    "two lines are one": lambda a, b, c, *rest: [a, b + b" " + c, *rest],
    "a line of somebody else": lambda a, b, *rest: [a, OTHER, *rest],
    "a carriage return": lambda a, b, *rest: [a, b + b"\r", *rest],
    "a line stands twice": lambda *lines: [*lines, lines[-1]],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_sampled_again(tmp_path, monkeypatch, capsys, damage):
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
    twice = damage is DAMAGE["a line stands twice"]
    assert drawn[-1] == 5 and (len(drawn) == 1) == twice and len(drawn) <= 3
    assert ("out.jsonl.part: 1; texts to sample: " in capsys.readouterr().err) == (not twice)


def test_a_broken_line_is_named(sample, tmp_path):
    for line, sentence in BROKEN.items():
        (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n' + line)
        code, lines, err = sample("bad.jsonl", "out.jsonl")
        assert (code, lines) == (2, []) and sentence in err and err.count("\n") == 1
