"""The forms that people's records of chats have, as messages, prompts and completions."""

from typing import Any

from dsv3_jax.chat.text_settings import TextSettings

# Names of roles, in any letters.
ROLE_OF = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def as_task(record: dict[str, Any], prompts: str) -> dict[str, Any]:
    """A task as its prompt and a completion; others stay, and messages that end in an answer.

    Args: prompts: as `DataConfig.prompts`.

    Example:
        >>> as_task({"question": "1+1=", "answer": "2"}, "text")
        {'prompt': '1+1=', 'completion': '2'}
    """
    record = with_system(record)
    found = (record.get(key) for key in ("prompt", "question", "messages"))
    prompt = next((value for value in found if value is not None), None)
    answer = record.get("answer")
    if prompt is None or answer is None or record.get("completion") is not None:
        return record

    # A question is a turn, unless its answer shall continue its text.
    if isinstance(prompt, str) and prompts == "turn":
        prompt = [*_system(record), {"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        return {"prompt": prompt, "completion": answer}

    # Messages that end in an assistant's turn have their answer already.
    if prompt and is_answer(prompt[-1]):
        return record
    turn = {"role": "assistant", "content": answer}
    return {"prompt": prompt, "completion": [turn], "tools": record.get("tools")}


def is_answer(turn: Any) -> bool:
    """Whether it is an assistant's turn."""
    return _is_of(turn, "assistant")


def _is_of(turn: Any, role: str) -> bool:
    return isinstance(turn, dict) and _role_of(turn) == role


def _role_of(turn: dict[str, Any]) -> str | None:
    """The usual name of a turn's role, as in ("GPT" → "assistant"); None for one that has none."""
    return ROLE_OF.get(str(turn.get("role")).strip().lower())


def turns_of(record: dict[str, Any]) -> Any:
    """Return the messages of a record that is a conversation, else None."""
    if record.get("messages") is not None:
        return record["messages"]
    turns = record.get("conversations")
    instruction, output = record.get("instruction"), record.get("output")
    if turns is None and instruction is not None and output is not None:
        # Alpaca's: the input follows the instruction in the user's turn.
        asked = f"{instruction}\n{record['input']}" if record.get("input") else instruction
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return [*_system(record), *turns] if isinstance(turns, list) else turns


def _system(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def with_system(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose messages begin with its own system message, if they have none."""
    lists = {key: record.get(key) for key in ("prompt", "question", "messages")}
    return record | {
        key: [*_system(record), *turns]
        for key, turns in lists.items()
        if isinstance(turns, list) and not any(_is_of(turn, "system") for turn in turns[:1])
    }


def usual(turns: Any, text: TextSettings) -> Any:
    """Give turns the usual keys and roles. `render` says what is wrong with the others."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [_usual_turn(turn, text) for turn in turns]


def _usual_turn(turn: dict[str, Any], text: TextSettings) -> dict[str, Any]:
    if "from" in turn:  # ShareGPT's keys
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = others | {"role": turn["from"], "content": turn.get("value")}
    role = _role_of(turn)
    if role is None:
        return turn
    # A template may have the role of tools or of the system under the name that the turn gives.
    if role in ("tool", "system") and text.chat.names(turn["role"]):
        return turn
    return turn | {"role": role}
