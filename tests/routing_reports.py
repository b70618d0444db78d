"""Made-up numbers in the shape of stats.json, for tests of the page: any layers, experts, domains and parts."""

import copy

import numpy as np

HOSTILE = '</script><b onclick="x()">&\'"'
WORDS = ("def", "␣return", "␣the", "␣of", "(", ")", "↵", "␣self", ".", "#", "␣include", "␣is", "␣x", "=", "␣0", "s")


def made_up(
    layers: int = 3,
    experts: int = 16,
    experts_per_token: int = 4,
    *,
    first: int = 1,
    heads: int = 1,
    domains: tuple[str, ...] = ("code", "tests", "C", "English"),
    words: tuple[str, ...] = WORDS,
    top: int = 12,
    contexts: int = 8,
    texts: int = 3,
    length: int = 64,
    bias: bool = True,
    worth: bool = True,
    against: bool = True,
    full: bool | None = None,
    seed: int = 0,
) -> dict:
    """Return numbers with every part that stats.json may have; `full`: matrices [E, E] in place of top lists."""
    rng = np.random.default_rng(seed)
    total, k, vocabulary = layers + heads, experts_per_token, np.array(words, dtype=object)
    names = [f"layer {first + i}" for i in range(layers)] + [f"MTP {i + 1}" for i in range(heads)]
    full = total * experts**2 <= 100_000 if full is None else full
    cells = (total, experts)
    by_domain = {name: rng.integers(50, 400, cells) for name in domains}
    load = np.sum(list(by_domain.values()), axis=0)
    tokens = load.sum(-1) // k

    def vio(x):
        return _rounded(np.max(x, -1) / np.mean(x, -1) - 1)

    def between(low, high, *shape):
        return _rounded(rng.uniform(low, high, shape))

    def interval(name, low, high):
        middle = rng.uniform(low, high, total)
        return {name: _rounded(middle), f"{name}_low": _rounded(middle * 0.8), f"{name}_high": _rounded(middle * 1.2)}

    def lists(make, count):
        pool = [make() for _ in range(min(400, count * experts * total))]  # of a large model, many are alike
        picks = rng.integers(len(pool), size=(total, experts, count)).tolist() if count else [[[]] * experts] * total
        return [[[pool[i] for i in of_expert] for of_expert in layer] for layer in picks]

    def favourite():
        token = int(rng.integers(len(words)))
        return {
            "token": token,
            "text": words[token],
            "count": int(rng.integers(20, 900)),
            "lift": round(float(rng.uniform(1, 5)), 3),
            "bits": round(float(rng.uniform(0, 0.05)), 4),
            "margin": round(float(rng.uniform(0, 0.4)), 3),
        }

    def context():
        before, after = ("".join(vocabulary[rng.integers(len(words), size=n)]) for n in (8, 4))
        return {
            "before": before,
            "token": words[int(rng.integers(len(words)))],
            "after": after,
            "gate": round(float(rng.uniform(0.2, 0.9)), 3),
            "margin": round(float(rng.uniform(0, 0.4)), 3),
            "document": int(rng.integers(50)),
        }

    def text(number):
        ids = np.argsort(rng.random((total, length, experts)), -1)[..., :k]
        gates = np.round(-np.sort(-rng.dirichlet(np.ones(k), (total, length)), -1), 2)

        def listed(values):  # a head has no choice for the last token
            return [
                [[] if i >= layers and t == length - 1 else x for t, x in enumerate(of)] for i, of in enumerate(values)
            ]

        return {
            "domain": domains[number % len(domains)],
            "document": number,
            "tokens": vocabulary[rng.integers(len(words), size=length)].tolist(),
            "nll": between(0, 6, length),
            "experts": listed(ids.tolist()),
            "gates": listed(gates.tolist()),
        }

    value = rng.normal(0, 0.05, cells)
    pairs = np.exp(rng.normal(0, 0.5, (total, experts, experts))) if full else None
    if pairs is not None:
        pairs = (pairs + pairs.swapaxes(1, 2)) / 2
        pairs[:, range(experts), range(experts)] = np.nan
    delta = rng.gamma(1.0, 0.004, cells)
    delta[layers:] = np.nan  # heads are not knocked out
    steps = [100, 200, 300, 400]
    return {
        "run": "made-up",
        "step": 400,
        "data": "made-up text",
        "layers": names,
        "domains": list(domains),
        "documents": {name: 20 for name in domains},
        "experts": experts,
        "experts_per_token": k,
        "tokens": tokens.tolist(),
        "load": load.tolist(),
        "load_by_domain": {name: x.tolist() for name, x in by_domain.items()},
        "max_vio": vio(load),
        "max_vio_by_domain": {name: vio(x) for name, x in by_domain.items()},
        "load_entropy": between(0.9, 1, total),
        "load_gini": between(0, 0.3, total),
        "gate_entropy": between(0.85, 0.99, total),
        "score_entropy": between(0.9, 0.99, total),
        "gate_entropy_by_domain": {name: between(0.85, 0.99, total) for name in domains},
        "score_entropy_by_domain": {name: between(0.9, 0.99, total) for name in domains},
        "coactivation_lift": _rounded(pairs) if pairs is not None else None,
        "partners": None if full else [[_pairs(rng, experts, 6, e) for e in range(experts)] for _ in range(total)],
        "specialisation": {
            "domain_entropy": [1.9] * total,
            "bits": between(0.05, 0.2, total),
            "share": between(0.02, 0.1, total),
            "shuffled_mean": between(0.01, 0.02, total),
            "shuffled_95": between(0.02, 0.03, total),
            "p_value": [0.005] * total,
            "draws": 200,
            "seed": 0,
        },
        "favourites": lists(favourite, top),
        "contexts": lists(context, contexts),
        "over_time": {"steps": list(range(10, 410, 10)), "max_vio": between(0.2, 2, 40, total)},
        "header": {
            "run": "made-up",
            "step": 400,
            "data": "made-up text",
            "preset": "tiny",
            "parameters": 1_234_567,
            "active_parameters": 654_321,
            "steps": 400,
            "tokens_seen": 1_638_400,
            "router": "sigmoid",
            "balance_rule": "sign",
            "version": "0.1.0",
            "commit": None,
            "loss": 3.456,
            "max_vio_training_mix": 0.12,
        },
        "bias": {
            "value": _rounded(value),
            "history": {"steps": steps, "value": _rounded(np.stack([value * s / 400 for s in steps]))},
            "changed_choices": between(0.19, 0.38, total),
            "max_vio": vio(load),
            "max_vio_without": between(1.5, 3, total),
            "load_without": (load * rng.uniform(0.2, 3, cells)).astype(int).tolist(),
        }
        if bias
        else None,
        "information": {
            **interval("token", 1.1, 1.5),
            **interval("domain", 0.05, 0.1),
            **interval("domain_given_token", 0.09, 0.17),
            "entropy": between(3.9, 4.0, total),
        },
        "worth": {
            "loss": 3.456,
            "without": _rounded(3.456 + delta),
            "tokens": 20_000,
            "documents": 80,
            "low": _rounded(delta - 0.002),
            "high": _rounded(delta + 0.002),
        }
        if worth
        else None,
        "transitions": {"lift": between(0.2, 3, total - 1, experts, experts)}
        if full
        else {"lift": None, "top": [_pairs(rng, experts, 64) for _ in range(total - 1)]},
        "repeats": {"share": between(0.3, 0.4, total), "by_chance": between(0.25, 0.27, total)},
        "saturation": {"steps": steps, "share": [*between(0.4, 0.9, 3, total), [1.0] * total]},
        "groups": {"load": between(0, 900, total, 4)},
        "devices": {"count": 8, "load": between(0, 900, total, 8)},
        "heads": {
            "layers": names[layers:],
            "load_correlation": between(0, 1, heads),
            "same_expert_number": between(0.1, 0.3, heads),
            "by_chance": between(0.2, 0.3, heads),
        }
        if heads
        else None,
        "against": {
            "run": "other",
            "step": 400,
            "same_text": True,
            "match": [rng.permutation(experts).tolist() for _ in range(total)],
            "shared": between(0.4, 0.8, total),
            "by_chance": between(0.2, 0.3, total),
            "load": rng.integers(200, 1600, cells).tolist(),
            "max_vio": between(0.2, 0.9, total),
            "loss": 3.4,
            "note": None,
        }
        if against
        else None,
        "texts": [text(i) for i in range(texts)],
    }


def version_three(**options) -> dict:
    """Return numbers in the shape of DeepSeek-V3: 58 sparse layers and one head, 256 experts, 8 a token."""
    return made_up(58, 256, 8, first=3, heads=1, texts=12, length=512, **options)


def hostile(numbers: dict) -> dict:
    """Put hostile text wherever a run can bring text in."""
    numbers = copy.deepcopy(numbers)
    old = numbers["domains"][0]
    numbers["run"] = numbers["data"] = numbers["domains"][0] = numbers["against"]["run"] = numbers["against"][
        "note"
    ] = HOSTILE
    for key in ("documents", "load_by_domain", "max_vio_by_domain"):
        numbers[key][HOSTILE] = numbers[key].pop(old)
    numbers["documents"] = {name: numbers["documents"][name] for name in numbers["domains"]}
    numbers["header"] |= dict.fromkeys(
        ("run", "data", "preset", "router", "balance_rule", "version", "commit"), HOSTILE
    )
    for layer in numbers["favourites"]:
        layer[0][0]["text"] = HOSTILE
    for layer in numbers["contexts"]:
        layer[0][0] |= {"before": HOSTILE, "token": HOSTILE, "after": HOSTILE}
    numbers["texts"][0] |= {"domain": HOSTILE, "tokens": [HOSTILE] * len(numbers["texts"][0]["tokens"])}
    return numbers


def _pairs(rng, experts: int, count: int, of: int | None = None) -> list[list[float]]:
    """[expert, expert, lift] of the largest pairs; [expert, lift] of one expert's partners."""
    lifts = -np.sort(-rng.uniform(1.5, 9, count))
    if of is not None:
        partners = (of + 1 + rng.choice(experts - 1, count, replace=False)) % experts
        return [[int(i), round(float(x), 3)] for i, x in zip(partners, lifts, strict=True)]
    ids = rng.integers(experts, size=(count, 2))
    return [[int(i), int(j), round(float(x), 3)] for (i, j), x in zip(ids, lifts, strict=True)]


def _rounded(values):
    """Nested lists of numbers with six significant digits; NaN is None."""
    values = np.asarray(values, np.float64)
    if values.ndim:
        return [_rounded(part) for part in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None
