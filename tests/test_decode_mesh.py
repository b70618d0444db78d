"""Decoding on a mesh gives a single device's tokens, and sends neither cache nor experts."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from models import DENSE, LIGHT, random_model, tokens_of
from runs import on_mesh, refused

from dsv3_jax.config import Layout
from dsv3_jax.decoding.batch import Batch, Shapes, Start
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate
from dsv3_jax.mesh import sharding
from dsv3_jax.model import decode
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.planning.traffic import traffic

pytestmark = pytest.mark.long

# "tensor" divides heads and vocabulary; an expert's matrix is larger than all that a step sends.
CFG = replace(LIGHT, num_heads=4, vocab_size=38, expert_dim=32, mtp_depth=1)
NEW = 8
LENGTHS = (1, 5, 40, 3, 9, 2, 21, 4)
PROMPTS = [tokens_of(CFG, 1, n, seed=i)[0].tolist() for i, n in enumerate(LENGTHS)]
LAW = dict(temperature=0.8, top_k=9, top_p=0.95)
REQUEST = dict(draft="mtp", draft_length=2, seed=3, **LAW)


def model_of(mesh=None, cfg=CFG, fsdp=False):
    model = random_model(cfg, execution=replace(DENSE, layout=Layout(fsdp=fsdp)))
    return model if mesh is None else on_mesh(model, mesh, fsdp)


LAYERS = replace(CFG, num_layers=2, mtp_depth=0)
GREEDY = dict(draft="mtp", draft_length=2)
CASES = {  # the mesh, the model, is it by fsdp, how many sequences, what is asked for
    "sampled": ((2, 2, 2), CFG, False, 8, REQUEST),
    # they are sharded by "data" alone, and "tensor" shards the vocabulary
    "two sequences on four devices": ((2, 2, 2), LAYERS, False, 2, {}),
    # each layer is gathered; three sequences do not divide evenly over two devices
    "fsdp": pytest.param((2, 4), CFG, True, 3, GREEDY, marks=pytest.mark.rare),
}


@pytest.mark.parametrize("sizes, cfg, fsdp, sequences, asked", CASES.values(), ids=CASES)
def test_a_mesh_gives_the_tokens_of_one_device(sizes, cfg, fsdp, sequences, asked):
    """tests/pairs has other meshes, attentions, caches and drafts."""
    mesh, prompts = sharding.make_mesh(*sizes), PROMPTS[:sequences]
    got = generate(model_of(mesh, cfg, fsdp), prompts, NEW, **asked).tokens
    assert got == generate(model_of(None, cfg), prompts, NEW, **asked).tokens
    assert len({token for row in got for token in row}) > 2  # else it could not fail


def test_a_draft_is_on_the_models_mesh():
    with refused("^draft is not on the mesh of the model"):
        generate(model_of(sharding.make_mesh(2, 2, 2)), PROMPTS[:1], NEW, draft=model_of())


def test_each_layers_arrays_lie_where_the_stack_has_them():
    mesh, cfg = sharding.make_mesh(2, 2, 2), replace(CFG, num_layers=2, num_dense_layers=1)
    with jax.set_mesh(mesh):
        layers = decode.prepare_decode(model_of(mesh, cfg))
        assert decode.prepare_decode(model_of(mesh, cfg, fsdp=True)) is None
    want = sharding.state_sharding(layers, mesh)
    assert any(at.spec != jax.P() for at in jax.tree.leaves(want))
    for x, at in zip(jax.tree.leaves(layers), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(at, x.ndim)


def test_neither_cache_nor_experts_are_sent():
    """In the compiled step all that is sent is smaller than one device's part of either."""
    config = DecodeConfig(NEW, Sampling(**LAW), draft="mtp", draft_length=2)
    shapes = Shapes.of(LENGTHS, len(PROMPTS), len(PROMPTS), config, CFG.max_positions)
    batch = Batch(model_of(sharding.make_mesh(2, 2, 2)), config, shapes)
    starts = [Start(i, i, tuple(of), 0, 3, NEW, config.sampling) for i, of in enumerate(PROMPTS)]
    batch.begin(batch.read(PROMPTS, shapes.width), starts)
    until = np.full(len(PROMPTS), NEW, np.int32)
    with sharding.use_mesh(batch.mesh):
        compiled = batch.programs.decode.lower(batch.leaves, batch.loop, until).compile()
    largest = max(sent.nbytes for sent in traffic(compiled).collectives) // 4  # numbers
    rows = len(PROMPTS)
    # a token's width, but no expert's matrix
    assert rows // 4 * 3 * CFG.dim <= largest < CFG.dim * CFG.expert_dim
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(batch.loop.cache.parts)]
    assert {x.shape[1] for x in shards} == {rows // 4} and largest < sum(x.size for x in shards)
