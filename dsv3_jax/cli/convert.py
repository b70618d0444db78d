"""`dsv3 convert FOLDER OUT`: released weights to a run, a run to them, another dtype, a mixture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.cli.common import parse
from dsv3_jax.report.progress import text_console


@dataclass
class Convert:
    """Convert released weights into a run, a run into them, or them into another dtype.

    With --experts, make a mixture of experts out of a dense model, or of more out of a mixture.
    """

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
    experts: int | None = None
    """number of routed experts of the mixture to make, a run at step 0 that begins with the model's
    weights; None makes no mixture"""
    experts_per_token: int | None = None
    """number of experts that a token is sent to; None means two copies of a dense layer"""
    parts: int = 1
    """number of experts that the hidden units of a dense layer are divided among"""
    redrawn: float = 0.0
    """share of each expert's hidden units that starts at random"""
    seed: int = 0
    """seed of new routers, and of what starts at random"""


MIXTURE = ("experts_per_token", "parts", "redrawn", "seed")  # options that need --experts


def run(argv: list[str]) -> int:
    """Convert, and print a sentence about the new folder."""
    args = parse(Convert, argv, "convert")
    from dsv3_jax import hf
    from dsv3_jax.model.upcycle import Upcycling

    options = vars(args)
    mixture = {name: options.pop(name) for name in ("experts", *MIXTURE)}
    if mixture["experts"] is not None:
        options["upcycling"] = Upcycling(**mixture)
    elif given := [name for name in MIXTURE if mixture[name] != getattr(Convert, name)]:
        name = given[0]
        raise ValueError(f"{name}={mixture[name]} is for a mixture; give --experts too")
    text_console().print(hf.convert(**options))
    return 0
