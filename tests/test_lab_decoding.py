"""The lab's studies of decoding: statistics against hand calculations, tables and pictures."""

import importlib.util

import numpy as np
import pytest
from runs import HERE

from dsv3_jax.config import replace
from dsv3_jax.model.counting import size
from dsv3_jax.presets import recipe
from experiments.lab import Results
from experiments.lab.tables import results_table

pytestmark = pytest.mark.long


def load(name):
    spec = importlib.util.spec_from_file_location("a_study", HERE / "experiments" / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(module, tmp_path, numbers):
    """Return results of two seeds. `numbers` is a function (variant, run, seed) → dict."""
    results = Results(tmp_path / "results.json")
    for (variant, seed), planned in module.STUDY.list_runs(recipe("lab"), (0, 1)).items():
        results.add(variant, seed, {"numbers": {"val_loss": 3.0 + seed} | numbers(variant, planned.run, seed)})
        results.runs[variant][str(seed)]["parameters"] = {"total": 1, "active": 1, "cache_bytes": 1}
    results.write()
    return Results(tmp_path / "results.json")


def drawn(module, results, tmp_path):
    module.STUDY.draw(results, tmp_path / "a.png")
    return (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_mtp(tmp_path):
    """A second draft counts if the first was accepted: 1 + 0.5 + 0.5 · 0.4 tokens per step."""
    module = load("06_mtp")

    def numbers(variant, run, seed):
        accepted = [0.5, 0.4][: run.model.mtp_depth]
        return {"mtp_acceptance": accepted, "val_bits_per_byte": 2.0, "train_flops": 3e6}

    results = filled(module, tmp_path, numbers)
    np.testing.assert_allclose(module.tokens_per_step(results, "DeepSeek, depth 2"), [1.7, 1.7])
    np.testing.assert_allclose(module.tokens_per_step(results, "off"), [1, 1])
    rows = results_table(results, module.STUDY.columns).splitlines()
    assert "50.0 ± 0.0 | – | 1.50 ± 0.00 |" in rows[3] and "| – | – | 1.00 ± 0.00 |" in rows[2]
    assert drawn(module, results, tmp_path) and "DeepSeek, depth 1: +0.000" in module.STUDY.ours(results)


def test_speculation(tmp_path):
    module = load("07_speculation")

    def numbers(variant, run, seed):
        if variant == "trunk":
            return {"mtp_acceptance": []}
        tried = module.lengths(run.model)
        speed = {"tokens_per_s": {"0": 100.0}} | {
            key: {str(length): 0.5 for length in tried} for key in ("times_plain", "plain_steps")
        }
        return {
            "accepted": [0.5**j for j in range(1, max(tried) + 1)],
            "tokens_a_step": {str(k): 1 + sum(0.5**j for j in range(1, k + 1)) for k in tried},
            "share": 0.25,
            "mtp_acceptance": [0.3] * run.model.mtp_depth,
            "speed": {"1": speed | {"same_text": 1.0}, "8": speed | {"same_text": 0.5 if seed else 1.0}},
        }

    results = filled(module, tmp_path, numbers)
    assert module.drafters(results) == list(module.variants(recipe("lab")))[1:]
    text = module.STUDY.table(results)
    assert "| independent | 2 | 1.75 ± 0.00 | 1.17 ± 0.00 | 0.50 ± 0.00 | " in text  # 1.75 / (1 + 2 · 0.25)
    assert text.endswith("equal with and without drafts: 50%.")
    assert "| trunk | 3.5000 ± 0.7071 |  |  |  |" in text and "| MTP | 8 | 2.00 ± 0.00 |" in text
    assert "| EAGLE, frozen trunk | 8 |" not in text and "100 ± 0 at batch 8" in text
    assert drawn(module, results, tmp_path) and "MTP: 50%, × 1.20 modelled, × 0.50 here" in module.STUDY.ours(results)


def test_the_share_of_a_draft():
    """Each of four heads is a quarter of them. A model that drafts for itself costs a full step."""
    module, cfg = load("07_speculation"), recipe("lab").model
    assert module.share(cfg, cfg) == 1
    medusa = replace(cfg, mtp_depth=4, mtp_kind="medusa")
    by_hand = cfg.dim**2 + cfg.vocab_size * cfg.dim
    assert module.share(cfg, medusa) == pytest.approx(by_hand / size(cfg).active)


def test_cache_dtype(tmp_path):
    module = load("08_cache_dtype")

    def numbers(variant, run, seed):
        widths = {"float32": 400, "bfloat16": 200, "int8": 104, "float8_e4m3": 104}
        return {
            kind: {
                dtype: {"val_loss": 3.0 + seed + (400 - width) * 1e-5, "agreement": 0.99, "bytes_per_token": width}
                for dtype, width in widths.items()
            }
            for kind in module.CACHES[variant]
        }

    results = filled(module, tmp_path, numbers)
    rows = module.STUDY.table(results).splitlines()
    assert len(rows) == 2 + 12
    row = "| MLA | latent | bfloat16 | 200 | 3.5020 ± 0.7071 | +0.00200 ± 0.00000 | +0.058 ± 0.012 | 99.00 ± 0.00 |"
    assert rows[3] == row
    assert drawn(module, results, tmp_path)
    assert module.STUDY.ours(results) == "int8 latent: +0.086% of loss at 104 bytes per token instead of 400"
