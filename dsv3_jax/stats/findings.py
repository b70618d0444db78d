"""One sentence for each part of the page and each picture: what its numbers show.

Each function takes arrays, as the pictures and stats.json have them; None, NaN and absent values are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BITS_OF_NOTE = 0.005  # smaller amounts of information are written as "less than" it


def max_vio_over_time(steps: Any, max_vio: Any) -> str:
    """Say how MaxVio of training batches, mean over layers, went.

    Example:
        >>> max_vio_over_time([10, 20, 30], [[1.0, 3.0], [0.5, 0.5], [0.2, 0.4]])
        'MaxVio of a training batch, mean over layers, was 2.00 at step 10 and is 0.30 at step 30.'
    """
    steps, mean = _array(steps), _mean_over_layers(max_vio)
    known = np.flatnonzero(np.isfinite(mean))
    if not len(known):
        return "No training batch has a load."
    last = known[-1]
    if len(known) == 1:
        return f"MaxVio of a training batch, mean over layers, is {mean[last]:.2f} at step {steps[last]:.0f}."
    peak = known[np.argmax(mean[known])]
    first, word = (peak, "peaked at") if peak not in (known[0], last) else (known[0], "was")
    return (
        f"MaxVio of a training batch, mean over layers, {word} {mean[first]:.2f} at step {steps[first]:.0f} "
        f"and is {mean[last]:.2f} at step {steps[last]:.0f}."
    )


def bias(changed: Any, max_vio: Any, without: Any) -> str:
    """Say how many choices the router's bias changes, and MaxVio with and without it.

    Example:
        >>> bias([0.2, 0.4], [0.5, 0.5], [2.0, 3.0])
        'The bias changes 30 % of the choices (20 % to 40 % by layer); without it, MaxVio is 2.50 in place of 0.50.'
    """
    changed = _array(changed)
    if not np.isfinite(changed).any():
        return "The router adds a bias to each expert's score before it chooses."
    return (
        f"The bias changes {percent(_mean(changed))} of the choices ({percent(np.nanmin(changed))} to "
        f"{percent(np.nanmax(changed))} by layer); without it, MaxVio is {_mean(without):.2f} in place of "
        f"{_mean(max_vio):.2f}."
    )


def information(token: Any, domain: Any, given: Any, given_low: Any = None) -> str:
    """Say what token and domain tell about the expert, means over layers.

    Example:
        >>> information([1.2, 1.4], [0.1, 0.1], [0.05, 0.07], [0.01, 0.02])
        'The token tells 1.30 bits about its expert, 13 times what the domain tells; once the token is known, \
the domain adds 0.06 bits.'
    """
    token, domain, given = (_mean(x) if _known(x) else np.nan for x in (token, domain, given))
    if np.isnan(token):
        return f"The domain tells {bits_text(domain)} about the expert."
    sentence = f"The token tells {bits_text(token)} about its expert"
    if np.isfinite(domain):
        times = f", {token / domain:.0f} times what the domain tells" if domain > BITS_OF_NOTE else ""
        sentence += times or f", the domain {bits_text(domain)}"
    if np.isfinite(given):
        sure = "" if not _known(given_low) or float(np.nanmax(_array(given_low))) > 0 else ", not more than chance"
        sentence += f"; once the token is known, the domain adds {bits_text(given)}{sure}"
    return sentence + "."


def domains(bits: Any, by_chance: Any, layers: Sequence[str]) -> str:
    """Say in how many layers experts tell more about the domain than shuffled domains do.

    Example:
        >>> domains([0.10, 0.02], [0.03, 0.03], ["layer 3", "layer 4"])
        'Experts tell more of the domain than chance in 1 of 2 layers, the most in layer 3: 0.10 bits, 0.03 by chance.'
    """
    bits, by_chance = _array(bits), _array(by_chance)
    best = int(np.nanargmax(bits))
    above = int((bits > by_chance).sum())
    return (
        f"Experts tell more of the domain than chance in {above} of {len(bits)} layers, the most in {layers[best]}: "
        f"{bits_text(bits[best])}, {by_chance[best]:.2f} by chance."
    )


def domain_preference(ratio: Any, names: Sequence[str], layers: Sequence[str]) -> str:
    """Say which domain prefers an expert the most; ratio is [N, L, E], p(expert | domain) / p(expert).

    Example:
        >>> domain_preference([[[1.5, 0.5]], [[0.5, 1.6]]], ["code", "prose"], ["layer 3"])
        'The strongest preference: domain prose gives 1.60 × its share of all text to expert 1 of layer 3.'
    """
    ratio = _array(ratio)
    if not np.isfinite(ratio).any():
        return "No expert has a load."
    n, layer, expert = _where_largest(ratio)
    return (
        f"The strongest preference: domain {names[n]} gives {ratio[n, layer, expert]:.2f} × its share of all text "
        f"to expert {expert} of {layers[layer]}."
    )


def worth(loss: int | float, without: Any, low: Any, high: Any, load: Any, layers: Sequence[str]) -> str:
    """Say which expert's removal costs the most, and how many experts cost nothing that differs from 0.

    Example:
        >>> worth(2.0, [[2.1, 2.0]], [[0.08, -0.01]], [[0.12, 0.01]], [[3, 1]], ["layer 3"])
        'Without expert 0 of layer 3 the loss is 0.100 nats higher, the most of all; for 1 of 2 experts the interval \
holds 0.'
    """
    delta = _array(without) - float(loss)
    if not np.isfinite(delta).any():
        return "No expert was taken out."
    layer, expert = _where_largest(delta)
    most = f"{delta[layer, expert]:.{3 if delta[layer, expert] >= 0.01 else 4}f} nats higher, the most of all"
    sentence = f"Without expert {expert} of {layers[layer]} the loss is {most}"
    if _known(low) and _known(high):
        known = np.isfinite(delta)
        holds = int(((_array(low) <= 0) & (_array(high) >= 0))[known].sum())
        sentence += f"; for {holds:,} of {int(known.sum()):,} experts the interval holds 0"
    rho = rank_correlation(_array(load).ravel(), delta.ravel())
    if np.isfinite(rho) and delta.size >= 8:
        sentence += f"; the rank correlation with load is {rho:.2f}"
    return sentence + "."


def path(top: Sequence | None, layers: Sequence[str]) -> str:
    """Name the strongest way from an expert to one of the next layer: (layer, from, to, lift).

    Example:
        >>> path((0, 3, 7, 3.14), ["layer 3", "layer 4"])
        'The strongest path: tokens of expert 3 in layer 3 go 3.1 × as often as chance to expert 7 in layer 4.'
    """
    if top is None:
        return "No path is more frequent than chance."
    layer, i, j, lift = top
    return (
        f"The strongest path: tokens of expert {i} in {layers[layer]} go {lift:.1f} × as often as chance "
        f"to expert {j} in {layers[layer + 1]}."
    )


def pair(top: Sequence | None, layers: Sequence[str]) -> str:
    """Name the two experts that are chosen together the most: (layer, expert, expert, lift).

    Example:
        >>> pair((0, 3, 7, 2.04), ["layer 3"])
        'Experts 3 and 7 of layer 3 are chosen for the same token 2.0 × as often as chance, the most of all pairs.'
    """
    if top is None:
        return "A token has one expert, so no two are chosen together."
    layer, i, j, lift = top
    return (
        f"Experts {i} and {j} of {layers[layer]} are chosen for the same token {lift:.1f} × as often as chance, "
        f"the most of all pairs."
    )


def repeats(share: Any, by_chance: Any) -> str:
    """Say how many choices the token before had made too.

    Example:
        >>> repeats([0.3, 0.4], [0.25, 0.25])
        "The token before made 35 % of a token's choices too; by chance it would be 25 %."
    """
    share, chance = _mean(share), _mean(by_chance)
    return f"The token before made {percent(share)} of a token's choices too; by chance it would be {percent(chance)}."


def saturation(steps: Sequence[int], share: Any, layers: Sequence[str]) -> str:
    """Say how many of the last choices the middle checkpoint made already, and which layer settles last.

    Example:
        >>> saturation([100, 200, 400], [[0.4, 0.5], [0.6, 0.8], [1, 1]], ["layer 3", "layer 4"])
        'At step 200 of 400, 70 % of the last choices were made already; layer 3 settled last (60 %).'
    """
    share = _array(share)
    earlier = [i for i, step in enumerate(steps) if step < steps[-1]]
    if not earlier:
        return "One checkpoint is kept, so nothing is known about how choices settled."
    row = min(earlier, key=lambda i: abs(steps[i] - steps[-1] / 2))
    if not _known(share[row]):
        return "No choice of an earlier checkpoint is known."
    late = int(np.nanargmin(share[row]))
    return (
        f"At step {steps[row]:,} of {steps[-1]:,}, {percent(_mean(share[row]))} of the last choices "
        f"were made already; "
        f"{layers[late]} settled last ({percent(share[row, late])})."
    )


def heads(names: Sequence[str], same: Any, by_chance: Any) -> str:
    """Say how many choices of the first head are the trunk's last layer's.

    Example:
        >>> heads(["MTP 1"], [0.2], [0.25])
        'MTP 1 takes the same expert numbers as the last layer of the trunk for 20 % of its choices; by chance 25 %.'
    """
    same, chance = _array(same), _array(by_chance)
    return (
        f"{names[0]} takes the same expert numbers as the last layer of the trunk for {percent(same[0])} "
        f"of its choices; by chance {percent(chance[0])}."
    )


def against(other: str, shared: Any, by_chance: Any, loss: Any = None, other_loss: Any = None) -> str:
    """Say how many choices another run shares once its experts are matched, and the losses of both.

    Example:
        >>> against("runs/b", [0.5, 0.7], [0.2, 0.2])
        '60 % of the choices go to the matched expert of runs/b; by chance it would be 20 %.'
        >>> against("runs/b", None, None, 3.4, 3.5)
        'The experts of runs/b are not matched. The loss is 3.400 here and 3.500 there.'
    """
    if _known(shared):
        sentence = f"{percent(_mean(shared))} of the choices go to the matched expert of {other}"
        if _known(by_chance):
            sentence += f"; by chance it would be {percent(_mean(by_chance))}"
    else:
        sentence = f"The experts of {other} are not matched"
    losses = (
        f". The loss is {loss:.3f} here and {other_loss:.3f} there." if _known(loss) and _known(other_loss) else "."
    )
    return sentence + losses


def entropies(gates: Any, scores: Any, experts_per_token: int, experts: int) -> str:
    """Say how evenly a token weighs its experts.

    Example:
        >>> entropies([0.9, 0.98], [0.99, 0.99], 4, 16)
        'A token weighs its 4 experts as if they were 3.7 equal ones, and the router scores 15.6 of 16 experts alike.'
    """
    gates, scores = _mean(gates), _mean(scores) if _known(scores) else np.nan
    if not np.isfinite(gates):
        return "No entropy is known."
    if experts_per_token == 1:
        first = "A token has one expert, with all the weight"
    else:
        first = (
            f"A token weighs its {experts_per_token} experts as if they were {experts_per_token**gates:.1f} equal ones"
        )
    end = f", and the router scores {experts**scores:.1f} of {experts} experts alike." if np.isfinite(scores) else "."
    return first + end


def evenness(overall: Mapping[str, Any]) -> str:
    """Say how near means over layers of entropies are to their largest value.

    Example:
        >>> evenness({"Chosen gates": [0.9, 0.92], "Scores of all experts": [0.99, 0.99]})
        'Means over layers: 91 % of the largest entropy in chosen gates, 99 % in scores of all experts.'
    """
    known = {name: _mean(values) for name, values in overall.items() if _known(values)}
    parts = [
        f"{percent(mean)}{' of the largest entropy' if i == 0 else ''} in {name[0].lower()}{name[1:]}"
        for i, (name, mean) in enumerate(known.items())
    ]
    return f"Means over layers: {', '.join(parts)}." if parts else "No entropy is known."


def bits_text(bits: int | float) -> str:
    """Write bits with two decimals, and a trace of them as one.

    Example:
        >>> bits_text(0.123), bits_text(0.0001)
        ('0.12 bits', 'less than 0.005 bits')
    """
    return f"less than {BITS_OF_NOTE} bits" if bits < BITS_OF_NOTE else f"{bits:.2f} bits"


def of_trunk(values: Any, layers: Sequence[str]) -> Any:
    """Leave out the multi-token heads of a list by layer: they are no part of the trunk's mean.

    Returns: all values if there is no other layer; None for None.

    Example:
        >>> of_trunk([0.1, 0.2, 0.9], ["layer 3", "layer 4", "MTP 1"])
        [0.1, 0.2]
    """
    if values is None:
        return None
    kept = [value for value, name in zip(values, layers, strict=True) if not name.startswith("MTP")]
    return kept or list(values)


def percent(share: int | float) -> str:
    """Write a share as whole per cent.

    Example:
        >>> percent(0.346)
        '35 %'
    """
    return f"{100 * share:.0f} %" if np.isfinite(share) else "–"


def rank_correlation(x: Any, y: Any) -> float:
    """Compute Spearman's rank correlation of the pairs that are known; NaN for fewer than three, or without spread.

    Example:
        >>> rank_correlation([1, 2, 3, np.nan], [10, 20, 15, 0])
        0.5
    """
    from scipy.stats import rankdata

    x, y = _array(x), _array(y)
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 3 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x[known]), rankdata(y[known]))[0, 1].round(12))


def largest_entry(lift: Any) -> tuple[int, int, int, float] | None:
    """Find the largest of [L, E, E]: (layer, i, j, value); None without values.

    Example:
        >>> largest_entry([[[None, 2.0], [1.5, None]]])
        (0, 0, 1, 2.0)
    """
    lift = _array(lift)
    if not np.isfinite(lift).any():
        return None
    layer, i, j = _where_largest(lift)
    return layer, i, j, float(lift[layer, i, j])


def _where_largest(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(np.nanargmax(values), values.shape))


def _array(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)


def _mean(values: Any) -> float:
    """Mean of the numbers that are known; NaN without any, and without a warning."""
    array = _array(values)
    known = array[np.isfinite(array)]
    return float(known.mean()) if known.size else float("nan")


def _known(values: Any) -> bool:
    return values is not None and bool(np.isfinite(_array(values)).any())


def _mean_over_layers(values: Any) -> np.ndarray:
    values = _array(values)
    known = np.isfinite(values)
    return np.divide(
        np.where(known, values, 0).sum(-1), known.sum(-1), out=np.full(len(values), np.nan), where=known.any(-1)
    )
