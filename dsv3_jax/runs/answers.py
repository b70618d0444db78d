"""The rows that GRPO trains on: answers that the model writes now, checked, one a row.

See `training.policy`. A step takes the next prompts in the run's order, and a group of answers to
each. A group whose answers have equal rewards teaches nothing: it is skipped, and its rows are
padding. If all groups of a step are, the next prompts are asked, `ROUNDS` times at most; after that
the step has no answers, and moves no weight. With several updates the next steps use the same
batch.

An answer depends on the model, the run's seed, its prompt and the step's place in the order of
prompts. So a run that resumes writes the same answers, and its position is that place.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsv3_jax.chat.checkers import Checker
from dsv3_jax.chat.examples import Task
from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import ConfigError, RunConfig
from dsv3_jax.data.batches import Batch, Batches, Row, endless, stack
from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.likelihood import next_token_scores
from dsv3_jax.report.units import shortened
from dsv3_jax.runs.start import Start, open_start
from dsv3_jax.training import lora
from dsv3_jax.training.policy import advantages
from dsv3_jax.training.rounding import rounded
from dsv3_jax.training.state import Job, TrainState, graph_of

ROUNDS = 8  # times that a step asks prompts, at most
HELD_OUT = 64  # held-out tasks that the model is asked at an evaluation, at most


class Answer(NamedTuple):
    """An answer to a prompt, and what its sampler knows of it."""

    task: int
    tokens: np.ndarray  # int32 [n]: of prompt and answer
    begin: int  # of the answer
    logprobs: list[float]  # of the answer's tokens, as they were sampled
    expert_ids: np.ndarray | None  # int32 [Lmoe, n, K]
    shown: dict[str, Any]  # its prompt, text and reward, see `Answers._checked`


@dataclass(frozen=True)
class Tasks:
    """What a run's model is asked, and who says how good its answers are."""

    text: TextSettings  # how the model reads and ends text
    asked: list[Task]
    held_out: list[Task]
    checker: Checker
    summary: str
    fingerprint: str  # as of `Batches`


def tasks_of(
    run: RunConfig, text: TextSettings, asked: list[Task], held_out: list[Task], fingerprint: str
) -> Tasks:
    """Choose the tasks whose prompt leaves room for an answer.

    Args: asked, held_out: from `load_tasks`.
    Raises: ConfigError if no prompt is short enough.
    """
    cfg = run.grpo
    checker = Checker(cfg.checker)

    # A task is asked if its prompt and the longest answer fit in a row.
    room = run.data.seq_len - cfg.max_new_tokens
    short = [task for task in asked if len(task.prompt) <= room]
    held_out = [task for task in held_out if len(task.prompt) <= room][:HELD_OUT]
    if not short:
        raise ConfigError(
            f"grpo max_new_tokens={cfg.max_new_tokens} leaves {room} of "
            f"data.seq_len={run.data.seq_len} tokens, and no prompt is so short"
        )

    # Show the first prompt: a wrong template is seen there.
    first = text.tokenizer.decode_with_names(short[0].prompt.tolist())
    out = len(asked) - len(short)
    left_out = f"; left out: {out:,} longer than {room}" if out else ""
    summary = (
        f"{len(short):,} prompts, {run.data.batch_size // cfg.group} a step with {cfg.group} "
        f"answers each{left_out}\n"
        f"val_reward: the likeliest answers to {len(held_out)} held-out prompts\n"
        f"the first prompt, as the model sees it: {shortened(first, 800)!r}"
    )
    return Tasks(text, short, held_out, checker, summary, fingerprint)


class Answers(Batches):
    """Batches of the model's own answers. Set `state` before each: the model answers as it is then.

    Args:
        job: the run's.
        tasks: from `tasks_of`.
        start: the run's, if it is open. None means that it is opened if KL needs it.
    """

    state: TrainState  # of the model that answers
    shown: list[list[dict[str, Any]]]  # the groups of the last batch: those that teach, if any

    def __init__(self, job: Job, tasks: Tasks, start: Start | None = None):
        run = job.run
        if jax.process_count() > 1:
            raise ConfigError(
                f"grpo group={run.grpo.group} samples in one process, not {jax.process_count()}"
            )
        order = endless([range(len(tasks.asked))], run.data.seed)
        prompts = run.data.batch_size // run.grpo.group
        super().__init__(order, prompts, fingerprint=tasks.fingerprint)
        self._job = job
        self._run = run
        self._tasks = tasks
        self._start = start
        self._batch: Batch | None = None
        self._uses = 0  # steps that the batch is still to be used for

    @cached_property
    def _graph(self) -> nnx.GraphDef:
        return graph_of(self._job)

    def __next__(self) -> Batch:
        if not self._uses:
            self._batch = self._answered()
            self._uses = self._run.grpo.updates
        self._uses -= 1
        assert self._batch is not None
        return self._batch

    def _answered(self) -> Batch:
        """Ask the next prompts."""
        with jax.transfer_guard("allow"):
            # Ask until a group teaches something.
            policy = self._policy(self._run.grpo.sampler_weights)
            groups = []
            row = self._row
            for _ in range(ROUNDS):
                groups += (new := self._asked(policy, row))
                row += self._batch_size
                if any(self._gains(group).any() for group in new):
                    break

            # KL is to the log probabilities of the model that the run began with.
            teaching = [group for group in groups if self._gains(group).any()]
            batch = self._stacked(teaching)
            if self._run.grpo.kl:
                nats, _ = next_token_scores(
                    *self._near(), batch["tokens"], self._run.grpo.temperature
                )
                batch["start_logprobs"] = np.pad(-np.asarray(nats), [(0, 0), (1, 0)])

        self._row = row  # last: after an error the same prompts are asked again
        answers = [answer for group in groups for answer in group]
        self.metrics = {
            "reward": float(np.mean([answer.shown["reward"] for answer in answers])),
            "skipped": 1 - len(teaching) / len(groups),
            "groups": len(groups),
            "answer_length": float(np.mean([len(answer.logprobs) for answer in answers])),
        }
        self.shown = [[answer.shown for answer in group] for group in teaching or groups]
        return batch

    def measured(self) -> dict[str, Any]:
        """Ask the held-out tasks, and take the likeliest answers.

        Returns: val_reward, their mean reward, and sample, one of them; nothing without such tasks.
        Raises: ValueError if the checker fails.
        """
        tasks = self._tasks.held_out
        if not tasks:
            return {}
        found = generate(
            self._policy(None), [task.prompt.tolist() for task in tasks],
            self._run.grpo.max_new_tokens, stop_tokens=self._tasks.text.stop_ids,
            batch_size=self._run.data.batch_size,
        )  # fmt: skip
        shown = [self._checked(*pair) for pair in zip(tasks, found.tokens, strict=True)]
        number = -(-int(self.state.step) // self._run.eval_every)  # another sample each time
        reward = float(np.mean([answer["reward"] for answer in shown]))
        return {"val_reward": reward, "sample": shown[number % len(shown)]}

    def _policy(self, rounding: str | None) -> Any:
        """The model as it is now, in its compute dtype, or with rounded weights."""
        dtype = self._run.execution.compute_dtype
        weights = lora.policy(self._run.lora, self.state.params, dtype)
        if rounding:
            weights = rounded(weights, rounding)
        return nnx.merge(self._graph, weights, self.state.bias)

    def _asked(self, policy: Any, first: int) -> list[list[Answer]]:
        """Ask the prompts from `first` on: a group of answers to each."""
        cfg = self._run.grpo
        text = self._tasks.text
        numbers = [self._order[first + i] for i in range(self._batch_size)]
        tasks = [self._tasks.asked[number] for number in numbers]

        # The seed is of the run and its place in the prompts: a resumed run answers alike.
        found = generate(
            policy, [task.prompt.tolist() for task in tasks], cfg.max_new_tokens,
            temperature=cfg.temperature, stop_tokens=text.stop_ids, cache_dtype=cfg.cache_dtype,
            seed=int(np.random.SeedSequence([self._run.seed, first]).generate_state(1)[0]),
            samples=cfg.group, logprobs=True,
            return_routing=cfg.replay and policy.cfg.num_sparse_layers > 0,
        )  # fmt: skip
        assert found.logprobs is not None

        answers = []
        for i, new in enumerate(found.tokens):
            task = tasks[i // cfg.group]
            answers.append(
                Answer(
                    task=numbers[i // cfg.group],
                    tokens=np.array([*task.prompt, *new], np.int32),
                    begin=len(task.prompt),
                    logprobs=found.logprobs[i],
                    expert_ids=None if found.expert_ids is None else found.expert_ids[i],
                    shown=self._checked(task, new),
                )
            )
        return [answers[i : i + cfg.group] for i in range(0, len(answers), cfg.group)]

    def _checked(self, task: Task, new: list[int]) -> dict[str, Any]:
        """An answer as people read it: prompt, answer, reward."""
        text = self._tasks.text

        # The checker reads the text without its stop token; the row of training keeps it.
        answer = text.tokenizer.decode(new[:-1] if new[-1] in text.stop_ids else new)
        return {
            "prompt": text.tokenizer.decode_with_names(task.prompt.tolist()),
            "answer": answer,
            "reward": self._tasks.checker.check(answer, task.record, task.location),
        }

    def _stacked(self, groups: list[list[Answer]]) -> Batch:
        """The batch of some groups; rows that are left are padding."""
        rows = [
            self._row_of(answer, gain)
            for group in groups
            for answer, gain in zip(group, self._gains(group), strict=True)
        ]

        # All batches have one shape, so that the step is compiled once.
        empty = Answer(0, np.zeros(0, np.int32), 0, [], None, {})
        cfg = self._run.model
        if self._run.grpo.replay and cfg.num_sparse_layers:
            none = np.zeros((cfg.num_sparse_layers, 0, cfg.experts_per_token), np.int32)
            empty = empty._replace(expert_ids=none)
        missing = self._run.data.batch_size - len(rows)
        return stack(rows + [self._row_of(empty, 0.0)] * missing)

    def _row_of(self, answer: Answer, advantage: float) -> Row:
        tokens = answer.tokens
        begin = answer.begin
        length = self._run.data.seq_len
        size = len(tokens)
        is_answer = (np.arange(length) >= begin) & (np.arange(length) < size)

        def padded(
            values: Any, start: int = 0, value: int = 0, dtype: Any = np.int32
        ) -> np.ndarray:
            row = np.full(length, value, dtype)
            row[start:size] = values
            return row

        # Only the answer's tokens are targets; what came before was given.
        row = Row(
            tokens=padded(tokens), segment_ids=padded(1), positions=padded(np.arange(size)),
            domains=padded(0), documents=padded(answer.task), loss_mask=is_answer,
            advantages=padded(advantage, begin, dtype=np.float32),
            old_logprobs=padded(answer.logprobs, begin, dtype=np.float32),
        )  # fmt: skip

        # Its experts are replayed: −1 where the model chooses freely.
        if answer.expert_ids is not None:
            layers, _, chosen = answer.expert_ids.shape
            row["expert_ids"] = np.full((layers, length, chosen), -1, np.int32)
            row["expert_ids"][:, :size] = answer.expert_ids
            row["routed_tokens"] = padded(tokens, value=-1)
        return row

    def _near(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The model to stay near: LoRA's frozen weights with the start's biases, else a copy."""
        if self._run.lora.rank:
            frozen = lora.split(self.state.params)[1]
            return nnx.split(nnx.merge(self._graph, frozen, self.state.start_bias))
        return self._copy

    @cached_property
    def _copy(self) -> tuple[nnx.GraphDef, nnx.State]:
        assert self._run.start is not None
        start = self._start or open_start(self._run.start)
        return nnx.split(start.load(self._job)[0])

    def _gains(self, group: list[Answer]) -> np.ndarray:
        """The advantages of a group; one that teaches nothing has only zeros."""
        rewards = np.array([[answer.shown["reward"] for answer in group]])
        return advantages(rewards, self._run.grpo.learn_from)[0]
