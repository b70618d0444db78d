"""Fine-tuning on chats: which tokens are targets, how examples are packed, what a run answers."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, parameters, random_model
from runs import MODEL, by_command, refused, rows_of, save_run, write_lines

from dsv3_jax import hf, reference
from dsv3_jax.chat.examples import encode, load_examples
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data.batches import model_inputs, stack
from dsv3_jax.data.packing import PackedRows, Piece
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.tensor_files import write_json
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.runs.callbacks import KeepOrigin
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import read_run
from dsv3_jax.runs.open_model import load_text
from dsv3_jax.training.loss import compute_loss, target_counts

PLAIN = plain_settings()
HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey"}]


def chat(i):
    return [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]


def write(folder, records):
    return write_lines(folder / "chats.jsonl", records)


def test_the_targets_of_a_record():
    """An assistant's tokens with the end of each turn, a completion, or all of a text."""
    eos, said = PLAIN.tokenizer.eos_id, {"messages": [*HELLO, *chat(7)]}
    last = {"prompt": [*HELLO, chat(7)[0]], "completion": [chat(7)[1]]}
    turns = "user\nhi\nassistant\nhey\nuser\n7?\nassistant\n7\n"
    for record, text, wanted in (
        (said, turns, [*b"hey", eos, *b"7", eos]),
        (last, turns, [*b"7", eos]),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4", [*b"4", eos]),
        ({"text": "abc"}, "abc", [*b"abc", eos]),
    ):
        ids, mask = encode(record, PLAIN)
        assert PLAIN.tokenizer.decode(ids) == text
        assert [i for i, is_target in zip(ids, mask, strict=True) if is_target] == wanted


def test_what_is_too_long_or_has_no_answer_is_counted_and_a_bad_record_is_named(tmp_path):
    records = [{"messages": chat(i)} for i in range(9)]
    records += [{"text": "x" * 100}, {"messages": HELLO[:1]}]
    cfg = DataConfig(paths=(write(tmp_path, records),), format="chat", seq_len=64, val_fraction=0.3)
    examples = load_examples(cfg, PLAIN)
    assert examples.domains == ("chats",) and examples.rows_per_epoch() > 0
    assert "left out: 1 longer than seq_len=64, 1 without an assistant's turn" in examples.summary
    train, held_out = map(int, re.findall(r"(\d+) (?:to train on|held out)", examples.summary))
    assert train + held_out == 9 and held_out
    with refused("give no example to train on; left out: 11 longer than seq_len=4"):
        load_examples(replace(cfg, seq_len=4), PLAIN)
    for record, sentence in (
        ({"prompt": "a", "completion": [1]}, r": prompt='a' and completion=\[1\] are not two"),
        ({"prompt": "a", "chosen": "b"}, " has chosen, prompt; give it messages, conversations, "),
        ({"conversations": [{"from": 5, "value": "hi"}]}, ": message 0 has role=5; give one of "),
    ):
        write(tmp_path, [{"text": "a"}, record])
        with refused(f"line 2{sentence}"):
            load_examples(replace(cfg, bad_records="refuse"), PLAIN)


def test_rows_fit_the_examples(tmp_path):
    records = [{"messages": chat(i)} for i in range(199)]
    file = write(tmp_path, [*records, {"text": "x" * 100}])
    cfg = DataConfig(paths=(file,), format="chat", val_fraction=0.3)
    source = load_examples(cfg, PLAIN, 4096)
    assert source.cfg.seq_len == 64 and "left out: 1 longer than seq_len=64" in source.summary
    assert load_examples(cfg, PLAIN, 48).cfg.seq_len == 48


@partial(jax.jit, static_argnums=0)
def masked_losses(graphdef, state, batch):
    out = compute_loss(nnx.merge(graphdef, state), batch, 0.3)
    return out.main, out.mtp, target_counts(batch["segment_ids"], 2, batch["loss_mask"])


def test_the_packed_loss_is_that_of_each_example_alone():
    """Sums over packed rows against the reference page in float64, one example after another."""
    cfg = replace(LIGHT, mtp_depth=1)
    model = random_model(cfg, execution=DENSE)
    rng = np.random.default_rng(0)
    pieces = [
        Piece(rng.integers(cfg.vocab_size, size=n).astype(np.int32), 0, n, rng.random(n) < 0.5)
        for n in (5, 9, 3, 7)
    ]
    batch = stack(list(PackedRows(pieces, 16, whole=True)))
    main, mtp, counts = masked_losses(*nnx.split(model), model_inputs(batch))
    params, sums, wanted = parameters(model), np.zeros(2), np.zeros(2)
    for tokens, _, _, mask in pieces:
        n = len(tokens)
        ctx = reference.Context(cfg, np.arange(n)[None], np.ones((1, n), int))
        out = reference.transformer(ctx, params, tokens[None])
        for depth, logits in enumerate([out.logits, *out.mtp_logits]):
            for i in range(n - depth - 1):
                if mask[i + depth + 1]:
                    row = logits[0, i]
                    sums[depth] += np.log(np.exp(row).sum()) - row[tokens[i + depth + 1]]
                    wanted[depth] += 1
    np.testing.assert_array_equal(counts, wanted)
    np.testing.assert_allclose([main, mtp[0]], sums / wanted, rtol=2e-6)


# of the released folder
ORIGIN = {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [256]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of bytes to start with, as a released folder without a template, and chats."""
    root = tmp_path_factory.mktemp("sft")
    cfg = replace(MODEL, num_layers=1, mtp_depth=0, max_positions=48)
    model = random_model(cfg, execution=DENSE)
    hf.save(model, root / "base", quiet=True)
    (root / "base" / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    config = json.loads((root / "base" / "config.json").read_text())
    write_json(root / "base" / "config.json", config | ORIGIN)
    return root / "base", write(root, [{"messages": chat(i)} for i in range(24)])


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    start, file = base
    out = tmp_path_factory.mktemp("tuned") / "run"
    argv = ["train", "sft", "--start", start, "--out", out, "--data.paths", file]
    argv += ["--data.chat-template", "plain", "--data.seq-len", 48, "--data.batch-size", 2]
    argv += ["--optim.learning-rate", "3e-2", "--epochs", 6, "--optim.warmup-steps", 1]
    argv += ["--execution.kernels", "grouped_swiglu=dense"]
    code, said, err = by_command(*argv)
    assert code == 0, err
    return out, said, argv


@pytest.mark.long
def test_a_run_learns_its_answers(tuned, base):
    out, said, argv = tuned
    losses = [row["loss"] for row in rows_of(out) if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    run = read_run(out)
    passes = float(said.split(f"{len(losses)} steps of 2 rows: ")[1].split(" passes")[0])
    assert run.steps == len(losses) and passes * (run.steps - 1) / run.steps < 6 <= passes
    assert run.data.format == "chat" and run.optim.bias_freeze == 0
    before, after = (nnx.state(m, RouterBias) for m in (hf.load(base[0]), load_run(out).model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    at = argv.index("--epochs")
    code, said, _ = by_command(*argv[:at], *argv[at + 2 :])
    assert code == 0 and f"resumed from the checkpoint of step {run.steps}" in said, said
    text, (ids, mask) = load_text(out), encode({"messages": chat(5)}, PLAIN)
    prompt = text.chat.render(chat(5)[:1], add_generation_prompt=True).ids
    assert prompt == ids[: mask.index(True)] and text.stop_ids == (256,)


@pytest.mark.long
def test_a_run_made_of_a_run_is_converted_as_the_released_folder(tuned, tmp_path):
    child = tmp_path / "child"
    run = save_run(child, replace(read_run(tuned[0]), start=str(tuned[0])))
    KeepOrigin().on_start(run, child, 0)
    for made, back in ((tuned[0], tmp_path / "first"), (child, tmp_path / "second")):
        code, said, err = by_command("convert", made, back)
        assert code == 0, err
        config = json.loads((back / "config.json").read_text())
        assert {key: config[key] for key in ORIGIN} == ORIGIN and "tensors in bfloat16" in said


@pytest.mark.long
def test_heads_learn_the_chats_of_their_frozen_trunk(tuned, tmp_path):
    out, argv = tmp_path / "run", ["--trunk", tuned[0], "--model.mtp-kind", "medusa"]
    code, _, err = by_command("train", "tiny", *argv, "--steps", 2, "--out", out)
    assert code == 0, err
    assert read_run(out).data.paths == read_run(tuned[0]).data.paths
    assert rows_of(out)[0]["mtp_loss"][0] > 0
    assert load_text(out).chat.render(HELLO) == load_text(tuned[0]).chat.render(HELLO)
    code, _, err = by_command("train", "grpo", *argv, "--out", tmp_path / "grpo")
    assert code == 2 and "grpo group=8 is not supported on a frozen trunk" in err
