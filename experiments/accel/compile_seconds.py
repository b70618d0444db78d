"""How long each part of `run.py` compiles, found without a device; writes compile_seconds.json.

python experiments/accel/compile_seconds.py                # all, for an H100; needs plan-gpu
python experiments/accel/compile_seconds.py layer right    # some; the others stay in the file

Each program is compiled for the target by its own compiler, on the CPU. Seconds are of CPU time,
all threads together. Autotuning is not in them: it runs on the device. Nothing is allocated: parts
are traced, and never run.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import Execution
from dsv3_jax.kernels import check, choose
from dsv3_jax.kernels.cases import Draw
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import decode_cost, train_cost
from dsv3_jax.training.state import Job, abstract_state
from experiments.accel import measuring, model_parts, run
from experiments.accel.kernels import gpu_latent_attention
from experiments.accel.right import NAMES, PRECISIONS
from experiments.accel.sizes import Sizes

TARGET, SIZES = "gpu:h100", Sizes()
PROGRAM = check.program.__wrapped__  # without its cache


class Compiler:
    """Compiles programs for a target, and adds up the CPU seconds."""

    def __init__(self) -> None:
        self.mesh = devices.target_mesh(TARGET, {"data": 1, "expert": 1, "tensor": 1})
        self.seconds, self.programs, self.failed = 0.0, 0, 0

    def add(self, compile_it: Any, times: int = 1) -> None:
        """Compile something that takes as long so many times."""
        start = time.process_time()
        try:
            compile_it()
        except Exception as error:  # of a compiler: any type
            self.failed += 1
            print(f"  failed: {type(error).__name__}: {error}"[:400], file=sys.stderr)
        self.seconds += times * (time.process_time() - start)
        self.programs += times

    def compile(self, function: Any, *args: Any) -> None:
        where = NamedSharding(self.mesh, PartitionSpec())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args
        )
        self.add(lambda: jax.jit(function).lower(*shapes).compile())

    def seconds_of(self, call: Any, *_: Any, **__: Any) -> float:
        """In place of `measuring.seconds_of`: compile what is called, whose arrays are traced."""
        traced = jax.make_jaxpr(call)()
        self.compile(lambda *arrays: jax.core.eval_jaxpr(traced.jaxpr, arrays), *traced.consts)
        return 1.0

    def plan(self, cost: Any, *args: Any, times: int = 1) -> None:
        def compile_it() -> None:
            if error := cost(*args, target=TARGET).compile_error:
                raise ValueError(error)

        self.add(compile_it, times)


def traced(compiler: Compiler, name: str) -> None:
    """A part that calls `seconds_of`."""
    jax.eval_shape(lambda: list(run.PARTS[name][0](SIZES)) and None)


def right(compiler: Compiler, name: str) -> None:
    """Programs differ by implementation and shape. The one that compares their results is small."""
    seen = set()

    def program(run_: Any, wrt: Any, settings: Any) -> Any:
        def compile_once(*args: Any) -> Any:
            function = PROGRAM(run_, wrt, settings)
            shapes = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(args))
            if (key := (run_, wrt, settings, shapes)) not in seen:
                seen.add(key)
                compiler.compile(function, *args)
            return jax.eval_shape(function, *args)

        return compile_once

    def zeros(draw: Draw, *shape: int, std: float = 1.0, dtype: Any = None) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype or draw.dtype), shape)

    with (
        patch.object(check, "program", program),
        patch.object(check, "_errors", lambda names, found, want: []),
        patch.object(Draw, "__call__", zeros),
        patch.object(jax, "device_put", lambda tree: tree),
    ):
        kernels = measuring.kernels_for()
        list(check.check(kernels, large=True, precisions=PRECISIONS, also=NAMES))


def step(compiler: Compiler, name: str) -> None:
    of_step = model_parts.train_run(SIZES.step, *SIZES.step_batch)
    compiler.plan(train_cost, of_step, compiler.mesh)
    compiler.compile(model_parts.sums_of_bits, abstract_state(Job(of_step)))


def exact(compiler: Compiler, name: str) -> None:
    """Estimated: for each of four texts a step of decoding, and a prefill as long to compile."""
    for dtype, times in (("float32", 6), ("bfloat16", 2)):
        args = SIZES.exact, Execution(dtype), compiler.mesh, 3, 128
        compiler.plan(decode_cost, *args, times=times)


def drafts(compiler: Compiler, name: str) -> None:
    """Estimated likewise: two batches, with drafts and without."""
    for batch in SIZES.draft_batches:
        length = SIZES.draft_prompt + SIZES.draft_tokens
        args = SIZES.drafts, measuring.BFLOAT16, compiler.mesh, batch, length
        compiler.plan(decode_cost, *args, times=4)


OTHERS = {"right": right, "step": step, "exact": exact, "drafts": drafts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*run.PARTS, []])
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    gpu_latent_attention.add()
    for name in parser.parse_args().parts or run.PARTS:
        compiler = Compiler()
        with (
            patch.object(measuring, "seconds_of", compiler.seconds_of),
            patch.object(model_parts, "seconds_of", compiler.seconds_of),
            patch.object(choose, "prepare", partial(choose.prepare, platform="cuda", chip="9.0")),
            patch.object(choose, "platform_of", lambda mesh=None: "cuda"),
        ):
            OTHERS.get(name, traced)(compiler, name)
            without = [missing for missing, _ in measuring.kernels_for().missing]
        found = {"programs": compiler.programs, "seconds": round(compiler.seconds, 1)}
        print(name, found, f"{compiler.failed} failed")
        kept = json.loads(run.COMPILING.read_text())["parts"] | {name: found}
        parts = {part: kept[part] for part in run.PARTS if part in kept}
        content = {"target": TARGET, "jax": jax.__version__, "without": without, "parts": parts}
        run.COMPILING.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
