"""`dsv3 chat MODEL`: talk with a model that has a chat template."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_jax.cli.common import parse, sentence, with_variables
from dsv3_jax.cli.generate import Decode, decode_config, load_with_draft, print_parts, show_kernels


@dataclass
class Chat(Decode):
    """Talk with a model in turns. The answer is printed as it comes, everything else on stderr.

    A line is a turn, also of stdin without a terminal. /help says how to write several lines, and
    lists commands. Ctrl-C stops an answer, and keeps what came of it. A conversation that fills the
    model's context is never cut: a sentence says so. The names of special tokens in your turns are
    text.
    """

    system: str | None = None
    """a system message before the first turn; None means what the template writes without one"""
    max_new_tokens: int = 1024
    """number of tokens of an answer, at most"""
    prefill: str | None = None
    """text with which each answer begins"""
    template: tuple[str, ...] = ()
    """variables of the chat template: --template.NAME VALUE"""
    tools: Path | None = None
    """a JSON file with a list of functions that the model may call"""


FENCE = '"""'
HELP = """/reset or /clear begins a new conversation; /exit, /quit or Ctrl-D ends the chat
Ctrl-C stops an answer
/tool TEXT gives the result of a call to the model
a turn of several lines: end a line with \\, or write \"\"\" on a line before and after it"""


def run(argv: list[str]) -> int:
    """Read turns from stdin and print answers."""
    args = parse(Chat, with_variables(argv, "--template"), "chat")
    from dsv3_jax.runs.open_model import load_text

    # A trial turn and a trial answer of one token show errors before the first turn.
    text = load_text(args.model)
    tools = _tools(args, text)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    _prompt(text, [*start, {"role": "user", "content": "a"}], args, tools)
    model, draft = load_with_draft(args, text)
    config = decode_config(args, text, draft, args.max_new_tokens)
    replace(config, max_new_tokens=1).check(model.cfg, [[text.stop_ids[0]]])
    show_kernels(model)

    messages = start
    for number, turn in enumerate(_turns(_lines())):
        command = turn.strip()
        if command in ("/exit", "/quit"):
            break
        if command == "/help":
            _say(HELP)
        elif command in ("/reset", "/clear"):
            messages = start
            _say("the conversation is empty")
        # Anything else that is not empty is a turn.
        elif command:
            message = _message(turn)
            if message["role"] == "tool" and (not message["content"] or messages == start):
                _say(
                    "/tool TEXT gives the result of a call in the last answer; there is no "
                    "answer, or no TEXT"
                )
                continue

            # Each turn has its own seed. A turn that cannot be answered is not kept.
            asked = [*messages, message]
            seeded = replace(config, seed=(args.seed + number) % (1 << 32))
            try:
                ids = _prompt(text, asked, args, tools)
                answer = (args.prefill or "") + _answer(model, text, ids, args, seeded)
            except ValueError as error:
                _say(sentence(error))
                continue
            if answer:
                messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _message(turn: str) -> dict[str, str]:
    """Make the message of a turn that is not empty: the user's, or after /tool a call's result.

    Example:
        >>> _message("/tool 4"), _message("hi ")
        ({'role': 'tool', 'content': '4'}, {'role': 'user', 'content': 'hi '})
    """
    command = turn.strip()
    if command.split()[0] == "/tool":
        return {"role": "tool", "content": command.removeprefix("/tool").strip()}
    return {"role": "user", "content": turn}


def _tools(args: Chat, text: Any) -> list[Any] | None:
    """The functions of --tools.

    Raises: ValueError when the file is none of a list, or the template reads no tools.
    """
    from dsv3_jax.chat.messages import read_tools
    from dsv3_jax.host.files import read_text

    if args.tools is None:
        return None
    try:
        found = read_tools(read_text(args.tools))
    except (OSError, ValueError) as error:
        raise ValueError(f"--tools {args.tools} cannot be read: {error}") from error
    if not text.chat.reads_tools:
        raise ValueError(
            f"--tools {args.tools} is for a chat template that reads tools, and this one does not"
        )
    return found


def _prompt(
    text: Any, messages: list[dict[str, Any]], args: Chat, tools: list[Any] | None
) -> list[int]:
    """The ids after which an answer to the messages begins.

    Raises: ValueError when the template refuses them, or does not read a variable.
    """
    from dsv3_jax.chat.text_settings import variables_of

    # A word is never an argument of `render`, as `messages` would be.
    variables = variables_of(args.template)
    text.chat.values(variables)
    if args.prefill is None:
        return text.chat.render(messages, tools=tools, add_generation_prompt=True, **variables).ids
    messages = [*messages, {"role": "assistant", "content": args.prefill}]
    return text.chat.render(messages, tools=tools, continue_final_message=True, **variables).ids


def _answer(model: Any, text: Any, ids: list[int], args: Chat, config: Any) -> str:
    """Print the answer to a conversation as it comes.

    Returns: the answer, as far as it came before Ctrl-C, without the prefill.
    Raises: ValueError when the conversation fills the context.
    """
    from dsv3_jax.decoding.generate import generate_in_parts
    from dsv3_jax.report.progress import say

    # Room for the answer, and for the drafts of its last step.
    context = model.cfg.max_positions
    if config.num_drafts and not isinstance(config.draft, str):
        context = min(context, config.draft.cfg.max_positions)
    room = context - config.num_drafts - len(ids)
    if room < 1:
        raise ValueError(
            f"the conversation of {len(ids)} tokens fills the context of {context}; /reset begins "
            "a new one"
        )
    most = min(config.max_new_tokens, room)

    # Lengths in powers of two: most turns then find their programs compiled.
    padded = min(max(256, 1 << (len(ids) - 1).bit_length()), len(ids) + room - most)
    config = replace(config, max_new_tokens=most, pad_prompts_to=padded)

    tokens: list[int] = []
    say(args.prefill or "")
    try:
        print_parts(generate_in_parts(model, [ids], config), text, tokens)
        if tokens[-1] not in text.stop_ids:
            full = f"the context of {context} tokens is full"
            reason = full if room == len(tokens) else f"max_new_tokens={len(tokens)}"
            _say(f"the answer ends here: {reason}")
    except KeyboardInterrupt:
        _say("stopped")

    # With names, special tokens become tokens in the next turn again.
    return text.tokenizer.decode_with_names(t for t in tokens if t not in text.stop_ids)


def _turns(lines: Iterator[str]) -> Iterator[str]:
    """Join the lines of a turn.

    Example:
        >>> list(_turns(iter(["a", "b\\\\", "c", FENCE, "d", "", "e", FENCE])))
        ['a', 'b\\nc', 'd\\n\\ne']
    """
    for line in lines:
        if line.strip() == FENCE:
            line = "\n".join(itertools.takewhile(lambda inner: inner.strip() != FENCE, lines))
        else:
            while line.endswith("\\"):
                line = line[:-1] + "\n" + next(lines, "")
        yield line


def _lines() -> Iterator[str]:
    """Yield the lines of a terminal, with a prompt and line editing, or of stdin."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at the prompt it drops the line
            print()


def _say(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
