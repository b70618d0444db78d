"""Decoding on a mesh gives a single device's tokens, and sends neither cache nor experts."""

import math
import re
from dataclasses import replace
from functools import lru_cache

import jax
import pytest
from models import DENSE, LIGHT, random_model, tokens_of
from runs import on_mesh, refused

from dsv3_jax.config import Layout
from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.programs import Programs
from dsv3_jax.mesh import sharding
from dsv3_jax.model import decode

pytestmark = pytest.mark.long

# "tensor" divides heads and vocabulary; an expert's matrix is larger than all that a step sends.
CFG = replace(LIGHT, num_heads=4, vocab_size=38, expert_dim=32, mtp_depth=1)
NEW = 8
LENGTHS = (1, 5, 40, 3, 9, 2, 21, 4)
PROMPTS = [tokens_of(CFG, 1, n, seed=i)[0].tolist() for i, n in enumerate(LENGTHS)]
SAMPLED = dict(temperature=0.8, top_k=9, top_p=0.95, seed=3)
DRAFTED = dict(draft="mtp", draft_length=2)


def model_of(cfg=CFG, mesh=None, seed=0, execution=DENSE):
    """A random model, sharded over a mesh if there is one."""
    model = random_model(cfg, seed, execution)
    return model if mesh is None else on_mesh(model, mesh, execution.layout.fsdp)


@lru_cache
def alone(cfg=CFG, rows=8, **settings):
    """The tokens of one device."""
    return generate(model_of(cfg), PROMPTS[:rows], NEW, **settings).tokens


INDEX = dict(index_heads=3, index_dim=9, index_topk=7, index_types=("full", "shared"))
DSA = replace(CFG, num_layers=2, num_dense_layers=2, attention="dsa", **INDEX)
INT8 = dict(cache="expanded", cache_dtype="int8")
CASES = {  # (data, expert, tensor), model, sequences, settings, is it fsdp
    "2,2,2 sampled, drafted": ((2, 2, 2), CFG, 8, SAMPLED | DRAFTED, False),
}
RARE = {
    "2,4,1 fsdp, uneven, drafted": ((2, 4, 1), CFG, 3, DRAFTED, True),
    "2,2,2 sampled from int8 heads": ((2, 2, 2), CFG, 8, SAMPLED | INT8, False),
    "2,2,2 sparse attention, one choice shared": ((2, 2, 2), DSA, 8, DRAFTED, False),
}


@pytest.mark.parametrize(
    "sizes, cfg, rows, settings, fsdp",
    [pytest.param(*case, id=name) for name, case in CASES.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.rare) for name, case in RARE.items()],
)
def test_a_mesh_gives_the_tokens_of_one_device(sizes, cfg, rows, settings, fsdp):
    execution = replace(DENSE, layout=Layout(fsdp=fsdp))
    model = model_of(cfg, sharding.make_mesh(*sizes), execution=execution)
    got = generate(model, PROMPTS[:rows], NEW, **settings).tokens
    # Greedy rows depend neither on drafts nor on other rows.
    want = alone(cfg, rows, **settings) if "temperature" in settings else alone(cfg)[:rows]
    assert got == want
    # a model that repeats one token could not fail
    assert len({token for row in got for token in row}) > 2


@pytest.mark.rare  # the cases above have a mesh, and test_speculative a draft model
def test_a_draft_model_is_on_the_mesh():
    mesh = sharding.make_mesh(1, 2, 2)
    draft = model_of(replace(CFG, mtp_depth=0), mesh, seed=1)
    how = dict(draft=draft, draft_length=2)
    assert generate(model_of(mesh=mesh), PROMPTS[:2], NEW, **how).tokens == alone()[:2]
    with refused("^draft is not on the mesh of the model"):
        generate(model_of(mesh=sharding.make_mesh(2)), PROMPTS[:1], NEW, draft=model_of())


SENDS = re.compile(
    r"= (.*) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def sent(text):
    """Numbers in the results of each collective of a compiled program."""
    for shapes in SENDS.findall(text):
        for sizes in re.findall(r"\[([\d,]*)\]", shapes):
            yield math.prod(int(n) for n in sizes.split(",") if n)


def test_each_layers_arrays_lie_where_the_stack_has_them():
    """Under fsdp they stay in the stack, whose layers are gathered one by one."""
    mesh, cfg = sharding.make_mesh(2, 2, 2), replace(CFG, num_layers=2, num_dense_layers=1)
    gathered = model_of(cfg, mesh, execution=replace(DENSE, layout=Layout(fsdp=True)))
    with jax.set_mesh(mesh):
        layers = decode.prepare_decode(model_of(cfg, mesh))
        assert decode.prepare_decode(gathered) is None
    want = sharding.state_sharding(layers, mesh)
    assert any(at.spec != jax.P() for at in jax.tree.leaves(want))
    for x, at in zip(jax.tree.leaves(layers), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(at, x.ndim)


def test_neither_cache_nor_experts_are_sent(monkeypatch):
    """In the compiled step all that is sent is smaller than one device's part of either."""
    compiled = []

    def look(*form):
        made = Programs(*form)
        decode = made.decode

        def lower(leaves, loop, *args, **static):
            text = decode.lower(leaves, loop, *args, **static).compile().as_text()
            compiled.append((loop.cache, text))
            raise InterruptedError

        made.decode = lower
        return made

    monkeypatch.setattr("dsv3_jax.decoding.batch.programs", look)
    with pytest.raises(InterruptedError):
        generate(model_of(mesh=sharding.make_mesh(2, 2, 2)), PROMPTS, NEW, **SAMPLED | DRAFTED)
    ((cache, text),) = compiled
    largest, rows = max(sent(text)), len(PROMPTS)
    # a token's width, but no expert's matrix
    assert rows // 4 * 3 * CFG.dim <= largest < CFG.dim * CFG.expert_dim
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(cache.parts)]
    assert {x.shape[1] for x in shards} == {rows // 4} and largest < sum(x.size for x in shards)
