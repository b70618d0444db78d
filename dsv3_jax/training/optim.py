"""How parameters move: the optimizers AdamW, Muon, and any optax transformation.

`make` gives the optimizer of a run, by `OptimConfig.name`, of which MAKERS has the classes. A
transformation that is given to `ds.train.fit(…, optimizer=tx)` comes before that name; it becomes
a `transformation.Optax`. The functions of an optimizer are pure, and run under `jax.jit`: `init`
makes the state of step 0, any tree of arrays or variables; `update` takes a step, see `AdamW`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import OptimConfig
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.mesh.sharding import names_of
from dsv3_jax.ops.newton_schulz import orthogonalize
from dsv3_jax.training import mup
from dsv3_jax.training.lora import sides
from dsv3_jax.training.schedules import learning_rate
from dsv3_jax.training.transformation import AtStep, Optax, Transform, clip_factor, is_variable

RMS = 0.2  # of an update by Muon, as AdamW's usually is; arXiv 2502.16982, section 2.2
XLA = Kernels(Target("cpu", "xla"))  # for structures that compute nothing


class AdamState(NamedTuple):
    """Running means of the gradient and of its square, in the parameters' structure."""

    mu: nnx.State
    nu: nnx.State


@dataclass(frozen=True, eq=False)
class AdamW:
    """AdamW in one fused pass; weight decay on all but the norms' scales. Source: arXiv 1711.05101.

    It equals optax.chain(clip_by_global_norm, adamw), in an order that XLA runs in place. That
    chain writes the clipped gradients out and copies both means: three times the memory traffic,
    and a gradient's size of temporary memory.

    Example:
        >>> cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0)
        >>> optimizer = AdamW(cfg, 100, XLA)
        >>> params = nnx.State({"w": nnx.Param(jnp.array([1.0]))})
        >>> first = AtStep(jnp.int32(0), norm=jnp.float32(1), keep=jnp.bool_(True))
        >>> state, gradient = optimizer.init(params), params
        >>> new, _ = optimizer.update(first, params, state, gradient)
        >>> round(float(new["w"][0]), 3)
        0.9
    """

    cfg: OptimConfig
    steps: int  # length of the run, for the schedule
    kernels: Kernels
    growth: float = 1.0  # of the width, by which muP scales rates; see `mup`

    def init(self, params: nnx.State) -> Any:
        def zeros() -> nnx.State:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=self.cfg.moments_dtype), params)

        return AdamState(zeros(), zeros())

    @jax.named_scope("optimizer")
    def update(
        self, at: AtStep, params: nnx.State, state: Any, grads: nnx.State
    ) -> tuple[nnx.State, Any]:
        """Take one step on gradients that are clipped to `clip_norm`.

        Returns: (params, state).
        """
        cfg = self.cfg

        # Numbers of the step. Both means begin at 0; the corrections undo that bias.
        count = (at.step + 1).astype(jnp.float32)
        clip = clip_factor(cfg, at.norm)
        rate = learning_rate(cfg, self.steps, at.step)
        to_mean = 1 / (1 - cfg.beta1**count)
        to_square = 1 / (1 - cfg.beta2**count)
        numbers = jnp.stack([clip, to_mean, to_square, rate, at.keep.astype(jnp.float32)])

        # Norms' scales have no weight decay.
        variables = jax.tree.leaves(params, is_leaf=is_variable)  # each has one leaf
        decays = [
            cfg.weight_decay if v.get_metadata().get("decay", True) else 0.0 for v in variables
        ]

        # muP divides rates, but not what weight decay takes off.
        shares = [mup.factors(v, self.growth)[1] for v in variables]
        by_share = {share: numbers.at[3].multiply(share) for share in set(shares) - {1.0}}
        by_share[1.0] = numbers

        # One kernel an array: it reads and writes each of the four once.
        settings: dict[str, Any] = {"betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
        arrays = map(jax.tree.leaves, (params, state.mu, state.nu, grads))
        new = [
            self.kernels("optimizer", *of_leaf, by_share[share], **settings, decay=decay / share)
            for *of_leaf, decay, share in zip(*arrays, decays, shares, strict=True)
        ]
        structure = jax.tree.structure(params)
        p, mu, nu = (jax.tree.unflatten(structure, [x[i] for x in new]) for i in range(3))
        return p, AdamState(mu, nu)


class MuonState(NamedTuple):
    """The matrices' running mean of the gradient, and AdamW's state of the rest."""

    momentum: nnx.State
    adam: AdamState


class Muon(AdamW):
    """Muon: the updates of matrices are orthogonalised, and AdamW updates the rest.

        M ← β M + (1−β) G;   O = NewtonSchulz(β M̂ + (1−β) Ĝ);
        W ← W − η (0.2 √max(in, out) · O + decay · W)

    M̂ and Ĝ are corrected for the first steps, as optax.contrib.muon does. The factor gives an
    update the root mean square of AdamW's, so both take the same learning rate η and weight decay.

    Which axes make a matrix follows from the names of a parameter's axes (`lora.sides`). Layers and
    experts are a batch: each has a matrix of its own. The heads of w_uq, w_uk, w_uv and w_o are one
    matrix, as in Moonlight and Kimi K2, whose factor and learning rates then hold here: w_uq is [Q,
    H·(N+R)], w_uk [H·N, C], w_uv [H·V, C], w_o [H·V, D]. AdamW updates embedding, unembedding,
    router and the norms' scales. LoRA's A and B are matrices.

    Source: Jordan et al., Muon (kellerjordan.github.io/posts/muon); Moonlight (arXiv 2502.16982),
    section 2.2.
    Departs from optax.contrib.muon, which it equals on matrices: the rest has AdamW without
    Nesterov, with weight decay on all but norms. The batch axes stay apart, so that a mesh shards
    experts while they are orthogonalised.

    Example:
        >>> w = nnx.Param(jnp.ones((1, 2)), axes=("dim", "hidden"))
        >>> Muon(OptimConfig(), 100, XLA).init(nnx.State({"w": w})).momentum["w"][...]
        Array([[0., 0.]], dtype=float32)
    """

    def init(self, params: nnx.State) -> Any:
        matrices, rest = split_matrices(params)
        return MuonState(super().init(matrices).mu, super().init(rest))

    @jax.named_scope("optimizer")
    def update(
        self, at: AtStep, params: nnx.State, state: Any, grads: nnx.State
    ) -> tuple[nnx.State, Any]:
        cfg = self.cfg

        # AdamW updates what is no matrix.
        matrices, rest = split_matrices(params)
        of_matrices, of_rest = split_matrices(grads)
        others, adam = super().update(at, rest, state.adam, of_rest)

        # Each matrix moves along its orthogonalised mean.
        rate = learning_rate(cfg, self.steps, at.step)
        clip = clip_factor(cfg, at.norm)
        flat = dict(nnx.to_flat_state(of_matrices))
        means = dict(nnx.to_flat_state(state.momentum))
        moved = {}
        for path, v in nnx.to_flat_state(matrices):
            w = v.get_value()
            mean = means[path].get_value()
            g = flat[path].get_value() * clip
            new, move = direction(mean.astype(g.dtype), g, at.step, names_of(v), cfg.muon_beta)
            w = jnp.where(at.keep, w - rate * (move + cfg.weight_decay * w), w)
            moved[path] = v.replace(w)
            means[path] = means[path].replace(jnp.where(at.keep, new.astype(mean.dtype), mean))
        params = nnx.merge_state(nnx.from_flat_state(moved), others)
        return params, MuonState(nnx.from_flat_state(means), adam)


def split_matrices(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split parameters, or gradients, into (matrices, the rest).

    Example:
        >>> w = nnx.Param(jnp.ones((2, 3)), axes=("dim", "hidden"))
        >>> embed = nnx.Param(jnp.ones((9, 2)), axes=("vocab", "dim"))
        >>> matrices, rest = split_matrices(nnx.State({"w": w, "embed": embed}))
        >>> list(matrices), list(rest)
        (['w'], ['embed'])
    """
    matrices, rest = nnx.split_state(params, lambda _, v: _is_matrix(v), ...)
    return matrices, rest


def _is_matrix(v: nnx.Variable) -> bool:
    """Whether Muon updates it: not a norm's scale, embedding, unembedding or router."""
    names = names_of(v)
    return bool(names) and "vocab" not in names and not v.get_metadata().get("exact", False)


def direction(
    mean: Float[Array, "*n"],
    g: Float[Array, "*n"],
    step: Array,
    names: tuple[str | None, ...],
    beta: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(The new running mean, the orthogonalised and scaled direction.)

    Stacked layers are computed one after the other, so that temporary arrays have the size of one
    layer.

    Args: names: of the last axes; see `lora.sides`.
    """
    count = (step + 1).astype(g.dtype)
    mean = beta * mean + (1 - beta) * g
    nesterov = beta * mean / (1 - beta ** (count + 1)) + (1 - beta) * g / (1 - beta**count)
    orthogonal = partial(_orthogonal, names=names)
    stacked = g.ndim > len(names)
    return mean, jax.lax.map(orthogonal, nesterov) if stacked else orthogonal(nesterov)


def _orthogonal(x: Float[Array, "*n"], names: tuple[str | None, ...]) -> Float[Array, "*n"]:
    """0.2 √max(in, out) · NewtonSchulz of one layer's weight."""
    left, right, _ = sides(names)
    rows = math.prod(x.shape[left:right])
    columns = math.prod(x.shape[right:])
    made = orthogonalize(x.reshape(*x.shape[:left], rows, columns))
    return (RMS * math.sqrt(max(rows, columns)) * made).reshape(x.shape)


MAKERS = {"adamw": AdamW, "muon": Muon}


def make(
    cfg: OptimConfig,
    steps: int,
    kernels: Kernels = XLA,
    transformation: Transform = None,
    growth: float = 1.0,
) -> AdamW | Optax:
    """Make the optimizer of a run.

    Args:
        steps: length of the run, for the schedule.
        kernels: run AdamW's update.
        transformation: takes the place of `cfg.name`. Clipping and steps that are not taken stay
            `cfg`'s and the step's; learning rate, schedule and weight decay are its own.
        growth: from `mup.growth`.
    Returns: the optimizer. Of a run that a transformation trained, opened without it, the state is
        empty, and an update raises ConfigError.

    Example:
        >>> import optax
        >>> optimizer = make(OptimConfig(), 100, transformation=optax.sgd(0.5, momentum=0.9))
        >>> params = nnx.State({"w": nnx.Param(jnp.array([1.0]))})
        >>> first = AtStep(jnp.int32(0), norm=jnp.float32(1), keep=jnp.bool_(True))
        >>> state, gradient = optimizer.init(params), params
        >>> moved, _ = optimizer.update(first, params, state, gradient)
        >>> moved["w"][...]  # the gradient is 1
        Array([0.5], dtype=float32)
    """
    if transformation is None and cfg.name in MAKERS:
        return MAKERS[cfg.name](cfg, steps, kernels, growth)
    return Optax(cfg, transformation)
