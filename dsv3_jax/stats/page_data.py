"""Choose and pack what the page's script shows, so that the page of a large model stays small.

Arrays are packed (`packing`). Lists of each expert, matrices [E, E] and texts are cut to budgets. A small model stays
complete; DeepSeek-V3's 59 layers of 256 experts do not.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.report.run_plots import load_norm, load_over_mean
from dsv3_jax.stats import findings
from dsv3_jax.stats.packing import pack, pack_ids

MATRIX_CELLS = 150_000  # of L·E·E; above, each expert has its NUM_PARTNERS and each layer its largest pairs
NUM_PARTNERS = 6
NUM_PAIRS = 64
FAVOURITES = 61_000  # over all experts
CONTEXT_BYTES = 900_000
TEXT_SLOTS = 350_000  # layers × tokens × experts a token
LEAST_TEXT = 128  # tokens; fewer texts are shown rather than shorter ones
HISTORY_CELLS = 200_000  # steps × layers × experts


def script_data(numbers: dict[str, Any]) -> dict[str, Any]:
    """Select and pack the numbers of stats.json (`reporting.KEYS`) for the page's script.

    Returns: JSON values. A part that the numbers lack is None.
    Raises: ValueError if a load is not [L, E], is negative or not finite.
    """
    loads = [numbers["load"]]
    if len(numbers["domains"]) > 1:
        loads += [numbers["load_by_domain"][name] for name in numbers["domains"]]
    ratios = np.stack([load_over_mean(load, "the page") for load in loads])
    norm, _ = load_norm(ratios)
    peaks = np.where(np.isfinite(ratios), ratios, -np.inf).max(-1)
    matrices = _cells(numbers) <= MATRIX_CELLS
    partners = numbers.get("partners")
    together = _pairs(numbers.get("coactivation_lift"), partners and _pairs_of_partners(partners), matrices)
    return {
        "layers": numbers["layers"],
        "keys": [layer_key(name) for name in numbers["layers"]],
        "experts": numbers["experts"],
        "experts_per_token": numbers["experts_per_token"],
        "domains": numbers["domains"] if len(numbers["domains"]) > 1 else [],
        "load": pack(ratios),
        "load_end": float(norm.vmax or 2.0),
        "max_vio": pack(peaks - 1),
        "tokens": numbers["tokens"],
        "bias": _bias(numbers),
        "information": _information(numbers),
        "worth": _worth(numbers),
        "transitions": _transitions(numbers, matrices),
        "together": together,
        "partners": _partners(numbers),
        "repeats": _packed(numbers.get("repeats")),
        "saturation": _packed(numbers.get("saturation")),
        "over_time": _packed(numbers.get("over_time")),
        "groups": _packed(numbers.get("groups")),
        "devices": _packed(numbers.get("devices")),
        "heads": numbers.get("heads"),
        "against": _against(numbers),
        "entropies": _entropies(numbers),
        "favourites": _favourites(numbers["favourites"]),
        "contexts": _contexts(numbers["contexts"]),
        "texts": _texts(numbers.get("texts") or [], len(numbers["layers"]), numbers["experts_per_token"]),
    }


def layer_key(name: str) -> str:
    """Name a layer in the page's address: "3" of "layer 3", "MTP1" of "MTP 1".

    Example:
        >>> layer_key("layer 3"), layer_key("MTP 1")
        ('3', 'MTP1')
    """
    return name.removeprefix("layer ").replace(" ", "")


def _cells(numbers: dict[str, Any]) -> int:
    return len(numbers["layers"]) * numbers["experts"] ** 2


def _packed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Pack each list of lists of a part; leave its names, steps and numbers."""
    if not part:
        return None
    return {key: pack(value) if key not in ("steps", "count") and isinstance(value, list) else value
            for key, value in part.items()}  # fmt: skip


def _bias(numbers: dict[str, Any]) -> dict[str, Any] | None:
    bias = numbers.get("bias")
    if not bias:
        return None
    history, kept = bias.get("history"), None
    if history:
        count = len(history["steps"])
        most = max(2, HISTORY_CELLS // max(1, len(numbers["layers"]) * numbers["experts"]))
        rows = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
        kept = {
            "steps": [history["steps"][i] for i in rows],
            "value": pack([history["value"][i] for i in rows], bits=8 if count > most else 16),
        }
    rest = {key: pack(bias[key]) for key in ("changed_choices", "max_vio", "max_vio_without") if bias.get(key)}
    return {"value": pack(bias["value"]), "history": kept} | rest


def _information(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """Information of token and domain; of the domain alone, with its shuffles, where nothing else is known."""
    special = numbers.get("specialisation") if len(numbers["domains"]) > 1 else None
    parts = {} if not special else {key: pack(special[key]) for key in ("bits", "shuffled_mean", "shuffled_95")}
    known = numbers.get("information") or {}
    parts |= {key: pack(value) for key, value in known.items() if isinstance(value, list) and value}
    return parts or None


def _worth(numbers: dict[str, Any]) -> dict[str, Any] | None:
    worth = numbers.get("worth")
    if not worth:
        return None
    delta = np.asarray(worth["without"], np.float64) - worth["loss"]
    rest = {key: pack(worth[key]) for key in ("low", "high") if worth.get(key)}
    return {"delta": pack(delta), "loss": worth["loss"]} | rest


def _transitions(numbers: dict[str, Any], matrices: bool) -> dict[str, Any] | None:
    """All pairs of two layers, or those of the largest lift. The largest of all is one that occurs often enough."""
    part = numbers.get("transitions")
    if not part:
        return None
    pairs, top = _pairs(part.get("lift"), part.get("top"), matrices), _pairs(None, part.get("top"), False)
    return {**pairs, "most": top["most"]} if pairs and top else pairs


def _pairs(lift: Any, top: Any, matrices: bool) -> dict[str, Any] | None:
    """A matrix for each layer, or the largest pairs of each layer."""
    if lift is not None:
        values = np.asarray(lift, np.float64)
        if not np.isfinite(values).any():
            return None
        if matrices:
            return {"lift": pack(values), "most": findings.largest_entry(values)}
        top = [largest_pairs(layer) for layer in values]
    if not top:
        return None
    first = max(((layer, *rows[0]) for layer, rows in enumerate(top) if rows), key=lambda row: row[-1], default=None)
    return {"top": top, "most": first}


def largest_pairs(lift: np.ndarray) -> list[tuple[int, int, float]]:
    """List the largest entries of [E, E]; a symmetric matrix has each pair once.

    Example:
        >>> largest_pairs(np.array([[np.nan, 2.0], [2.0, np.nan]]))
        [(0, 1, 2.0)]
    """
    values = np.triu(lift, 1) if np.array_equal(lift, lift.T, equal_nan=True) else lift
    values = np.where(np.isfinite(values), values, -1)
    order = np.argsort(-values, axis=None, kind="stable")[:NUM_PAIRS]
    rows = zip(*np.unravel_index(order, values.shape), values.ravel()[order], strict=True)
    return [(int(i), int(j), round(float(x), 3)) for i, j, x in rows if x > 0]


def _pairs_of_partners(partners: Sequence[Sequence[Sequence]]) -> list[list[tuple]]:
    """The largest pairs of each layer, from the partners of each of its experts: (expert, expert, lift)."""
    top = []
    for layer in partners:
        found = {(min(i, j), max(i, j)): lift for i, rows in enumerate(layer) for j, lift in rows}
        top.append(sorted(((i, j, lift) for (i, j), lift in found.items()), key=lambda row: -row[2])[:NUM_PAIRS])
    return top


def _partners(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """The experts with the largest co-activation lift, of each expert; its own number means none."""
    listed = numbers.get("partners")
    if listed is None:
        lifts = numbers.get("coactivation_lift")
        if lifts is None:
            return None
        listed = [
            [[(j, x) for j, x in sorted(enumerate(row), key=lambda pair: -(pair[1] or 0)) if x] for row in layer]
            for layer in lifts
        ]
    padded = [
        [[*rows[:NUM_PARTNERS], *[(e, None)] * (NUM_PARTNERS - len(rows))] for e, rows in enumerate(layer)]
        for layer in listed
    ]
    expert = pack_ids([[[pair[0] for pair in rows] for rows in layer] for layer in padded])
    return {"expert": expert, "lift": pack([[[pair[1] for pair in rows] for rows in layer] for layer in padded])}


def _against(numbers: dict[str, Any]) -> dict[str, Any] | None:
    """The other run by the layers of this one; a layer or expert without a counterpart is missing."""
    other = numbers.get("against")
    if not other:
        return None
    kept = {key: other.get(key) for key in ("run", "step", "same_text", "loss", "note")}
    kept |= {key: pack(other[key]) for key in ("shared", "by_chance") if other.get(key)}
    theirs, experts = other.get("layers") or numbers["layers"], numbers["experts"]
    place = {name: i for i, name in enumerate(theirs)}
    if other.get("max_vio"):
        kept["max_vio"] = pack([other["max_vio"][place[name]] if name in place else None for name in numbers["layers"]])
    if other.get("match"):
        match = np.array([[experts if e is None or e < 0 else e for e in row] for row in other["match"]], np.int64)
        kept["match"] = pack_ids(match)  # E: the expert has no partner
        if other.get("load"):
            ratio = load_over_mean(other["load"], other["run"])
            matched = np.full(match.shape, np.nan)
            for layer, name in enumerate(numbers["layers"]):
                has = match[layer] < experts
                if name in place:
                    matched[layer, has] = ratio[place[name], match[layer, has]]
            kept["difference"] = pack(load_over_mean(numbers["load"], "this run") - matched)
    return kept


def _entropies(numbers: dict[str, Any]) -> dict[str, Any] | None:
    names = [key for key in ("gate_entropy", "score_entropy", "load_entropy") if numbers.get(key)]
    return {key: pack(numbers[key]) for key in names} or None


class _Texts:
    """Strings and their numbers: a string that occurs often is written once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _favourites(favourites: Sequence[Sequence[Sequence[dict]]]) -> dict[str, Any]:
    """Lists of all experts one after another: where each starts, and a column for each number."""
    experts = [rows for layer in favourites for rows in layer]
    most = max(3, FAVOURITES // max(1, len(experts)))
    kept = [rows[:most] for rows in experts]
    texts = _Texts()
    rows = [row for of_expert in kept for row in of_expert]
    columns: dict[str, Any] = {"text": pack_ids([texts.number(row["text"]) for row in rows])}
    columns["count"] = pack_ids([row.get("count", row.get("num_routed", 0)) for row in rows])
    for key in ("lift", "bits", "margin"):
        if any(row.get(key) is not None for row in rows):
            columns[key] = pack([row.get(key) for row in rows])
    return {"starts": pack_ids(_starts(kept)), "texts": list(texts.numbers)} | columns


def _contexts(contexts: Sequence[Sequence[Sequence[dict]]]) -> dict[str, Any]:
    """Contexts of all experts, as many of each as the budget holds, and shorter ones if it holds few."""
    experts = [rows for layer in contexts for rows in layer]
    for before, after, least in ((10_000, 10_000, 2), (24, 10, 1), (10, 4, 0)):
        cut = [
            [(row["before"][-before:], row["token"][:24], row["after"][:after], row) for row in rows]
            for rows in experts
        ]
        most, used = 0, 0
        while any(len(rows) > most for rows in cut):
            used += sum(len("".join(rows[most][:3]).encode()) + 14 for rows in cut if len(rows) > most)
            if used > CONTEXT_BYTES:
                break
            most += 1
        if most >= min(least, max(map(len, experts))):
            break
    kept = [rows[:most] for rows in cut]
    rows = [row for of_expert in kept for row in of_expert]
    parts: dict[str, Any] = {"starts": pack_ids(_starts(kept)), "rows": [row[:3] for row in rows]}
    if any(row[3].get("gate") is not None for row in rows):
        parts["gate"] = pack([row[3].get("gate") for row in rows])
    return parts


def _starts(lists: Iterable[Sequence]) -> list[int]:
    return [0, *np.cumsum([len(rows) for rows in lists]).tolist()]


def _filled(rows: Sequence[Sequence[list]], length: int, none: list) -> list[list[list]]:
    """The first tokens of each layer; a token without a choice, as the last ones of a head, gets `none`."""
    return [[choices or none for choices in layer[:length]] for layer in rows]


def _texts(texts: Sequence[dict], layers: int, experts_per_token: int) -> list[dict[str, Any]]:
    """Texts with their routing: the first ones, and the beginnings of long ones, as the budget holds."""
    left = TEXT_SLOTS // max(1, layers * experts_per_token)  # tokens
    shown = []
    count = min(len(texts), max(1, left // LEAST_TEXT))
    for i, text in enumerate(texts[:count]):
        length = min(len(text["tokens"]), left // (count - i))
        left -= length
        shown.append(
            {
                "domain": text.get("domain"),
                "document": text.get("document"),
                "total": len(text["tokens"]),
                "tokens": text["tokens"][:length],
                "nll": pack(text["nll"][:length]) if text.get("nll") else None,
                "experts": pack_ids(_filled(text["experts"], length, [0] * experts_per_token)),
                "gates": pack(_filled(text["gates"], length, [None] * experts_per_token), bits=8),
            }
        )
    return shown
