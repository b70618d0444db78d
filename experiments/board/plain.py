"""The base recipes."""


def facts(run):
    return run


def domains(run):
    return run


def induction(run):
    return run
