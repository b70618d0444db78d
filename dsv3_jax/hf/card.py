"""The model card of a converted folder: README.md, as Hugging Face shows it."""

from pathlib import Path
from typing import Any

from dsv3_jax.config import RunConfig
from dsv3_jax.hf import tensor_files
from dsv3_jax.host.files import read_bytes
from dsv3_jax.model.counting import size
from dsv3_jax.report.metrics_files import METRICS_FILE, read_rows
from dsv3_jax.report.units import format_count

CARD = "README.md"
# What is known of a validation: its key in metrics.jsonl, and its name in the card.
MEASURES = {
    "val_loss": "loss on held-out text, nats a token",
    "val_bits_per_byte": "bits a byte of held-out text",
    "max_vio_global": "MaxVio: the largest load of an expert over the mean, less 1",
}

_TEMPLATE = Path(__file__).with_name("card.md")


def card_of_folder(folder: Path) -> dict[str, bytes]:
    """The model card that a folder has, by its name; empty without one.

    Raises: ValueError when it is a link out of the folder.
    """
    file = tensor_files.file_inside(folder, CARD)
    return {CARD: read_bytes(file)} if file.is_file() else {}


def card_of_run(folder: Path, run: RunConfig, step: int, name: str, dtype: str) -> dict[str, bytes]:
    """The model card of a run's checkpoint, by its name: the run's own README.md, else a new one.

    It names no folders of this machine: of texts and of the start it has the last part alone.

    Args: name: of the new folder.
    """
    own = card_of_folder(folder)
    if own:
        return own
    rows = [row for row in read_rows(folder / METRICS_FILE) if row["step"] <= step]
    text = _TEMPLATE.read_text(encoding="utf-8").format(
        name=name,
        dtype=dtype,
        what=_what(run),
        trained="\n".join(f"- {line}" for line in _trained(run, step)),
        measured=_measured(next((row for row in rows[::-1] if "val_loss" in row), None)),
        heads="" if run.model.mtp_depth == 0 else "transformers leaves the multi-token heads out. ",
    )
    return {CARD: text.encode()}


def _what(run: RunConfig) -> str:
    cfg = run.model
    counted = size(cfg)
    return (
        f"A language model of the DeepSeek family with {format_count(counted.total)} parameters, "
        f"{format_count(counted.active)} of them active a token: {cfg.num_layers} layers, "
        f"{cfg.experts_per_token} of {cfg.num_experts} experts a token, "
        f"attention {cfg.attention.upper()}, a vocabulary of {cfg.vocab_size:,}, "
        f"texts of up to {cfg.max_positions:,} tokens."
    )


def _trained(run: RunConfig, step: int) -> list[str]:
    data = run.data
    names = ", ".join(Path(path).name for path in data.paths)
    tokens = step * data.batch_size * data.seq_len
    lines = [
        f"text: {names or 'what a Python installation carries: its library, tests and reference'}",
        f"{step:,} of {run.steps:,} steps of {data.batch_size} rows of {data.seq_len} tokens, "
        f"{format_count(tokens)} tokens at most",
        f"{run.optim.name}, schedule {run.optim.schedule}, learning rate {run.optim.learning_rate}",
    ]
    begun = run.start or run.trunk
    if begun:
        lines.append(f"it began with the weights of {Path(begun).name}")
    return lines


def _measured(row: dict[str, Any] | None) -> str:
    if row is None:
        return "It was not measured on held-out text."
    lines = [f"| at step {row['step']:,} | |", "|---|---|"]
    lines += [f"| {MEASURES[key]} | {row[key]:.4f} |" for key in MEASURES if key in row]
    return "\n".join(lines)
