"""Muon at twice AdamW's rate, as in study 23."""

from dsv3_jax.config import replace
from experiments.board import plain


def _muon(run):
    rate = 2 * run.optim.learning_rate
    optim = replace(run.optim, name="muon", learning_rate=rate, final_learning_rate=rate / 20)
    return replace(run, optim=optim)


def facts(run):
    return _muon(plain.facts(run))


def domains(run):
    return _muon(plain.domains(run))


def induction(run):
    return _muon(plain.induction(run))
