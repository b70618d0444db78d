"""`dsv3 plan PRESET`: what each device of a mesh would hold, compute and send, without devices."""

import os
from typing import Any

from dsv3_jax.cli.common import named_preset, parse
from dsv3_jax.config import RunConfig
from dsv3_jax.presets import recipe_with_model


def run(argv: list[str]) -> int:
    """Print the plan of a training and a decoding step."""
    from dsv3_jax.planning.plan import plan

    return plan(*options(argv))


def options(argv: list[str]) -> tuple[Any, RunConfig, str]:
    """Read the options; return (them, the preset's recipe, the model's name)."""
    if any(word.startswith("--target") for word in argv):
        # the compiler regrets at length that there is no GPU here
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from dsv3_jax.planning.plan import PlanOptions

    run, rest = named_preset(argv, "plan", recipe_with_model)
    args = parse(PlanOptions, rest, "plan PRESET", default=PlanOptions(run.model, run.execution))
    changed = (args.model, args.execution) != (run.model, run.execution)
    return args, run, f"{argv[0]}, changed" if changed else argv[0]
