"""Tokenizers: text survives the round trip, bytes are counted, streams give whole characters."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from runs import refused
from texts import TEXTS, tiktoken_lines, tokenizer_of, write_text_files

from dsv3_jax.data import tokenizer as tok
from dsv3_jax.data.kimi_pattern import KIMI_PATTERN
from dsv3_jax.data.special_tokens import named_specials

TEXT = "def f(x):\n    return 'naïve €5 🚀' + \"日本語\"  # e\u0301\r\n\t\0 end"
BASE = len(tiktoken_lines().splitlines())


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made = tok.train_bpe(iter([TEXT] * 20), 300, str(file))
    assert (made.vocab_size, made.eos_id, made.fim_ids) == (300, 0, (1, 2, 3))
    return made


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """As in Llama 2: "▁" for a space, bytes for unknown characters, specials with other names."""
    path = tmp_path_factory.mktemp("sp") / "tokenizer.json"
    tokenizer_of(TEXTS["strict"]).save(str(path))
    return tok.load(str(path))


@pytest.fixture(scope="module")
def tiktoken(tmp_path_factory):
    """As of Kimi: ranks in tiktoken.model, names of special tokens in tokenizer_config.json."""
    pytest.importorskip("tiktoken")
    return tok.load(str(kimi_folder(tmp_path_factory.mktemp("kimi"))))


def kimi_folder(folder, **config):
    names = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<|im_user|>": 3, "[PAD]": 255}
    added = {str(BASE + i): {"content": name, "special": True} for name, i in names.items()}
    (folder / "tiktoken.model").write_bytes(tiktoken_lines())
    config = {"eos_token": "[EOS]", "added_tokens_decoder": added} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["bytes", "bpe", "sentencepiece", "tiktoken"])
def words(request):
    name = request.param
    return tok.load("bytes") if name == "bytes" else request.getfixturevalue(name)


def test_round_trip_and_bytes(words, monkeypatch):
    text = TEXT + "ʘ"  # several tokens in every vocabulary
    ids = words.encode(text)
    prefix = " " if words.puts_space_before else ""
    assert words.decode(ids) == words.decode(np.array(ids)) == text
    assert words.bytes_of(ids) == (prefix + text).encode()
    assert words.byte_lengths.dtype == np.int32 and words.byte_lengths.shape == (words.vocab_size,)
    assert words.byte_lengths[ids].sum() == len((prefix + text).encode())
    many = [text[i:] for i in range(70)]
    monkeypatch.setattr("dsv3_jax.data.file_tokenizers._BATCH", 100)
    assert [ids.tolist() for ids in words.encode_arrays(many)] == [*map(words.encode, many)]


def test_decode_of_broken_text(bpe):
    """Partial UTF-8 becomes U+FFFD as in the library; specials and unknown ids are skipped."""
    assert tok.load("bytes").decode([0x61, 0xE2, 0x82, 256, 0x62, 300, -5]) == "a\ufffdb"
    for ids in np.random.default_rng(0).integers(bpe.vocab_size, size=(50, 30)).tolist():
        assert bpe.decode(ids) == bpe.inner.decode(ids, skip_special_tokens=True)


def test_specials_have_no_bytes_and_text_cannot_contain_them(words):
    specials = [words.eos_id, *words.specials.values()]
    assert not words.byte_lengths[specials].any() and words.decode(specials) == ""
    text = "a</s>b<eos><fim_prefix><|im_end|>[EOS]"
    for ids in (words.encode(text), words.encode_plain(text)):
        assert not set(ids) & set(specials)
        assert words.decode(ids) == text


def test_names_of_specials_are_read_where_they_are_asked_for(words):
    """An id has its bytes' characters, specials their names'; text between is encoded alike."""
    special = next(name for name, i in words.specials.items() if i == words.eos_id)
    text = f"é{special}{special}日b"
    ids, spans = words.encode_with_specials(text)
    assert ids.count(words.eos_id) == 2
    for i, (start, end) in zip(ids, spans, strict=True):
        if i == words.eos_id:
            assert text[start:end] == special
        # else the first token covers a space that the text does not have
        elif not words.puts_space_before:
            assert words.bytes_of([i]) in text[start:end].encode()
    assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))
    if not words.puts_space_before:
        between = [list(g) for k, g in itertools.groupby(ids, lambda i: i == words.eos_id) if not k]
        assert between == [words.encode("é"), words.encode("日b")]
    # a tokenizer that puts a space before adds BOS
    assert words.encode_prompt("a") == words.encode_with_specials("a")[0] or words.puts_space_before


SPLITS = {
    "the user's 1234567": ["the", " user's", " ", "123", "456", "7"],
    "ab日本c語": ["ab", "日本", "c", "語"],  # Han characters are separate words
    "x = [1]\n\n  y": ["x", " =", " [", "1", "]\n\n", " ", " y"],
    "ß'LLe\u0301 🚀": ["ß'LL", "e\u0301", " 🚀"],
}


def test_kimis_pattern(tiktoken):
    """How texts are split, written by hand; `make parity` compares the ids."""
    regex = pytest.importorskip("regex")
    for text, pieces in SPLITS.items():
        assert regex.findall(KIMI_PATTERN, text, regex.V1) == pieces
        assert tiktoken.encode(text) == [i for piece in pieces for i in tiktoken.encode(piece)]


def test_kimis_special_tokens(tiktoken, tmp_path):
    assert (tiktoken.vocab_size, tiktoken.eos_id) == (BASE + 256, BASE + 1)
    assert tiktoken.specials["<|im_end|>"] == BASE + 2
    assert tiktoken.encode_with_specials("the<|im_user|>")[0] == [*tiktoken.encode("the"), BASE + 3]
    folder = kimi_folder(tmp_path, added_tokens_decoder={str(BASE + 300): {"content": "[EOS]"}})
    assert tok.load(str(folder / "tiktoken.model")).vocab_size == BASE + 301
    with refused("has no fill-in-the-middle"):
        _ = tiktoken.fim_ids
    twice = tiktoken_lines().replace(b" 255\n", b" 254\n")
    for lines in (b"YQ== 0\nYg==\n", b"!! 0\n", twice, b"", b"YQ== 0\nYg== 1\n"):
        (folder / "tiktoken.model").write_bytes(lines)
        with refused(r"tiktoken\.model' .*cannot be read"):
            tok.load(str(folder))
    kimi_folder(tmp_path, added_tokens_decoder={str(BASE + 1): {"content": None}})
    with refused(r"tokenizer_config\.json has content=.* not the name of a token"):
        tok.load(str(folder))


def inner_of(*specials):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(specials))
    return inner


def test_the_files_beside_a_tokenizer_name_the_end(tmp_path):
    """The four configuration files in their order of preference, then known names.

    tokenizer_config.json, special_tokens_map.json, config.json and generation_config.json.
    """
    inner = inner_of("<eos>", "<x>", "<y>", "<z>")
    file = tmp_path / "tokenizer.json"
    inner_of().save(str(file))
    for name, said in {"nowhere": "tokenizer='nowhere'", str(file): "has no end of docu"}.items():
        with refused(said):
            tok.load(name)
    inner.save(str(file))

    def eos(**files):
        for name in ("tokenizer_config", "special_tokens_map", "config", "generation_config"):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
            if name in files:
                (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
        assert tok.load(str(file)).eos_id == tok.load(str(tmp_path)).eos_id
        return tok.load(str(file)).eos_id

    assert eos() == eos(tokenizer_config={"eos_token": None}) == 1
    assert eos(generation_config={"eos_token_id": [4, 2]}) == 4
    assert eos(generation_config={"eos_token_id": 4}, config={"eos_token_id": 3}) == 3
    assert eos(config={"eos_token_id": 3}, tokenizer_config={"eos_token": "<x>"}) == 2
    config = {"eos_token": {"content": "<x>"}}
    assert eos(tokenizer_config=config, special_tokens_map={"eos_token": "<y>"}) == 3
    with refused("names eos_token='<w>', and tokenizer.json has no such token"):
        eos(tokenizer_config={"eos_token": "<w>"})
    folder = write_text_files(tmp_path / "glm", TEXTS["GLM"])
    assert named_specials(folder) == {"eos_token": "<|endoftext|>", "image_token": "<|image|>"}


def test_deepseek_names(tmp_path):
    names = "begin▁of▁sentence end▁of▁sentence fim▁hole fim▁begin fim▁end"
    inner = inner_of(*(f"<｜{name}｜>" for name in names.split()))
    inner.add_tokens(["<think>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    t = tok.load(str(tmp_path))
    assert t.eos_id == 2 and t.fim_ids == (4, 3, 5)
    assert t.byte_lengths.tolist() == [1, 0, 0, 0, 0, 0, 7]


def test_a_copy_keeps_the_end_of_a_document(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    inner_of("<eos>", "<x>").save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "<x>", "chat_template": "…"}')
    own = tok.keep_copy(str(source / "tokenizer.json"), tmp_path / "said")
    assert tok.load(str(own)).eos_id == tok.load(str(source)).eos_id == 2
    names = {path.name for path in own.parent.iterdir()}
    assert names == {"tokenizer.json", "special_tokens_map.json"}
    assert tok.keep_copy(str(own), own.parent) == own


def with_parts(folder, **parts):
    """A tokenizer of bytes with another normalizer or pre-tokenizer."""
    inner = tokenizers.Tokenizer.from_str(tok.byte_tokenizer_json())
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.save(str(folder / "tokenizer.json"))
    return tok.load(str(folder))


def test_a_normalizer_that_makes_a_book_of_a_letter(tmp_path):
    made, regex = tokenizers.normalizers, tokenizers.Regex
    doubles = made.Sequence([made.Replace(regex("(?=q)"), "q")] * 30)
    for normalizer in (made.Replace("", "a" * 1000), doubles, made.Prepend("a" * 1000)):
        with refused("normalizer that may make .* letters of one"):
            with_parts(tmp_path, normalizer=normalizer)
    usual = [made.Prepend("▁"), made.Replace(regex(" {2,}"), " "), made.NFKC()]
    assert with_parts(tmp_path, normalizer=made.Sequence(usual)).encode("a") == [*"▁a".encode()]


def test_a_panic_of_the_library_is_one_sentence(tmp_path):
    """Its regular expressions give up on such a text, and Rust's panic is no Exception."""
    slow = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a|aa)+$"), "isolated")
    words = with_parts(tmp_path, pre_tokenizer=slow)
    for name in ("encode", "encode_prompt", "encode_with_specials", "encode_plain"):
        with refused("the tokenizer cannot encode .*aaa!'.*: Onig"):
            getattr(words, name)("a" * 60 + "!")
