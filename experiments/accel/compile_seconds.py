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
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import Execution
from dsv3_jax.kernels import check, choose, table
from dsv3_jax.kernels.cases import Draw
from dsv3_jax.planning import devices
from dsv3_jax.planning.cost import decode_cost, train_cost
from dsv3_jax.training.state import Job, abstract_state
from experiments.accel import measuring, model_parts, run, worker
from experiments.accel.right import NAMES, OWN, PRECISIONS
from experiments.accel.sizes import full

TARGET, CHIP = "gpu:h100", "9.0"
PROGRAM = check.program.__wrapped__  # without its cache


class Compiler:
    """Compiles programs for a target, each shape once, and adds up the CPU seconds."""

    def __init__(self) -> None:
        self.mesh = devices.target_mesh(TARGET, {"data": 1, "expert": 1, "tensor": 1})
        self.seconds, self.programs, self.failed = 0.0, 0, 0

    def compile(self, function: Any, *args: Any) -> None:
        where = NamedSharding(self.mesh, PartitionSpec())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args
        )
        start = time.process_time()
        try:
            jax.jit(function).lower(*shapes).compile()
        except Exception as error:  # of a compiler: any type
            self.failed += 1
            print(
                f"  failed: {function}: {type(error).__name__}: {measuring.sentence(error)}",
                file=sys.stderr,
            )
        self.seconds += time.process_time() - start
        self.programs += 1

    def of_call(self, call: Any, *_: Any, **__: Any) -> float:
        """In place of `measuring.seconds_of`: compile what is called, whose arrays are traced."""
        traced = jax.make_jaxpr(call)()
        self.compile(lambda *arrays: jax.core.eval_jaxpr(traced.jaxpr, arrays), *traced.consts)
        return 1.0


def traced(part: str, compiler: Compiler) -> None:
    """A part that calls `seconds_of`."""
    jax.eval_shape(lambda: list(worker.PARTS[part](full())) and None)


def right(compiler: Compiler, ops: Iterable[str] = table.TABLE) -> None:
    """Programs differ by implementation and shape. The one that compares their results is small."""
    seen = set()

    def program(run_: Any, wrt: Any, settings: Any) -> Any:
        def compile_once(*args: Any) -> Any:
            function = PROGRAM(run_, wrt, settings)
            shapes = tuple((x.shape, x.dtype.name) for x in jax.tree.leaves(args))
            if (run_, wrt, settings, shapes) not in seen:
                seen.add((run_, wrt, settings, shapes))
                compiler.compile(function, *args)
            return jax.eval_shape(function, *args)

        return compile_once

    def nothing(names: Any, found: Any, want: Any) -> list:
        return []

    def zeros(draw: Draw, *shape: int, std: float = 1.0, dtype: Any = None) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype or draw.dtype), shape)

    with (
        patch.object(check, "program", program),
        patch.object(check, "_errors", nothing),
        patch.object(Draw, "__call__", zeros),
        patch.object(jax, "device_put", lambda tree: tree),
    ):
        for _ in check.check(
            measuring.kernels_for(), large=True, precisions=PRECISIONS, ops=ops, also=NAMES
        ):
            pass


def step(compiler: Compiler) -> None:
    sizes = full()
    of_step = model_parts.train_run(sizes.step, *sizes.step_batch)
    _of_cost(compiler, partial(train_cost, of_step, compiler.mesh))
    compiler.compile(model_parts.sums_of_bits, abstract_state(Job(of_step)))


def exact(compiler: Compiler) -> None:
    """Estimated: for each of four texts a step of decoding, and a prefill as long to compile."""
    sizes = full()
    for dtype, times in (("float32", 6), ("bfloat16", 2)):
        before = compiler.seconds
        _of_cost(
            compiler, partial(decode_cost, sizes.exact, Execution(dtype), compiler.mesh, 3, 128)
        )
        compiler.seconds += (times - 1) * (compiler.seconds - before)
        compiler.programs += times - 1


def drafts(compiler: Compiler) -> None:
    """Estimated likewise: two batches, with drafts and without."""
    sizes = full()
    for batch in sizes.draft_batches:
        before = compiler.seconds
        context = sizes.draft_prompt + sizes.draft_tokens
        _of_cost(
            compiler,
            partial(decode_cost, sizes.drafts, model_parts.BFLOAT16, compiler.mesh, batch, context),
        )
        compiler.seconds += 3 * (compiler.seconds - before)
        compiler.programs += 3


def _of_cost(compiler: Compiler, cost: Any) -> None:
    start = time.process_time()
    found = cost(target=TARGET)
    compiler.failed += bool(found.compile_error)
    compiler.seconds += time.process_time() - start
    compiler.programs += 1


PARTS = {"right": right, "step": step, "exact": exact, "drafts": drafts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*run.PARTS, []])
    names = parser.parse_args().parts or list(run.PARTS)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_platforms", "cpu")
    for kernel in OWN:
        kernel.add()
    for name in names:
        compiler = Compiler()
        with (
            patch.object(measuring, "seconds_of", compiler.of_call),
            patch.object(model_parts, "seconds_of", compiler.of_call),
            patch.object(choose, "prepare", partial(choose.prepare, platform="cuda", chip=CHIP)),
            patch.object(choose, "platform_of", lambda mesh=None: "cuda"),
        ):
            PARTS.get(name, partial(traced, name))(compiler)
            without = [missing for missing, _ in measuring.kernels_for().missing]
        found = {"programs": compiler.programs, "seconds": round(compiler.seconds, 1)}
        print(name, found, f"{compiler.failed} failed")
        kept = json.loads(run.COMPILING.read_text())["parts"] if run.COMPILING.exists() else {}
        kept = {
            part: (kept | {name: found})[part] for part in run.PARTS if part in kept or part == name
        }
        content = {"target": TARGET, "jax": jax.__version__, "without": without, "parts": kept}
        run.COMPILING.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
