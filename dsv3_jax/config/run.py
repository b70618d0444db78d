"""A training run: its optimizer, adapters and rewards, and when it evaluates and saves."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.execution import CacheDtype, Execution
from dsv3_jax.config.fields import (
    Natural,
    NonNegative,
    Positive,
    PositiveReal,
    Seed,
    Share,
    Table,
    check_fields,
    require,
)
from dsv3_jax.config.model import ModelConfig

HeadLoss = Literal["ce", "kl", "tv"]
LoraPart = Literal["attention", "dense", "shared", "routed"]


# made by training/optim.py
OPTIMIZERS = Table(
    "optim name", {"adamw": "AdamW", "muon": "Muon for matrices, AdamW for the rest"}
)
OPTAX = "optax:"  # begins the name that `ds.train.fit(…, optimizer=tx)` gives a run


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedules. The defaults are those of the V3 report, section 4.2.

    Example:
        >>> OptimConfig(learning_rate=1e-3).warmup_steps
        2000
    """

    # adamw, or muon: it orthogonalises the updates of matrices, LoRA's A and B too, and leaves
    # embeddings, router and norms to AdamW
    name: str = "adamw"
    # learning rate after the warm-up: report is constant, cosine, constant; wsd is constant, a line
    # down, constant; cosine falls to the last step
    schedule: Literal["report", "wsd", "cosine"] = "report"
    learning_rate: PositiveReal = 2.2e-4  # largest learning rate, between the warm-up and the decay
    final_learning_rate: NonNegative = 2.2e-5  # learning rate after the decay
    warmup_steps: Natural = 2000  # number of steps in which the learning rate rises from 0
    # share of all steps after which the decay begins, if the warm-up is over, and mtp_final_weight;
    # schedule cosine uses it for the latter only
    decay_start: Share = 0.67
    # share of all steps after which the decay ends; not for schedule cosine
    decay_end: Share = 0.97
    beta1: Annotated[float, "[0, 0.9999999]"] = 0.9  # decay of AdamW's mean of gradients
    beta2: Annotated[float, "[0, 0.9999999]"] = 0.95  # decay of AdamW's mean of squared gradients
    muon_beta: Annotated[float, "[0, 0.9999999]"] = 0.95  # decay of Muon's mean of gradients
    eps: PositiveReal = 1e-8  # epsilon of AdamW's division
    weight_decay: NonNegative = 0.1  # weight decay of matrices; the scales of norms have none
    # muP: the width (model.dim) that init_std and learning_rate were chosen for; in a wider model
    # matrices begin smaller and have a lower rate (training/mup.py). None: the same at each width
    base_width: Positive | None = None
    # largest norm of the whole gradient; a larger gradient is scaled down
    clip_norm: PositiveReal = 1.0
    # QK-clip: after a step, weights of heads whose largest attention logit was above it are scaled
    # down; None: never
    qk_clip: PositiveReal | None = None
    mtp_weight: NonNegative = 0.3  # weight of the multi-token loss (lambda)
    mtp_final_weight: NonNegative = 0.1  # weight of the multi-token loss from decay_start on
    bias_freeze: Share = 0.97  # share of all steps after which the router bias no longer moves
    microbatches: Positive = 1  # number of parts of a batch whose gradients are accumulated
    # dtype of the means of AdamW and Muon; bfloat16 halves their memory (DeepSeek-V3 report,
    # section 3.3.2)
    moments_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name.startswith(OPTAX):
            OPTIMIZERS[self.name]  # refuses a name that it does not have
        require(
            self.base_width is None or self.name == "adamw",
            f"base_width={self.base_width} is for name='adamw', not {self.name!r}",
        )
        # A bfloat16 has 8 bits: a step of less than 2^-9 of a mean is rounded away, and a mean
        # could not decay.
        most = 0.99 if self.moments_dtype == "bfloat16" else 1
        for name in ("beta1", "beta2", "muon_beta"):
            beta = getattr(self, name)
            require(
                beta <= most,
                f"{name}={beta} is over 0.99, too slow for moments_dtype={self.moments_dtype!r}; "
                "use 'float32'",
            )
        require(
            self.decay_start <= self.decay_end,
            f"decay_start={self.decay_start} is after decay_end={self.decay_end}",
        )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: W + (alpha / rank) A B is used in place of a frozen W; A and B train.

    Source: LoRA (arXiv 2106.09685), section 4.1.

    Example:
        >>> Lora(rank=8, on=("attention", "routed")).alpha
        16.0
    """

    rank: Natural = 0  # rank of the change of a matrix; 0 trains the matrices themselves
    alpha: PositiveReal = 16.0  # weight of the change, times rank
    # matrices that change, in all layers and multi-token heads: of attention, of the FFN in dense
    # layers, of the shared and of the routed experts, each expert by itself
    on: tuple[LoraPart, ...] = ("attention",)

    def __post_init__(self) -> None:
        check_fields(self, "lora ")
        require(
            len(self.on) > 0, "lora on=() names no matrices; use rank=0 to train without adapters"
        )
        require(len(set(self.on)) == len(self.on), f"lora on={self.on} names one part twice")


@dataclass(frozen=True)
class Grpo:
    """Reinforcement learning by GRPO: the model learns from the better of its own answers.

    Sources: GRPO and several updates arXiv 2402.03300; token_mean and two clips DAPO, arXiv
    2503.14476; constant_length arXiv 2503.20783; mask IcePop, arXiv 2510.18855; right answers alone
    RAFT, arXiv 2304.06767, with ratios as RAFT++, arXiv 2504.11343; rounded weights of the sampler
    FlashRL (Liu, Yao et al., 2025).

    Example:
        >>> Grpo(group=8, checker="number").form
        'token_mean'
    """

    group: Natural = 0  # answers that are sampled for each prompt; 0 trains on the given answers
    # what makes an answer right: exact (equal texts, but for spaces around them), number (its last
    # number is the given answer's), regex (the given answer is a pattern that it holds), or
    # module:name, a function (text, row) → number, of which True is 1 and False 0
    checker: str = "exact"
    max_new_tokens: Positive = 256  # tokens of an answer, at most
    # of sampling; ratios and KL are of the distribution that was sampled from
    temperature: PositiveReal = 1.0
    # answers that are better than the rest of their group, and less of the worse ones; or right
    # answers alone, with a reward of at least 1, each as much (rejection sampling)
    learn_from: Literal["better", "right"] = "better"
    clip_low: Share = 0.2  # ratios of new to old probabilities below 1 minus this teach nothing
    clip_high: NonNegative = 0.2  # ratios above 1 plus this teach nothing
    # clip stops a token that has moved so far in the direction of its advantage; mask leaves out
    # every token beyond these ratios, whichever its advantage
    outside: Literal["clip", "mask"] = "clip"
    updates: Positive = 1  # steps that each batch of answers is used for
    # weight of the KL divergence from start (beta); without LoRA it keeps start in memory, too
    kl: NonNegative = 0.0
    # token_mean is the mean over all tokens of answers; constant_length divides their sum by the
    # most that they may have, so that long answers count no less
    form: Literal["token_mean", "constant_length"] = "token_mean"
    replay: bool = True  # train with the experts that the sampler chose
    # dtype of the sampler's cache; None is compute_dtype
    cache_dtype: CacheDtype | None = None
    # what the sampler's matrices of attention and feed-forward layers are rounded to: fp8 has a
    # scale for 128 x 128 numbers, int4 and int3 one for 32 inputs. None is what trains
    sampler_weights: Literal["bfloat16", "fp8", "int4", "int3"] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "grpo ")
        require(
            self.group != 1,
            "grpo group=1 has nothing to compare an answer with; sample at least 2",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run: a model, how it is computed, its data, and when to evaluate and save.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> RunConfig(preset("tiny"), steps=100).data.seq_len
        256
    """

    model: ModelConfig
    execution: Execution = field(default_factory=Execution)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: Positive = 1000  # number of optimizer steps
    eval_every: Positive = 250  # number of steps between two evaluations
    eval_batches: Positive = 8  # number of validation batches in an evaluation
    save_every: Positive = 250  # number of steps between two checkpoints
    keep: Positive = 3  # number of checkpoints to keep; older ones are deleted
    log_every: Positive = 10  # number of steps between two rows of metrics
    seed: Seed = 0  # seed of the initial weights
    # folder of a run whose trunk is taken over and frozen; only the multi-token heads train
    trunk: str | None = None
    # folder of a run, or a released model, whose last weights training begins with
    start: str | None = None
    # low-rank adapters, which train in place of the weights of start
    lora: Lora = field(default_factory=Lora)
    # learning from the model's own answers to the prompts of chat examples
    grpo: Grpo = field(default_factory=Grpo)
    # of attention dsa: sparse trains the model on its text, and each indexer to choose what
    # attention to its choice weighs most; warm trains the indexers alone, by the dense attention of
    # start
    indexer_stage: Literal["sparse", "warm"] = "sparse"
    # of heads on a frozen trunk: cross-entropy on the text, or KL or TV to the trunk's distribution
    head_loss: HeadLoss = "ce"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_lengths(self)
        _check_beginning(self)
        base = self.optim.base_width
        tied, rank = self.model.tie_embeddings, self.lora.rank
        require(
            base is None or not (tied or rank),
            f"optim.base_width={base} needs tie_embeddings=False and lora rank=0, "
            f"not {tied} and {rank}",
        )
        if self.lora.rank:
            _check_lora(self)
        if self.grpo.group:
            _check_grpo(self)

    @property
    def freezes(self) -> bool:
        """Whether the weights of `start` or `trunk` stay as they are."""
        return self.trunk is not None or self.lora.rank > 0


def _check_lengths(run: RunConfig) -> None:
    model = run.model
    parts = run.optim.microbatches
    length = f"seq_len={run.data.seq_len}"
    require(
        run.data.batch_size % parts == 0,
        f"microbatches={parts} does not divide batch_size={run.data.batch_size}",
    )
    require(
        run.data.seq_len <= model.max_positions,
        f"{length} is more than the model's max_positions={model.max_positions}",
    )

    # Head k at position i predicts token i + k + 1, so head M needs a row of M + 2 tokens.
    require(
        run.data.seq_len > model.mtp_depth + 1,
        f"{length} leaves no target for mtp_depth={model.mtp_depth}",
    )


def _check_beginning(run: RunConfig) -> None:
    """Check what a run begins with, and what then trains."""
    depth = run.model.mtp_depth

    # On a frozen trunk only heads train, on the text or towards the trunk's own distribution.
    require(
        run.head_loss == "ce" or run.trunk is not None,
        f"head_loss={run.head_loss!r} compares heads with a frozen trunk; trunk=None needs 'ce'",
    )
    require(
        not run.trunk or depth > 0,
        f"mtp_depth={depth} leaves nothing to train on the frozen trunk {run.trunk!r}",
    )
    require(
        not (run.trunk and run.start),
        f"a run begins with start={run.start!r} or on trunk={run.trunk!r}, not with both",
    )

    # Settings for one kind of attention each: QK-clip, and the warm-up of indexers.
    attention = run.model.attention
    clip = run.optim.qk_clip
    require(
        clip is None or attention == "mla",
        f"optim.qk_clip={clip} is for attention='mla', not {attention!r}",
    )
    if run.indexer_stage == "warm":
        require(
            attention == "dsa", f"indexer_stage='warm' is for attention='dsa', not {attention!r}"
        )
        require(
            run.start is not None,
            "indexer_stage='warm' learns from given weights, and those of start=None are random; "
            "give start",
        )


def _check_lora(run: RunConfig) -> None:
    rank = f"lora rank={run.lora.rank}"
    clip = run.optim.qk_clip

    # Only A and B train, and W is given by start: no other stage or clip may move it.
    require(
        run.indexer_stage != "warm",
        f"{rank} is not supported with indexer_stage='warm', which trains indexers",
    )
    require(
        run.trunk is None, f"{rank} is not supported on a frozen trunk={run.trunk!r}; use start"
    )
    require(
        run.start is not None,
        f"{rank} changes given weights, and those of start=None are random; give start",
    )
    require(
        clip is None,
        f"{rank} is not supported with optim.qk_clip={clip}, which scales weights, not adapters",
    )

    # Each part must name matrices of this model; an EAGLE head has a dense FFN, too.
    model = run.model
    sparse = model.num_sparse_layers + model.num_sparse_heads > 0
    there = {
        "attention": True,
        "dense": model.num_dense_layers > 0 or (model.mtp_kind == "eagle" and model.mtp_depth > 0),
        "shared": sparse and model.num_shared_experts > 0,
        "routed": sparse,
    }
    for part in run.lora.on:
        require(there[part], f"lora on={part!r} names matrices that the model does not have")


def _check_grpo(run: RunConfig) -> None:
    group = f"grpo group={run.grpo.group}"
    data = run.data
    require(
        data.format == "chat",
        f"{group} asks the prompts of chat examples; data.format={data.format!r} must be 'chat'",
    )

    require(
        run.trunk is None,
        f"{group} is not supported on a frozen trunk={run.trunk!r}; use start",
    )

    # A step asks batch_size / group prompts, and each answer is a row.
    require(
        data.batch_size % run.grpo.group == 0,
        f"{group} does not divide batch_size={data.batch_size}",
    )
    require(
        run.indexer_stage != "warm",
        f"{group} is not supported with indexer_stage='warm', which trains indexers",
    )

    # Ratios are of one policy: the model trains with the experts that it samples with.
    require(
        run.model.capacity_factor is None,
        f"model.capacity_factor={run.model.capacity_factor} drops tokens in training, and {group} "
        "samples without it; use None",
    )

    # Checkpoints lie between two batches of answers: a run that resumes has none of them.
    for name in ("steps", "save_every"):
        require(
            getattr(run, name) % run.grpo.updates == 0,
            f"grpo updates={run.grpo.updates} does not divide {name}={getattr(run, name)}",
        )
