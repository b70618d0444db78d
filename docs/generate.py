"""Pages that the code prints: tables, each command's help, the API's modules, and the studies."""

import contextlib
import importlib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import dsv3_jax
from dsv3_jax.cli.info import describe
from dsv3_jax.cli.main import COMMANDS, main
from dsv3_jax.hf.families import FAMILIES
from dsv3_jax.kernels.table import TABLE
from dsv3_jax.mesh.sharding import FSDP_RULES, RULES
from dsv3_jax.presets import MODELS, RECIPES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments.cards import DEVICES, TASKS, read_cards  # noqa: E402
from experiments.count_lines import CORE, with_sums  # noqa: E402

PARTS = {
    "config": "What a model and a run are",
    "ops": "The mathematics: pure functions on arrays",
    "model": "Flax modules",
    "mesh": "Which mesh axis shards which array",
    "data": "From text to rows",
    "chat": "Chat templates and examples",
    "training": "The training step",
    "runs": "What is on disk",
    "decoding": "From prompts to text",
    "scores": "Scores on tasks",
    "hf": "Released weights, both ways",
    "stats": "Where tokens go",
    "planning": "A mesh without its devices",
    "kernels": "Which implementation runs where",
}

# Pages of the API, one a topic: a sentence, and public names, the most used ones first.
TOPICS = {
    "models": (
        "A model: its settings, its layers, and from where it comes.",
        "ModelConfig Yarn Balance preset replace Transformer MLA GQA DSA MoE Execution Layout "
        "load_model counting.size ConfigError",
    ),
    "runs": (
        "A run: its settings, the loop, what a callback sees, and what is measured.",
        "RunConfig OptimConfig Lora Grpo recipe train.fit train.FitResult train.Callback "
        "train.open_start train.on_weights train.on_trunk train.read_chats train.for_epochs "
        "read_run load_run evaluate.evaluate plots.training_curves",
    ),
    "text": (
        "Text: what is read, how it becomes rows, and tokenizers.",
        "DataConfig data.load_corpus data.open_source data.from_corpus tokenizer.load "
        "tokenizer.train_bpe load_text",
    ),
    "decoding": (
        "From prompts to text, and the probability of a given text.",
        "generate DecodeConfig loglikelihood",
    ),
    "own_parts": (
        "Parts of one's own: a router, a rule for its bias, an attention, and a training loop.",
        "register_router ops.routing.Router ops.routing.Inputs ops.routing.Routing register_rule "
        "ops.balance.Rule register_attention balance.update",
    ),
    "released": (
        "Released weights, in the form that transformers reads.",
        "hf.load hf.save hf.convert hf.config_from_dict hf.config_to_dict hf.tensor_table",
    ),
    "statistics": (
        "Where tokens go: numbers, intervals, and the page that shows them.",
        "stats.report stats.ReportOptions stats.collect stats.RoutingStats stats.specialisation "
        "stats.information stats.worth stats.favourites stats.find_contexts stats.transitions "
        "stats.agreement stats.saturation stats.read_load plots.routing_heatmap",
    ),
    "scores": ("Scores of a model on tasks.", "score_tasks scores.tasks.Task scores.score.Scores"),
    "meshes": (
        "Many devices: the mesh, and where on it each array is.",
        "sharding.make_mesh sharding.use_mesh sharding.state_sharding sharding.batch_sharding",
    ),
}


def write_pages(folder: Path) -> None:
    """Write all pages that are not there or have changed, so that a second build is quick."""
    pages = {
        "front": front((ROOT / "README.md").read_text(encoding="utf-8")),
        "tables": tables(),
        "commands": commands(),
        "studies": studies(),
        "cards": cards(read_cards()),
    }
    pages |= {f"topics/{name}": topic(name, *about) for name, about in TOPICS.items()}
    pages |= {f"api/{part}": api(part, title) for part, title in PARTS.items()}
    for name, text in pages.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def front(readme: str) -> str:
    """The README's table of where to go, with its links as they are from docs/."""
    rows = "\n".join(line for line in readme.splitlines() if line.startswith("|"))
    rows = rows.replace("](notebooks/README.md)", "](docs/notebooks.md)")  # the site's list of them
    return rows.replace("](", "](../") + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [list(head), ["---"] * len(list(head)), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def tables() -> str:
    """The tables of presets, kernels, families, sharding rules and code, and presets' counts."""
    counted = {name: dict(describe(cfg, name)) for name, cfg in MODELS.items()}
    quantities = ("total parameters", "active parameters", "cache")
    sizes = [
        (f"`{name}`", *(of[quantity] for quantity in quantities)) for name, of in counted.items()
    ]
    recipes = [
        (
            f"`{name}`",
            run.steps,
            f"{run.data.batch_size} × {run.data.seq_len}",
            run.optim.learning_rate,
            run.optim.name,
        )
        for name, run in RECIPES.items()
    ]
    kernels = [
        (
            f"`{op}`",
            f"`{row.name}`",
            ", ".join(row.platforms),
            ", ".join(row.dtypes) or "any",
            row.precision,
        )
        for op, rows in TABLE.items()
        for row in rows
    ]
    families = [
        (
            f"`{name}`",
            of.scoring,
            ", ".join(of.methods),
            "yes" if of.experts else "no",
            "yes" if of.indexer else "no",
        )
        for name, of in FAMILIES.items()
    ]
    sharding = [
        (f"`{name}`", ", ".join(FSDP_RULES[name]), ", ".join(RULES.get(name, ())))
        for name in FSDP_RULES
    ]
    code = [
        (f"`{name}`", of.files, f"{of.code:,}", f"{of.tokens:,}", f"{of.tokens / of.code:.1f}")
        for name, of in with_sums().items()
    ]
    return f"""# Tables

The code prints these tables; they cannot be older than it.

## Presets

{table(("preset", *quantities), sizes)}

## Recipes

{table(("recipe", "steps", "batch, rows × tokens", "learning rate", "optimizer"), recipes)}

## Kernels

Rows of an op are in order of preference: the first that serves platform, dtype, mesh and shapes
runs.

{table(("op", "implementation", "platforms", "dtypes", "precision"), kernels)}

## Released models

{table(("`model_type`", "scores", "choice of experts", "experts", "indexer"), families)}

## Sharding

Which mesh axes shard an axis of that name, with `--execution.layout.fsdp` and without.

{table(("axis of an array", "weights with FSDP", "else"), sharding)}

## The code

The core is {", ".join(CORE)}. A line of code holds more than a comment or a docstring.

{table(("part of the package", "files", "lines of code", "tokens", "tokens a line"), code)}
"""


def commands() -> str:
    """Each command with the text of its `--help`."""
    parts = ["# Commands\n", "The text of each command's `--help`.\n"]
    for name in COMMANDS:
        argv = ["train", "tiny"] if name == "train" else [name]
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            mock.patch.dict("os.environ", {"COLUMNS": "100", "NO_COLOR": "1"}),
        ):
            main([*argv, "--help"])
        parts.append(f"## {' '.join(['dsv3', *argv])}\n\n```text\n{said.getvalue().strip()}\n```\n")
    return "\n".join(parts)


def api(part: str, title: str) -> str:
    """The public functions and classes of a folder, by their docstrings."""
    files = sorted(ROOT.glob(f"dsv3_jax/{part}.py")) + sorted(ROOT.glob(f"dsv3_jax/{part}/**/*.py"))
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in files
    ]
    blocks = [f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in names]
    return f"# {part}\n\n{title}.\n\n" + "\n".join(blocks)


def topic(name: str, about: str, members: str) -> str:
    """A page of the API: some public names with their docstrings.

    A name of a file is in the index by the page of its folder, so here it has no entry.
    """
    blocks = []
    for member in members.split():
        found, path = dsv3_jax, "dsv3_jax"
        for part in member.split("."):
            if not hasattr(found, part):
                importlib.import_module(f"{path}.{part}")
            within, found = found, getattr(found, part)
            path = found.__name__ if inspect.ismodule(found) else f"{path}.{part}"
        kind = "class" if inspect.isclass(found) else "function"
        option = "" if hasattr(within, "__path__") else "\n   :no-index:"
        blocks.append(f"```{{eval-rst}}\n.. auto{kind}:: {path}{option}\n```\n")
    return f"# {name.replace('_', ' ').capitalize()}\n\n{about}\n\n" + "\n".join(blocks)


def cards(found: list[dict[str, Any]]) -> str:
    """Verification cards: who ran what, where. What has no card says "not run"."""
    devices = {card["device"] for card in found}
    names = {
        device: next((name for name in DEVICES if name in device.upper()), device)
        for device in sorted(devices)
    }
    columns = list(dict.fromkeys([*DEVICES, *names.values()]))
    of = {(names[card["device"]], card["task"], card["model"]): card for card in found}
    count = {
        (name, task): sum(key[:2] == (name, task) for key in of)
        for name in columns
        for task in TASKS
    }
    glance = [(task, *(count[name, task] or "not run" for name in columns)) for task in TASKS]
    parts = [
        f"""# What has run where

Each program that compares or measures writes a card for each model, task and device: a JSON file in
[experiments/cards](../../experiments/cards/__init__.py). This page is printed from them.

{table(("task", *columns), glance)}

The numbers count models. A model is a small folder of random weights in the form of that family's
released ones, if it does not say otherwise.

{table(("task", "what it asks"), TASKS.items())}
"""
    ]
    for name in columns:
        tasks = [task for task in TASKS if count[name, task]]
        models = list(dict.fromkeys(model for device, _, model in of if device == name))
        rows = [
            (model, *(_first_figure(of.get((name, task, model))) for task in tasks))
            for model in models
        ]
        ran: dict[tuple, dict] = {}  # (command, date, versions) → its tasks
        for (device, task, _), card in of.items():
            if device == name:
                versions = ", ".join(map(" ".join, card["versions"].items()))
                ran.setdefault((f"`{card['command']}`", card["date"], versions), {})[task] = None
        how = table(
            ("command", "date", "versions", "tasks"),
            [(*key, ", ".join(ran[key])) for key in sorted(ran)],
        )
        shown = f"{table(('model', *tasks), rows)}\n\n{how}" if rows else "Not run."
        parts.append(f"## {name}\n\n{shown}\n")
    return "\n".join(parts)


def _first_figure(card: dict[str, Any] | None) -> str:
    """The figure of a card that its cell shows, on one line."""
    if card is None:
        return "not\N{NO-BREAK SPACE}run"
    name, value = next(iter(card["figures"].items()))
    if isinstance(value, float):
        return f"{value:.2g}".replace("-", "\N{NON-BREAKING HYPHEN}")
    return f"{value} of {name.split()[1]}" if name.startswith("of ") else str(value)


def studies() -> str:
    """The gallery: each study's question, picture and answers."""
    parts = [
        "# Studies\n",
        "Each asks a question of the reports at a size that two CPU cores answer in minutes.\n",
    ]
    for path in sorted(ROOT.glob("experiments/[0-9]*/results.json")):
        results, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
        given = [verdict["answer"] for verdict in results["verdicts"]]
        answers = ", ".join(f"{given.count(answer)} {answer}" for answer in dict.fromkeys(given))
        readme = (folder / "README.md").read_text(encoding="utf-8")
        picture = re.search(r"!\[(.*?)\]\((\w+\.png)\)", readme)
        link = f"../../experiments/{folder.name}/"
        image = f"[![{picture[1]}]({link}{picture[2]})]({link}README.md)\n" if picture else ""
        title = folder.name.replace("_", " ")
        parts.append(
            f"## [{title}]({link}README.md)\n\n{results['question']}\n\n"
            f"Answers: {answers}.\n\n{image}"
        )
    pages = [
        path.relative_to(ROOT).with_suffix("")
        for path in sorted(ROOT.glob("experiments/[0-9]*/*.md"))
    ]
    return "\n".join(
        [*parts, "```{toctree}", ":hidden:", "", *(f"/{page}" for page in pages), "```", ""]
    )
