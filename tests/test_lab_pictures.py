"""Pictures of the studies: titles say answers, from the kept results; some of the runs give a part of the picture."""

import importlib.util
from pathlib import Path

import pytest

from experiments.lab import Results, drawing
from experiments.lab.results import MissingRuns

EXPERIMENTS = Path(drawing.__file__).parents[1]
STUDIES = sorted(path.parent.name for path in EXPERIMENTS.glob("[0-9][0-9]_*/run.py"))
# Study → the sentence that names the run which its picture needs.
NEEDED = {"15_low_precision": "no run of 'float32'", "17_router_life": "no run of 'loss-free, γ 3e-3'"}


@pytest.fixture
def load(monkeypatch):
    """Return a function: name of a study → (Study, its kept results, the figures that it would write)."""

    def load(name):
        monkeypatch.syspath_prepend(str(EXPERIMENTS / name))
        spec = importlib.util.spec_from_file_location(f"study_{name}", EXPERIMENTS / name / "run.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        written = []
        for place in (module, drawing):
            monkeypatch.setattr(place, "write_figure", lambda figure, path: written.append(figure), raising=False)
        return module.STUDY, Results(EXPERIMENTS / name / "results.json"), written

    return load


@pytest.mark.parametrize("name", STUDIES)
def test_the_title_of_a_study_says_a_number(name, load):
    study, results, written = load(name)
    study.draw(results, Path("picture.png"))
    [figure] = written
    whole = figure.get_suptitle()
    titles = [whole] if whole else [ax.get_title() for ax in figure.axes if ax.has_data() and ax.get_title()]
    assert titles and all(any(c.isdigit() for c in title) for title in titles), titles


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_makes_the_seeds_that_it_shows(name, load):
    """So `make lab` from nothing gives the kept results again, and no verdict rests on seeds that it does not make."""
    study, results, _ = load(name)
    for variant in results.variants:
        assert results.seeds_of(variant) == [str(seed) for seed in range(study.seeds_of.get(variant, study.seeds))]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_with_some_of_its_runs_shows_these(name, load):
    """The first or the last variant alone, with one seed: a table, and a picture or a sentence on what it needs."""
    study, results, _ = load(name)
    everything = results.runs
    for variant in (list(everything)[0], list(everything)[-1]):
        results.runs = {variant: dict([min(everything[variant].items())])}
        assert study.make_table(results).startswith("| ")
        try:
            study.draw(results, Path("picture.png"))
        except MissingRuns as missing:
            assert str(missing) == NEEDED[name]
