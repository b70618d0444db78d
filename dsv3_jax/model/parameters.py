"""Parameters: how they are drawn, and how they are stored where they do not train."""

import math
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dsv3_jax.kernels.cpu.draws import compile_lightly


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    std: float,
    *,
    exact: bool = False,
) -> nnx.Param:
    """Draw a float32 parameter from a normal distribution.

    Args:
        axes: names of its last axes, by which `mesh.sharding.RULES` shards it.
        std: standard deviation.
        exact: use it in float32 whatever the compute dtype.

    Example:
        >>> w = param(nnx.Rngs(0), (2, 3), ("dim", "hidden"), std=0.02)
        >>> w.shape, w.get_metadata()["axes"]
        ((2, 3), ('dim', 'hidden'))
    """
    draw = Draw(rngs.params(), shape, std)
    return nnx.Param(draw if _WAITS.get() else draw_all([draw])[0], axes=axes, exact=exact)


_WAITS: ContextVar[bool] = ContextVar("whether parameters wait to be drawn together", default=False)
# a larger parameter is drawn alone: with others, it would take its memory twice
_DRAWN_ALONE = 2**18
# numbers to draw for a parameter, of which it takes the first: few sizes are few operations
_FEWEST = 2**14


@partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["shape", "std"])
@dataclass(frozen=True)
class Draw:
    """The value of a parameter that is not drawn yet. A stack has one of its keys a layer."""

    key: Any  # [*layers]; not annotated more closely, as `Frozen`
    shape: tuple[int, ...]  # of one layer
    std: float


def draw_all(draws: list[Draw]) -> list[Array]:
    """Draw parameters, all of about one size at once: compile time grows with the operations.

    A key's first n numbers do not depend on how many are drawn.

    Example:
        >>> key = jax.random.key(0)
        >>> a, b = draw_all([Draw(key, (2, 3), 1.0), Draw(key, (7,), 1.0)])
        >>> bool((a == jax.random.normal(key, (2, 3))).all()), bool((a.reshape(-1) == b[:6]).all())
        (True, True)
    """
    # Which draws share an operation: all small ones of about one size and one deviation.
    alike: dict[Any, list[int]] = defaultdict(list)
    sizes = [math.prod(draw.shape) for draw in draws]
    for i, (draw, size) in enumerate(zip(draws, sizes, strict=True)):
        padded = max(_FEWEST, 1 << (size - 1).bit_length())
        alike[(padded, draw.std, None) if size <= _DRAWN_ALONE else (size, draw.std, i)].append(i)

    # One operation draws the same count with each of its keys; each draw takes its first numbers.
    drawn: dict[int, Array] = {}
    for (count, std, _), chosen in alike.items():
        keys = [draws[i].key.reshape(-1) for i in chosen]
        draw_each = jax.vmap(lambda key, n=count: jax.random.normal(key, (n,), jnp.float32))
        normal = std * draw_each(jnp.concatenate(keys))
        ends = np.cumsum([len(own) for own in keys])
        for i, own in zip(chosen, jnp.split(normal, ends[:-1]), strict=True):
            drawn[i] = own[:, : sizes[i]].reshape(draws[i].key.shape + draws[i].shape)
    return [drawn[i] for i in range(len(draws))]


def draws_together(init: Callable) -> Callable:
    """Decorate a module's `__init__`: one compiled program draws all parameters in it."""

    @wraps(init)
    def made(self: nnx.Module, *args: Any, **kwargs: Any) -> None:
        # Inside another module's `__init__`, that module draws for its parts.
        if _WAITS.get():
            return init(self, *args, **kwargs)

        # While the modules are made, a parameter's value is a `Draw` instead of numbers.
        token = _WAITS.set(True)
        try:
            init(self, *args, **kwargs)
        finally:
            _WAITS.reset(token)

        # Then one program draws all of them. Under a trace it is a part of the caller's program.
        params = [
            v
            for _, v in nnx.iter_graph(self)
            if isinstance(v, nnx.Param) and isinstance(v.get_value(), Draw)
        ]
        draws = [v.get_value() for v in params]
        draw = draw_all
        if not any(isinstance(d.key, jax.core.Tracer) for d in draws):
            draw = compile_lightly(draw_all, next(iter(draws[0].key.devices())))
        for v, value in zip(params, draw(draws), strict=True):
            v.set_value(value)

    return made


class Packed(NamedTuple):
    """The value of a frozen matrix as a released folder stores it, in 8 or 4 bits: number · scale.

    It is unpacked where it is used. A group of inputs has one scale. A byte holds two numbers of 4
    bits, the first in its low bits, each stored as number + 8.
    """

    # Not annotated more closely, as `Frozen`.
    numbers: Any  # float8_e4m3fn [*batch, in, out], or uint8 [*batch, in / 2, out]
    scales: Any  # float [*batch, in / group, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        *batch, rows, out = self.numbers.shape
        return (*batch, rows * (2 if self.numbers.dtype == jnp.uint8 else 1), out)

    def unpack(self) -> Array:
        """The matrix in bfloat16.

        Example:
            >>> numbers = jnp.array([[0x29]], jnp.uint8)  # 9 - 8 and 2 - 8
            >>> Packed(numbers, jnp.array([[0.5]])).unpack()
            Array([[0.5],
                   [-3]], dtype=bfloat16)
        """
        x = self.numbers
        if x.dtype == jnp.uint8:
            x = jnp.stack([x & 15, x >> 4], axis=-2).astype(jnp.float32) - 8
        x = x.astype(jnp.float32).reshape(*self.scales.shape[:-1], -1, self.shape[-1])
        x = x * self.scales[..., None, :].astype(jnp.float32)
        # XLA may leave a cast to bfloat16 and back out, but not this.
        return jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16).reshape(self.shape)


def unpacked(x: Any) -> Any:
    """The array of a `Packed` value; any other value as it is."""
    return x.unpack() if isinstance(x, Packed) else x


def unpack_all(v: Any) -> Any:
    """Variables in any structure, none of them packed.

    Example:
        >>> w = nnx.Param(Packed(jnp.array([[0x29]], jnp.uint8), jnp.array([[0.5]])))
        >>> unpack_all({"w": w})["w"].shape
        (2, 1)
    """

    def of(v: nnx.Variable) -> nnx.Variable:
        return v.replace(v.get_value().unpack()) if isinstance(v.get_value(), Packed) else v

    return jax.tree.map(of, v, is_leaf=lambda x: isinstance(x, nnx.Variable))


class Frozen(NamedTuple):
    """The value of a parameter frozen in training, and what adapters make of it: w + left right.

    The sum is formed where it is used, see `training.lora`. Leading axes are a batch: each layer
    and each expert has its own pair.
    """

    # Not annotated more closely: JAX rebuilds it with shapes and shardings in its places.
    w: Any  # [*batch, *m, *n], or `Packed`
    left: Any  # [*batch, *m, r]
    right: Any  # [*batch, r, *n]

    def merge(self) -> Array:
        """The matrix in use.

        Example:
            >>> left, right = jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]])
            >>> Frozen(jnp.zeros((2, 2)), left, right).merge()
            Array([[3., 4.],
                   [6., 8.]], dtype=float32)
        """
        w = unpacked(self.w)

        # left right sums over r; the leading axes [*batch] are those that w has beside *m and *n.
        batch = tuple(range(self.left.ndim + self.right.ndim - 2 - w.ndim))
        dims = ((self.left.ndim - 1,), (len(batch),)), (batch, batch)
        change = jax.lax.dot_general(
            self.left, self.right, dims, precision=jax.lax.Precision.HIGHEST
        )
        return w.astype(change.dtype) + change


def in_use(v: Any, dtype: Any) -> Any:
    """Variables as they are used: unpacked, merged, and none narrower than the compute dtype.

    Example:
        >>> w = nnx.Param(Frozen(jnp.zeros((1, 1)), jnp.array([[2.0]]), jnp.array([[3.0]])))
        >>> used = in_use({"w": w, "scale": nnx.Param(jnp.ones(1, jnp.bfloat16))}, jnp.float32)
        >>> used["w"][...], used["scale"][...]
        (Array([[6.]], dtype=float32), Array([1.], dtype=float32))
    """

    def of(v: Any) -> Any:
        if not isinstance(v, nnx.Variable):
            return v
        x = v.get_value()
        x = x.merge() if isinstance(x, Frozen) else unpacked(x)
        wide = np.promote_types(x.dtype, dtype)
        return v.replace(x if x.dtype == wide else x.astype(wide))

    return jax.tree.map(of, v, is_leaf=lambda x: isinstance(x, nnx.Variable))
