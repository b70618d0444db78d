"""GRPO: its loss, and runs that learn from their own answers."""

import importlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import nnx
from models import random_model
from released import GRID, write_folder

import dsv3_jax as ds
from dsv3_jax.config import DataConfig, Grpo
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.fp8 import dequantize, quantize
from dsv3_jax.report.metrics_files import read_rows
from dsv3_jax.runs.answers import Answers
from dsv3_jax.runs.folder import read_run
from dsv3_jax.training.loss import Part, compute_loss
from dsv3_jax.training.policy import policy_loss
from dsv3_jax.training.rounding import rounded
from dsv3_jax.training.state import Job
from dsv3_jax.training.step import make_step

ONE_LAYER = replace(runs.MODEL, num_layers=1, mtp_depth=0)
DENSE_LAYER = replace(ONE_LAYER, num_dense_layers=1)  # compiles fastest


@pytest.mark.parametrize("outside", ["clip", "mask"])
def test_the_loss_and_its_gradient_are_those_of_the_formula(rng, outside):
    """Token by token in float64, clipped or masked on both sides, with the KL divergence."""
    cfg, shape = Grpo(clip_low=0.1, clip_high=0.3, kl=0.2, outside=outside), (3, 7)
    new, old, start, gains = rng.normal(0, 0.4, (4, *shape))
    mask, slope = rng.random(shape) < 0.7, np.zeros(shape)
    loss = sampler_kl = out = 0.0
    for i in zip(*np.nonzero(mask), strict=True):
        ratio, away = np.exp(new[i] - old[i]), np.exp(start[i] - new[i])
        clipped = min(max(ratio, 0.9), 1.3)
        inside = ratio * gains[i] <= clipped * gains[i]
        gain = min(ratio * gains[i], clipped * gains[i])
        if outside == "mask":
            inside = 0.9 <= ratio <= 1.3
            gain = ratio * gains[i] if inside else 0.0
        loss += 0.2 * (away - np.log(away) - 1) - gain
        slope[i] = 0.2 * (1 - away) - (ratio * gains[i] if inside else 0)
        sampler_kl += ratio - np.log(ratio) - 1
        out += not inside
    args = [*map(jnp.float32, (old, start, gains)), jnp.asarray(mask), cfg]
    loss_of = jax.value_and_grad(lambda new: policy_loss(new, *args), has_aux=True)
    (found, measures), grad = loss_of(jnp.float32(new))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, atol=1e-6)
    np.testing.assert_allclose(measures["sampler_kl"], sampler_kl, rtol=1e-5)
    assert measures["clipped"] == out

    # The KL never pushes a token further from the start, though exp is cut off.
    assert (loss_of(jnp.float32(start - 30))[1] <= 0).all()


MATRIX_OF = {  # one layer's matrix [inputs, outputs] of a weight, of an expert's last one
    "w_q": lambda w: w[0].reshape(w.shape[1], -1),
    "w_o": lambda w: w[0].reshape(-1, w.shape[-1]),
    "w_uk": lambda w: w[0].reshape(-1, w.shape[-1]).T,
    "w_gate": lambda w: w[0].reshape(-1, *w.shape[-2:])[-1],
}


def test_a_samplers_weights_are_rounded_as_in_released_folders():
    """FP8 as these are written, 4 bits group by group; embedding, head, router and norms stay."""
    wide = replace(ONE_LAYER, dim=160, num_heads=3, expert_dim=40, kv_latent_dim=70)
    params = nnx.state(random_model(wide), nnx.Param)
    kinds = "bfloat16", "fp8", "int4", "int3"
    by_kind = [nnx.to_flat_state(rounded(params, kind)) for kind in kinds]
    stayed = set()
    for (path, v), *made in zip(nnx.to_flat_state(params), *by_kind, strict=True):
        w, bfloat16, *others = (np.asarray(x[...]) for x in (v, *(x for _, x in made)))
        if (bfloat16 == w).all():
            assert all((x == w).all() for x in others), path
            stayed.add(path[-1])
        if path[-1] not in MATRIX_OF:
            continue
        np.testing.assert_array_equal(bfloat16, w.astype(jnp.bfloat16).astype(np.float32))
        w, fp8, *few = map(MATRIX_OF[path[-1]], (w, *others))
        np.testing.assert_allclose(fp8, dequantize(*quantize(w)), rtol=1e-6)
        for i in range(0, len(w), 32):
            for x, most in zip(few, (7, 3), strict=True):
                scale = np.abs(w[i : i + 32]).max(0) / most
                wanted = np.round(w[i : i + 32] / scale)
                np.testing.assert_allclose(x[i : i + 32] / scale, wanted, atol=1e-4)
    assert stayed == {"embed", "head", "w_router", "scale"}


@pytest.mark.parametrize(
    "form", ["token_mean", pytest.param("constant_length", marks=pytest.mark.rare)]
)
def test_at_ratio_1_it_is_the_policy_gradient(rng, form):
    """−Σ A ∇ ln π / N, summed over two parts; N are the answers' tokens, or the most they have."""
    settings = Grpo(group=2, form=form, max_new_tokens=9, temperature=0.5)
    graph, params, rest = nnx.split(random_model(DENSE_LAYER), nnx.Param, ...)
    batch = runs.packed_batch(rng, np.ones((4, 12), np.int32))
    batch["loss_mask"] = mask = jnp.arange(12)[None] >= jnp.array([[3], [5], [8], [11]])
    batch["advantages"] = gains = jnp.float32(rng.normal(0, 1, (4, 1)) * np.asarray(mask))

    def logprobs(params):
        inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        log_p = jax.nn.log_softmax(nnx.merge(graph, params, rest)(*inputs).logits / 0.5)
        picked = jnp.take_along_axis(log_p[:, :-1], batch["tokens"][:, 1:, None], 2)
        return jnp.pad(picked[..., 0], [(0, 0), (1, 0)])

    batch["old_logprobs"] = jax.jit(logprobs)(params)
    count = mask.sum(dtype=jnp.float32)
    size = count if form == "token_mean" else 4 * 9

    @jax.jit
    def grads(params, half):
        def loss(params):
            how = dict(grpo=settings, part=Part(count[None], share=0.5))
            out = compute_loss(nnx.merge(graph, params, rest), half, 0.0, **how)
            return out.main, out.metrics["answers"]

        return jax.grad(loss, has_aux=True)(params)

    wanted = jax.jit(jax.grad(lambda params: -(gains * logprobs(params)).sum() / size))(params)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in (0, 2)]
    parts, measures = zip(*(grads(params, half) for half in halves), strict=True)
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(near, jax.tree.map(jnp.add, *parts), wanted)
    assert all(of["max_mismatch"] < 1e-5 and of["clipped"] == 0 for of in measures)


@pytest.mark.long
def test_a_step_without_answers_moves_nothing(rng):
    run = runs.make_run("nowhere", model=ONE_LAYER, grpo=Grpo(group=2), data=CHATS)
    batch, step = runs.packed_batch(rng, np.ones((4, 16), np.int32)), make_step(Job(run))
    batch |= {"loss_mask": batch["positions"] > 9, "old_logprobs": jnp.zeros((4, 16))}
    batch["advantages"] = jnp.float32(rng.normal(0, 1, (4, 1)) * np.asarray(batch["loss_mask"]))
    state, metrics = step(runs.fresh_state(run), batch)
    before = jax.tree.map(np.array, state)
    assert metrics["grad_norm"] > 0
    assert max(np.abs(x).max() for x in jax.tree.leaves(before.opt.mu)) > 0
    after, metrics = step(state, jax.tree.map(jnp.zeros_like, batch))
    assert (metrics["loss"], metrics["grad_norm"], metrics["finite"], after.step) == (0, 0, True, 2)
    runs.assert_bitwise(replace(after, step=before.step), before)


CHATS = DataConfig(paths=("nowhere",), seq_len=16, batch_size=4, format="chat")
JUDGE = """
import sys
left = 1
def even(text, row):
    global left
    left -= 1
    return len(text) % 2 == 0 if left else sys.exit()
def odd(text, row):
    return sum(text.encode()) % 2 == 1
def part(text, row):
    return sum(text.encode()) % 7 / 7
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(A folder with a checker and tasks, arguments of the command without START and OUT.)"""
    root = tmp_path_factory.mktemp("grpo")
    records = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    tasks = runs.write_lines(root / "tasks.jsonl", records)
    (root / "judge.py").write_text(JUDGE)
    words = "--data.chat-template plain --data.seq-len 32 --data.batch-size 8 "
    words += "--data.val-fraction 0.3 --eval-batches 1 --grpo.group 4 --grpo.max-new-tokens 6 "
    words += "--optim.learning-rate 1e-2 --optim.warmup-steps 1 --steps 4"
    return root, ["train", "grpo", "--data.paths", tasks, *words.split()]


@pytest.fixture(scope="module")
def ready(asked):
    root, argv = asked
    runs.save_run(root / "start", runs.make_run(runs.write_text(root / "text"), model=ONE_LAYER))
    return root, [*argv, "--start", str(root / "start")]


@pytest.mark.long
def test_a_run_that_its_checker_ends_resumes_as_if_it_had_not(ready, monkeypatch):
    """It samples as it trains, and ends bitwise the same.

    The checker fails at an answer, which no step follows, and at an evaluation, where the next step
    completes as after a callback's error.
    """
    root, argv = ready
    monkeypatch.syspath_prepend(root)
    settings = "--grpo.checker judge:even --grpo.kl 0.1 --lora.rank 2 --eval-every 2 "
    settings += "--optim.bias-freeze 1 --model.balance.bias-rate 0.3"
    argv, measured = [*argv, *settings.split()], Answers.measured

    def fails(self):
        raise ValueError("grpo checker='even' fails at line 3")

    def train(out, wanted, left=1000, measure=measured):
        importlib.import_module("judge").left = left
        (root / "judge.py").write_text(JUDGE + f"\n# {left}")
        monkeypatch.setattr(Answers, "measured", measure)
        code, *texts = runs.by_command(*argv, "--out", root / out)
        said = "".join(texts)
        assert all(words in said for words in wanted), said
        return code

    prompt = "as the model sees it: 'user\\n0+1=<eos>\\nassistant\\n'"
    assert train("run", ["4 answers each", prompt, "step 4  sample: 'user"]) == 0
    ended = "'judge:even' fails at", "line", "SystemExit", "stopped and saved at step 1"
    assert train("again", ended, left=12) == 2
    changed = "checker='judge:even' has changed since the last start"
    ended = changed, "'even' fails at line 3", "stopped and saved at step 3"
    assert train("again", ended, measure=fails) == 2
    assert train("again", ["resumed from the checkpoint of step 3"]) == 0

    runs.assert_bitwise(runs.last_state(root / "run"), runs.last_state(root / "again"))
    answers, again = (read_rows(root / out / "answers.jsonl") for out in ("run", "again"))
    assert answers == again and {row["step"] for row in answers} == {1, 2, 3, 4}
    rows = runs.rows_of(root / "run")
    assert [row["step"] for row in rows if "val_reward" in row] == [2, 4]
    for row in (row for row in rows if row["step"] == 2):
        row.pop("val_reward", None)
    assert runs.rows_of(root / "again") == rows
    rows = [row for row in rows if "reward" in row]
    for row in rows:
        assert row["max_mismatch"] < 1e-5 and row["clipped"] == 0 < row["reward"] < 1, rows
    assert len(rows) == 4 and rows[0]["kl"] < 1e-6 < rows[-1]["kl"]


@pytest.mark.long
def test_a_batch_of_answers_is_used_for_several_updates_and_a_run_stops_after_the_last(
    ready, monkeypatch
):
    """Asked to stop after the first of two, it stops after both, and resumes bitwise.

    answers.jsonl has the resumed run's answers once, each with its reward, a part of 1.
    """
    (root, argv), steps, answered = ready, [], Answers._answered
    monkeypatch.syspath_prepend(root)

    def noted(self):
        steps.append(int(self.state.step))
        return answered(self)

    monkeypatch.setattr(Answers, "_answered", noted)
    words = "--grpo.checker judge:part --grpo.updates 2 --grpo.sampler-weights int4 --log-every 1"
    code, _, said = runs.by_command(*argv, *words.split(), "--out", root / "two")
    assert code == 0, said
    run = read_run(root / "two")
    assert ds.train.fit(run, root / "parts", stop_after=1, quiet=True).step == 2
    assert ds.train.fit(run, root / "parts", quiet=True).resumed_from == 2
    assert steps == [0, 2, 0, 2]
    runs.assert_bitwise(runs.last_state(root / "two"), runs.last_state(root / "parts"))
    first, *_, last = runs.rows_of(root / "two")
    assert first["sampler_kl"] > 1e-6, first  # by the rounding: there was no update yet

    part = importlib.import_module("judge").part
    rows, parts = (read_rows(root / out / "answers.jsonl") for out in ("two", "parts"))
    assert rows == parts and [row["step"] for row in rows] == [1] * 8 + [3] * 8
    for row in rows:
        assert row["prompt"].startswith("user\n") and row["reward"] == part(row["answer"], {})
    assert first["skipped"] == 0  # all groups teach
    assert first["reward"] == np.mean([row["reward"] for row in rows[:8]])

    # The trained model's likeliest answers to the held-out tasks, by public names.
    found = ds.train.read_chats(run, root / "two").tasks
    asked = {tuple(task.prompt.tolist()) for task in found.asked}
    prompts = [task.prompt.tolist() for task in found.held_out]
    assert len(asked) + len(prompts) == 20 and not asked & set(map(tuple, prompts))
    stops = found.text.stop_ids
    new = ds.generate(ds.load_model(root / "two"), prompts, 6, stop_tokens=stops).tokens
    texts = [found.text.tokenizer.decode(ids[:-1] if ids[-1] in stops else ids) for ids in new]
    assert last["val_reward"] == np.mean([part(text, {}) for text in texts]) > 0


def write_packed(folder):
    """Its experts have 4 bits, and all else is float32."""
    kimi = GRID["Kimi K2-Thinking"]
    write_folder(folder, replace(kimi, config=kimi.config | {"vocab_size": 260}))


def write_zeroed(folder):
    """Its layers add nothing: sampler and trainer have the same states, and differ by heads."""
    model = random_model(DENSE_LAYER)
    for w in (model.dense.attn.w_o, model.dense.ffn.w_down):
        w.set_value(jnp.zeros_like(w[...]))
    ds.hf.save(model, folder, quiet=True)


HARDLY, NOT = "--optim.learning-rate 3e-5", "--optim.learning-rate 1e-20"
PACKED = f"--lora.rank 2 --lora.on attention shared routed {HARDLY}"
AT_TEMPERATURE = f"--grpo.temperature 0.7 --execution.compute-dtype bfloat16 {NOT}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("write", "words"),
    [pytest.param(write_packed, PACKED, marks=pytest.mark.rare), (write_zeroed, AT_TEMPERATURE)],
)
def test_a_released_start_is_sampled_as_it_is_trained_by_public_names(
    asked, tmp_path, monkeypatch, write, words
):
    """π is the sampler's to float32 rounding; test_frozen has packed weights of other kinds."""
    root, argv = asked
    monkeypatch.syspath_prepend(root)
    write(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(byte_tokenizer_json())
    folders = ("--start", tmp_path / "model", "--out", tmp_path / "run")
    code, _, said = runs.by_command(*argv, "--grpo.checker", "judge:odd", *folders, *words.split())
    rows = [row for row in runs.rows_of(tmp_path / "run") if "reward" in row]
    assert code == 0 and len(rows) == 4, said
    assert all(row["max_mismatch"] < 1e-5 for row in rows), rows
    assert 0 < sum(row["reward"] for row in rows) < 4 and rows[-1]["grad_norm"] > 0
