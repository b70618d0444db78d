"""`dsv3 chat MODEL`: talk with a model that has a chat template."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dsv3_jax.cli.common import parse, sentence
from dsv3_jax.cli.generate import Decode, decode_config, load, print_parts, show_kernels


@dataclass
class Chat(Decode):
    """Talk with a model in turns. A line is a turn; the answer is printed as it comes, everything else on stderr.

    The line /reset begins a new conversation; /exit or the end of the input ends. Ctrl-C stops an answer, and keeps
    what came of it. Without a terminal, each line of stdin is a turn. No turn is ever dropped: if the conversation
    fills the model's context, a sentence says so. The names of special tokens in your turns are text.
    """

    system: str | None = None
    """text of a system message before the first turn; None means what the template writes without one"""
    max_new_tokens: int = 1024
    """number of tokens of an answer, at most"""


def run(argv: list[str]) -> int:
    """Read turns from stdin and print answers."""
    args = parse(Chat, argv, "chat")
    from dsv3_jax.hf.open_model import load_text

    text = load_text(args.model)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    text.chat.text([*start, {"role": "user", "content": "a"}], add_generation_prompt=True)  # errors before loading
    model, draft = load(args, text)
    config = decode_config(args, text, draft, args.max_new_tokens)
    replace(config, max_new_tokens=1).check(model.cfg, [[text.stop_ids[0]]])
    show_kernels(model)
    messages = start
    for number, line in enumerate(_lines()):
        if line.strip() == "/exit":
            break
        if line.strip() == "/reset":
            messages = start
            _say("the conversation is empty")
        elif line.strip():
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(model, text, asked, replace(config, seed=(args.seed + number) % (1 << 32)))
            except ValueError as error:
                _say(sentence(error))
                continue
            if answer:
                messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _answer(model: Any, text: Any, messages: list[dict[str, Any]], config: Any) -> str:
    """Print the answer to a conversation as it comes.

    Returns: the answer, as far as it came before Ctrl-C.
    Raises: ValueError when the template refuses the messages, or they fill the context.
    """
    from dsv3_jax.decoding.generate import generate_in_parts

    ids = text.chat.render(messages, add_generation_prompt=True).ids
    context = model.cfg.max_positions
    if config.num_drafts and not isinstance(config.draft, str):
        context = min(context, config.draft.cfg.max_positions)
    room = context - config.num_drafts - len(ids)
    if room < 1:
        raise ValueError(
            f"the conversation of {len(ids)} tokens fills the context of {context}; /reset begins a new one"
        )
    most = min(config.max_new_tokens, room)
    # Lengths in powers of two: most turns then find their programs compiled.
    padded = min(max(256, 1 << (len(ids) - 1).bit_length()), len(ids) + room - most)
    config = replace(config, max_new_tokens=most, pad_prompts_to=padded)
    tokens: list[int] = []
    try:
        print_parts(generate_in_parts(model, [ids], config), text, tokens)
        if tokens[-1] not in text.stop_ids:
            full = f"the context of {context} tokens is full"
            _say(f"the answer ends here: {full if room == len(tokens) else f'max_new_tokens={len(tokens)}'}")
    except KeyboardInterrupt:
        _say("stopped")
    return _with_names(text.tokenizer, [t for t in tokens if t not in text.stop_ids])


def _with_names(tokenizer: Any, tokens: list[int]) -> str:
    """Decode an answer, with the names of its special tokens, so that they become tokens in the next turn again.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> _with_names(ByteTokenizer(), [257, 257, 104, 105])
        '<fim_prefix><fim_prefix>hi'
    """
    names = {i: name for name, i in tokenizer.specials.items()}
    runs = itertools.groupby(tokens, names.get)
    return "".join(name * len(list(run)) if name else tokenizer.decode(run) for name, run in runs)


def _lines() -> Iterator[str]:
    """Yield the turns: of a terminal with a prompt and line editing, else the lines of stdin."""
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
