"""An optax transformation as the optimizer of a run, and what all optimizers share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import OPTAX, ConfigError, OptimConfig
from dsv3_jax.mesh.sharding import names_of

Transform: TypeAlias = optax.GradientTransformation | None


class AtStep(NamedTuple):
    """What an optimizer knows of a step, beside parameters, state and gradients."""

    step: Array  # int32 []: steps taken before this one
    norm: Array  # float32 []: of all gradients
    keep: Array  # bool []: take the step; False changes nothing, whatever the gradients are
    loss: Array | None = None  # float32 []: some transformations of optax read it


def clip_factor(cfg: OptimConfig, norm: Array) -> Array:
    """The factor that scales gradients of this global norm down to `clip_norm`; 1 for smaller ones.

    Example:
        >>> clip_factor(OptimConfig(clip_norm=2.0), jnp.array([1.0, 8.0])).tolist()
        [1.0, 0.25]
    """
    return jnp.where(norm < cfg.clip_norm, 1.0, cfg.clip_norm / norm)


@dataclass(frozen=True, eq=False)
class Optax:
    """Any optax transformation on clipped gradients; a step that is not kept does not count.

    It sees parameters and gradients as nested dicts of arrays, {"sparse": {"attn": {"w_uq": …}},
    …}, so its masks and labels are functions of such dicts. Leaves of its state with the path and
    the shape of a parameter get that parameter's axis names, by which a mesh shards them; all
    others are replicated.

    Example:
        >>> params = nnx.State({"w": nnx.Param(jnp.ones(2), axes=("heads",))})
        >>> names_of(Optax(OptimConfig(), optax.trace(0.9)).init(params).trace["w"])
        ('heads',)
    """

    cfg: OptimConfig
    tx: Transform  # None: the state is empty, for readers, and there is no update

    def init(self, params: nnx.State) -> Any:
        if self.tx is None:
            return ()
        with _promoting():
            return _named(self.tx.init(nnx.to_pure_dict(params)), params)

    def update(
        self, at: AtStep, params: nnx.State, state: Any, grads: nnx.State
    ) -> tuple[nnx.State, Any]:
        check_optimizer(self.cfg, self.tx)
        assert self.tx is not None

        # optax knows dicts of arrays, and no variables.
        clip = clip_factor(self.cfg, at.norm)
        old = nnx.to_pure_dict(params)
        before = jax.tree.map(
            lambda v: v.get_value() if is_variable(v) else v, state, is_leaf=is_variable
        )
        clipped = nnx.to_pure_dict(jax.tree.map(lambda g: g * clip, grads))
        with _promoting():
            update = optax.with_extra_args_support(self.tx).update
            try:
                updates, after = update(clipped, before, old, value=at.loss)
            except TypeError as error:
                if "required keyword-only argument" not in str(error):
                    raise
                raise ConfigError(
                    f"optimizer needs more than gradients, parameters and the loss: {error}"
                ) from error
            new = optax.apply_updates(old, updates)

        # A step that is not kept changes nothing, the count of steps included.
        found, kept = (new, after), (old, before)
        new, after = jax.tree.map(lambda a, b: jnp.where(at.keep, a, b), found, kept)
        flat = nnx.traversals.flatten_mapping(new)
        moved = nnx.from_flat_state(
            [(path, v.replace(flat[path])) for path, v in nnx.to_flat_state(params)]
        )
        return moved, _named(after, params)


@contextmanager
def _promoting() -> Iterator[None]:
    """optax mixes dtypes, as of a count and a decay, even if the caller has JAX refuse that."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


def _named(state: Any, params: nnx.State) -> Any:
    """A state whose leaves are variables with axis names, where they mirror a parameter."""
    flat = dict(nnx.to_flat_state(params))

    def of(path: tuple, leaf: Array) -> Any:
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        v = next((flat[keys[start:]] for start in range(len(keys)) if keys[start:] in flat), None)
        mirrors = v is not None and v.shape == leaf.shape and names_of(v)
        return nnx.Variable(leaf, axes=names_of(v)) if mirrors else leaf

    return jax.tree_util.tree_map_with_path(of, state)


def check_optimizer(cfg: OptimConfig, transformation: object) -> None:
    """Check that a run has what trains it.

    Raises: ConfigError if it is not an optax transformation, or is missing for a run that was
        trained by one.

    Example:
        >>> check_optimizer(OptimConfig(), optax.sgd(1e-3)), check_optimizer(OptimConfig(), None)
        (None, None)
    """
    if transformation is None and cfg.name.startswith(OPTAX):
        raise ConfigError(
            f"optim.name={cfg.name!r} is a transformation: give it by ds.train.fit(…, optimizer=tx)"
        )
    if not isinstance(transformation, optax.GradientTransformation | None):
        # Wrappers such as optax.MultiSteps are no transformations themselves.
        wraps = hasattr(transformation, "gradient_transformation")
        remedy = "give its .gradient_transformation()" if wraps else "give one as optax.lion(1e-4)"
        raise ConfigError(f"optimizer={transformation!r} is not an optax transformation; {remedy}")


def name_of(tx: optax.GradientTransformation, params: nnx.State) -> str:
    """Name a transformation by the types of its state, for `OptimConfig.name`: it has no other.

    Args: params: or their shapes.

    Example:
        >>> params = nnx.State({"w": nnx.Param(jnp.ones(2))})
        >>> name_of(optax.adam(1e-3), params), name_of(optax.sgd(1e-3), params)
        ('optax:ScaleByAdamState', 'optax:no state')
    """
    with _promoting():
        state = jax.eval_shape(tx.init, nnx.to_pure_dict(params))
    types = dict.fromkeys(re.findall(r"namedtuple\[(\w+)\]", str(jax.tree.structure(state))))
    return OPTAX + ("+".join(name for name in types if name != "EmptyState") or "no state")
