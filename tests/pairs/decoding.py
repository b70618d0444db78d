"""Decoding by pairs: a row decodes prompts of several lengths, and each alone in the plainest way.

greedy      The text of each prompt is the plain one: alone, on one device, without drafts. Drafts,
            a batch and a mesh change no text at temperature 0.
sampled     A text depends on seed, prompt and sample alone. Without drafts and with "lookup" it is
            the plain one, with other drafts that of the same drafts alone.
log p       The model's own log-probabilities are those of the plain text, and of one pass over
            prompt and text.
routing     The experts likewise.

Plain texts have the row's cache, and its dtype. A pass without a cache is compared where the cache
has float32. In bfloat16 numbers are not compared, a sampled text may be another one, and a greedy
token another one about as likely.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from models import forward, random_model

import dsv3_jax as ds
from dsv3_jax.config import RunConfig
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.ops.sampling import Sampling

from . import training
from .covering import Row, refusal
from .settings import named
from .training import changed, check_near, texts_apart

DONE = "decoded"
PROMPTS = [[66, 7, 190, 3, 3, 80, 21], [5, 9], [250, 17, 6, 200, 31], [5, 9]]
NEW, SEED = 7, 3
# of log-probabilities, in nats; a number of 8 bits may be rounded to the other side
PART, PLAIN = 1e-4, 1e-3


def of_model(*names: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Factors of training that make the model."""
    return {name: training.FACTORS[name] for name in names}


FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "draft": {
        "none": {},
        "mtp": {"draft": "mtp"},
        "mtp, 2": {"draft": "mtp", "draft_length": 2},
        "lookup": {"draft": "lookup", "draft_length": 3},
        "model": {"draft": "model", "draft_length": 2},
    },
    "sampling": {
        "greedy": {},
        "0.8": {"temperature": 0.8},
        "top 5": {"temperature": 0.8, "top_k": 5},
        "p 0.7": {"temperature": 1.0, "top_p": 0.7},
    },
    "samples": {"1": {}, "3": {"samples": 3}},
    "cache": {"default": {}} | named("cache", "latent expanded none"),
    "cache dtype": {"default": {}} | named("cache_dtype", "float32 bfloat16 int8 float8_e4m3"),
    "batch": {"all": {}, "1": {"batch_size": 1}, "2": {"batch_size": 2}},
    "log p": {"no": {}, "yes": {"logprobs": True}},
    "routing": {"no": {}, "yes": {"return_routing": True}},
    "stop": {"none": {}, "half": {"stop_tokens": list(range(0, 260, 2))}},
    **of_model("attention", "layers", "heads"),
    "router": {
        name: of for name, of in training.FACTORS["router"].items() if "sigmoid, " not in name
    },
    **of_model("capacity", "tied", "positions"),
    "mesh": {name: of for name, of in training.FACTORS["mesh"].items() if "length" not in name},
    **of_model("dtype", "precision", "kernels"),
}
OF_MODEL = [name for name in FACTORS if name in training.FACTORS]
_FIRST = {name: next(iter(values)) for name, values in FACTORS.items()}
BASES = [
    _FIRST,
    _FIRST | {"sampling": "0.8"},
    _FIRST | {"heads": "deepseek"},
    _FIRST | {"attention": "mha"},
    _FIRST | {"heads": "medusa"},
    _FIRST | {"sampling": "0.8", "heads": "deepseek"},
]


class Plan:
    """A row as the package sees it. Raises: ValueError where the package refuses it."""

    def __init__(self, row: Row, scratch: Path | None = None):
        of_run, self.asked = {}, {}
        for name, value in row.items():
            (of_run if name in OF_MODEL else self.asked).update(FACTORS[name][value])
        self.run: RunConfig = changed(training.RUN, of_run)
        self.mesh = training.mesh_of(row)
        if self.mesh is not None:
            sharding.check_model(self.mesh, self.run.model)
        prepare(self.run.execution, mesh=self.mesh)  # refuses kernels
        self.draft = self.asked.pop("draft", None)
        cfg, asked = self.run.model, dict(self.asked)
        sampling = Sampling(
            asked.pop("temperature", 0.0), asked.pop("top_k", None), asked.pop("top_p", None)
        )
        own = None if self.draft == "model" else self.draft
        ds.DecodeConfig(NEW, sampling, draft=own, seed=SEED, **asked).check(cfg, PROMPTS)
        if self.draft and asked.get("cache") == "none":
            ds.DecodeConfig(NEW, draft="lookup", cache="none")  # refuses it
        if asked.get("cache") != "none":
            pick_kind(cfg, asked.get("cache"))

    @property
    def exact(self) -> bool:
        """Whether all is computed in float32."""
        return self.run.execution.compute_dtype == "float32"


def write_data(scratch: Path) -> None:
    """Nothing is read from files."""


def model_of(plan: Plan, *, placed: bool, seed: int = 0, **changes: Any) -> Any:
    """A random model, on the row's mesh or on one device."""
    model = random_model(ds.replace(plan.run.model, **changes), seed, plan.run.execution)
    if plan.mesh is None or not placed:
        return model
    graph, state = nnx.split(model)
    fsdp = plan.run.execution.layout.fsdp
    shardings = sharding.state_sharding(state, plan.mesh, fsdp=fsdp)
    return nnx.merge(graph, jax.device_put(state, shardings))


def check_row(row: Row, scratch: Path | None = None) -> str:
    """Do one row. Returns and raises as `training.check_row`, "decoded" in place of "trained"."""
    if sentence := refusal(Plan, row):
        return f"refused: {sentence}"
    plan = Plan(row)
    model, alone = (model_of(plan, placed=placed) for placed in (True, False))
    draft, draft_alone = plan.draft, plan.draft
    if plan.draft == "model":  # much like the model, so that some of its drafts are right
        draft, draft_alone = (
            model_of(plan, placed=placed, num_layers=2, mtp_depth=0) for placed in (True, False)
        )
    found = ds.generate(model, PROMPTS, NEW, seed=SEED, draft=draft, **plan.asked)
    samples, greedy = plan.asked.get("samples", 1), "temperature" not in plan.asked
    same = {k: v for k, v in plan.asked.items() if k != "batch_size"}
    if greedy or plan.draft in (None, "lookup"):
        draft_alone = None
        same.pop("draft_length", None)
    row = 0
    apart = [0.0]
    for i, prompt in enumerate(PROMPTS):
        # a prompt that occurs again has the next samples
        earlier = 0 if greedy else PROMPTS[:i].count(prompt)
        plain = ds.generate(
            alone, [prompt] * (1 + earlier), NEW, seed=SEED, draft=draft_alone, **same
        )
        for k in range(earlier * samples, len(plain.tokens)):
            if greedy:
                texts = found.tokens[row], plain.tokens[k]
                apart.append(texts_apart(alone, prompt, *texts, exact=plan.exact))
            elif plan.exact:
                assert found.tokens[row] == plain.tokens[k], (
                    f"{prompt} → {found.tokens[row]}, alone {plain.tokens[k]}"
                )
            if plan.exact and found.tokens[row] == plain.tokens[k]:
                _same_numbers(found, row, plain, k)
            row += 1
    check_near(apart)
    if plan.exact and plan.asked.get("cache_dtype") in (None, "float32"):
        _check_numbers(plan, alone, found, samples)
    return DONE


def _same_numbers(found: Any, row: int, plain: Any, k: int) -> None:
    """Compare what two requests say of one text."""
    for name in ("logprobs", "model_logprobs"):
        if (of := getattr(found, name)) is not None:
            worst = np.abs(np.subtract(of[row], getattr(plain, name)[k])).max()
            assert worst < PLAIN, f"row {row}: {name} differ by {worst:.2g} from the plain ones"
    if found.expert_ids is not None:
        np.testing.assert_array_equal(
            np.sort(found.expert_ids[row], -1), np.sort(plain.expert_ids[k], -1)
        )


def _check_numbers(plan: Plan, model: Any, found: Any, samples: int) -> None:
    model = training.in_compute_dtype(model)
    if plan.run.model.capacity_factor is not None:  # decoding drops no token
        model = training.in_compute_dtype(model_of(plan, placed=False, capacity_factor=None))
    for row, text in enumerate(found.tokens):
        prompt = PROMPTS[row // samples]
        out = forward(model, jnp.array([prompt + text + [0] * (16 - len(prompt + text))]))
        if found.model_logprobs is not None:
            logits = np.asarray(out.logits[0], np.float64)[len(prompt) - 1 :][: len(text)]
            most = logits.max(-1, keepdims=True)
            nats = logits - np.log(np.exp(logits - most).sum(-1, keepdims=True)) - most
            wanted = nats[np.arange(len(text)), text]
            worst = np.abs(wanted - found.model_logprobs[row]).max()
            assert worst < PART, f"row {row}: log p differs by {worst:.2g}"
        if found.expert_ids is not None:
            read = len(prompt + text) - 1
            ids, wanted = (
                np.sort(x, -1)[:, :read]
                for x in (found.expert_ids[row], np.asarray(out.routing.expert_ids)[:, 0])
            )
            np.testing.assert_array_equal(ids, wanted)
