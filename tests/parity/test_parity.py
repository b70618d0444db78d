"""Parity with transformers over the complete grid of tiny folders. `make parity` runs these."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from models import arrays_of, forward, tokens_of
from released import GRID, LIMITS, Cell, assert_equal, golden, ours, probed, write_folder
from runs import assert_bitwise

from dsv3_jax import hf
from dsv3_jax.decoding.generate import generate
from dsv3_jax.hf.tensor_files import read_json

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn
]

LOGITS = LIMITS["logits"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Compute (ours, theirs, folder) of a cell, once."""
    from parity_reference import plain_folder, theirs

    @cache
    def compute(name: str):
        root, cell = tmp_path_factory.mktemp("cell"), GRID[name]
        folder = write_folder(root / "folder", cell)
        return ours(hf.load(folder)), theirs(plain_folder(root / "plain", cell), cell), folder

    return compute


def model_of(name):
    """The model of a cell's cards."""
    if "architectures" not in GRID[name].config:  # else it names its label
        return name
    return f"DeepSeek-{name}" if name.startswith("V2") else f"DeepSeek-V3, {name}"


@pytest.mark.parametrize("name", GRID)
def test_ours_and_the_golden_files_are_transformers(result, name, card):
    results, reference, _ = result(name)
    assert results.keys() == reference.keys()
    worst = assert_equal(results, reference)
    theirs, stored = probed(reference), golden(name)
    assert theirs.keys() == stored.keys()
    assert_equal(theirs, stored)  # another processor or build of torch may sum in another order
    write_cards(card, name, worst, results)


def write_cards(card, name, worst, results):
    model, file = model_of(name), "int4" if name == "Kimi K2-Thinking" else GRID[name].file
    logits = {"of the logits": worst["logits"], "limit": LOGITS}
    more = {"of the MTP logits": worst["mtp_logits"]} if "mtp_logits" in worst else {}
    card(model, "logits", logits | more)
    counted = {"routed experts": "expert_ids", "greedy tokens": "greedy"}
    # some have no experts
    sizes = {what: results[key].size for what, key in counted.items() if results[key].size}
    ids = {f"of {size} {what}": int(worst[counted[what]]) for what, size in sizes.items()}
    card(model, "ids", ids)
    gradients = {"of the gradients": worst["grad"], "limit": LIMITS["grad"]}
    loss = {"of the loss, nats": worst["loss"], "limit of the loss": LIMITS["loss"]}
    card(model, "trained step", gradients | loss)
    if file != "float32":
        figures = {"of the logits": worst["logits"], "stored as": file, "limit": LOGITS}
        card(model, "stored format", figures)


@pytest.mark.parametrize("name", ["groups", "tied embeddings", "DeepSeek-V3.2", "GLM-5"])
def test_transformers_runs_what_we_save(result, name, tmp_path, card):
    from parity_reference import theirs

    results, _, folder = result(name)
    hf.save(hf.load(folder), tmp_path / "saved", shard_bytes=9000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    worst = assert_equal(results, theirs(tmp_path / "saved", GRID[name]))
    card(model_of(name), "written back", {"of the logits": worst["logits"], "limit": LOGITS})


def test_we_run_what_transformers_saves(result, tmp_path):
    from parity_reference import load_theirs

    _, reference, folder = result("no groups")
    cfg = GRID["no groups"].cfg
    main, _ = load_theirs(folder, cfg.num_layers, 0, cfg.tie_embeddings)
    main.save_pretrained(tmp_path / "theirs")
    # the newer spelling
    assert "rope_theta" in read_json(tmp_path / "theirs" / "config.json")["rope_parameters"]
    assert_equal(ours(hf.load(tmp_path / "theirs")), reference)


FAR = {"index_topk": 16, "max_position_embeddings": 512, "num_nextn_predict_layers": 0}
SPARSE = {
    "DeepSeek-V3.2": {},
    "GLM-5": {"indexer_types": ["full", "shared", "full"]},
    "GLM-5, one indexer": {"index_topk_pattern": "FSS"},
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention_below_and_far_beyond_its_choice(name, tmp_path, card):
    """Texts of up to 25 `index_topk`, positions not from 0, unequal prompts; both ways."""
    import torch
    from parity_reference import load_theirs

    config = GRID[name.split(",")[0]].config | FAR | SPARSE[name]
    folder = write_folder(tmp_path / "folder", Cell(name, config))
    model, worst = hf.load(folder), 0.0
    main, _ = load_theirs(folder, model.cfg.num_layers, 0, False)
    for length, start in ((8, 0), (16, 5), (17, 90), (100, 0), (400, 100)):
        tokens, positions = tokens_of(model.cfg, 2, length), start + np.arange(length)[None]
        with torch.no_grad():
            of_torch = torch.tensor(np.array(tokens)).long()
            theirs = main(of_torch, position_ids=torch.tensor(positions)).logits.numpy()
        places = jnp.asarray(np.repeat(positions, 2, axis=0), jnp.int32)
        own = forward(model, tokens, None, places).logits
        worst = max(worst, float(np.abs(own - theirs).max() / theirs.std()))
    assert worst < LOGITS
    lengths, longest = (3, 16, 90, 300), 300
    prompts = [np.array(tokens_of(model.cfg, 1, n, seed=n))[0].tolist() for n in lengths]
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.arange(longest)[None] >= torch.tensor([[longest - n] for n in lengths])
    texts = main.generate(padded, attention_mask=mask.long(), max_new_tokens=40, do_sample=False)
    assert generate(model, prompts, 40).tokens == texts[:, longest:].tolist()
    main.save_pretrained(tmp_path / "theirs")
    hf.save(model, tmp_path / "ours")
    for saved in ("theirs", "ours"):
        again = hf.load(tmp_path / saved)
        assert again.cfg == model.cfg
        assert_bitwise(arrays_of(again), arrays_of(model))
    figures = {"of the logits": worst, "limit": LOGITS, "of 160 greedy tokens": 0}
    card(name, "sparse attention", figures)
