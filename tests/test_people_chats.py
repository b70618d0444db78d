"""Chats as people have them: forms of records and kinds of files; what is left out is counted."""

import json
import re
from itertools import cycle, islice

import pyarrow
import pyarrow.parquet
from runs import by_command, refused, write_lines
from texts import message as turn

import dsv3_jax as ds
from dsv3_jax.chat import sandbox
from dsv3_jax.chat.checkers import Checker
from dsv3_jax.chat.examples import asked_ids, encode, load_examples, load_tasks
from dsv3_jax.chat.text_settings import plain_settings, with_template
from dsv3_jax.config import DataConfig, replace
from dsv3_jax.presets import sft_sized
from dsv3_jax.report.unread_keys import unread_keys, unread_line
from dsv3_jax.runs.chats import read_chats
from dsv3_jax.runs.start import Start
from dsv3_jax.scores.made_chats import write_chats

PLAIN = plain_settings()
# It writes tools, calls of tools and thoughts, and any role.
TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ (m.reasoning_content or '') + (m.content or m.tool_calls | tojson) + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ADD = [{"type": "function", "function": {"name": "add"}}]
CALL = [{"function": {"name": "add", "arguments": {"a": 1}}}]


def pair(i):
    return [turn("user", f"{i}?"), turn("assistant", f"{i}.")]


def of_sharegpt(asked, answer):
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def seen(i):
    called = turn("assistant", None, tool_calls=CALL), turn("tool", "2")
    return [pair(i)[0], *called, pair(i)[1]]


# Name of a file: (its record i, the same as plain messages and tools).
GOOD = {
    "openai.jsonl": lambda i: ({"messages": [pair(i)[0] | {"name": "Ann"}, pair(i)[1]]}, pair(i)),
    "sharegpt.json": lambda i: ({"id": i, "conversations": of_sharegpt(f"{i}?", f"{i}.")}, pair(i)),
    "ultrachat.parquet": lambda i: ({"prompt": f"{i}?", "messages": pair(i)}, pair(i)),
    "reasoning.jsonl": lambda i: (
        {"messages": [pair(i)[0], pair(i)[1] | {"reasoning_content": "so"}]},
        [pair(i)[0], turn("assistant", f"so{i}.")],
    ),
    "tools.jsonl": lambda i: ({"messages": seen(i), "tools": json.dumps(ADD)}, seen(i)),
}
# None can be learnt from.
BROKEN = [
    {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "a"}]},
    {"messages": [*pair(0), pair(0)[1]]},
    {"messages": [turn("user", None), turn("assistant", "a")]},
    {"messages": [turn("user", 7), turn("assistant", "a")]},
    {"messages": [{"content": "a"}]},
]


def write(file, records):
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records, indent=1))
    else:
        write_lines(file, records)
    return str(file)


def chats_of(path, **more):
    sizes = {"seq_len": 256, "batch_size": 2, "val_fraction": 0.2}
    return DataConfig(paths=(str(path),), format="chat", **sizes | more)


def counts_of(summary):
    """(Examples to train on, held out, left out)."""
    first = summary.splitlines()[0]
    found = re.findall(r"([\d,]+) (?:to train on|held out|that cannot be learnt from)", first)
    return [int(number) for number in found]


def test_chats_of_all_kinds_of_files_are_read_or_counted(tmp_path, capsys):
    (template := tmp_path / "template.jinja").write_text(TEMPLATE)
    text = with_template(PLAIN, str(template))
    (folder := tmp_path / "chats").mkdir()
    for name, record in GOOD.items():
        write(folder / name, [record(i)[0] for i in range(25)])
        for i in (0, 7):
            theirs, messages = record(i)
            tools = ADD if "tools" in theirs else None
            assert encode(theirs, text) == encode({"messages": messages, "tools": tools}, text)
    write(folder / "broken.json", list(islice(cycle(BROKEN), 25)))
    (folder / "dataset_info.json").write_text('{\n"features": []\n}')

    source = load_examples(cfg := chats_of(folder), text)
    train, held_out, left_out = counts_of(source.summary)
    assert train + held_out == 125 and left_out == 25 and held_out > 9
    assert train == source.examples and len(source.domains) == 5
    named = source.summary.splitlines()[1:]
    assert [re.sub(".*broken.json, ", "", line) for line in named] == [
        "row 1: message 0 is the assistant's, and no user's message precedes it",
        "row 2: message 2 is a second one of role='assistant' in a row; join the two",
        "row 3: message 0 of role='user' has no content",
    ]
    assert all(line.startswith("left out: ") for line in named)
    assert unread_keys(cfg, text) == {"name": 25}
    # The plain template drops thoughts and tools, and has no words for a call without content.
    assert counts_of(load_examples(cfg, PLAIN).summary)[2] == 50
    assert "name (25), reasoning_content (25)" in unread_line(cfg, PLAIN)
    with refused(r"broken\.json, row 1: message 0 is the assistant's"):
        load_examples(replace(cfg, bad_records="refuse"), text)
    assert capsys.readouterr().err == ""


HELLO = [turn("user", "hi"), turn("assistant", "hey")]
HUMAN, GPT = of_sharegpt("hi", "hey")
CALLED = [{"from": "function_call", "value": "add(1)"}, {"from": "observation", "value": "2"}]
TOLD = [turn("system", "s"), *HELLO]
FORMS = [  # a record, and the same conversation
    ({"messages": HELLO, "prompt": "hi", "prompt_id": "7", "text": "a", "source": None}, HELLO),
    ({"conversations": [HUMAN, GPT], "id": 1}, HELLO),
    ({"messages": [turn("human", "hi"), turn("bot", "hey")]}, HELLO),
    ({"instruction": "hi", "input": "", "output": "hey", "text": "Below is an instruction"}, HELLO),
    # a task whose messages end in an answer has its answer already
    ({"messages": [turn("User", "hi"), turn(" GPT", "hey")], "answer": "hey"}, HELLO),
    ({"system": "s", "messages": HELLO}, TOLD),
    ({"system": "another", "messages": TOLD}, TOLD),
    ({"system": "s", "prompt": HELLO[:1], "completion": HELLO[1:]}, TOLD),
    ({"system": "s", "question": HELLO[:1], "answer": "hey"}, TOLD),
    (
        {"system": "s", "conversations": [HUMAN, *CALLED, GPT]},
        [*TOLD[:2], turn("assistant", "add(1)"), turn("tool", "2"), TOLD[2]],
    ),
    ({"messages": [turn("developer", "s"), *HELLO]}, TOLD),
]


def test_records_of_other_forms_are_the_same_conversation():
    for record, messages in FORMS:
        assert encode(record, PLAIN) == encode({"messages": messages}, PLAIN), record
    assert not any(encode({"conversations": [HUMAN, GPT | {"weight": 0}]}, PLAIN)[1])
    task = encode({"instruction": "add", "input": "1 2", "output": "3"}, PLAIN)
    assert PLAIN.tokenizer.decode(i for i, m in zip(*task, strict=True) if m) == "3"
    asked = asked_ids({"system": "s", "messages": HELLO}, PLAIN)
    assert asked == PLAIN.chat.render(TOLD[:2], add_generation_prompt=True).ids


def test_a_broken_file_and_an_unsafe_template_end_the_run(tmp_path, monkeypatch):
    """What is no record is nobody's bad record."""
    file = tmp_path / "a.json"
    cfg = chats_of(file)
    for text, sentence in {
        '[{"text": "a"}, {"text": ': "a.json cannot be read after row 0",
        '[{"text": "a"}, 7]': "a.json, row 2, is not an object",
        '{"text": "a"}\n{"text"': "a.json, line 2, is not JSON",
        json.dumps([BROKEN[2]]): "give no example .* 1 that cannot be learnt from, .*a.json, row 1",
    }.items():
        file.write_text(text)
        with refused(sentence):
            load_examples(cfg, PLAIN)
    write(file, [{"messages": pair(i)} for i in range(9)])
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    for source, sentence in {
        loop: "row 1: the chat template runs for more than",
        "{{ messages.__class__.__mro__ }}": "row 1: the chat template fails with SecurityError",
    }.items():
        (template := tmp_path / "t.jinja").write_text(source)
        with refused(f"^{re.escape(str(file))}, {sentence}"):  # no record is left out
            load_examples(cfg, with_template(PLAIN, str(template)))


def test_tasks_that_cannot_be_asked_are_left_out(tmp_path):
    records = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)]
    bad = [{"prompt": "1+1=", "answer": "two"}, {"prompt": "1+1="}, {"messages": pair(0)}]
    cfg = chats_of(write(tmp_path / "tasks.jsonl", [*bad, *records]))
    check = Checker("number").look_at
    source, asked = load_tasks(cfg, PLAIN, check)[:2]
    train, held_out, left_out = counts_of(source.summary)
    assert (train + held_out, left_out, len(asked)) == (20, 3, train)
    with refused("line 1: answer='two' does not fit 'number': it holds no number"):
        load_tasks(replace(cfg, bad_records="refuse"), PLAIN, check)
    write(tmp_path / "tasks.jsonl", [{"prompt": "", "answer": "2"}, *records])
    assert counts_of(load_tasks(replace(cfg, prompts="text"), PLAIN, check)[0].summary)[2] == 1


def test_the_sft_recipe_goes_by_the_examples_and_the_width():
    recipe = ds.recipe("sft")
    wide = replace(recipe, model=ds.preset("v3"))

    def sized(run, examples, rows, *given, **options):
        run, epochs, sentence = sft_sized(run, examples, rows, given, **options)
        optim = run.optim
        return epochs, run.data.batch_size, optim.learning_rate, optim.final_learning_rate, sentence

    assert sized(wide, 5000, 4000) == (2, 16, 5e-6, 1e-6, "")
    *few, sentence = sized(recipe, 48, 24)
    assert few == [20, 2, 1e-3, 2e-4]
    assert "48 examples and a model of dim=128: --epochs 20 --data.batch-size 2 " in sentence
    # What is named stays.
    names = ("data.batch_size", "optim.learning_rate", "optim.final_learning_rate")
    assert sized(recipe, 48, 24, *names, epochs=2.0) == (2, 16, 5e-6, 1e-6, "")


def test_the_examples_are_made_once_and_overwrite_nothing(tmp_path):
    assert by_command("data", "example", tmp_path / "new")[0] == 0
    chats, tasks = write_chats(tmp_path / "new")
    source, asked = load_tasks(chats_of(tasks), PLAIN, Checker("exact").look_at)[:2]
    assert counts_of(source.summary) == [len(asked), 200 - len(asked)]
    assert sum(counts_of(load_examples(chats_of(chats), PLAIN).summary)) == 50
    records = map(json.loads, chats.read_text().splitlines())
    questions = {record["messages"][0]["content"] for record in records}
    assert len(questions) == 50 and not questions & {task.record["prompt"] for task in asked}
    tasks.write_text("mine")
    chats.unlink()
    with refused(r"tasks\.jsonl' exists and holds something else; move it away"):
        write_chats(tmp_path / "new")
    assert not chats.exists() and tasks.read_text() == "mine"


def test_an_own_checker_sees_all_keys_also_beside_messages_of_another_name(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text("def reward(text, row):\n    return len(row['tests'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    records = [{"chat": pair(i)[:1], "answer": "", "tests": ["a", "b"]} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "tasks.parquet")
    data = chats_of(tmp_path / "tasks.parquet", text_column="chat", batch_size=8, seq_len=300)
    run = replace(ds.recipe("grpo"), data=data, start="start")
    run = replace(run, grpo=replace(run.grpo, checker="own_judge:reward"))
    start = Start("start", run, PLAIN, False, lambda job: ...)
    [task, *_] = read_chats(run, tmp_path / "out", start).tasks.asked
    assert Checker("own_judge:reward").check("", task.record, task.location) == 2


def test_tasks_may_have_a_long_answer_or_one_without_a_target(tmp_path):
    """The model learns from its own answers."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!"
    )
    text = with_template(PLAIN, str(tmp_path / "t.jinja"))
    records = [{"prompt": f"{i}?", "answer": "so " * 9 * (i % 2)} for i in range(20)]
    cfg = chats_of(write(tmp_path / "tasks.jsonl", records), seq_len=16)
    source, asked, held_out = load_tasks(cfg, text, Checker("exact").look_at)
    assert len(asked) + len(held_out) == 20 and source.val_batches(1)[0]["tokens"].shape == (2, 16)
    assert {len(task.prompt) for task in asked} == {3, 4}


def test_a_json_file_may_also_hold_lines(tmp_path):
    """Alone: in a folder it may be about the data, and only lists are read."""
    records = [{"messages": pair(i)} for i in range(20)]
    listed = load_examples(chats_of(write(tmp_path / "chats.json", records)), PLAIN)
    write_lines(tmp_path / "chats.json", records)
    assert load_examples(chats_of(tmp_path / "chats.json"), PLAIN).fingerprint == listed.fingerprint
    with refused("give no example"):
        load_examples(chats_of(tmp_path), PLAIN)
