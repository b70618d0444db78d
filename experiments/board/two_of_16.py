"""Two of 16 experts and no shared one: what study 11 finds to store most."""

from dsv3_jax.config import replace
from experiments.board import plain
from experiments.lab.ladder import GSHARD, ladder


def facts(run):
    return replace(plain.facts(run), model=ladder(run.model)[GSHARD])
