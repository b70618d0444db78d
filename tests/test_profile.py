"""A trace of training steps: its place, its steps, and the names of the model's parts in it."""

import gzip
from dataclasses import replace

import pytest
from runs import MODEL, cheap_compiles, make_run, write_text

from dsv3_jax.training import loop
from dsv3_jax.training.profile import FOLDER, parse_steps


@pytest.mark.long
def test_a_trace_holds_its_steps(tmp_path):
    model = replace(MODEL, num_layers=1, mtp_depth=0)
    run = make_run(write_text(tmp_path / "text"), model=model, steps=5, eval_batches=1)
    with cheap_compiles():
        loop.fit(run, tmp_path / "run", quiet=True, profile=(2, 4))
    traces = sorted((tmp_path / "run" / FOLDER).rglob("perfetto_trace.json.gz"))
    assert len(traces) == 1 and list((tmp_path / "run" / FOLDER).rglob("*.xplane.pb"))
    with gzip.open(traces[0], "rt") as file:
        text = file.read()
    assert text.count('"train"') == 2


@pytest.mark.parametrize("text", ["3", "5:5", "7:2", "a:b", "-1:3", "1:2:3", ""])
def test_steps_that_are_none(text):
    with pytest.raises(ValueError, match="is not START:STOP, two steps of which the first is smaller"):
        parse_steps(text)
