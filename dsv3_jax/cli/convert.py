"""`dsv3 convert FOLDER OUT`: released weights into a run, a run into them, or another dtype."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.cli.common import parse
from dsv3_jax.report.progress import text_console


@dataclass
class Convert:
    """Convert released weights into a run, a run into them, or them into another dtype."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """a released folder (config.json and safetensors), a hub id in the local cache, or a run"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """the folder to create; a failure leaves nothing of it"""
    step: int | None = None
    """step of a run's checkpoint; None means the last"""
    dtype: Literal["float32", "bfloat16", "fp8"] | None = None
    """dtype of the weights in Hugging Face format; None makes a run of released weights, and gives
    a run that of the released folder that it was made of, else float32"""
    mtp: bool = True
    """convert the multi-token prediction layers too"""
    allow_nonfinite: bool = False
    """accept weights that are NaN or Inf"""
    allow_unknown_keys: bool = False
    """pass over keys of config.json that are not known, although they may change the network"""


def run(argv: list[str]) -> int:
    """Convert, and print a sentence about the new folder."""
    args = parse(Convert, argv, "convert")
    from dsv3_jax import hf

    text_console().print(hf.convert(**vars(args)))
    return 0
