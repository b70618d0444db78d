"""Folders as people have them beside transformers: converted ones that chat, the hub's cache, a wrapped model."""

import json
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from models import SMALL, random_model
from released import GRID, differences, ours, tokens, write_folder
from texts import CONVERSATIONS, TEXTS, V2, write_text_files

from dsv3_jax import hf
from dsv3_jax.config import replace
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import Sampling, generate_in_parts
from dsv3_jax.hf.files import read_json, write_json
from dsv3_jax.hf.open_model import load_model, load_text

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn
    pytest.mark.usefixtures("light_compiles"),
]

NEW = 12
TURNS = ("hello world", "the end <|im_end|> <｜User｜>", "1+1 is?")  # names of special tokens stay text
TEMPLATE = "{% for m in messages %}{{ m['role'] }}{% endfor %}"


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def load_theirs(folder):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()


def logits_of(model, cfg):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens(cfg), dtype=torch.long), use_cache=False).logits.numpy()


# Chat


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Today's date in both programs: chat_reference.py gives transformers another one, and templates write it."""
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", datetime)


class Ours:
    """Greedy answers as `dsv3 chat --temperature 0` gives them."""

    def __init__(self, folder):
        self.text, self.model = load_text(folder), load_model(folder)

    def answer(self, messages):
        ids = self.text.chat.render(messages, add_generation_prompt=True).ids
        config = DecodeConfig(NEW, Sampling(0.0), stop_tokens=self.text.stop_ids, pad_prompts_to=256)
        *_, last = generate_in_parts(self.model, [ids], config)
        (new,) = last.tokens
        return ids, new, self.text.tokenizer.decode(t for t in new if t not in self.text.stop_ids)


class Theirs:
    """Greedy answers by transformers."""

    def __init__(self, folder):
        import transformers

        self.tokenizer, self.model = transformers.AutoTokenizer.from_pretrained(folder), load_theirs(folder)

    def answer(self, messages):
        import torch

        made = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, sanitize_control_tokens=True
        )
        ids = made["input_ids"]
        batch = torch.tensor([ids])
        with torch.no_grad():
            out = self.model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW, do_sample=False, num_beams=1
            )
        new = out[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        said = [token for token in new if token not in (ends if isinstance(ends, list) else [ends])]
        return ids, new, self.tokenizer.decode(said, skip_special_tokens=True)


def talk(side):
    """A conversation of `TURNS`: (ids of the prompt, ids of the answer, its text) for each."""
    messages, answers = [], []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answers.append(side.answer(messages))
        messages.append({"role": "assistant", "content": answers[-1][2] or "nothing"})
    return answers


def talker(folder: Path, name: str) -> Path:
    """Write a released folder in bfloat16 with the text files of `TEXTS`."""
    cfg = replace(SMALL, vocab_size=320, num_layers=2, max_positions=512)
    hf.save(random_model(cfg), folder, dtype="bfloat16", quiet=True)
    config = read_json(folder / "config.json")
    write_text_files(folder, TEXTS[name])
    ends = read_json(folder / "generation_config.json").get("eos_token_id") if TEXTS[name].generation else None
    write_json(folder / "config.json", config | {"eos_token_id": ends or load_text(folder).tokenizer.eos_id})
    return folder


@pytest.mark.parametrize("name", ["V3", "V2", "Kimi", "GLM"])
def test_a_converted_folder_chats_as_before(name, tmp_path):
    """Released → run → released: transformers answers from the result as from the first, and so do we."""
    first, run, back = talker(tmp_path / "first", name), tmp_path / "run", tmp_path / "back"
    # One of the tokens that the first answer holds ends a turn, so that stop tokens matter.
    _, new, _ = Ours(first).answer([{"role": "user", "content": TURNS[0]}])
    stop = next(t for t in new[4:] if t not in new[:4])
    said = read_json(first / "generation_config.json") if TEXTS[name].generation else {}
    text = load_text(first)
    ends = [stop, *text.stop_ids]
    write_json(first / "generation_config.json", said | {"eos_token_id": ends})
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates" / "rag.jinja").write_text(TEMPLATE)
    (first / "chat_template.jinja").write_text(text.chat.source)  # files hide the one in tokenizer_config.json

    hf.convert(first, run, quiet=True)
    hf.convert(run, back, quiet=True)
    theirs = talk(Theirs(back))
    assert theirs[0][1][-1] == stop and len(theirs[0][1]) < NEW
    assert theirs == talk(Theirs(first)) == talk(Ours(first)) == talk(Ours(run)) == talk(Ours(back))

    config = read_json(back / "config.json")
    assert config["torch_dtype"] == "bfloat16" and Theirs(back).tokenizer.chat_template.keys() == {"default", "rag"}
    ignored = {"config.json", "model.safetensors.index.json"}
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file() and path.name not in ignored}
    assert all((back / file).read_bytes() == (first / file).read_bytes() for file in files)


# The hub's cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A repository as huggingface_hub lays it out: blobs, a snapshot of links to them, a reference."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = talker(tmp_path / "source", "V2")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text(TEMPLATE)
    (source / "chat_template.jinja").write_text(V2)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--organisation--small"
    for path in [path for path in source.rglob("*") if path.is_file()]:
        name = path.relative_to(source)
        blob = repo / "blobs" / f"{len(list((repo / 'blobs').glob('*'))):040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link = repo / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * (1 + len(name.parts)) + f"blobs/{blob.name}")
    for reference in ("main", "v1"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / reference).write_text(revision)
    shutil.rmtree(source)
    return repo


def test_a_hub_cache_is_what_transformers_finds_in_it(cached):
    """By its id, offline: numbers, templates, and a conversation."""
    name = "organisation/small"
    assert hf.places.find(name) == next((cached / "snapshots").iterdir())
    theirs = Theirs(name)
    model = hf.load(name, quiet=True)
    results = ours(model, gradients=False, greedy=False)
    assert differences({"logits": results["logits"]}, {"logits": logits_of(theirs.model, model.cfg)})["logits"] < 1e-4
    text = load_text(name)
    assert text.templates == theirs.tokenizer.chat_template and text.templates.keys() >= {"default", "rag"}
    messages = CONVERSATIONS["two turns"]
    made = theirs.tokenizer.apply_chat_template(messages, return_dict=True)
    assert text.chat.render(messages, any_order=True, specials_in_messages=True).ids == made["input_ids"]
    assert talk(theirs) == talk(Ours(name)) == talk(Ours(f"{name}@v1")) == talk(Ours(cached))


def test_an_id_that_is_absent_is_absent_for_both(cached):
    with pytest.raises(OSError):
        Theirs("organisation/large")
    with pytest.raises(ValueError, match="model='organisation/large' is no folder, and the hub's cache"):
        hf.load("organisation/large")


# Kimi K2.5


@pytest.fixture(scope="module")
def wrapped():
    """transformers' class of Kimi K2.5, with a small tower of pictures, around a cell's language model."""
    import torch
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    @cache
    def make(tie: bool):
        text = hf.config_to_dict(replace(GRID["Kimi K2.5"].cfg, tie_embeddings=tie), dtype="float32")
        vision = {"patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1, "hidden_size": 8}
        vision |= {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        roles = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = dict.fromkeys(roles, 999)  # in no text
        config = Kimi_K25Config(
            text_config=text, vision_config=vision, projection_hidden_size=8, tie_word_embeddings=tie, **ids
        )
        torch.manual_seed(0)
        model = Kimi_K25ForConditionalGeneration._from_config(config, dtype=torch.float32, **EAGER).eval()
        for parameter in model.model.language_model.parameters():
            parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.3)
        return model

    return make


@pytest.mark.parametrize("tie", [False, True])
def test_we_run_a_wrapped_model_that_transformers_saves(wrapped, tie, tmp_path):
    wrapped(tie).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "kimi_k25" and config["text_config"]["model_type"] == "deepseek_v3"
    model = hf.load(tmp_path, quiet=True)
    assert model.cfg.tie_embeddings == tie
    results = ours(model, gradients=False, greedy=False)
    assert differences({"logits": results["logits"]}, {"logits": logits_of(wrapped(tie), model.cfg)})["logits"] < 1e-4


def test_transformers_reads_the_released_names_of_a_wrapped_model_as_we_do(wrapped, tmp_path):
    from transformers import Kimi_K25ForConditionalGeneration

    cell = GRID["Kimi K2.5"]
    folder = write_folder(tmp_path / "folder", cell)
    results = ours(hf.load(folder, quiet=True), gradients=False, greedy=False)
    theirs, report = Kimi_K25ForConditionalGeneration.from_pretrained(
        folder, config=wrapped(False).config, output_loading_info=True, **EAGER
    )
    assert not [name for name in report["missing_keys"] if "language_model" in name or "lm_head" in name]
    assert np.abs(results["logits"]).max() > 1
    assert differences({"logits": results["logits"]}, {"logits": logits_of(theirs.eval(), cell.cfg)})["logits"] < 1e-4
