"""Speculation: who drafts best for the same model, what a step then brings, and what it costs on this machine."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import statistics

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.cli.bench import held_out_prompts
from dsv3_jax.config import replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.counting import size
from dsv3_jax.training.checkpoint import load_model
from experiments.lab import After, Study, drawing
from experiments.lab.results import markdown, mean_spread, number, write_figure

PROMPTS = 32
BATCH = 8
ROUNDS = 3


def variants(base):
    cfg = replace(base.model, mtp_depth=0)
    trunk = replace(base, model=cfg)
    small = replace(cfg, num_layers=1, num_dense_layers=1, dim=cfg.dim // 2, dense_dim=cfg.dense_dim // 2)

    def on_trunk(depth, kind):
        model = replace(cfg, mtp_depth=depth, mtp_kind=kind)
        return After(("trunk",), lambda folder: replace(base, model=model, trunk=folder))

    return {
        "trunk": trunk,
        "independent": After(("trunk",), lambda _: replace(base, model=small)),
        "MTP": replace(base, model=replace(cfg, mtp_depth=1)),
        "MTP, trunk held": on_trunk(1, "deepseek"),
        "EAGLE, trunk held": on_trunk(1, "eagle"),
        "Medusa, trunk held": on_trunk(4, "medusa"),
    }


def lengths(cfg):
    """Drafts a step that are tried: a DeepSeek head also goes on far beyond its depth."""
    return (1, 2, 4, 8) if cfg.mtp_depth and cfg.mtp_kind == "deepseek" else (1, 2, 4)


def pair(trained):
    """(model, who drafts for it); no drafter for the trunk alone."""
    if trained.run.model.mtp_depth:
        return trained.model, "mtp"
    if trained.others:
        return load_model(trained.others["trunk"])[0], trained.model
    return trained.model, None


def prompts_of(run):
    """Held-out prompts of a quarter of the length that is trained on; what goes on from them fills the rest."""
    return held_out_prompts(run, PROMPTS, run.data.seq_len // 4)


def go_on(trained, model, draft, prompts, batch, length):
    """Greedy continuations of all prompts, `batch` at a time; length 0 is plain decoding."""
    new = trained.run.data.seq_len - len(prompts[0])
    draft, length = (draft, length) if length else (None, 1)
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return [generate(model, group, new, draft=draft, draft_length=length) for group in groups]


def measure(trained):
    """What stands: no clock is looked at."""
    model, draft = pair(trained)
    if draft is None:
        return {}
    prompts, accepted = prompts_of(trained.run), {}
    for length in lengths(trained.run.model):
        made = go_on(trained, model, draft, prompts, BATCH, length)
        accepted[length] = np.mean([m.acceptance for m in made], axis=0).tolist()
    tokens = {length: 1 + sum(found) for length, found in accepted.items()}
    return {"accepted": accepted[max(accepted)], "tokens_a_step": tokens, "share": share(model.cfg, trained.run.model)}


def share(trunk, drafter):
    """Parameters that a drafted token is multiplied with, over those of a token of the trunk."""
    counted = size(drafter)
    drafting = counted.mtp_active / drafter.mtp_depth if drafter.mtp_depth else counted.active
    return drafting / size(trunk).active


def measure_alone(trained):
    """Tokens a second, plain and with drafts in turns; by batch, then by draft length (0 is plain)."""
    model, draft = pair(trained)
    if draft is None:
        return {}
    prompts, found = prompts_of(trained.run), {}
    for batch, some in ((1, prompts[:: PROMPTS // 4]), (BATCH, prompts[:: PROMPTS // BATCH])):
        rates = {length: [] for length in (0, *lengths(trained.run.model))}
        steps = {length: [] for length in rates}
        texts = {}
        for turn in range(ROUNDS + 1):
            for length in rates:
                made = go_on(trained, model, draft, some if turn else some[:batch], batch, length)
                if turn:  # the first compiles
                    seconds = sum(m.decode_seconds for m in made)
                    rates[length].append(sum(len(row) - 1 for m in made for row in m.tokens) / seconds)
                    steps[length].append(seconds / sum(m.steps for m in made))
                    texts[length] = [row for m in made for row in m.tokens]
        found[batch] = {
            "tokens_per_s": {length: statistics.median(r) for length, r in rates.items()},
            "times_plain": {length: _ratio(rates[length], rates[0]) for length in rates},
            "plain_steps": {length: _ratio(steps[length], steps[0]) for length in rates},
            "same_text": float(
                np.mean([a == b for rows in texts.values() for a, b in zip(rows, texts[0], strict=True)])
            ),
        }
    return {"speed": found}


def _ratio(values, plain):
    """The median over the rounds, each against plain decoding in the same round."""
    return statistics.median(v / p for v, p in zip(values, plain, strict=True))


def modelled(tokens, length, share):
    """Times plain decoding where reading parameters is all that counts: a step over the drafts costs one, as on
    accelerators at small batches, and a draft its share of it (arXiv 2211.17192, section 3.3).
    """
    return tokens / (1 + length * share)


def drafters(results):
    return [variant for variant in results.variants if "accepted" in results.records(variant)[0]["numbers"]]


def by_length(results, variant):
    """(draft length, tokens a step [seeds], modelled gain [seeds]) of each that was tried."""
    part = results.values(variant, "share")
    for key in results.records(variant)[0]["numbers"]["tokens_a_step"]:
        tokens = results.values(variant, f"tokens_a_step/{key}")
        yield int(key), tokens, modelled(tokens, int(key), part)


def table(results):
    what, how = [], []
    for variant in results.variants:
        what.append([variant, mean_spread(results.values(variant, "val_loss"), 4)])
        if variant not in drafters(results):
            what[-1] += [""] * 3
            continue
        accepted = results.values(variant, "accepted") * 100
        teacher = results.values(variant, "mtp_acceptance") * 100
        what[-1] += [
            number(results.values(variant, "share").mean(), 2),
            ", ".join(mean_spread(found, 0) for found in accepted.T),
            mean_spread(teacher[:, 0], 0) if teacher.size else "–",
        ]
        for length, tokens, gain in by_length(results, variant):
            cells = [
                mean_spread(results.values(variant, f"speed/{batch}/{key}/{length}"), 2)
                for key in ("plain_steps", "times_plain")
                for batch in (1, BATCH)
            ]
            how.append([variant, str(length), mean_spread(tokens, 2), mean_spread(gain, 2), *cells])
    stands = ["run", "validation loss", "a draft's parameters over the trunk's"]
    stands += ["stands at position 1, 2, …, %", "the same for the first, on held-out text, %"]
    costs = ["drafter", "drafts a step", "tokens a step: × plain if a step costs one, drafts nothing"]
    costs += ["× plain if drafts cost their parameters"]
    costs += ["measured: plain steps a step costs, batch 1", f"batch {BATCH}"]
    costs += ["measured: × plain, batch 1", f"batch {BATCH}"]
    plain = [
        f"{mean_spread(results.values(variant, f'speed/{batch}/tokens_per_s/0'), 0)} at batch {batch}"
        for variant in drafters(results)[:1]
        for batch in (1, BATCH)
    ]
    same = [results.values(variant, f"speed/{b}/same_text").min() for variant in drafters(results) for b in (1, BATCH)]
    words = f"Plain, tokens a second: {', '.join(plain)}. Texts that are the same with drafts: {min(same):.0%}."
    return f"{markdown(stands, what)}\n\n{markdown(costs, how)}\n\n{words}"


def draw(results, path):
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    stands, model, here = figure.subplots(1, 3)
    for i, variant in enumerate(drafters(results)):
        color = f"C{i}"
        accepted = results.values(variant, "accepted") * 100
        at = np.arange(1, accepted.shape[1] + 1)
        stands.plot(at, accepted.mean(0), "o-", color=color, markersize=4, label=variant)
        stands.fill_between(at, accepted.min(0), accepted.max(0), color=color, alpha=0.15, linewidth=0)
        found = list(by_length(results, variant))
        tried = [length for length, *_ in found]
        model.plot(tried, [tokens.mean() for _, tokens, _ in found], "o-", color=color, markersize=4)
        model.plot(tried, [gain.mean() for *_, gain in found], "o:", color=color, markersize=4)
        for batch, line in ((1, "o-"), (BATCH, "o:")):
            gains = [results.values(variant, f"speed/{batch}/times_plain/{length}").mean() for length in tried]
            here.plot(tried, gains, line, color=color, markersize=4)
    drawing.panel(stands, "Drafts that stand, by position", "position in the draft", "% of steps")
    drawing.panel(model, "If a step over the drafts costs one", "drafts a step", "× plain decoding")
    drawing.panel(here, "Measured on this machine", "drafts a step", "× plain decoding")
    stands.set_ylim(0, 100)
    stands.legend(frameon=False, fontsize=8)
    for ax, full, dotted in (
        (model, "drafts cost nothing", "drafts cost their parameters"),
        (here, "batch 1", f"batch {BATCH}"),
    ):
        ax.axhline(1, color="0.5", linewidth=0.8)
        ax.set_ylim(bottom=0)
        ax.plot([], [], "-", color="0.4", label=full)
        ax.plot([], [], ":", color="0.4", label=dotted)
        ax.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def ours(results):
    said = []
    for variant in drafters(results):
        modelled_best = max(gain.mean() for *_, gain in by_length(results, variant))
        best = max(
            results.values(variant, f"speed/1/times_plain/{length}").mean()
            for length, *_ in by_length(results, variant)
        )
        first = results.values(variant, "accepted/0").mean()
        said.append(f"{variant}: {first:.0%}, × {modelled_best:.2f} modelled, × {best:.2f} here")
    return "; ".join(said)


STUDY = Study(
    script=__file__,
    question="Which drafts stand, and is speculative decoding faster than plain decoding?",
    published="V3's second token stands 85–90 %, × 1.8; Medusa × 2.2, EAGLE × 2.7 and more, independent × 2–3",
    variants=variants,
    measure=measure,
    measure_alone=measure_alone,
    table=table,
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
