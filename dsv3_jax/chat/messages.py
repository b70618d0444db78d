"""Check the messages of a conversation, and the tools that come with it."""

import json
from collections.abc import Callable
from typing import Any

from dsv3_jax.host.files import parse_json

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")  # others are known if the template names them
# Templates' names of one thing: what an assistant thought before its answer.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def check_messages(
    messages: Any, *, knows: Callable[[str], bool] | None = None, ordered: bool = False
) -> list[Message]:
    """Check a conversation.

    The first turn after system messages is a user's. Two user turns or two assistant turns never
    follow one another.

    Args:
        knows: says whether a template has a role that is none of `ROLES`. None allows all roles.
        ordered: check the order of turns.
    Returns: a copy of plain data. Keys whose value is None are left out; the names that templates
        have for an assistant's reasoning are all there if one is, as in transformers.
    Raises: ValueError naming the message by its number, from 0.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages={messages!r} is not a list of messages; give at least one")
    copied = plain_data(list(messages), "messages")

    # Each message by itself, then its role and place among the others.
    checked: list[Message] = []
    before = None  # role of the last message that is not the system's
    for i, message in enumerate(copied):
        message = _check_message(i, message)
        role = message["role"]
        if knows is not None and role not in ROLES and not knows(role):
            raise ValueError(
                f"message {i} has role={role!r}, which the chat template does not name; it is for "
                f"{', '.join(ROLES)}"
            )
        if ordered:
            _check_order(i, role, before)
        if role != "system":
            before = role
        checked.append(_with_reasoning(message))
    return checked


def _check_message(i: int, message: Any) -> Message:
    """Check a message by itself. Returns: its keys that have a value."""
    if not isinstance(message, dict):
        raise ValueError(f"message {i}={message!r} is not an object with a role and a content")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"message {i} has role={role!r}; give one of {', '.join(ROLES)}")

    # A call of a tool is an answer without a text.
    content = message.get("content")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise ValueError(f"message {i} of role={role!r} has no content")
    if content is not None and not isinstance(content, str | list):
        raise ValueError(f"message {i} has content={content!r}, which is not text")
    return message


def _check_order(i: int, role: str, before: str | None) -> None:
    if before is None and role == "assistant":
        raise ValueError(f"message {i} is the assistant's, and no user's message precedes it")
    if role == before and role in ("user", "assistant"):
        raise ValueError(f"message {i} is a second one of role={role!r} in a row; join the two")


def _with_reasoning(message: Message) -> Message:
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message

    # Templates read the reasoning by one of two names, so the message has both.
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_tools(tools: Any) -> list[Any] | None:
    """Return tools that may be JSON as a text; an empty text means None.

    Raises: ValueError when they are no list.

    Example:
        >>> read_tools('[{"name": "add"}]'), read_tools("")
        ([{'name': 'add'}], None)
    """
    try:
        found = parse_json(tools or "null") if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"tools={tools!r:.60} is not JSON: {error}") from error
    if found is not None and not isinstance(found, list):
        raise ValueError(f"tools={tools!r:.60} is not a list of functions")
    return found


def plain_data(value: Any, what: str) -> Any:
    """Copy a value by JSON, so that templates get plain data of a bounded depth."""
    try:
        return parse_json(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} hold a value that JSON does not have: {error}") from error
