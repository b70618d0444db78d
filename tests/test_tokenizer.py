"""Tokenizers: text survives the round trip, bytes are counted correctly, and streams give complete characters."""

import json

import numpy as np
import pytest
import tokenizers

from dsv3_jax.data import tokenizer as tok

TEXT = "def f(x):\n    return 'naïve €5 🚀' + \"日本語\"  # e\u0301\r\n\t\0 end"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return tok.train_bpe([TEXT] * 20, 400, str(tmp_path_factory.mktemp("bpe") / "tokenizer.json"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """As in Llama 2: "▁" for a space, bytes for characters outside the vocabulary, specials with other names."""
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"<0x{b:02X}>": 3 + b for b in range(256)},
        "▁": 259,
        "a": 260,
        "b": 261,
    }
    vocab |= {"▁a": 262, "ab": 263}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    d = tokenizers.decoders
    inner.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    path = tmp_path_factory.mktemp("sp") / "tokenizer.json"
    inner.save(str(path))
    return tok.load(str(path))


def test_byte_ids_are_the_bytes():
    t = tok.load("bytes")
    assert t.encode(TEXT) == list(TEXT.encode())
    assert (t.vocab_size, t.eos_id, t.fim_ids) == (260, 256, (257, 258, 259))


@pytest.mark.parametrize("name", ["bytes", "bpe", "sentencepiece"])
def test_round_trip_bytes_and_stream(name, request):
    """decode(encode) is the text; byte lengths sum to its bytes; a stream gives the same complete characters."""
    t = tok.load("bytes") if name == "bytes" else request.getfixturevalue(name)
    text = TEXT + "ʘ"  # several tokens in every vocabulary
    ids = t.encode(text)
    prefix = " " if name == "sentencepiece" else ""
    assert t.decode(ids) == t.decode(np.array(ids)) == text
    assert t.bytes_of(ids) == (prefix + text).encode()
    assert t.byte_lengths.dtype == np.int32 and t.byte_lengths.shape == (t.vocab_size,)
    assert t.byte_lengths[ids].sum() == len((prefix + text).encode())
    stream = t.stream()
    shown = [stream.push([i]) for i in ids]
    assert "".join(shown) == prefix + text and stream.finish() == ""
    assert len(ids) > len([s for s in shown if s])  # some ids complete no character


def test_decode_of_broken_text(bpe):
    """Partial UTF-8 becomes U+FFFD as in the library; specials and ids beyond the vocabulary are skipped."""
    t = tok.load("bytes")
    assert t.decode([0x61, 0xE2, 0x82, 256, 0x62, 300, -5]) == "a\ufffdb"
    stream = t.stream()
    assert (stream.push([0xE2, 0x82]), stream.finish()) == ("", "\ufffd")
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(bpe.vocab_size, size=30).tolist()
        assert bpe.decode(ids) == bpe._inner.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["bytes", "bpe", "sentencepiece"])
def test_specials_have_no_bytes_and_text_cannot_contain_them(name, request):
    t = tok.load("bytes") if name == "bytes" else request.getfixturevalue(name)
    specials = [t.eos_id] + ([] if name == "sentencepiece" else list(t.fim_ids))
    assert not t.byte_lengths[specials].any() and t.decode(specials) == ""
    text = "a</s>b<eos><fim_prefix>"
    assert not set(t.encode(text)) & set(specials)
    assert t.decode(t.encode(text)) == text


def test_a_vocabulary_without_fim_specials(sentencepiece):
    with pytest.raises(ValueError, match="vocab_size=264 has no fill-in-the-middle"):
        _ = sentencepiece.fim_ids


def test_deepseek_names(tmp_path):
    """DeepSeek's specials are found by name, in PSM order; added tokens of its chat format have their text's bytes."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
    inner.add_special_tokens(names)
    inner.add_tokens(["<think>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    t = tok.load(str(tmp_path))  # a folder, as of a released model
    assert t.eos_id == 2 and t.fim_ids == (4, 3, 5)
    assert t.byte_lengths.tolist() == [1, 0, 0, 0, 0, 0, 7]


def test_train_bpe_writes_complete_files_only(tmp_path, bpe):
    path = tmp_path / "new" / "tokenizer.json"
    t = tok.train_bpe(iter([TEXT] * 20), 300, str(path))
    assert t.vocab_size == 300 and t.eos_id == 0 and t.fim_ids == (1, 2, 3)
    assert len(bpe.encode(TEXT)) < len(t.encode(TEXT)) < len(TEXT.encode())
    before = path.read_bytes()
    assert json.loads(before)["model"]["type"] == "BPE"

    def failing():
        yield TEXT
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        tok.train_bpe(failing(), 300, str(path))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_errors_name_the_value(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=259"):
        tok.train_bpe(["a"], 259, str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="tokenizer='nowhere'"):
        tok.load("nowhere")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json' cannot be read"):
        tok.load(str(tmp_path / "bad.json"))
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json' has no end of document"):
        tok.load(str(tmp_path / "none.json"))
