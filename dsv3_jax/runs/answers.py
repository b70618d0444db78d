"""The rows that GRPO trains on: answers that the model writes now, checked, one a row.

See `training.policy`. A step takes the next prompts in the run's order, and a group of answers to
each. A group whose answers are all right or all wrong teaches nothing: it is skipped, and its rows
are padding. If all groups of a step are, the next prompts are asked, `ROUNDS` times at most; after
that the step has no answers, and moves no weight.

An answer depends on the model, the run's seed, its prompt and the step's place in the order of
prompts. So a run that resumes writes the same answers, and its position is that place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsv3_jax.chat.checkers import Checker
from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import ConfigError, RunConfig, replace
from dsv3_jax.data.batches import Batch, Batches, Row, Source, endless, stack
from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.likelihood import next_token_scores
from dsv3_jax.runs.start import Open
from dsv3_jax.training import lora
from dsv3_jax.training.policy import advantages
from dsv3_jax.training.step import Job, TrainState, graph_of

ROUNDS = 8  # times that a step asks prompts, at most
_SHOWN = 400  # characters of the beginning and of the end of a prompt that are printed


class Answer(NamedTuple):
    """An answer to a prompt, and what its sampler knows of it."""

    task: int
    tokens: np.ndarray  # int32 [n]: of prompt and answer
    begin: int  # of the answer
    logprobs: list[float]  # of the answer's tokens, as they were sampled
    expert_ids: np.ndarray | None  # int32 [Lmoe, n, K]
    reward: float


class Answers(Batches):
    """Batches of the model's own answers.

    Args:
        run, text: the run, and how its model reads and ends text.
        tasks: of each the prompt's tokens, the record, and its place in the files.
        open_start: opens `run.start`.
        current: returns the run's job and state.
        fingerprint: as of `Batches`.
    """

    def __init__(
        self, run: RunConfig, text: TextSettings, tasks: list, open_start: Open,
        current: Callable[[], tuple[Job, TrainState]], fingerprint: str,
    ):  # fmt: skip
        if jax.process_count() > 1:
            raise ConfigError(
                f"grpo group={run.grpo.group} samples in one process, not {jax.process_count()}"
            )
        order = endless([range(len(tasks))], run.data.seed)
        super().__init__(order, run.data.batch_size // run.grpo.group, fingerprint=fingerprint)
        self._run = run
        self._text = text
        self._tasks = tasks
        self._current = current
        self._checker = Checker(run.grpo.checker)
        self._open_start = open_start
        self._graph: Any = None
        # the model to stay near, if it is not among the run's frozen weights
        self._start: Any = None

    def __next__(self) -> Batch:
        job, state = self._current()
        self._graph = self._graph or graph_of(job)
        with jax.transfer_guard("allow"):
            weights = lora.policy(job.run.lora, state.params, job.run.execution.compute_dtype)
            policy = nnx.merge(self._graph, weights, state.bias)
            groups = []
            row = self._row
            for _ in range(ROUNDS):
                groups += (new := self._asked(policy, row))
                row += self._batch_size
                if any(map(_teaches, new)):
                    break
            batch = self._stacked([group for group in groups if _teaches(group)])
            if self._run.grpo.kl:
                nats, _ = next_token_scores(
                    *self._near(job, state), batch["tokens"], self._run.grpo.temperature
                )
                batch["start_logprobs"] = np.pad(-np.asarray(nats), [(0, 0), (1, 0)])
        self._row = row  # last: after an error the same prompts are asked again
        answers = [answer for group in groups for answer in group]
        self.metrics = {
            "reward": float(np.mean([answer.reward for answer in answers])),
            "skipped": 1 - sum(map(_teaches, groups)) / len(groups),
            "answer_length": float(np.mean([len(answer.logprobs) for answer in answers])),
        }
        return batch

    def _asked(self, model: Any, first: int) -> list[list[Answer]]:
        """Ask the prompts from `first` on: a group of answers to each."""
        cfg = self._run.grpo
        numbers = [self._order[first + i] for i in range(self._batch_size)]
        found = generate(
            model, [self._tasks[number][0].tolist() for number in numbers], cfg.max_new_tokens,
            temperature=cfg.temperature, stop_tokens=self._text.stop_ids,
            cache_dtype=cfg.cache_dtype,
            seed=int(np.random.SeedSequence([self._run.seed, first]).generate_state(1)[0]),
            samples=cfg.group, logprobs=True,
            return_routing=cfg.replay and model.cfg.num_sparse_layers > 0,
        )  # fmt: skip
        assert found.logprobs is not None
        answers = []
        for i, new in enumerate(found.tokens):
            number = numbers[i // cfg.group]
            prompt, record, location = self._tasks[number]
            ended = new[-1] in self._text.stop_ids
            right = self._checker.check(
                self._text.tokenizer.decode(new[:-1] if ended else new), record, location
            )
            experts = None if found.expert_ids is None else found.expert_ids[i]
            tokens = np.array([*prompt, *new], np.int32)
            answers.append(
                Answer(number, tokens, len(prompt), found.logprobs[i], experts, float(right))
            )
        return [answers[i : i + cfg.group] for i in range(0, len(answers), cfg.group)]

    def _stacked(self, groups: list[list[Answer]]) -> Batch:
        """The batch of some groups; rows that are left are padding."""
        rewards = np.array([[answer.reward for answer in group] for group in groups])
        gains = advantages(rewards.reshape(-1, self._run.grpo.group)).ravel()
        answers = [answer for group in groups for answer in group]
        rows = [self._row_of(answer, gain) for answer, gain in zip(answers, gains, strict=True)]

        empty = Answer(0, np.zeros(0, np.int32), 0, [], None, 0.0)
        cfg = self._run.model
        if self._run.grpo.replay and cfg.num_sparse_layers:
            none = np.zeros((cfg.num_sparse_layers, 0, cfg.experts_per_token), np.int32)
            empty = empty._replace(expert_ids=none)
        return stack(rows + [self._row_of(empty, 0.0)] * (self._run.data.batch_size - len(rows)))

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

        row = Row(
            tokens=padded(tokens), segment_ids=padded(1), positions=padded(np.arange(size)),
            domains=padded(0), documents=padded(answer.task), loss_mask=is_answer,
            advantages=padded(advantage, begin, dtype=np.float32),
            old_logprobs=padded(answer.logprobs, begin, dtype=np.float32),
        )  # fmt: skip
        if answer.expert_ids is not None:
            layers, _, chosen = answer.expert_ids.shape
            row["expert_ids"] = np.full((layers, length, chosen), -1, np.int32)
            row["expert_ids"][:, :size] = answer.expert_ids
            row["routed_tokens"] = padded(tokens, value=-1)
        return row

    def _near(self, job: Job, state: TrainState) -> tuple[nnx.GraphDef, nnx.State]:
        """The model to stay near: LoRA's frozen weights with the start's biases, else a copy."""
        if job.run.lora.rank:
            return nnx.split(nnx.merge(self._graph, lora.split(state.params)[1], state.start_bias))
        if self._start is None:
            assert self._run.start is not None
            self._start = nnx.split(self._open_start(self._run.start).load(job)[0])
        return self._start


def check_model(run: RunConfig) -> None:
    """Refuse what changes training and not the sampler: ratios would be of two policies."""
    model = run.model
    group = f"grpo group={run.grpo.group}"
    if model.capacity_factor is not None:
        raise ConfigError(
            f"model.capacity_factor={model.capacity_factor} drops tokens in training, and {group} "
            "samples without it; use None"
        )


def _teaches(group: list[Answer]) -> bool:
    return len({answer.reward for answer in group}) > 1


def with_answers(run: RunConfig, text: TextSettings, examples: Source, open_start: Open) -> Source:
    """Make chat examples the prompts that a run's model answers; held-out ones stay as they are.

    Args: examples: from `load_examples(…, keep=True)`.
    Raises: ValueError naming the line of a task whose answer the checker cannot use, or if no
        prompt is short enough. ConfigError for a model that trains with other experts than it
        samples with.
    """
    cfg = run.grpo
    room = run.data.seq_len - run.grpo.max_new_tokens
    check_model(run)
    checker = Checker(cfg.checker)
    tasks = []
    for prompt, record, location in examples.examples:
        checker.look_at(record, location)
        if prompt is None or not len(prompt):
            raise ValueError(f"{location} has an empty prompt")
        if len(prompt) <= room:
            tasks.append((prompt, record, location))
    if not tasks:
        raise ConfigError(
            f"grpo max_new_tokens={cfg.max_new_tokens} leaves {room} of "
            f"data.seq_len={run.data.seq_len} tokens, and no prompt is so short"
        )
    out = len(examples.examples) - len(tasks)
    left_out = f"; left out: {out:,} longer than {room}" if out else ""
    asked = (
        f"{len(tasks):,} prompts, {run.data.batch_size // cfg.group} a step with {cfg.group} "
        f"answers each{left_out}"
    )
    first = text.tokenizer.decode_with_names(tasks[0][0].tolist())
    shown = first if len(first) <= 2 * _SHOWN else f"{first[:_SHOWN]} … {first[-_SHOWN:]}"
    return replace(
        examples,
        summary=f"{examples.summary}\n{asked}\nthe first prompt, as the model sees it: {shown!r}",
        sampled=lambda current: Answers(
            run, text, tasks, open_start, current, examples.fingerprint
        ),
        checker=checker.fingerprint(),
    )
