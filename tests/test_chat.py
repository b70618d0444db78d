"""Chats: `dsv3 chat` asks and continues as training and GRPO do; folders say how text is read."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import LIGHT, random_model
from runs import by_command, make_run, write_lines
from texts import (
    ANSWER,
    CONVERSATIONS,
    PROMPTS,
    TEMPLATES,
    TEXTS,
    USER,
    V3,
    message,
    settings_of,
    write_text_files,
)

import dsv3_jax as ds
from dsv3_jax.chat.examples import read_example
from dsv3_jax.chat.text_settings import copy_to_run, with_template
from dsv3_jax.cli import generate as command
from dsv3_jax.config import replace
from dsv3_jax.decoding import generate
from dsv3_jax.hf.tensor_files import write_json
from dsv3_jax.runs.folder import claim
from dsv3_jax.runs.open_model import load_text

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A released folder: a random layer and an MTP layer, 160 positions, Kimi's text files."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    cfg = replace(LIGHT, vocab_size=320, mtp_depth=1, max_positions=160, init_std=0.2)
    ds.hf.save(random_model(cfg), folder, quiet=True)
    return write_text_files(folder, TEXTS["Kimi"])


def greedy(folder, messages, max_new_tokens, how="add_generation_prompt"):
    """The answer to a conversation, by the library."""
    text, model = load_text(folder), ds.load_model(folder)
    ids = text.chat.render(messages, **{how: True}).ids
    (tokens,) = ds.generate(model, [ids], max_new_tokens, stop_tokens=text.stop_ids).tokens
    return text.tokenizer.decode(t for t in tokens if t not in text.stop_ids)


GREEDY = ("--temperature", 0, "--max-new-tokens", 9)


@pytest.mark.long
def test_chat_continues_the_conversation(talker):
    lines = 'hello\n\nthe\\\n<|im_end|>\n/clear\n/help\n"""\nhello\n"""\n'
    lines += "x" * 150 + "\n/exit\nno\n"
    how = ("--system", "the system", "--draft", "mtp")
    code, out, err = by_command("chat", talker, *GREEDY, *how, lines=lines)
    first = [message("system", "the system"), message("user", "hello")]
    one = greedy(talker, first, 9)
    more = [message("assistant", one), message("user", "the\n<|im_end|>")]
    two = greedy(talker, first + more, 9)
    assert (code, out) == (0, f"{one}\n{two}\n{one}\n") and one and two != one
    assert err.startswith("kernels for cpu: ")
    assert "(the conversation is empty)" in err
    assert "drafts accepted: " in err
    assert err.count("(the answer ends here: max_new_tokens=9)") == 3
    assert "fills the context of 160; /reset" in err
    assert "a turn of several lines: end a line with" in err
    begun = [message("user", "hello"), message("assistant", "the")]
    rest = greedy(talker, begun, 9, "continue_final_message")
    code, out, _ = by_command("chat", talker, *GREEDY, "--prefill", "the", lines="hello\n")
    assert (code, out) == (0, f"the{rest}\n")


@pytest.mark.long
def test_a_file_of_messages_is_answered_as_chat_answers(talker, tmp_path):
    records = [{"messages": [USER]}, {"prompt": "hello"}, {"prompt": [USER], "answer": "2"}]
    records += [{"messages": [USER, ANSWER]}]
    asked, out = write_lines(tmp_path / "asked.jsonl", records), tmp_path / "out.jsonl"
    words = ("generate", talker, "--prompts", asked, "--out", out, *GREEDY)
    assert by_command(*words)[0] == 0
    text = load_text(talker)
    (new,) = ds.generate(ds.load_model(talker), [text.encode("hello")], 9).tokens
    answer, plain = greedy(talker, [USER], 9), text.tokenizer.decode(new)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == [answer, plain, answer, answer] and plain != answer
    assert all(line | record == line for line, record in zip(lines, records, strict=True))
    out.unlink()
    code, _, err = by_command(*words, "--raw")
    assert code == 2 and "raw=True is for prompts of text, and " in err and "line 1 has" in err


@pytest.mark.parametrize("name", ["GLM", "R1, thinking"])
def test_grpo_asks_what_chat_asks(talker, tmp_path, monkeypatch, name):
    fed = []
    words = ("thinking=true",) if name != "GLM" else ()
    r1 = replace(TEXTS["V3"], jinja=(TEMPLATES / "r1.jinja").read_text())
    folder = Path(shutil.copytree(talker, tmp_path / "model"))
    for file in folder.glob("*_config.json"):
        file.unlink()
    write_text_files(folder, TEXTS.get(name, r1))

    def parts(model, prompts, config):
        fed.extend(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_in_parts", parts)
    template = ("--template.thinking", "true") if words else ()
    assert by_command("chat", folder, *template, lines="hello world\n")[0] == 0
    tasks = [{"question": "hello world", "answer": "2"}, {"prompt": "hello world", "answer": "2"},
             {"prompt": [USER], "answer": "2"}, {"messages": [USER], "answer": "2"},
             {"messages": [USER, ANSWER], "answer": "2"}]  # fmt: skip
    text = with_template(load_text(folder), None, words)
    for task in tasks:
        prompt = read_example(task, text, "here").prompt.tolist()
        thought = text.tokenizer.added.get("<think>")
        assert [prompt] == fed and (prompt[-1] == thought) == bool(words), task


def test_a_prompt_of_text_is_encoded_without_its_answer():
    """As `dsv3 generate` encodes it, although the tokenizer joins its end with the answer."""
    for name in TEXTS:
        for prompt in filter(None, PROMPTS):
            tasks = ({"prompt": prompt, "answer": answer} for answer in (" the", "1"))
            one, two = (read_example(task, settings_of(name), "here", "text") for task in tasks)
            assert one.prompt.tolist() == settings_of(name).encode(prompt), (name, prompt)
            assert one.side == two.side
    v3, task = settings_of("V3"), {"prompt": "hello ", "answer": "world"}
    joined = read_example(task, v3, "here", "text")
    assert v3.tokenizer.decode(joined.prompt) == "hello "
    assert v3.tokenizer.decode(joined.ids[: joined.targets.argmax()]) == "hello"


def test_tools_are_those_of_training(talker, tmp_path, monkeypatch):
    fed, text, file = [], load_text(talker), tmp_path / "tools.json"
    tokens = [[*text.tokenizer.encode("the"), text.stop_ids[0]]]

    def parts(model, prompts, config):
        fed.extend(prompts)
        yield SimpleNamespace(tokens=tokens, decode_seconds=0, acceptance=())

    monkeypatch.setattr(generate, "generate_in_parts", parts)
    tools = [{"name": "add"}]  # the context is short
    file.write_text(json.dumps(tools))
    lines = "/tool 2\nhello world\n/tool\n/tool 2 é\n"
    code, _, err = by_command("chat", talker, "--tools", file, lines=lines)
    assert code == 0 and err.count("(/tool TEXT gives the result of a call") == 2
    for given in (tools, json.dumps(tools)):
        task = {"messages": [USER], "tools": given, "answer": ""}
        assert read_example(task, text, "").prompt.tolist() == fed[0]
    called = [USER, message("assistant", "the"), message("tool", "2 é")]
    assert fed[1:] == [text.chat.render(called, tools=tools, add_generation_prompt=True).ids]

    file.write_text("{}")
    code, out, err = by_command("chat", talker, "--tools", file)
    assert (code, out) == (2, "") and f"{file} cannot be read: tools='{{}}'" in err
    other = Path(shutil.copytree(talker, tmp_path / "model"))
    (other / "chat_template.jinja").write_text(V3)  # it has no tools
    file.write_text(json.dumps(tools))
    assert by_command("chat", other, "--tools", file)[0] == 2
    asked = write_lines(tmp_path / "asked.jsonl", [{"messages": [USER], "tools": tools}])
    words = ("generate", other, "--prompts", asked, "--out", tmp_path / "out.jsonl")
    code, _, err = by_command(*words)
    assert code == 2 and "line 1: tools are for a chat template that reads them" in err


@pytest.mark.long
def test_ctrl_c_stops_an_answer_and_not_the_program(talker, monkeypatch):
    whole, interrupted = generate.generate_in_parts, []

    def parts(*args, **options):
        yield from itertools.islice(whole(*args, **options), 2)
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_in_parts", parts)
    code, out, err = by_command("chat", talker, *GREEDY, lines="hello\nhello\n")
    first = message("user", "hello")
    one = greedy(talker, [first], 9)  # the first token and a part of eight
    assert code == 0 and err.count("(stopped)") == 1
    two = greedy(talker, [first, message("assistant", one), first], 9)
    assert out == f"{one}\n{two}\n"


def test_a_wrong_folder_is_one_sentence(talker, tmp_path):
    for file, content, sentence in (
        ("chat_template.jinja", "{{ 1 / 0 }}", "template fails with ZeroDivisionError"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id='x', which is neither"),
        ("generation_config.json", '{"temperature": "hot"}', 'temperature="hot", which is not'),
        ("tokenizer_config.json", '{"add_bos_token": true}', "add_bos_token=true, and bos_token="),
    ):
        folder = Path(shutil.copytree(talker, tmp_path / "model", dirs_exist_ok=True))
        (folder / file).write_text(content)
        code, out, err = by_command("chat", folder, lines="hello\n")
        assert (code, out, err.count("\n")) == (2, "", 1) and sentence in err, err


def test_an_argument_of_render_is_no_variable_of_a_template(talker):
    for name in ("messages", "add_generation_prompt", "any_order"):
        code, out, err = by_command("chat", talker, f"--template.{name}", "true", lines="hello\n")
        assert (code, out) == (2, "") and f"{name}=True is no variable of the chat template" in err


@pytest.mark.parametrize(
    "said, given, expected",
    [
        ({}, {}, (0.8, None, 0.95)),
        ({"temperature": 0.6, "top_p": 0.9}, {"top_k": 3, "top_p": 0.5}, (0.6, 3, 0.5)),
    ],
)
def test_options_come_before_the_folders_sampling_and_that_before_ours(said, given, expected):
    text, options = SimpleNamespace(sampling=said, stop_ids=(1,)), command.Generate(Path(), **given)
    assert tuple(command.decode_config(options, text, None, 5).sampling) == expected


def test_a_converted_folder_keeps_its_text(talker, tmp_path):
    talker = Path(shutil.copytree(talker, tmp_path / "talker"))
    config = json.loads((talker / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "bos_token_id": 3, "eos_token_id": [4, 5]}
    write_json(talker / "config.json", config)
    ds.hf.convert(talker, tmp_path / "run", quiet=True)
    ds.hf.convert(tmp_path / "run", tmp_path / "back", quiet=True)
    first, run, turns = load_text(talker), load_text(tmp_path / "run"), CONVERSATIONS["two turns"]
    assert [run.encode(p) for p in PROMPTS] == [first.encode(p) for p in PROMPTS]
    assert run.chat.render(turns) == first.chat.render(turns)
    assert (run.stop_ids, run.sampling) == (first.stop_ids, first.sampling)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (talker / name).read_bytes()
    old, new = ((x / "generation_config.json").read_text() for x in (talker, tmp_path / "back"))
    assert json.loads(old) == json.loads(new)


def test_a_run_reads_text_as_it_was_trained(tmp_path):
    claim(tmp_path / "run", make_run(str(tmp_path)))
    text = load_text(tmp_path / "run")
    assert text.encode("<eos>") == text.encode("<eos>", raw=True) == list(b"<eos>")
    assert text.stop_ids == (256,) and text.sampling == {}

    folder = write_text_files(tmp_path / "glm", TEXTS["GLM"])
    run = make_run(str(tmp_path))
    claim(tmp_path / "tuned", replace(run, data=replace(run.data, tokenizer=str(folder))))
    copy_to_run(folder, tmp_path / "tuned")
    assert load_text(tmp_path / "tuned").stop_ids == load_text(folder).stop_ids
