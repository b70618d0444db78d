"""`dsv3 generate --prompts`: a stopped command resumes to the same file, and a broken line is named."""

import itertools
import json
import os

import pytest
from runs import finished, unhooked_cli

from dsv3_jax.decoding import generate

RECORDS = [{"prompt": "def f", "answer": [1.5, "é"]}, {"prompt": "x"}, {"id": 7, "prompt": "for in range(9)"}]
BROKEN = {
    "[1]": "bad.jsonl, line 2, is not an object",
    '{"prompt": ""}': "bad.jsonl, line 2: \"prompt\" is '', not a text",
    '{"prompt": "x", "text": 1}': "bad.jsonl, line 2: key 'text' is one that the output adds",
    '{"prompt"': "bad.jsonl, line 2, is not JSON",
}


@pytest.fixture
def folder(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp()).folder


@pytest.fixture
def sample(folder, tmp_path, capsys, monkeypatch):
    """A command of the finished run, stopped after some parts: its exit code, the lines of its output, stderr."""
    whole = generate.generate_in_parts

    def command(prompts, out, *options, parts=None, model=folder):
        def some(*args, **settings):
            yield from itertools.islice(whole(*args, **settings), parts)
            if parts:
                raise KeyboardInterrupt

        monkeypatch.setattr(generate, "generate_in_parts", some)
        words = "--prompts", tmp_path / prompts, "--out", tmp_path / out, "--max-new-tokens", 24
        code = unhooked_cli().main(list(map(str, ("generate", model, *words, *options))))
        lines = (tmp_path / out).read_text().splitlines() if (tmp_path / out).exists() else []
        return code, list(map(json.loads, lines)), capsys.readouterr().err

    return command


@pytest.mark.long
def test_a_stopped_command_resumes_to_the_same_file(folder, sample, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, RECORDS)))
    how = "--samples", 2, "--temperature", 1.5
    code, whole, err = sample("in.jsonl", "whole.jsonl", *how)
    assert code == 0 and "6 texts; " in err and whole[0]["text"] != whole[1]["text"]
    for row, line in enumerate(whole):
        assert line | RECORDS[row // 2] == line and line["sample"] == row % 2 and line["logprob"] < -1
        assert line["tokens"] == 24 or line["ended"]
    part, how = tmp_path / "out.jsonl.part", (*how, "--batch-size", 2)
    assert sample("in.jsonl", "out.jsonl", *how, parts=3)[:2] == (130, [])
    kept = part.read_bytes()
    assert 1 < kept.count(b"\n") < 7
    part.write_bytes(kept + kept.splitlines(keepends=True)[-1])
    assert "is no text of it, or twice in it; delete it" in sample("in.jsonl", "out.jsonl", *how)[2]
    part.write_bytes(kept + b'{"row": 5, "li')  # killed while it wrote
    code, lines, err = sample("in.jsonl", "out.jsonl", *how, "--seed", 1)
    assert (code, lines) == (2, []) and "seed=1 is not the 0 that" in err and part.read_bytes().startswith(kept)
    code, lines, _ = sample("in.jsonl", "out.jsonl", *how)
    assert code == 0 and not part.exists()
    assert [line | {"logprob": 0} for line in lines] == [line | {"logprob": 0} for line in whole]
    assert [line["logprob"] for line in lines] == pytest.approx([line["logprob"] for line in whole])
    # A released model that changes at its place is another one.
    assert unhooked_cli().main(["convert", str(folder), str(tmp_path / "hf")]) == 0
    assert sample("in.jsonl", "hf.jsonl", *how, parts=2, model=tmp_path / "hf")[0] == 130
    for file in (tmp_path / "hf").glob("*.safetensors"):
        os.utime(file, (0, 0))
    code, _, err = sample("in.jsonl", "hf.jsonl", *how, model=tmp_path / "hf")
    assert code == 2 and "weights=[" in err and "is not the [" in err


def test_a_broken_line_is_named(sample, tmp_path):
    for line, sentence in BROKEN.items():
        (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n' + line)
        code, lines, err = sample("bad.jsonl", "out.jsonl")
        assert (code, lines) == (2, []) and sentence in err and err.count("\n") == 1
