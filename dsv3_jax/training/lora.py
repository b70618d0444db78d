"""LoRA: low-rank adapters that are trained in place of the weights of a start.

A frozen matrix W, as a map from inputs to outputs, is used as W + (alpha / rank) A B. A [in, rank]
is random at first, and B [rank, out] is 0, so that training begins with the start's own numbers.
Every matrix of a stack has a pair of its own: each layer, and each routed expert. A weight with
heads is one matrix, over all heads.

The names of a parameter's axes say which of them are inputs and outputs (`sides`). The adapters are
in the state's parameters beside the weights, under the name "lora". The step takes the gradient
with respect to them alone, and the optimizer has no other state. `join` hands weights and adapters
to the model, which merges each layer when it runs (`parameters.Frozen`): the gradient of a merged
matrix ends in its layer. So memory holds it for one layer at a time. The merged matrices are
results like others: with remat "none" or "dots" the backward pass keeps all layers' merged
matrices, with "attention" or "full" it forms them again. Beside its arguments, a CPU step of `mini`
(4 × 256 tokens, remat "full") takes 493 MB with adapters on all experts and attention. It takes
1,572 MB if all layers are merged beforehand.

Frozen weights keep the dtype of their start in memory and in checkpoints: float32, bfloat16, or, of
feed-forward matrices, FP8 and 4 bits (`parameters.Packed`). They are unpacked and cast where they
are used, one layer at a time, so float32 of them would give the same numbers.

Readers never see adapters: `Checkpoints.restore` merges them for all who do not resume (`merge`),
and GRPO samples from merged copies (`policy`). A checkpoint holds weights and adapters, so a run
resumes bitwise and does not depend on its start.

Source: LoRA (arXiv 2106.09685), section 4.1.
Departs from the paper: any matrix of attention and experts may change, and W + A B is formed before
it meets a token. This costs the products of a training step without LoRA; what it saves is the
optimizer's state and the gradients.
"""

import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import Lora
from dsv3_jax.mesh.sharding import names_of
from dsv3_jax.model.counting import ADAPTED
from dsv3_jax.model.parameters import Frozen

NAME = "lora"  # of the adapters in a state's parameters


def sides(names: tuple[str | None, ...]) -> tuple[int, int, bool]:
    """Read off the names of a parameter's axes how they make matrices: batch, left and right axes.

    Heads and the axis after them are one side. Inputs come first, but in w_uk and w_uv, which end
    in the latent that they read. Leading axes without names, a stack's layers, are a batch too.

    Returns: (the first left axis, the first right axis, whether the right ones are inputs).

    Example:
        >>> sides(("latent", "heads", None)), sides(("expert", "dim", "hidden"))
        ((0, 1, False), (1, 2, False))
    """
    left = 1 if names[0] == "expert" else 0
    right = left + (2 if names[left] == "heads" else 1)
    return left, right, names[right:] == ("latent",)


def init(cfg: Lora, weights: nnx.State, key: Array) -> nnx.State:
    """Make new adapters, {"lora": …}, of variance 1 / (number of inputs) or 0; empty without LoRA.

    Args: weights: parameters, or their shapes.

    Example:
        >>> w = nnx.Param(jnp.ones((2, 4, 3)), axes=("dim", "hidden"))  # of 2 layers
        >>> weights = nnx.State({"ffn": {"w": w}})
        >>> made = init(Lora(rank=1, on=("dense",)), weights, jax.random.key(0))
        >>> made["lora"]["ffn"]["w"]["a"].shape, made["lora"]["ffn"]["w"]["b"][...].sum()
        ((2, 4, 1), Array(0., dtype=float32))
    """
    made = {}
    for path, v in nnx.to_flat_state(weights) if cfg.rank else ():
        names = names_of(v)
        # A norm's scale has no names.
        if not any(ADAPTED[part] in path for part in cfg.on) or not names:
            continue

        # The two factors of a weight [batch, left, right]: [batch, left, r] and [batch, r, right].
        left, right, input_is_right = sides(names)
        layers = len(v.shape) - len(names)
        of_left = v.shape[layers + left : layers + right]
        of_right = v.shape[layers + right :]
        left_factor = (*v.shape[: layers + right], cfg.rank), (*names[:right], None)
        right_factor = (
            (*v.shape[: layers + left], cfg.rank, *of_right),
            (*names[:left], None, *names[right:]),
        )

        # A is the factor at the inputs. B is 0, so that training begins with the weight itself.
        a, b = left_factor, right_factor
        num_inputs = math.prod(of_left)
        if input_is_right:
            a, b = right_factor, left_factor
            num_inputs = math.prod(of_right)

        # A draw depends on the weight's path alone, not on which others have adapters.
        own = jax.random.fold_in(key, zlib.crc32(repr(path).encode()))
        drawn = 1 / math.sqrt(num_inputs) * jax.random.normal(own, a[0], jnp.float32)
        made[NAME, *path, "a"] = nnx.Param(drawn, axes=a[1])
        made[NAME, *path, "b"] = nnx.Param(jnp.zeros(b[0], jnp.float32), axes=b[1])
    return nnx.from_flat_state(made)


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split parameters into (adapters, weights).

    Example:
        >>> adapters, weights = split(nnx.State({"lora": {"w": {"a": 1, "b": 2}}, "w": 3}))
        >>> list(adapters), list(weights)
        (['lora'], ['w'])
    """
    adapters, weights = nnx.split_state(params, lambda path, _: path[0] == NAME, ...)
    return adapters, weights


def join(cfg: Lora, params: nnx.State) -> nnx.State:
    """Give each weight its adapters, as a `Frozen` value: what a model holds in training.

    All else stays as it is.

    Example:
        >>> w = nnx.Param(jnp.zeros((1, 1)), axes=("dim", "hidden"))
        >>> a, b = nnx.Param(jnp.array([[2.0]])), nnx.Param(jnp.array([[3.0]]))
        >>> params = nnx.State({"w": w, "lora": {"w": {"a": a, "b": b}}})
        >>> join(Lora(rank=1, alpha=10.0), params)["w"].get_value().merge()
        Array([[60.]], dtype=float32)
    """
    adapters, weights = split(params)
    found = dict(nnx.to_flat_state(adapters))

    def used(path: tuple, v: nnx.Variable) -> nnx.Variable:
        a = found.get((NAME, *path, "a"))
        b = found.get((NAME, *path, "b"))
        if a is None or b is None:
            return v
        # w + left · right. A is at the inputs, wherever these are.
        left, right = a.get_value(), cfg.alpha / cfg.rank * b.get_value()
        if sides(names_of(v))[2]:
            left, right = right, left
        return v.replace(Frozen(v.get_value(), left, right))

    return nnx.from_flat_state({path: used(path, v) for path, v in nnx.to_flat_state(weights)})


def merge(cfg: Lora, params: nnx.State) -> nnx.State:
    """Merge adapters into their weights, in their memory and dtype; other parameters stay.

    Example:
        >>> w = nnx.Param(jnp.zeros((1, 1)), axes=("dim", "hidden"))
        >>> a, b = nnx.Param(jnp.array([[2.0]])), nnx.Param(jnp.array([[3.0]]))
        >>> params = nnx.State({"w": w, "lora": {"w": {"a": a, "b": b}}})
        >>> merge(Lora(rank=1, alpha=10.0), params)["w"][...]
        Array([[60.]], dtype=float32)
    """
    adapters, weights = split(params)
    if not adapters:
        return weights
    where = jax.tree.map(lambda x: x.sharding, weights)
    return jax.jit(partial(_merged, cfg), donate_argnums=0, out_shardings=where)(weights, adapters)


def _merged(cfg: Lora, weights: nnx.State, adapters: nnx.State) -> nnx.State:
    def merged(v: nnx.Variable) -> nnx.Variable:
        x = v.get_value()
        return v.replace(x.merge().astype(x.w.dtype)) if isinstance(x, Frozen) else v

    joined = nnx.to_flat_state(join(cfg, nnx.merge_state(weights, adapters)))
    return nnx.from_flat_state((path, merged(v)) for path, v in joined)


def policy(cfg: Lora, params: nnx.State, dtype: Any) -> nnx.State:
    """The weights that a step computes with, to sample from: merged copies of those with adapters.

    A copy has the compute dtype, to which a step casts what it merges. In the dtype of a bfloat16
    start it would lose all changes below 2^-9 of a weight, so the sampler would be another policy
    than the trainer. Beside the frozen weights, the copies take 4 bytes in float32 and 2 in
    bfloat16 for each number of a matrix with adapters. All else is not copied. Packed matrices are
    unpacked where they are read (`Transformer.run_trunk`). XLA for CPUs does so once before a
    decoding loop, so while it runs they take 2 bytes a number as temporary memory.

    Args: dtype: the compute dtype.

    Example:
        >>> w = nnx.Param(jnp.ones((1, 1), jnp.bfloat16), axes=("dim", "hidden"))
        >>> a, b = nnx.Param(jnp.array([[1.0]])), nnx.Param(jnp.array([[1e-3]]))
        >>> params = nnx.State({"w": w, "lora": {"w": {"a": a, "b": b}}})
        >>> policy(Lora(rank=1, alpha=1.0), params, jnp.float32)["w"][...]  # bfloat16 would be 1
        Array([[1.001]], dtype=float32)
    """

    def merged(v: nnx.Variable) -> nnx.Variable:
        x = v.get_value()
        if not isinstance(x, Frozen):
            return v
        return v.replace(_merged_copy(x, len(x.w.shape) > len(names_of(v)), dtype))

    return jax.tree.map(merged, join(cfg, params), is_leaf=lambda v: isinstance(v, nnx.Variable))


@partial(jax.jit, static_argnums=(1, 2))
def _merged_copy(x: Frozen, is_stack: bool, dtype: Any) -> Array:
    """Merge in float32, one layer at a time: what is made meanwhile has the size of a layer."""

    def of_layer(x: Frozen) -> Array:
        return x.merge().astype(dtype)

    return jax.lax.map(of_layer, x) if is_stack else of_layer(x)
