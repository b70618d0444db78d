"""`dsv3 stats` on texts from known processes, and what its page says of luck."""

import numpy as np
import pytest

from dsv3_jax.stats.bits import information
from dsv3_jax.stats.page import findings
from dsv3_jax.stats.token_rows import rows_of

DOMAINS, EXPERTS, SHARED, OWN = 3, 8, 20, 60  # words of all domains, and of each alone
DOCUMENTS, LENGTH, WORLDS = 48, 150, 8


def world(rng, pull):
    """Draw p(word | domain) [D, W] and p(expert | word, domain) [D, W, E].

    Half of a text is of its domain's own words. `pull`: how far a domain moves a word's experts.
    """
    words = SHARED + DOMAINS * OWN
    of_word = np.zeros((DOMAINS, words))
    for d in range(DOMAINS):
        of_word[d, :SHARED] = rng.dirichlet(np.ones(SHARED)) / 2
        own = SHARED + d * OWN
        of_word[d, own : own + OWN] = rng.dirichlet(np.ones(OWN)) / 2
    logits = rng.normal(size=(1, words, EXPERTS)) + pull * rng.normal(
        size=(DOMAINS, words, EXPERTS)
    )
    experts = np.exp(logits)
    return of_word, experts / experts.sum(-1, keepdims=True)


def truth(of_word, of_expert):
    """Return I(expert; domain | word) in bits, of domains with equal shares."""
    joint = (of_word[..., None] * of_expert) / DOMAINS  # [D, W, E]
    given = joint / joint.sum((0, 2), keepdims=True)
    apart = given.sum(2, keepdims=True) * given.sum(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nansum(joint * np.log2(given / apart)))


def text(rng, of_word, of_expert):
    """Draw documents of each domain, with one expert a token."""
    domain = np.repeat(np.arange(DOCUMENTS) % DOMAINS, LENGTH)
    words = np.concatenate(
        [rng.choice(of_word.shape[1], LENGTH, p=of_word[i % DOMAINS]) for i in range(DOCUMENTS)]
    )
    sums = of_expert[domain, words].cumsum(-1)
    experts = (rng.random(len(words))[:, None] > sums).sum(-1).clip(max=EXPERTS - 1)
    rows = rows_of(experts[None, :, None], np.repeat(np.arange(DOCUMENTS), LENGTH))
    return rows._replace(token=words.astype(np.int32), domain=domain.astype(np.int32))


@pytest.mark.parametrize("pull", [0.0, 0.5, 0.8])
def test_what_the_domain_tells_beyond_the_token(pull):
    """Domains have words of their own. Shuffled domains alone would take off too much there."""
    rng, covered, errors = np.random.default_rng(0), [], []
    for _ in range(WORLDS):
        process = world(rng, pull)
        found = information(
            text(rng, *process), EXPERTS, DOMAINS, draws=10, resamples=40
        ).domain_given_token
        want = truth(*process)
        assert want > 0.02 or not pull
        covered.append(found.low[0] <= want <= found.high[0])
        errors.append(found.bits[0] - want)
    assert abs(np.mean(errors)) < 0.012
    assert np.mean(covered) >= 0.75  # 95 % of worlds; six of eight leave room for chance


def test_the_largest_of_many_is_partly_luck():
    """The page counts the experts that it chose among, and what chance alone would give."""
    worth = {
        "loss": 3.0,
        "without": [[3.1, 3.0], [3.02, None]],
        "low": [[0.05, -0.1], [-0.1, None]],
        "high": [[0.2, 0.1], [0.1, None]],
        "documents": 40,
    }
    numbers = {"layers": ["layer 1", "layer 2"], "load": [[1, 1], [1, 1]], "worth": worth}
    found = findings(numbers)["worth"]
    assert "Without expert 0 of layer 1 the loss of 3.000 nats is 0.1000 higher" in found
    assert "the largest of 3 and so partly luck. For 2 of 3 experts the interval holds 0" in found
    assert "2.5% (0.1) would lie above 0 by chance" in found and "documents" not in found
    few = findings(numbers | {"worth": worth | {"documents": 8}})["worth"]
    assert few == f"{found} The intervals are percentiles of 8 documents, and may be too narrow."
