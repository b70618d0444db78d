"""Text settings beside transformers: the golden file of tests/test_chat.py holds what transformers gives today."""

import json

import pytest
from texts import GOLDEN, PROMPTS, TEXTS, tiktoken_lines, write_text_files

from dsv3_jax.chat.text_settings import read_released

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # torch and transformers warn


@pytest.mark.parametrize("name", TEXTS)
def test_the_golden_file_is_transformers(name, tmp_path):
    from chat_reference import theirs

    results = theirs(write_text_files(tmp_path, TEXTS[name]), TEXTS[name])
    assert json.loads(json.dumps(results)) == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize("name", TEXTS)
def test_transformers_reads_what_it_has_saved_as_we_do(name, tmp_path):
    """`save_pretrained` writes the files in another form: templates apart, no special_tokens_map."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(write_text_files(tmp_path / "ours", TEXTS[name]))
    tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text((tmp_path / "ours" / "config.json").read_text())
    ours, saved = read_released(tmp_path / "ours"), read_released(tmp_path / "theirs")
    assert [saved.encode(p) for p in PROMPTS] == [tokenizer(p)["input_ids"] for p in PROMPTS]
    assert saved.templates == ours.templates and saved.special_tokens == ours.special_tokens
    assert saved.tokenizer.same_ids(ours.tokenizer)


def test_a_tiktoken_model_is_transformers_conversion(tmp_path):
    """transformers converts the ranks to merges, with OpenAI's pattern; the texts here are split alike by both."""
    pytest.importorskip("tiktoken")
    import transformers

    folder = write_text_files(tmp_path, TEXTS["Kimi"])
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_bytes(tiktoken_lines())
    base = len(tiktoken_lines().splitlines())
    names = TEXTS["Kimi"].specials.split()
    added = {str(base + i): {"content": name, "special": True} for i, name in enumerate(names)}
    config = TEXTS["Kimi"].config | {"added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(folder), read_released(folder)
    assert [ours.encode(p) for p in PROMPTS] == [tokenizer(p)["input_ids"] for p in PROMPTS]
