"""Models that tests share: they compile in seconds, and are so random that every part matters."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import Balance, Execution, ModelConfig
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.loop import Begins, Decoder
from dsv3_jax.decoding.programs import Programs
from dsv3_jax.kernels.cpu import library
from dsv3_jax.model.cache import pick_dtype
from dsv3_jax.model.decode import prepare_decode
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract

# No two sizes are alike, so that no axis can pass for another.
SMALL = ModelConfig(
    vocab_size=37, dim=16, num_layers=3, num_dense_layers=1, dense_dim=20, num_heads=3,
    q_latent_dim=12, kv_latent_dim=10, nope_head_dim=6, rope_head_dim=4, v_head_dim=5,
    num_experts=8, experts_per_token=3, num_shared_experts=1, expert_dim=7,
    num_groups=4, groups_per_token=2, routed_scale=2.5, max_positions=128,
    balance=Balance(sequence_alpha=0.02, switch_alpha=0.03),
    norm_eps=0.05,  # far from the latent norms' 1e-6
    init_std=0.3,  # scores, gates and attention are far from even
)  # fmt: skip


# Sparse attention, as a change of a small configuration.
INDEXED = dict(attention="dsa", q_latent_dim=7, index_heads=2, index_dim=6, index_topk=5)


def small(**changes) -> ModelConfig:
    return replace(SMALL, **changes)


LIGHT = small(num_layers=1, num_dense_layers=0)  # one sparse layer: compiles in seconds
# of a test, or of one of its cases, that calls the C++ kernels
needs_cpp = pytest.mark.skipif(library.why_not() != "", reason=library.why_not())
# compiles fastest: every expert reads every token
DENSE = Execution(kernels="grouped_swiglu=dense")


def random_model(
    cfg: ModelConfig, seed: int = 0, execution: Execution | None = None
) -> Transformer:
    """A model filled by NumPy, uncompiled: norm scales are not 1, and router biases are signed."""
    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(abstract(cfg, execution))
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        noise = rng.standard_normal(variable.shape)
        if not variable.get_metadata().get("decay", True):  # a norm's scale
            noise = 1 + 0.3 * noise
        elif isinstance(variable, RouterBias):
            noise = 0.15 * noise
        else:
            noise = cfg.init_std * noise
        filled[path] = variable.replace(jax.device_put(noise.astype(np.float32)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def parameters(model: Transformer) -> dict:
    """All variables of a model in float64, as the nested dicts that `dsv3_jax.reference` reads."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), arrays_of(model))


def decode_program(
    model, draft=None, length=0, batch=2, new=16, capacity=4096, dtype="float32", cache="latent"
):
    """A request's programs, its decoder's leaves and its loop, as shapes; draft may be a model."""
    models = [model, draft] if isinstance(draft, Transformer) else [model]
    with_weights = tuple((m, jax.eval_shape(prepare_decode, m)) for m in models)
    tokens, rows, stops = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 16), (batch,), (1,))
    )
    draft = "model" if len(models) > 1 else draft
    config = DecodeConfig(new, cache=cache, cache_dtype=pick_dtype("float32", dtype))
    decoder = Decoder(with_weights, stops, draft, length, config, capacity, capacity)
    leaves, form = jax.tree.flatten(decoder)
    made = Programs(form)
    read = jax.eval_shape(made.prefill, leaves, tokens, rows)
    begins = Begins(rows, rows, rows, jax.ShapeDtypeStruct((batch,), jnp.uint32), rows)
    admit = partial(made.admit, in_order=True)
    return made, leaves, jax.eval_shape(admit, leaves, None, read, begins)


def flat(params: nnx.State) -> dict[tuple, np.ndarray]:
    """The arrays of a state by path."""
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(params)}


def arrays_of(model: Transformer) -> dict:
    """All variables of a model as nested dicts."""
    return nnx.to_pure_dict(nnx.state(model))


def tokens_of(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.device_put(
        np.random.default_rng(seed).integers(cfg.vocab_size, size=(batch, length), dtype=np.int32)
    )


def teacher_logits(model: Transformer, prompts, new) -> list[np.ndarray]:
    """Logits [tokens, W] of up to four texts where their new tokens were chosen, by one pass."""
    rows = np.zeros((4, 64), np.int32)
    for row, prompt, more in zip(rows, prompts, new, strict=False):
        row[: len(prompt) + len(more)] = [*prompt, *more]
    logits = forward(model, jnp.asarray(rows)).logits
    texts = zip(logits, prompts, new, strict=False)
    return [of[len(prompt) - 1 :][: len(more)] for of, prompt, more in texts]


def assert_best(model: Transformer, prompts, tokens) -> None:
    """The tokens after prompts are those of the forward pass, and not one that is repeated."""
    assert len({token for row in tokens for token in row}) > 5
    best = [logits.argmax(-1).tolist() for logits in teacher_logits(model, prompts, tokens)]
    assert tokens[: len(best)] == best


def scratch_bytes(function, *shapes: tuple[int, ...], dtype=jnp.float32) -> int:
    """Scratch memory of a function of such arrays, compiled and not run."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, weight, *arrays):
    """y = function(*arrays), and the gradients of sum(weight * y) in all arrays of floats."""
    kinds = [jax.tree.leaves(array)[0].dtype for array in arrays]
    wanted = tuple(i for i, kind in enumerate(kinds) if jnp.issubdtype(kind, jnp.floating))

    def loss(*arrays):
        y = function(*arrays)
        return (weight * y).sum(), y

    (_, y), grads = jax.value_and_grad(loss, wanted, has_aux=True)(*arrays)
    return y, grads


@partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, tokens, segment_ids, positions):
    return nnx.merge(graphdef, state)(tokens, segment_ids, positions)


def forward(model: Transformer, tokens, segment_ids=None, positions=None):
    """`model(…)` as NumPy arrays, compiled once for all models and inputs of one shape."""
    return jax.tree.map(np.asarray, _forward(*nnx.split(model), tokens, segment_ids, positions))
