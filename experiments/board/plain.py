"""The base recipes, with as many steps as five minutes allow."""

from dsv3_jax.config import replace


def facts(run):
    return replace(run, steps=2 * run.steps)


def domains(run):
    return replace(run, steps=5 * run.steps)


def induction(run):
    return run
