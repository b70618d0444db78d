"""The lab's studies of decoding: statistics against hand calculations, tables and pictures."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from models import DENSE, random_model
from runs import HERE, MODEL

from dsv3_jax.config import replace
from dsv3_jax.model.counting import size
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows
from dsv3_jax.presets import recipe
from dsv3_jax.stats.cache_quality import cache_quality
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
        results.runs[variant][str(seed)]["steps"] = planned.run.steps
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
    assert drawn(module, results, tmp_path)


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
    assert drawn(module, results, tmp_path)
    slow = {v.claim.text: v for v in module.STUDY.judge(results)[0]}["MTP is faster than plain decoding here"]
    assert slow.difference.mean == -0.5  # against × 1


def test_the_share_of_a_draft():
    """Each of four heads is a quarter of them. A model that drafts for itself costs a full step."""
    module, cfg = load("07_speculation"), recipe("lab").model
    assert module.share(cfg, cfg) == 1
    medusa = replace(cfg, mtp_depth=4, mtp_kind="medusa")
    by_hand = cfg.dim**2 + cfg.vocab_size * cfg.dim
    assert module.share(cfg, medusa) == pytest.approx(by_hand / size(cfg).active)


def test_cache_dtype(tmp_path):
    """Bits cost 0.1 nats at 2 and nothing above 4: the check passes, and the latent keeps its loss at 6 bits."""
    module = load("08_cache_dtype")
    rates = {name: run.optim.learning_rate for name, run in module.variants(recipe("lab")).items()}
    assert rates["MHA"] == rates["MLA"] / 2  # F8: the rate that study 01 chose

    def numbers(variant, run, seed):
        widths = {"float32": 400, "bfloat16": 200, "int8": 104, "float8_e4m3": 104}
        widths |= {f"{bits} bits": 100 * bits / 8 + 4 for bits in module.BITS}
        costs = {"4 bits": 0.02, "3 bits": 0.05, "2 bits": 0.1}
        found = {
            dtype: {
                "val_loss": 3.0 + seed + costs.get(dtype, (400 - width) * 1e-7) * (1 + 0.01 * seed),
                "agreement": 0.99,
                "bytes_per_token": width,
            }
            for dtype, width in widths.items()
        }
        loss = 3.0 + seed + 0.01 * (seed + 1) * (variant == "MHA")  # noise, which is the yardstick of the check
        return {"val_loss": loss} | {kind: found for kind in module.CACHES[variant]}

    results = filled(module, tmp_path, numbers)
    rows = module.STUDY.table(results).splitlines()
    assert len(rows) == 2 + 30
    row = "| MLA | latent | bfloat16 | 200 | +0.00002 ± 0.00000 | +0.001 ± 0.000 | 99.00 ± 0.00 |"
    assert rows[3] == row
    assert drawn(module, results, tmp_path)
    verdicts, [check] = module.STUDY.judge(results)
    answers = {v.claim.text: v.answer for v in verdicts}
    assert (
        check.cost == pytest.approx(0.1005) and answers["a latent of 6 bits keeps the loss, within 0.004 nats"] == "yes"
    )
    assert answers["a latent of 4 bits keeps the loss, within 0.004 nats"] == "no"


def test_rounding_to_eight_bits_is_int8(rng):
    """And 2 bits leave three values: −max, 0 and max of a row."""
    module = load("08_cache_dtype")
    x = rng.normal(size=(4, 8)).astype(np.float32)
    x[2] = 0
    rows, scales = quantize_rows(jnp.asarray(x), jnp.int8)
    np.testing.assert_allclose(module.round_to_bits(x, 8), dequantize_rows(rows, scales, jnp.float32), rtol=1e-6)
    top = np.abs(x).max(1, keepdims=True)
    two = np.where(np.abs(x) > top / 2, np.sign(x) * top, 0)
    np.testing.assert_allclose(module.round_to_bits(x, 2), two)


def test_a_cache_of_few_bits_loses_and_leaves_no_trace(rng):
    """The rounding is compiled in, and is gone afterwards."""
    module = load("08_cache_dtype")
    cfg = replace(MODEL, mtp_depth=0, vocab_size=260, init_std=0.3)
    model = random_model(cfg, seed=3, execution=DENSE)
    one, tokens = np.ones((2, 20), np.int32), rng.integers(0, 260, (2, 20)).astype(np.int32)
    batches = [{"tokens": tokens, "segment_ids": one, "positions": one, "domains": 0 * one}]
    losses = [module.loss_at_bits(model, batches, "latent", bits) for bits in (24, 8, 2)]
    exact, int8 = cache_quality(model, batches, ("float32", "int8"), "latent").values()
    assert losses[0] == pytest.approx(exact.val_loss, abs=1e-5)
    assert losses[1] == pytest.approx(int8.val_loss, abs=1e-5)
    assert abs(losses[2] - exact.val_loss) > 10 * abs(losses[1] - exact.val_loss)
