"""Named models and training recipes. Each says what it is for; a new one is a diff of another."""

import operator
from collections.abc import Container
from dataclasses import replace
from typing import Any

from dsv3_jax.config import (
    Balance,
    ConfigError,
    DataConfig,
    Execution,
    Grpo,
    Layout,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Table,
    Yarn,
)

# The demo: byte vocabulary, seconds to compile, minutes to train on two CPU cores.
TINY = ModelConfig(
    vocab_size=260, dim=128, num_layers=4, num_dense_layers=1, dense_dim=352, num_heads=4,
    q_latent_dim=64, kv_latent_dim=32, nope_head_dim=32, rope_head_dim=16, v_head_dim=32,
    num_experts=16, experts_per_token=4, num_shared_experts=1, expert_dim=64, num_groups=4,
    groups_per_token=2, routed_scale=1.0, max_positions=2048, mtp_depth=1, init_std=0.05,
    # a run of hundreds of steps: the report's 1e-3 would not get far
    balance=Balance(bias_rate=3e-3),
)  # fmt: skip

# The lab's (experiments/): small enough that a run takes about a minute on one core, so that seeds
# and variants are cheap; 1M parameters, 0.4M active. Studies add groups and multi-token heads where
# they ask about them.
LAB = replace(
    TINY, vocab_size=1024, dim=96, num_layers=3, dense_dim=256, q_latent_dim=48, nope_head_dim=24,
    rope_head_dim=8, v_head_dim=24, num_experts=32, expert_dim=48, num_groups=1, groups_per_token=1,
    mtp_depth=0,
)  # fmt: skip

# The benchmark shape: 196M parameters, 32M active.
MINI = ModelConfig(
    vocab_size=8192, dim=512, num_layers=8, num_dense_layers=1, dense_dim=1408, num_heads=8,
    q_latent_dim=256, kv_latent_dim=128, nope_head_dim=64, rope_head_dim=32, v_head_dim=64,
    num_experts=64, experts_per_token=6, num_shared_experts=1, expert_dim=256, num_groups=8,
    groups_per_token=4, routed_scale=2.5, max_positions=16384, init_std=0.02,
)  # fmt: skip

# DeepSeek-V3 as released: 671B parameters, 37B active, and one MTP module.
V3 = ModelConfig(
    vocab_size=129280, dim=7168, num_layers=61, num_dense_layers=3, dense_dim=18432, num_heads=128,
    q_latent_dim=1536, kv_latent_dim=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128,
    num_experts=256, experts_per_token=8, num_shared_experts=1, expert_dim=2048, num_groups=8,
    groups_per_token=4, routed_scale=2.5,
    yarn=Yarn(factor=40.0, original_max_positions=4096), max_positions=163840, mtp_depth=1,
)  # fmt: skip

# DeepSeek-V2 as released: 236B parameters, 21B active; a softmax router with auxiliary losses.
V2 = replace(
    V3, vocab_size=102400, dim=5120, num_layers=60, num_dense_layers=1, dense_dim=12288,
    expert_dim=1536, num_experts=160, experts_per_token=6, num_shared_experts=2, groups_per_token=3,
    router="softmax", group_score="max", normalize_gates=False, routed_scale=16.0,
    balance=Balance(bias_rate=0.0, sequence_alpha=0.003), mtp_depth=0,
)  # fmt: skip

# DeepSeek-V2-Lite as released: 15.7B parameters, 2.4B active; no query compression, no groups.
V2_LITE = replace(
    V2, dim=2048, num_layers=27, dense_dim=10944, num_heads=16, q_latent_dim=None, expert_dim=1408,
    num_experts=64, num_groups=1, groups_per_token=1, routed_scale=1.0,
    yarn=Yarn(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip

# The first 4 of V2-Lite's 27 layers: 2.3B parameters, 0.5B active. For one card: see its recipe.
V2_LITE_80GB = replace(V2_LITE, num_layers=4)

# Moonlight (16B-A3B) as released: 16B parameters, 2.2B active beside the embedding.
MOONLIGHT = replace(
    V3, vocab_size=163840, dim=2048, num_layers=27, num_dense_layers=1, dense_dim=11264,
    num_heads=16, q_latent_dim=None, num_experts=64, experts_per_token=6, num_shared_experts=2,
    expert_dim=1408, num_groups=1, groups_per_token=1, routed_scale=2.446, rope_theta=5e4,
    norm_eps=1e-5, yarn=Yarn(), max_positions=8192, mtp_depth=0,
)  # fmt: skip

# GLM-4.7-Flash as released: 30B parameters, 3B active, and one MTP module; wide heads of 192 + 64.
GLM47_FLASH = replace(
    MOONLIGHT, vocab_size=154880, num_layers=47, dense_dim=10240, num_heads=20, q_latent_dim=768,
    nope_head_dim=192, v_head_dim=256, experts_per_token=4, num_shared_experts=1, expert_dim=1536,
    routed_scale=1.8, rope_theta=1e6, max_positions=202752, mtp_depth=1,
)  # fmt: skip

# Kimi K2 as released: 1T parameters, 32B active; more experts and fewer heads than V3.
KIMI_K2 = replace(
    V3, vocab_size=163840, num_dense_layers=1, num_heads=64, num_experts=384, num_groups=1,
    groups_per_token=1, routed_scale=2.827, rope_theta=5e4,
    yarn=Yarn(factor=32.0, original_max_positions=4096, beta_fast=1.0, beta_slow=1.0),
    max_positions=131072, mtp_depth=0,
)  # fmt: skip

MODELS = Table("preset", {
    "tiny": TINY,
    "lab": LAB,
    "mini": MINI,
    "mini_80gb": MINI,
    "v2_lite": V2_LITE,
    "v2_lite_80gb": V2_LITE_80GB,
    "v2_lite_8x80gb": V2_LITE,
    "v2_lite_16xv5p": V2_LITE,
    "v2": V2,
    "v3": V3,
    "moonlight": MOONLIGHT,
    "glm47_flash": GLM47_FLASH,
    "kimi_k2": KIMI_K2,
})  # fmt: skip

# Recipes. The released models' are the reports'; the small ones were tuned here, see
# experiments/README.md.
_TINY_RUN = RunConfig(
    model=TINY,
    data=DataConfig(seq_len=256, batch_size=8),
    optim=OptimConfig(learning_rate=3e-3, final_learning_rate=1.5e-4, warmup_steps=20),
    steps=400,
    eval_every=100,
    save_every=100,
)
_V3_RUN = RunConfig(
    model=V3,
    execution=Execution(compute_dtype="bfloat16", remat="full"),
    data=DataConfig(seq_len=4096, batch_size=15360, separate_documents=False, fim_rate=0.1),
    optim=OptimConfig(moments_dtype="bfloat16"),
    steps=235_000,
    eval_every=1000,
    save_every=500,
    log_every=1,
)
_MINI_RUN = replace(
    _TINY_RUN,
    model=MINI,
    data=DataConfig(seq_len=512, batch_size=8),
    optim=OptimConfig(learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=200),
    steps=5000,
)
_V2_LITE_RUN = replace(
    _V3_RUN, model=V2_LITE, optim=OptimConfig(learning_rate=4.2e-4, final_learning_rate=4.2e-5)
)
# Fine-tuning on chats: the schedule of DeepSeek-V3's, a few thousand examples, the router's bias at
# rest. The model is that of --start.
_SFT_RUN = RunConfig(
    model=TINY,
    data=DataConfig(format="chat", seq_len=2048, batch_size=16),
    optim=OptimConfig(
        learning_rate=5e-6,
        final_learning_rate=1e-6,
        warmup_steps=10,
        decay_start=0.0,
        decay_end=1.0,
        bias_freeze=0.0,
    ),
    eval_every=50,
    save_every=50,
    log_every=1,
)
# For one 80 GB card, of which JAX takes 64 GB by default. By arithmetic, in GB:
#   mini_80gb      parameters and gradients 1.6, means 1.6, a second gradient 0.8 (microbatches);
#                  nothing recomputed: 20
#   v2_lite_80gb   parameters and gradients 18, means in bfloat16 9, a second gradient 9; kept by
#                  "dots" 3, one layer's recomputation 4, a chunk of logits 7. All 27 layers would
#                  be 189 without a single activation
# For V2-Lite whole, with weights sharded along "data"; both are compiled, and never ran:
#   v2_lite_8x80gb    eight 80 GB cards, 18 rows each: 64.5 GB
#   v2_lite_16xv5p    sixteen chips, 20 rows each: 94.5 of 102.8 GB
# Their learning rates come from mini and V2-Lite's report, and are not tuned for these batches.
RECIPES = Table("preset", {
    "tiny": _TINY_RUN,
    "lab": replace(
        _TINY_RUN,
        model=LAB,
        data=DataConfig(seq_len=128, batch_size=16),
        optim=OptimConfig(learning_rate=6e-3, final_learning_rate=3e-4, warmup_steps=20),
        steps=500,
        eval_every=250,
        eval_batches=32,
        save_every=125,
        keep=1,
    ),
    "mini": _MINI_RUN,
    "mini_80gb": replace(
        _MINI_RUN,
        execution=Execution(compute_dtype="bfloat16"),
        data=DataConfig(seq_len=2048, batch_size=64),
        optim=replace(_MINI_RUN.optim, microbatches=2),
    ),
    "v2_lite": _V2_LITE_RUN,
    "v2_lite_80gb": replace(
        _V2_LITE_RUN,
        model=V2_LITE_80GB,
        execution=Execution(compute_dtype="bfloat16", remat="dots"),
        data=replace(_V2_LITE_RUN.data, batch_size=64),
        optim=replace(_V2_LITE_RUN.optim, moments_dtype="bfloat16", microbatches=16),
    ),
    "v2_lite_8x80gb": replace(
        _V2_LITE_RUN,
        execution=Execution(
            compute_dtype="bfloat16", remat="attention", layout=Layout(fsdp=True)
        ),
        data=replace(_V2_LITE_RUN.data, batch_size=144),
    ),
    "v2_lite_16xv5p": replace(
        _V2_LITE_RUN,
        execution=Execution(compute_dtype="bfloat16", remat="queries", layout=Layout(fsdp=True)),
        data=replace(_V2_LITE_RUN.data, batch_size=320),
    ),
    "v2": replace(
        _V3_RUN,
        model=V2,
        optim=OptimConfig(learning_rate=2.4e-4, final_learning_rate=2.4e-5),
    ),
    "v3": _V3_RUN,
    "moonlight": replace(
        _V3_RUN,
        model=MOONLIGHT,
        optim=OptimConfig(learning_rate=4.2e-4, final_learning_rate=4.2e-5),
    ),
    "glm47_flash": replace(_V3_RUN, model=GLM47_FLASH),
    "kimi_k2": replace(_V3_RUN, model=KIMI_K2),
    "sft": _SFT_RUN,
    # Learning from answers that a checker finds right. Eight prompts a step, a constant small rate;
    # multi-token heads rest.
    "grpo": replace(
        _SFT_RUN,
        data=DataConfig(format="chat", seq_len=1024, batch_size=64),
        optim=replace(
            _SFT_RUN.optim,
            learning_rate=1e-6,
            final_learning_rate=1e-6,
            weight_decay=0.0,
            mtp_weight=0.0,
            mtp_final_weight=0.0,
        ),
        steps=200,
        grpo=Grpo(group=8),
    ),
})  # fmt: skip
EPOCHS = 2.0  # passes over many chat examples. Source: DeepSeek-V3 report, section 5.1
WIDE = 1024  # models of this dim keep DeepSeek-V3's rates
# recipes without a model of their own: `recipe` gives one in its place
NEEDS_START = ("sft", "grpo")


def preset(name: str) -> ModelConfig:
    """Return the model of that name.

    Raises: ConfigError for an unknown name.

    >>> preset("v3").num_experts
    256
    """
    return MODELS[name]


def recipe(name: str) -> RunConfig:
    """Return the training run of that name: the preset's model, data, schedule and execution.

    Raises: ConfigError for an unknown name.

    >>> recipe("v3").execution.compute_dtype
    'bfloat16'
    """
    return RECIPES[name]


def sft_sized(
    run: RunConfig, examples: int, rows: int, given: Container[str], epochs: float | None = None
) -> tuple[RunConfig, float, str]:
    """Choose the passes, the batch and the rates of the sft recipe by its examples and its model.

    Fewer than 5,000 examples have more passes than DeepSeek-V3's two: 10,000 examples are seen in
    all, in 20 passes at most. The batch has 16 rows or fewer, so that a pass has 8 steps. A model
    with dim < 1,024 has the learning rate 0.128 / dim, its adapters three times that, and at the
    end a fifth of it.

    Args:
        examples, rows: that are trained on; a row holds several short examples.
        given: settings that stay as they are, as "optim.learning_rate". So do those that are no
            longer the recipe's.
        epochs: passes. None means that they are chosen.
    Returns: the run, the passes, and a sentence on what was chosen, which may be empty.
    Source: LIMA, arXiv 2305.11206, takes 15 passes over 1,000 examples. The rate goes by the width
        as in muP, arXiv 2203.03466.

    Example:
        >>> run, epochs, _ = sft_sized(recipe("sft"), examples=48, rows=24, given=())
        >>> epochs, run.data.batch_size, run.optim.learning_rate
        (20.0, 2, 0.001)
        >>> sft_sized(recipe("sft"), 5000, rows=2000, given=["optim.learning_rate"])[1:]
        (2.0, '')
    """
    wanted: dict[str, float] = {}
    if epochs is None:
        epochs = min(20.0, max(EPOCHS, round(10_000 / examples, 1)))
        wanted |= {"epochs": epochs} if epochs != EPOCHS else {}

    # A power of two divides what 16 divides.
    batch = next((size for size in (16, 8, 4, 2) if rows >= 8 * size), 1)
    can_be = batch != run.data.batch_size and batch % run.optim.microbatches == 0
    if can_be and _is_open("data.batch_size", run, given):
        wanted["data.batch_size"] = batch

    if run.model.dim < WIDE and _is_open("optim.learning_rate", run, given):
        rate = float(f"{0.128 / run.model.dim * (3 if run.lora.rank else 1):.2g}")
        wanted["optim.learning_rate"] = rate
        if _is_open("optim.final_learning_rate", run, given):
            wanted["optim.final_learning_rate"] = rate / 5

    for setting in wanted.keys() - {"epochs"}:
        run = with_setting(run, setting, wanted[setting])
    options = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in wanted.items())
    sentence = f"chosen for {examples:,} examples and a model of dim={run.model.dim}: {options}"
    return run, epochs, sentence if options else ""


def with_setting(run: RunConfig, setting: str, value: Any) -> RunConfig:
    """The run with a setting of one of its sections, as "optim.learning_rate"."""
    section, name = setting.split(".")
    return replace(run, **{section: replace(getattr(run, section), **{name: value})})


def _is_open(setting: str, run: RunConfig, given: Container[str]) -> bool:
    """Whether a setting is still that of the sft recipe, and is not given."""
    was, now = map(operator.attrgetter(setting), (RECIPES["sft"], run))
    return was == now and setting not in given


def recipe_with_model(name: str) -> RunConfig:
    """Return the recipe of that name if it names a model.

    Raises: ConfigError for an unknown name, and for a recipe that takes another run's model.

    >>> try:
    ...     recipe_with_model("sft")
    ... except ConfigError as error:
    ...     print(error)
    preset 'sft' names no model: it is for `dsv3 train sft --start MODEL`
    """
    if name in NEEDS_START:
        raise ConfigError(
            f"preset {name!r} names no model: it is for `dsv3 train {name} --start MODEL`"
        )
    preset(name)  # its error names models only
    return recipe(name)
