"""Conversations: who said what, and the text that a model reads of it."""

from typing import NamedTuple

from base import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # one of ROLES
    text: str


def read_messages(said):
    """[Message, ...] from a list of objects as OpenAI's protocol has them.

    Content is a text or a list of parts, whose texts are joined. Raises InputError, which begins
    with the place of what is wrong, such as messages[2].role.
    """
    if not isinstance(said, list) or not said:
        raise InputError("messages: expected a list of one or more messages")
    messages = []
    for i, message in enumerate(said):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: expected an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"{where}.role: expected one of {', '.join(ROLES)}")
        text = text_of(message.get("content"), f"{where}.content")
        messages.append(Message(role, text))
    return messages


def text_of(content, where):
    """The text of a message's content. Raises InputError."""
    if content is None:  # of an assistant that called a tool
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}: expected a text, or a list of parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
            raise InputError(f'{where}[{i}]: expected {{"type": "text", "text": ...}}')
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}[{i}].text: expected a text")
        texts.append(part["text"])
    return "".join(texts)


def as_plain_text(messages):
    """A conversation for a model that was trained on text alone and knows no roles: each message
    begins a new line, and the model goes on where the last one ends."""
    text = ""
    for message in messages:
        if text and not text.endswith("\n"):
            text += "\n"
        text += message.text
    return text
