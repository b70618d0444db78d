"""Fill the page of `dsv3 stats`: one file that needs no other file and no network.

`page_data` packs the numbers, `findings` writes the sentences, and the folder `web` holds the template, the style and
the script. All values are escaped; the page's policy runs its own script alone and loads nothing.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from dsv3_jax.report.colours import MEANINGS, diverging, on_dark, tints
from dsv3_jax.report.run_plots import load_finding
from dsv3_jax.stats import findings
from dsv3_jax.stats.measures import domain_preference
from dsv3_jax.stats.page_data import script_data

WEB = Path(__file__).parent / "web"
SCRIPTS = ("core.js", "maps.js", "lines.js", "layers.js", "experts.js", "texts.js", "panel.js", "table.js", "main.js")
BAR_STEPS = 16  # colours on each side of even, between which the script interpolates
LAYER_COLUMNS = ("MaxVio", "entropy of load", "Gini of load", "entropy of gates", "entropy of scores")
DOMAIN_COLUMNS = ("I(expert; domain), bits", "shuffled: mean", "shuffled: 95 %", "share of H(domain)", "p value")


class Section(NamedTuple):
    """A part of the page; the script draws its charts."""

    id: str
    heading: str
    finding: str
    note: str


def render_page(numbers: dict[str, Any]) -> str:
    """Render the page from the numbers of stats.json (`reporting.KEYS`); a part that they lack is left out.

    Returns: HTML, with style, script and numbers inside and all text escaped.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.measures import specialisation
        >>> from dsv3_jax.stats.reporting import as_json
        >>> from dsv3_jax.stats.routing_stats import RoutingStats
        >>> stats = RoutingStats.from_loads(np.array([[[3, 1]], [[0, 4]]]), np.array([0, 1]), ["code", "prose"])
        >>> numbers = as_json(stats, specialisation(stats, draws=1), ByteTokenizer(), None)
        >>> page = render_page({"run": "demo", "step": 400, "data": "text"} | numbers)
        >>> page.split("\\n")[0]
        '<!DOCTYPE html>'
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "ensure_ascii": False,
        "separators": (",", ":"),
        "default": lambda value: value.item(),  # NumPy's own numbers
    }
    data = script_data(numbers) | {"colours": _colours(numbers)}
    script = "(() => {\n" + "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        title=f"Where tokens go: {numbers['run']}, step {numbers['step']}",
        subtitle=_subtitle(numbers),
        facts=_facts(numbers),
        sections=_sections(numbers, data),
        table=_layer_table(numbers),
        meanings=MEANINGS,
        style=Markup((WEB / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        data=data,
    )


def _colours(numbers: dict[str, Any]) -> dict[str, Any]:
    """Colours that the script draws with; those of `MEANINGS` are in the style."""

    def hexes(values) -> list[str]:
        return [to_hex(value) for value in values]

    experts = numbers["experts"]
    return {
        "diverging": {
            "light": hexes(diverging(BAR_STEPS).colors),
            "dark": hexes(on_dark(BAR_STEPS).colors),
        },
        "experts": {
            "light": hexes(tints(experts, (0.91, 0.83), 0.075)),
            "dark": hexes(tints(experts, (0.36, 0.46), 0.08)),
        },
    }


def _subtitle(numbers: dict[str, Any]) -> str:
    documents = numbers["documents"]
    names = ", ".join(f"{name} {count:,}" for name, count in documents.items())
    return (
        f"{max(numbers['tokens']):,} tokens of {sum(documents.values()):,} documents ({names}): {numbers['data']}. "
        f"{numbers['experts_per_token']} of {numbers['experts']} experts a token in {len(numbers['layers'])} layers."
    )


def _facts(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each fact of the run that is known."""
    header = numbers.get("header") or {}

    def count(key):
        return None if header.get(key) is None else _short(header[key])

    def fixed(key, digits):
        return None if header.get(key) is None else f"{header[key]:.{digits}f}"

    parameters = count("parameters")
    if parameters and header.get("active_parameters") is not None:
        parameters += f", {count('active_parameters')} active"
    vio = [x for x in findings.of_trunk(numbers["max_vio"], numbers["layers"]) if x is not None]
    known = {
        "loss of this text": fixed("loss", 3) and f"{fixed('loss', 3)} nats a token",
        "bits a byte": fixed("bits_per_byte", 3),
        "MaxVio of this text": f"{np.mean(vio):.2f}" if vio else None,
        "MaxVio, training mix": fixed("max_vio_training_mix", 2),
        "parameters": parameters,
        "trained": header.get("steps") and f"{header['steps']:,} steps"
        + (f", {count('tokens_seen')} tokens" if header.get("tokens_seen") else ""),
        "recipe": header.get("preset"),
        "router": header.get("router"),
        "balance": header.get("balance_rule"),
        "version": header.get("version") and f"{header['version']}"
        + (f", {header['commit'][:10]}" if header.get("commit") else ""),
    }  # fmt: skip
    return [(name, str(value)) for name, value in known.items() if value]


def _short(count: int | float) -> str:
    """Write a count with three digits: 1,234,567 is 1.23 M.

    Example:
        >>> _short(950), _short(1_234_567), _short(671_000_000_000)
        ('950', '1.23 M', '671 G')
    """
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"


def _sections(numbers: dict[str, Any], data: dict[str, Any]) -> list[Section]:
    """The parts that the numbers have, in the page's order."""
    layers, found = numbers["layers"], []

    def trunk(part, key):
        return findings.of_trunk(part.get(key), layers)

    def add(id, heading, finding, note):
        found.append(Section(id, heading, finding, note))

    add(
        "load", "Load by layer and expert", load_finding(numbers["load"], layers),
        "Assignments of an expert, divided by the mean of its layer. Choose a cell to see its expert. MTP rows are "
        "multi-token prediction heads.",
    )  # fmt: skip
    if data["texts"]:
        text = data["texts"][0]
        add(
            "texts", "Texts, token by token",
            f"{len(data['texts'])} of the texts that were read, each token in the colour of its first expert.",
            "Hover over a token, or move with the arrow keys, to see all its experts, their gates and its loss. A "
            "click opens the token's first expert; the tokens of the open expert are framed."
            + ("" if text["total"] == len(text["tokens"]) else " Long texts are cut."),
        )  # fmt: skip
    if bias := numbers.get("bias"):
        add(
            "bias", "The bias and its work",
            findings.bias(trunk(bias, "changed_choices"), trunk(bias, "max_vio"), trunk(bias, "max_vio_without")),
            "The router chooses by score + bias and weighs by the score alone. Only differences within a layer matter, "
            "so the map shows each bias minus its layer's mean.",
        )  # fmt: skip
    if known := data["information"]:
        info, special = numbers.get("information") or {}, numbers.get("specialisation") or {}
        if "token" in known:
            sentence = findings.information(
                trunk(info, "token"),
                trunk(info, "domain"),
                trunk(info, "domain_given_token"),
                trunk(info, "domain_given_token_low"),
            )
        else:
            sentence = findings.domains(special["bits"], special["shuffled_95"], layers)
        add(
            "information", "Token against domain", sentence,
            "Mutual information of one chosen expert, in bits, less what chance gives; bars are 95 % intervals by "
            "bootstrap over documents. The second chart enlarges what concerns the domain."
            if "token" in known
            else "I(expert; domain) in bits. Grey: the same after the domains were shuffled among the documents.",
        )  # fmt: skip
    if data["domains"]:
        preference = domain_preference(np.array([numbers["load_by_domain"][name] for name in numbers["domains"]]))
        add(
            "domains", "Experts that each domain prefers",
            findings.domain_preference(preference, numbers["domains"], layers),
            "An expert's share of a domain's assignments, divided by its share of all, in the chosen layer. The colour "
            "scale is logarithmic: half as often is as blue as twice as often is red.",
        )  # fmt: skip
    if worth := numbers.get("worth"):
        add(
            "worth", "What an expert is worth",
            findings.worth(
                worth["loss"], worth["without"], worth.get("low"), worth.get("high"), numbers["load"], layers
            ),
            f"Loss without the expert's output minus the loss of the whole model, {worth['loss']:.3f} nats a token, on "
            f"{worth['tokens']:,} tokens of {worth['documents']:,} documents. A faint cell's interval holds 0.",
        )  # fmt: skip
    if data["transitions"]:
        add(
            "transitions", "From layer to layer", findings.path(data["transitions"]["most"], layers),
            "How often tokens of one expert go to an expert of the next layer, divided by chance.",
        )  # fmt: skip
    if data["together"]:
        add(
            "together", "Experts chosen together", findings.pair(data["together"]["most"], layers),
            "How often two experts are chosen for the same token, divided by what their loads alone predict. With "
            "groups of experts, a token's experts come from a few groups, which show as squares along the diagonal.",
        )  # fmt: skip
    if part := numbers.get("repeats"):
        add(
            "repeats", "Neighbours", findings.repeats(trunk(part, "share"), trunk(part, "by_chance")),
            "Share of a token's choices that the token before it in its document made too, by layer.",
        )  # fmt: skip
    if data["over_time"]:
        part = numbers["over_time"]
        add(
            "over-time", "Balance over training", findings.max_vio_over_time(part["steps"], part["max_vio"]),
            "MaxVio of single training batches: (largest load − mean) / mean. Of few tokens, it is above 0 by chance.",
        )  # fmt: skip
    if part := numbers.get("saturation"):
        add(
            "saturation", "When choices settled", findings.saturation(part["steps"], part["share"], layers),
            "Share of the last checkpoint's choices that an earlier checkpoint made already, on the same text.",
        )  # fmt: skip
    if (part := numbers.get("heads")) and part.get("same_expert_number"):
        add(
            "heads", "Multi-token heads and the trunk",
            findings.heads(part["layers"], part["same_expert_number"], part["by_chance"]),
            "A head has experts of its own. It was trained beside the trunk, so equal numbers mean no equal experts.",
        )  # fmt: skip
    if data["entropies"]:
        add(
            "entropy", "How evenly a token weighs its experts",
            findings.entropies(
                trunk(numbers, "gate_entropy"), trunk(numbers, "score_entropy"), numbers["experts_per_token"],
                numbers["experts"],
            ),
            "Entropies over their largest value: 1 is even, 0 is one expert alone. The axis is whole, from 0 to 1.",
        )  # fmt: skip
    if other := numbers.get("against"):
        add(
            "against", "Beside another run",
            findings.against(
                f"{other['run']} (step {other['step']})", other.get("shared"), other.get("by_chance"),
                (numbers.get("header") or {}).get("loss"), other.get("loss"),
            ),
            f"Both runs read {'the same' if other.get('same_text') else 'other'} text."
            + (" Each expert is matched with one of the other run, by the tokens that they share."
               if other.get("match") else "")
            + (f" Note: {other['note']}." if other.get("note") else ""),
        )  # fmt: skip
    add(
        "layers", "Layer by layer", _layers_finding(numbers),
        "MaxVio is (largest load − mean) / mean. Entropies are divided by their maximum: 1 is even."
        + (f" Shuffled: I(expert; domain) after the domains were shuffled among the documents, "
           f"{numbers['specialisation']['draws']:,} times." if data["domains"] else ""),
    )  # fmt: skip
    add(
        "experts", "All experts", _experts_finding(numbers),
        "Search finds the experts that receive a token more often than chance. The table sorts by each column.",
    )  # fmt: skip
    return found


def _layers_finding(numbers: dict[str, Any]) -> str:
    vio = np.array([np.nan if x is None else x for x in numbers["max_vio"]], np.float64)
    if not np.isfinite(vio).any():
        return "No layer has a load."
    worst, best = int(np.nanargmax(vio)), int(np.nanargmin(vio))
    return (
        f"MaxVio of this text is between {vio[best]:.2f} ({numbers['layers'][best]}) and {vio[worst]:.2f} "
        f"({numbers['layers'][worst]})."
    )


def _experts_finding(numbers: dict[str, Any]) -> str:
    load = np.asarray(numbers["load"])
    idle = int((load == 0).sum())
    return (
        f"{idle:,} of {load.size:,} experts received no token."
        if idle
        else f"All {load.size:,} experts received tokens, {load.min():,} to {load.max():,} each."
    )


def _layer_table(numbers: dict[str, Any]) -> dict[str, Any]:
    """Names of columns and the rows of text of the table of layers."""

    def column(values, digits):
        return ["–" if value is None else f"{value:.{digits}f}" for value in values]

    columns = [
        [f"{count:,}" for count in numbers["tokens"]],
        column(numbers["max_vio"], 2),
        column(numbers["load_entropy"], 4),
        column(numbers["load_gini"], 3),
        column(numbers["gate_entropy"], 3),
        column(numbers["score_entropy"], 3),
    ]
    names = ["tokens", *LAYER_COLUMNS]
    if len(numbers["domains"]) > 1:
        special = numbers["specialisation"]
        names += DOMAIN_COLUMNS
        columns += [column(special[key], 4) for key in ("bits", "shuffled_mean", "shuffled_95")]
        columns += [[f"{100 * share:.1f} %" for share in special["share"]], column(special["p_value"], 3)]
    return {"names": names, "rows": list(zip(numbers["layers"], *columns, strict=True))}
