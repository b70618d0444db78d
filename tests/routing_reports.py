"""Numbers of made-up runs, for tests of the page: random choices, counted by the package itself."""

import copy
import json
from dataclasses import replace
from functools import cache

import numpy as np

from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.stats import BiasWork, LoadLog, RoutingStats, Worth, specialisation
from dsv3_jax.stats.bits import NAMES
from dsv3_jax.stats.numbers import as_json, by_domain, merge_small_domains, worth_json
from dsv3_jax.stats.tables import as_lists
from dsv3_jax.stats.token_rows import rows_of

HOSTILE = '</script><b onclick="x()">&\'"'


def made_up(
    layers: int = 3,
    experts: int = 16,
    experts_per_token: int = 4,
    *,
    first: int = 1,
    heads: int = 1,
    domains: tuple[str, ...] = ("code", "tests", "C", "English"),
    measured: bool = True,
) -> dict:
    """Return the page's numbers; `measured`: with bias, log, worth, checkpoints and another run."""
    rng, k, n = np.random.default_rng(0), experts_per_token, 480
    total = layers + heads
    names = [f"layer {first + i}" for i in range(layers)] + [f"MTP {i + 1}" for i in range(heads)]
    ids = np.argpartition(rng.random((total, n, experts), dtype=np.float32), k, axis=-1)
    ids = ids[..., :k].astype(np.int16)
    document = np.arange(n) // 40
    counted = np.ones((total, n), bool)
    counted[layers:, 39::40] = False  # a head has no choice for the last token of a text
    rows = rows_of(ids, document)._replace(
        token=rng.integers(97, 123, n).astype(np.int32),
        domain=(document % len(domains)).astype(np.int32),
        nll=rng.uniform(0, 6, n).astype(np.float32),
        gates=rng.dirichlet(np.ones(k), (total, n)).astype(np.float32),
        counted=counted,
    )
    cells = (total, experts)
    document_load = rng.integers(50, 400, (60, *cells))
    pairs = rng.integers(1, 99, (total, experts, experts))
    pairs += pairs.swapaxes(1, 2)
    if k == 1:
        pairs *= np.eye(experts, dtype=pairs.dtype)
    stats = replace(
        RoutingStats.from_loads(document_load, np.arange(60) % len(domains), domains),
        layers=tuple(names),
        experts_per_token=k,
        document_score_entropy=rng.uniform(0.9, 1, (60, total)) * document_load.sum(-1) / k,
        document_gate_entropy=rng.uniform(0.8, 1, (60, total)) * document_load.sum(-1) / k,
        coactivation=pairs,
        bias=BiasWork(
            rng.normal(0, 0.05, cells), rng.integers(9, 99, cells), rng.integers(99, 999, total)
        ),
        rows=rows,
    )
    header = dict(
        preset="tiny", parameters=1_234_567, active_parameters=654_321, steps=400,
        tokens_seen=1_638_400, router="sigmoid", balance_rule="sign", version="0.1.0",
        commit="0" * 40, loss=3.456, bits_per_byte=2.1, max_vio_training_mix=0.5,
    )  # fmt: skip
    more = {"run": "made-up", "step": 400, "data": "made-up text", "header": header}
    bits = {name: rng.uniform(0.1, 1.5, total) for name in NAMES}
    ends = {"": 1.0, "_low": 0.8, "_high": 1.2, "_chance": 0.5}
    more["information"] = {
        name + end: as_lists(x * bits[name]) for name in NAMES for end, x in ends.items()
    }
    log = None
    if measured:
        loads, biases = rng.integers(1, 9, (40, *cells)), rng.normal(0, 0.1, (40, *cells))
        log = LoadLog(np.arange(10, 410, 10), loads, biases)
        delta = rng.gamma(1.0, 0.004, (layers, experts))
        worth = Worth(3.0, 3.0 + delta, delta - 0.002, delta + 0.002, 20_000, 80, 100)
        share = [*rng.uniform(0.4, 1, (2, total)).tolist(), [1] * total]
        other = dict(run="other", step=300, same_text=True, loss=3.4, bits_per_byte=2.0, note=None)
        other |= {"layers": names, "match": [rng.permutation(experts).tolist() for _ in names]}
        for key in ("shared", "by_chance", "max_vio"):
            other[key] = rng.uniform(0.2, 0.8, total).tolist()
        more |= {
            "worth": worth_json(worth, total),
            "saturation": {"steps": [100, 200, 400], "share": share},
            "groups": {"load": rng.integers(1, 900, (total, 4)).tolist()},
            "devices": {"count": 8, "load": rng.integers(1, 900, (total, 8)).tolist()},
            "against": other | {"load": rng.integers(200, 1600, cells).tolist()},
        }
    else:
        stats = replace(stats, bias=None)
    numbers = as_json(stats, specialisation(stats, draws=2), ByteTokenizer(), log, more)
    return numbers | by_domain(merge_small_domains(stats))


@cache
def version_three() -> dict:
    """Return numbers in V3's shape: 58 sparse layers, a head, 256 experts, 8 a token, domains."""
    return made_up(58, 256, 8, first=3, domains=tuple(f"domain {i}" for i in range(24)))


def hostile(numbers: dict) -> dict:
    """Put hostile text wherever a run can bring text in."""
    numbers = copy.deepcopy(numbers)
    old = numbers["domains"][0]
    numbers = json.loads(json.dumps(numbers).replace(json.dumps(old), json.dumps(HOSTILE)))
    numbers["run"] = numbers["data"] = HOSTILE
    numbers["against"]["run"] = numbers["against"]["note"] = HOSTILE
    texts = ("preset", "router", "balance_rule", "version", "commit")
    numbers["header"] |= dict.fromkeys(texts, HOSTILE)
    numbers["favourites"][0][0][0][1] = HOSTILE
    numbers["contexts"][0][0][0][:3] = [HOSTILE] * 3
    numbers["texts"][0]["tokens"] = [HOSTILE] * len(numbers["texts"][0]["tokens"])
    return numbers
