"""Task scores: an option's tokens are the prompt's, log p finds the right, errors are named."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import LIGHT, random_model
from runs import by_command, refused, write_lines

import dsv3_jax as ds
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.data.tokenizer import train_bpe
from dsv3_jax.model.transformer import abstract
from dsv3_jax.scores import score
from dsv3_jax.scores.made import write_tasks
from dsv3_jax.scores.tasks import read_tasks

MODEL = ds.replace(LIGHT, vocab_size=260)
CHOICE = {"query": "q", "choices": ["zz", "az", "b"], "gold": 2}
SCHEMA = {"context_options": ["c", "a("], "continuation": "x", "gold": 1}
SINGLE = {"context": "one ", "continuation": "two"}
CODE = """
def first(value, other):
    total = self.names[value] + self.names[other]
    if total > {"one": value, "two": other}["one"]:
        return self.names[total]
    raise ValueError("<broken> and {name: total}")
"""


def write(folder: Path, **files) -> str:
    for name, rows in files.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return str(folder)


def test_each_kind_is_answered_by_log_p_a_token(tmp_path, monkeypatch):
    """log p is minus the sum of the new bytes and the context's first; "t" is the likeliest."""

    def small_bytes(model, pairs):
        sums = [-float(sum(more) + len(more) * context[0]) for context, more in pairs]
        return [(log_p, more[0] == ord("t")) for log_p, (_, more) in zip(sums, pairs, strict=True)]

    monkeypatch.setattr(score, "loglikelihood", small_bytes)
    mean = {"query": "q", "choices": ["b", "aab"], "gold": 1}  # a sum would prefer "b"
    choices, single = [CHOICE, mean, CHOICE | {"gold": 0}], [SINGLE, SINGLE | {"continuation": "x"}]
    folder = write(tmp_path, choice=choices, schema=[SCHEMA], single=single)
    said: list[str] = []
    found = ds.score_tasks(abstract(MODEL), plain_settings(), folder, say=said.append)
    chance = (1 / 3 + 1 / 2 + 1 / 3) / 3
    centred = [(2 / 3 - chance) / (1 - chance), 1, 0.5]
    assert [task.rows for task in found.tasks] == [3, 1, 2]
    assert [task.chance for task in found.tasks] == pytest.approx([chance, 1 / 2, 0])
    assert [task.centred for task in found.tasks] == pytest.approx(centred)
    for task in found.tasks:
        low, high = task.centred_interval
        assert low <= task.centred <= high
    assert found.core == pytest.approx(sum(centred) / 3)
    assert len(said) == 5 and f"{found.core:.3f}" in said[-1]


@pytest.mark.parametrize("words", ["bytes", "pairs"])
def test_context_and_continuation_are_the_prompts_own_tokens(tmp_path, words):
    """Also where a token covers both sides of the border, or nothing is before it."""
    if words == "pairs":
        train_bpe(["f() g(x) " * 50], 265, words := str(tmp_path / "pairs.json"))
    text, calls = plain_settings(words), {"query": "f(", "choices": [")", ")x", "x)"], "gold": 0}
    nothing = {"query": "", "choices": ["\n)", " x"], "gold": 0}
    rows = dict(call=[calls] * 3, none=[nothing], schema=[SCHEMA] * 3, single=[SINGLE] * 3)
    for task in read_tasks(write(tmp_path, **rows)):
        for i, row in enumerate(task.rows):
            pairs, _ = score.pairs_of(task, i, text, 99)
            ids = [[*context, *more] for context, more in pairs]
            first = [text.tokenizer.eos_id] * (task.label == "none")
            assert all(map(all, pairs))
            assert ids == [first + text.encode(prompt) for prompt in task.prompts(i)]
            if task.kind != "multiple_choice":
                assert text.tokenizer.decode(pairs[0][1]).strip() == row.options[0][1]
            short, cut = score.pairs_of(task, i, text, 2)  # loses its beginning, never its end
            assert [[*context, *more] for context, more in short] == [tokens[-2:] for tokens in ids]
            assert cut == any(len(tokens) > 2 for tokens in ids) and all(map(all, short))


def test_a_bundle_of_core_says_examples_delimiter_and_chance(tmp_path):
    """A row's examples are other rows, those that nanochat draws."""
    (tmp_path / "eval_data").mkdir()
    count = [{"context": f"<{i}> ", "continuation": str(i)} for i in range(9)]
    write(tmp_path / "eval_data", arc=[CHOICE], count=count)
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n-\n  label: arc_easy\n  dataset_uri: arc.jsonl\n"
        "  icl_task_type: multiple_choice\n"
        '  continuation_delimiter: "\\nAnswer: "\n'
        "-\n  label: count\n  dataset_uri: count.jsonl\n  num_fewshot: [0, 8]\n"
    )
    table = 'Eval Task,"Random baseline",x\narc_easy,25,\nother,60.5,\n'
    (tmp_path / "eval_meta_data.csv").write_text(table)
    arc, none, task = read_tasks(tmp_path)
    assert (arc.label, arc.shots, arc.chance) == ("arc_easy", 0, 0.25)
    assert arc.prompts(0)[2] == "q\nAnswer: b"
    assert (none.shots, task.shots, task.chance) == (0, 8, 0)
    for i in range(9):
        drawn = random.Random(1234 + i).sample([j for j in range(9) if j != i], 8)
        prompts = [none.prompts(j)[0] for j in (*drawn, i)]
        assert task.prompts(i) == ["\n\n".join(prompts)]
        assert sorted(prompts) == [f"<{n}> {n}" for n in range(9)]


def test_made_tasks_are_the_texts_own(tmp_path):
    write_tasks(tmp_path / "tasks", [CODE, "no code"], rows=8)
    tasks = {task.label: task for task in read_tasks(tmp_path / "tasks")}
    assert tasks.keys() == {"brackets", "names", "keywords"}
    for task in tasks.values():
        for options, gold in task.rows:
            query, choices = options[0][0], [choice for _, choice in options]
            assert query + choices[gold] in CODE and len(query) <= 240 and len({*choices}) == 4
    assert {row.options[row.gold][1] for row in tasks["brackets"].rows} == set(")]}>")


def test_bad_tasks_are_refused_with_file_and_line(tmp_path):
    one = {**CHOICE, "choices": ["a"], "gold": 0}
    for lines, said in (
        ([SINGLE, CHOICE], "a.jsonl, line 2, is no object with the keys"),
        ([{**CHOICE, "gold": 3}], "line 1: gold=3 is not the index"),
        ([{**CHOICE, "choices": ["a", 1, ""]}], "'q' and 1 are not a text"),
        ([one], "a.jsonl has one text in the choices"),
        ([SINGLE] * 2, "shots=2 is no number of examples for .*a.jsonl"),
    ):
        with refused(said):
            read_tasks(write(tmp_path, a=lines), shots=2)
    write(tmp_path, a=[SINGLE] * 3)
    task = "{label: a, dataset_uri: a.jsonl}"
    for tasks, said in (
        ("{label: a}", "core.yaml has no list icl_tasks"),
        ("!!timestamp x", "core.yaml has no list icl_tasks"),  # AttributeError
        ('{label: a, dataset_uri: "a\\0b"}', f"{tmp_path} has a task 'a': a name has one line"),
        (task.replace("label: a", f"label: {'a' * 10**6}"), "has a task 'aaa"),
        (task.replace("}", ", num_fewshot: []}"), r"shots=\[\] is no number of examples for .*a"),
        (f"{task}, {task}", "has task 'a' with shots=0 twice"),
    ):
        (tmp_path / "core.yaml").write_text(f"icl_tasks: [{tasks}]")
        with refused(said) as error:
            read_tasks(tmp_path)
        assert len(str(error.value)) < 1000
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,25\na,50\n")
    with refused(r"eval_meta_data.csv is no table .*, or a task has two"):
        read_tasks(tmp_path)


def test_eval_prints_and_writes_the_scores(whole, tmp_path):
    out = tmp_path / "scores.json"
    command = ("eval", whole.folder, "--tasks", write(tmp_path, choice=[CHOICE] * 3))
    code, said, _ = by_command(*command, "--limit", 2, "--shots", 1, "--out", out)
    written = json.loads(out.read_text())
    assert code == 0 and f"{written['core']:.3f}" in said
    assert (written["tasks"][0]["rows"], written["step"]) == (2, 12)
    (tmp_path / "choice.jsonl").write_text("{")
    code, _, err = by_command(*command)
    assert code == 2 and "choice.jsonl, line 1" in err


@pytest.fixture
def harness(monkeypatch):
    """Stands for lm_eval, which tests do not install: one task, whose score is a model's log p."""

    def simple_evaluate(model, tasks, num_fewshot, limit, task_manager):
        ((nats, _),) = model._loglikelihood_tokens([(None, [1, 2], [3])])
        found = {"nats": nats, "shots": num_fewshot, "limit": limit}
        return {"results": dict.fromkeys(tasks, found)}

    tasks = SimpleNamespace(all_tasks=["hellaswag", "piqa"])
    windows = dict.fromkeys(("get_rolling_token_windows", "make_disjoint_window"))
    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": lambda: tasks},
        "lm_eval.utils": windows | {"make_table": lambda x: f"table of {', '.join(x['results'])}"},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
    }
    for name, values in parts.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))


def test_eval_scores_on_tasks_of_the_harness(harness, whole, tmp_path):
    out, ask = tmp_path / "scores.json", ("eval", whole.folder, "--lm-eval")
    words = "piqa hellaswag --limit 5 --shots 2 --out".split()
    code, said, _ = by_command(*ask, *words, out)
    assert code == 0 and "table of piqa, hellaswag" in said
    written = json.loads(out.read_text())
    ((nats, _),) = ds.loglikelihood(ds.load_model(whole.folder), [([1, 2], [3])])
    want = {"nats": pytest.approx(nats), "shots": 2, "limit": 5}
    assert written["lm_eval"] == {"piqa": want, "hellaswag": want} and written["step"] == 12

    unknown = "'hellaswg' is no task of lm-evaluation-harness; did you mean 'hellaswag'?"
    assert by_command(*ask, "hellaswg") == (2, "", f"dsv3: lm_eval={unknown}\n")


@pytest.mark.parity
def test_the_harness_runs_its_own_tasks_on_a_model(tmp_path):
    """Two tasks of lm-evaluation-harness on local data. Its answers are those of our own log p."""
    lm_eval = pytest.importorskip("lm_eval")
    from dsv3_jax.scores.harness import harness_model

    model, text = random_model(MODEL), plain_settings()
    rows = [
        {"query": f"{i} + {i} =", "choices": [str(2 * i), "none"], "gold": i % 2} for i in range(12)
    ]
    files = {"data_files": {"test": write_lines(tmp_path / "sums.jsonl", rows)}}
    data = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": files}
    data |= {"doc_to_text": "{{query}}", "doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
    settings = {"until": ["\n"], "max_gen_toks": 6}
    tasks = [
        {**data, "task": "choice", "output_type": "multiple_choice"},
        {**data, "task": "until", "output_type": "generate_until", "generation_kwargs": settings},
    ]
    found = lm_eval.simple_evaluate(harness_model(model, text), tasks=tasks, bootstrap_iters=0)
    options = [(row["query"], f" {choice}") for row in rows for choice in row["choices"]]
    pairs = [tuple(map(text.encode, option)) for option in options]
    nats = [log_p for log_p, _ in ds.loglikelihood(model, pairs)]
    right = [(nats[2 * i] < nats[2 * i + 1]) == row["gold"] for i, row in enumerate(rows)]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / 12)
    query = text.encode(rows[0]["query"])
    greedy = ds.generate(model, [query], 6, stop_tokens=text.stop_ids).tokens[0]
    assert found["samples"]["until"][0]["resps"] == [[text.tokenizer.decode(greedy).split("\n")[0]]]
