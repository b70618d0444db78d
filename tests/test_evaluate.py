"""Held-out measures against a loop over positions, without masks and batches."""

from dataclasses import replace

import numpy as np
import pytest
from models import DENSE, forward, random_model
from runs import MODEL, packed_batch

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.runs.evaluate import evaluate
from dsv3_jax.stats.cache_quality import cache_quality

# Few tokens, so that drafts are often right; of 0 to 3 bytes, so that their numbers differ.


class Table(Tokenizer):
    """A vocabulary alone: no test here encodes text."""

    def encode_array(self, text):
        raise AssertionError(f"encode_array({text!r}) was called")


WORDS = Table([b"a", b"bc", b"", b"xyz", "é".encode()], 2, None)
CFG = replace(MODEL, vocab_size=5, mtp_depth=2, init_std=0.5)
B, T = 3, 12


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Rows of one to three documents, of two domains; the last row ends with padding or is padding.

    That of seed 2 is all padding.
    """
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    segment_ids[-1, rng.integers(3, T - 2) if seed == 1 else 0 :] = 0
    batch = packed_batch(rng, segment_ids, vocab_size=5) | {"domains": rng.integers(0, 2, (B, T))}
    return {name: np.asarray(array, np.int32) for name, array in batch.items()}


BATCHES = [make_batch(1), make_batch(2)]


def slow_measures(model) -> dict[str, object]:
    """Position by position, from the model's logits and routing."""
    nats, tokens, size = 0.0, 0, 0
    domains = {name: [0.0, 0] for name in ("even", "odd")}
    trunk = model.cfg.num_sparse_layers
    load = np.zeros((trunk + model.cfg.num_sparse_heads, CFG.num_experts))
    domain_load = np.zeros((2, trunk, CFG.num_experts))
    drafted, agreed = np.zeros(2), np.zeros(2)
    for batch in BATCHES:
        out = forward(model, batch["tokens"], batch["segment_ids"], batch["positions"])
        logits = np.asarray(out.logits, np.float64)
        own, drafts = logits.argmax(-1), [d.argmax(-1) for d in out.mtp_logits]
        ids = [*out.routing.expert_ids, *(routing.expert_ids for routing in out.mtp_routing)]
        for b in range(B):
            segment = batch["segment_ids"][b]
            for t in range(T):
                for layer, chosen in enumerate(ids):
                    read = t + T - chosen.shape[1]  # an MTP block's position reads a later token
                    if segment[t] and read < T and segment[read] == segment[t]:
                        load[layer, chosen[b, t]] += 1
                        if layer < trunk:
                            domain_load[batch["domains"][b, t], layer, chosen[b, t]] += 1
                if t + 1 == T or segment[t] == 0 or segment[t + 1] != segment[t]:
                    continue
                target = batch["tokens"][b, t + 1]
                cost = np.log(np.exp(logits[b, t]).sum()) - logits[b, t, target]
                nats, tokens, size = nats + cost, tokens + 1, size + len(WORDS.bytes_of([target]))
                domain = domains[("even", "odd")[batch["domains"][b, t + 1]]]
                domain[0] += cost
                domain[1] += len(WORDS.bytes_of([target]))
                for depth in (0, 1):
                    if t + 2 + depth >= T or segment[t + 2 + depth] != segment[t]:
                        break
                    drafted[depth] += 1
                    if drafts[depth][b, t] != own[b, t + 1 + depth]:
                        break
                    agreed[depth] += 1
    assert agreed.all() and (agreed < drafted).all()  # or no acceptance would be tested
    measures = {
        "val_loss": nats / tokens,
        "val_bits_per_byte": nats / np.log(2) / size,
        "bits_per_byte_by_domain": {name: n / np.log(2) / s for name, (n, s) in domains.items()},
        "mtp_acceptance": list(agreed / drafted),
        "load": load,
    }
    measures |= {"max_vio_global": vio(load[:trunk]), "max_vio_mtp": vio(load[trunk:])}
    by_domain = zip(domains, domain_load, strict=True)
    measures["max_vio_by_domain"] = {name: vio(part) for name, part in by_domain}
    tokens_of = domain_load[:, 0].sum(-1)
    weights = [MIX[name] * n / domains[name][1] for name, n in zip(domains, tokens_of, strict=True)]
    mixed = sum(w * part / n for w, part, n in zip(weights, domain_load, tokens_of, strict=True))
    return measures | {"max_vio_training_mix": vio(mixed)}


MIX = {"even": 1e6, "odd": 1e5}  # bytes of the training text


def vio(load):
    return np.mean([row.max() / row.mean() - 1 for row in load])


@pytest.mark.long
def test_measures_are_the_slow_loops():
    # with this seed some drafts of each depth are right
    model = random_model(CFG, seed=3, execution=DENSE)
    found, want = evaluate(model, BATCHES, WORDS, ("even", "odd"), mix=MIX), slow_measures(model)
    assert found.keys() == want.keys()
    np.testing.assert_array_equal(found["load"], want["load"])
    assert found["mtp_acceptance"] == pytest.approx(want["mtp_acceptance"], rel=1e-6)
    for name in want.keys() - {"load", "mtp_acceptance"}:
        # the model's float32 rounding
        assert found[name] == pytest.approx(want[name], rel=1e-5), name


@pytest.mark.long
def test_cache_quality_of_an_exact_cache_is_that_of_the_forward():
    model = random_model(replace(CFG, mtp_depth=0), seed=3, execution=DENSE)
    tokens = np.random.default_rng(4).integers(0, 5, (2, B, 20)).astype(np.int32)
    one, positions = np.ones((B, 20), np.int32), np.tile(np.arange(20, dtype=np.int32), (B, 1))
    row = {"segment_ids": one, "positions": positions, "domains": 0 * one}
    rows = [row | {"tokens": t} for t in tokens]
    exact, rounded = cache_quality(model, rows, ("float32", "int8"), "latent").values()
    assert exact.val_loss == pytest.approx(evaluate(model, rows, WORDS)["val_loss"], rel=1e-5)
    assert exact.agreement == 1.0 and 0.9 < rounded.agreement <= 1.0
    assert rounded.val_loss != exact.val_loss == pytest.approx(rounded.val_loss, rel=0.02)
    # C + R; scales
    assert (exact.bytes_per_token, rounded.bytes_per_token) == (2 * 7 * 4, 2 * (7 + 8))
