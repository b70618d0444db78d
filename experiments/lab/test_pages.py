"""Numbers in README.md's prose against its tables. test_statistics holds those to results.json."""

import math
import re
from collections.abc import Callable, Mapping

import pytest
from runs import HERE

from experiments.lab import Results, overview
from experiments.lab.pooling import recipe_noise, siblings
from experiments.lab.results import BEGIN, END
from experiments.lab.study import load

FOLDERS = overview.folders(HERE / "experiments")
NUMBER = r"(?<![\w.,])[−+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?!\w|[.,]\d)"
UNIT = r"(?:\s?(?:%|nats|bits|points|steps|ms|MiB|times)(?!\w))?"
MEAN = rf"({NUMBER}){UNIT} \(({NUMBER}) to ({NUMBER}){UNIT}"  # with its interval
RANGE = rf"\(({NUMBER}) to ({NUMBER}){UNIT}[),]"
SPREAD = rf"({NUMBER}) ± ({NUMBER})"
SAID = rf"({NUMBER})(?!\s?±)[^\d().;:|]{{0,40}}\(({NUMBER}) to ({NUMBER})"  # words may be between
# No measurement: code, addresses, versions, and numbers that are names.
NAMES = (
    r"`[^`]*`|arxiv \d{4}\.\d{5}|\]\([^)]*\)|\d+\.\d+\.\d+"
    r"|\b(?:study|figure|table|section|recipe) [\d.]+"
)
FUNCTIONS = {"log2": math.log2, "exp": math.exp}
CONSTANTS = {"1", "2", "1000000"}

# a value without its sign, which prose leaves to its words, and decimals
Printed = tuple[float, int]
Facts = Mapping[str, str | Callable[[Results], float]]


def parse(text: str) -> Printed:
    """Return (value, decimals) of a number: (1024.0, 0) of "−1,024", (2.5e-7, 8) of "2.5e-7"."""
    digits, _, power = text.lstrip("−+-").replace(",", "").partition("e")
    return float(f"{digits}e{power or 0}"), len(digits.partition(".")[2]) - int(power or 0)


def says(text: str, value: float, decimals: int = 99, unit: str = "") -> bool:
    """Return whether a number is a value that is rounded. In %, the value may be a share of 1."""
    said, digits = parse(text)
    shares = (
        ((100 * value, decimals - 2), (value, decimals)) if unit == "%" else ((value, decimals),)
    )
    return any(
        digits <= most and abs(abs(one) - said) <= 0.5000001 * 10.0**-digits for one, most in shares
    )


def intervals(tables: str) -> list[tuple[Printed, Printed]]:
    """Return pairs of numbers that tables print together: ends of intervals, mean and spread."""
    pairs = [(parse(a), parse(b)) for form in (RANGE, SPREAD) for a, b in re.findall(form, tables)]
    for mean, *ends in re.findall(MEAN, tables):
        low, high = (float(end.replace("−", "-").replace(",", "")) for end in ends)
        pairs.append((parse(mean), ((high - low) / 2, parse(mean)[1])))
    return pairs + [(second, first) for first, second in pairs]


def with_interval(tables: str) -> list[tuple[Printed, Printed, Printed]]:
    """Return what tables print as a mean with its interval, turned to the other sign too."""
    found = [(parse(a), parse(b), parse(c)) for a, b, c in re.findall(MEAN, tables)]
    return found + [(mean, high, low) for mean, low, high in found]


def is_fact(text: str, unit: str, facts: Facts, tables: str, results: Results) -> bool:
    """Return whether a number is a fact, given in words or by what is printed or stored."""
    number = text.lstrip("−+")
    source = facts.get(f"{number} {unit}") or facts.get(number)
    if source is None:
        return False
    if callable(source):
        return says(text, source(results), unit=unit)
    if re.search(r"[a-z]{2}", re.sub("log2|exp", "", source)):
        return True
    printed = {parse(one)[0] for one in (*re.findall(NUMBER, tables), *CONSTANTS)}
    used = re.findall(r"\d[\d,]*(?:\.\d+)?", source.replace("log2", ""))
    if any(parse(one)[0] not in printed for one in used):
        return False
    value = eval(source.replace(",", ""), {"__builtins__": {}}, FUNCTIONS)
    return says(text, value, unit=unit)


def unexplained(
    page: str, own: str, tables: Mapping[str, str], facts: Facts, results: Results
) -> list[str]:
    """Return the numbers and intervals of a page's prose that neither a table nor a fact has.

    Before the tables, paragraphs on what is published are quotations. A paragraph may quote the
    tables of studies that it links.
    """
    facts = {number: source for numbers, source in facts.items() for number in numbers.split(", ")}
    before, _, after = re.sub(r"```.*?```", "", page, flags=re.DOTALL).partition(BEGIN)
    parts = [(part, False) for part in before.split("\n\n") if not part.startswith("Published")]
    parts += [(part, True) for part in after.partition(END)[2].split("\n\n")]

    missing = []
    for part, is_verdict in parts:
        block = "\n".join(
            tables[study] for study in (own, *re.findall(r"\]\((?:\.\./)?(\d\d)_", part))
        )
        text = re.sub(NAMES, "", part, flags=re.IGNORECASE)

        pairs = intervals(block)
        for said in re.findall(RANGE, text) + re.findall(SPREAD, text):
            known = any(
                all(says(one, *other) for one, other in zip(said, pair, strict=True))
                for pair in pairs
            )
            if not known and not any(is_fact(one, "", facts, block, results) for one in said):
                missing.append(" and ".join(said))

        # A mean and its interval are of one row.
        rows = with_interval(block)
        for said in re.findall(SAID, text):
            known = any(
                all(says(one, *other) for one, other in zip(said, row, strict=True)) for row in rows
            )
            if not known:
                missing.append("{} ({} to {})".format(*said))

        printed = [parse(number) for number in re.findall(NUMBER, block)]
        for number, unit in measured(text, is_verdict):
            known = any(says(number, *one) for one in printed)
            if not known and not is_fact(number, unit, facts, block, results):
                missing.append(f"{number} {unit}".strip())
    return missing


def measured(text: str, is_verdict: bool) -> list[tuple[str, str]]:
    """Return (number, unit) of decimals or units; before the verdict integers are settings."""
    found = [(number, unit.strip()) for number, unit in re.findall(f"({NUMBER})({UNIT})", text)]
    return [
        (n, unit)
        for n, unit in found
        if re.search(r"[.e]", n) or unit == "%" or (unit and is_verdict)
    ]


# Numbers of the lab's own pages that no study's tables have.
LAB_FACTS: Facts = {
    "3.702, 3.666, 3.731, 1.2e-2": "trials of the base's rate, on seed 0",
    "240 steps, 500 steps": "settings",
    "0.002, 0.004": "measured when runs were trained again",
}
TABLES = {
    f.name[:2]: (f / "README.md").read_text().partition(BEGIN)[2].partition(END)[0] for f in FOLDERS
}


def test_a_changed_digit_is_found():
    table, none = "| a | −0.080 (−0.104 to −0.057) nats | 50.2 |", Results(HERE / "none")
    for prose, facts, missing in (
        ("It is 0.08 nats (0.057 to 0.104) below, 50 %.", {}, []),
        (
            "It is 0.08 nats (0.057 to 0.103) below, 51 %.",
            {},
            ["0.057 and 0.103", "0.08 (0.057 to 0.103)", "0.103", "51 %"],
        ),
        ("It is 0.05 nats (0.057 to 0.104).", {"0.05": "a guess"}, ["0.05 (0.057 to 0.104)"]),
        ("Half of it is 0.04 ± 0.01.", {"0.04": "0.080 / 2", "0.01": "a guess"}, []),
        ("Half of it is 0.04.", {"0.04": "0.081 / 2"}, ["0.04"]),
    ):
        assert (
            unexplained(f"{BEGIN}{table}{END}{prose}", "01", {"01": table}, facts, none) == missing
        )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_number_of_a_page_is_that_of_a_table(folder):
    """A number that no table can have is one of `Study.facts`."""
    page, results = (folder / "README.md").read_text(), Results(folder / "results.json")
    assert unexplained(page, folder.name[:2], TABLES, load(folder).facts, results) == []


def test_every_number_of_the_overview_is_that_of_a_table():
    """Its noise is that of all studies of the base recipe. The lab's own page is held too."""
    pages = [(HERE / f"experiments/{name}").read_text() for name in ("README.md", "lab/README.md")]
    page, noise = "\n\n".join(pages), recipe_noise(siblings(HERE / "experiments"), "lab", {500})
    assert f"{noise.sd:.4f} nats of validation loss, with {noise.dof} degrees of freedom" in page
    tables = TABLES | {"": "\n".join([*TABLES.values(), f"{noise.sd:.4f}"])}
    assert unexplained(page, "", tables, LAB_FACTS, Results(HERE / "none")) == []
    page = (HERE / "experiments/verdicts.md").read_text()
    before: Facts = {
        "0.047, 0.049, 0.018, 0.019, 0.023, 0.034, 0.035": "verdicts that changed",
        "0.009, 0.061, 0.720": "verdicts that changed",
    }
    assert unexplained(page, "", tables, before, Results(HERE / "none")) == []
