"""Pictures draw the numbers that they are given."""

import numpy as np
from runs import refused

from dsv3_jax.report import run_plots


def texts(ax) -> list[str]:
    return [t.get_text() for t in ax.texts]


def test_heatmap_draws_load_over_mean(tmp_path, rng):
    load = rng.integers(1, 100, (3, 8))
    code, c = rng.integers(1, 100, (2, 3, 8))
    file = tmp_path / "a" / "load.png"
    figure = run_plots.routing_heatmap(load, file, domain_loads={"code": code, "C": c})
    drawn = [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    assert len(drawn) == 3
    for got, counts in zip(drawn, (load, code, c), strict=True):
        # float64 rounding
        np.testing.assert_allclose(got * counts.sum(-1, keepdims=True), counts * 8.0, rtol=1e-12)
    norms = [ax.images[0].norm for ax in figure.axes[:3]]
    norms = {(norm.vmin, norm.vcenter, norm.vmax) for norm in norms}
    assert len(norms) == 1 and norms.pop()[:2] == (0.0, 1.0)  # one scale for all, white is even
    peaks = load.max(-1) / load.mean(-1) - 1
    assert texts(figure.axes[0]) == ["MaxVio", *(f"{p:.2f}" for p in peaks)]
    assert file.read_bytes().startswith(b"\x89PNG")

    empty = {"C": [[0, 0], [0, 0]]}
    figure = run_plots.routing_heatmap([[1, 3], [0, 0]], file, domain_loads=empty)
    assert texts(figure.axes[0]) == ["MaxVio", "0.50", "no load"]
    assert figure.axes[1].get_title() == "C (no load)"


def test_curves_draw_each_metric_and_head_at_its_steps(tmp_path):
    metrics = [
        {"step": 10, "loss": 5.0, "lr": 1e-4, "max_vio": 2.0, "tokens_per_s": 10.0},
        {"step": 20, "loss": 4.0, "lr": 2e-4, "max_vio": 1.0, "tokens_per_s": 11.0},
        {"step": 20, "val_loss": 4.5, "val_bits_per_byte": 3.0, "max_vio_global": 0.5},
        {"step": 20, "reward": 0.25, "val_reward": -0.5},
        {"step": 20, "mtp_acceptance": [0.5], "mtp_loss": [4.0, 5.5]},
        {"step": 10, "loss": 5.5},  # a resumed run repeats the step
        {"step": 30, "mtp_acceptance": None},
    ]
    figure = run_plots.training_curves(metrics, tmp_path / "run.png")
    curves = {
        (ax.get_title().split(":")[0], line.get_label()): line.get_xydata().tolist()
        for ax in figure.axes
        for line in ax.lines
    }
    assert curves == {
        ("Loss", "train"): [[10, 5.5], [20, 4.0]],
        ("Loss", "train, MTP 1"): [[20, 4.0]],
        ("Loss", "train, MTP 2"): [[20, 5.5]],
        ("Loss", "validation"): [[20, 4.5]],
        ("Reward", "train, sampled"): [[20, 0.25]],
        ("Reward", "held out, likeliest"): [[20, -0.5]],
        ("Validation", "validation"): [[20, 3.0]],
        ("MaxVio", "batch"): [[10, 2.0], [20, 1.0]],
        ("MaxVio", "validation set"): [[20, 0.5]],
        ("Learning rate", "train"): [[10, 1e-4], [20, 2e-4]],
        ("Speed", "train"): [[10, 10.0], [20, 11.0]],
        ("MTP drafts accepted", "head"): [[20, 0.5]],
    }
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() for ax in figure.axes)
    with refused("none of the 1 rows"):
        run_plots.training_curves([{"step": 3}], tmp_path / "run.png")
