"""Conversations: who said what, and the text that a model reads of it."""

import json
import re
from typing import NamedTuple

import numpy as np

from base import InputError, one_line, to_json

from .shapes import messages_of_line, pair_of_line

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
        if message.get("tool_calls") is not None:
            if role != "assistant":
                raise InputError(f"{where}.tool_calls: expected the assistant's only")
            calls = read_calls(message["tool_calls"], f"{where}.tool_calls")
            text = "\n".join([*([text.strip()] if text.strip() else []), *map(as_text, calls)])
        messages.append(Message(role, text))
    return messages


# --------------------------------------------------------------------------------------------------
# Tools: what an assistant asks for, and in the next turn is told

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = re.compile(f"({OPEN}|{CLOSE})")
CALL = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)


class Call(NamedTuple):
    """A tool that an assistant asks for."""

    name: str
    arguments: dict


def as_text(call):
    """A call as it stands in an assistant's text, as Qwen's and Hermes' models write them:
    <tool_call>, {"name": ..., "arguments": {...}} and </tool_call>, a line each."""
    said = to_json(call._asdict(), ensure_ascii=False)
    return f"{OPEN}\n{said}\n{CLOSE}"


def calls_in(text):
    """([Call, ...], the text without them) of what an assistant says; without any where one of them
    is not what as_text() makes."""
    calls = []
    for said in CALL.findall(text):
        try:
            call = json.loads(said)
        except (ValueError, RecursionError):
            return [], text
        right = isinstance(call, dict) and isinstance(call.get("name"), str)
        if not right or not isinstance(call.get("arguments"), dict):
            return [], text
        calls.append(Call(call["name"], call["arguments"]))
    return calls, CALL.sub("", text).strip() if calls else text


def read_calls(said, where):
    """[Call, ...] from a message's tool_calls as OpenAI's protocol has them, where arguments are
    JSON in a text; an object will do. Raises InputError."""
    if not isinstance(said, list) or not said:
        raise InputError(f"{where}: expected a list of one or more calls")
    calls = []
    for i, call in enumerate(said):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise InputError(f"{where}[{i}]: expected {expected}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise InputError(f"{where}[{i}].function.arguments: expected a JSON object in a text")
        calls.append(Call(function["name"], arguments))
    return calls


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


# --------------------------------------------------------------------------------------------------
# As a taught model reads it: ChatML, in tokens

START, END = "<|im_start|>", "<|im_end|>"


def render(messages, tokenizer):
    """A conversation in ChatML: (ids, counts), two arrays of one length.

    <|im_start|>role, a new line, the text and <|im_end|>, a new line after each message, all behind
    end-of-text. counts: whether a token is one that the assistant says, its <|im_end|> included:
    what teaching is about. Texts are taken without white space around them, so that a header is
    made of the same tokens whatever follows. The marks of a tool's call are tokens of their own in
    what the assistant says, where the vocabulary has them. Raises InputError where the tokenizer
    has no chat tokens.
    """
    start, end = chat_tokens(tokenizer)
    headers = tokenizer.encode([f"{message.role}\n" for message in messages])
    texts = tokenizer.encode([message.text.strip() for message in messages])
    for i, message in enumerate(messages):
        if message.role == "assistant" and OPEN in message.text and OPEN in tokenizer.specials:
            texts[i] = with_marks(message.text.strip(), tokenizer)
    (line_end,) = tokenizer.encode(["\n"])
    parts = [([tokenizer.eot], False)]
    for message, header, text in zip(messages, headers, texts):
        said = message.role == "assistant"
        parts += [([start], False), (header, False), (text, said), ([end], said), (line_end, False)]
    ids = np.concatenate([np.asarray(part, dtype=tokenizer.dtype) for part, _ in parts])
    counts = np.repeat([said for _, said in parts], [len(part) for part, _ in parts])
    return ids, counts


def with_marks(text, tokenizer):
    """Ids of a text in which <tool_call> and </tool_call> are tokens."""
    ids = []
    for piece in MARKS.split(text):
        if piece in (OPEN, CLOSE):
            ids.append(tokenizer.specials[piece])
        elif piece:
            ids += tokenizer.encode([piece])[0].tolist()
    return np.asarray(ids, dtype=tokenizer.dtype)


def prompt_of(messages, tokenizer):
    """Ids that a model goes on from with the assistant's next message. Raises InputError."""
    start, _ = chat_tokens(tokenizer)
    (header,) = tokenizer.encode(["assistant\n"])
    return [*render(messages, tokenizer)[0].tolist(), start, *header.tolist()]


def chat_tokens(tokenizer):
    """Ids of <|im_start|> and <|im_end|>. Raises InputError where there are none."""
    if not knows_chat(tokenizer):
        raise InputError(
            f"the vocabulary has no {START}: expected a model that was taught with ./run.sh sft"
        )
    return tokenizer.specials[START], tokenizer.specials[END]


def knows_chat(tokenizer):
    """Whether conversations can be written with a vocabulary."""
    return START in tokenizer.specials and END in tokenizer.specials


# --------------------------------------------------------------------------------------------------
# Files of conversations


def read_conversations(path, left_out=None):
    """Yield the messages of each line of a .jsonl file, or row of a .parquet file, in one of the
    forms that shapes.py has. Raises InputError, which names the line; left_out: as of_lines()."""
    return of_lines(path, conversation, left_out)


def of_lines(path, read, left_out=None):
    """Yield read(line, where) for each line of a .jsonl file, or row of a .parquet file.

    left_out: a list that gets the errors of what cannot be learned from; None raises the first one,
    an InputError.
    """
    for line, where in rows_of_parquet(path) if is_parquet(path) else lines_of(path):
        try:
            found = read(line, where)
        except InputError as e:
            if left_out is None:
                raise
            left_out.append(e)
            continue
        yield found


def is_parquet(path):
    return str(path).lower().endswith(".parquet")


def lines_of(path):
    """Yield (line, where) of a file, but for empty ones. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, start=1):
                if line.strip():
                    yield line, f"{path}:{number}"
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected UTF-8, found byte {e.object[e.start]:#04x}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from None


def rows_of_parquet(path):
    """Yield (object, where) of the rows of a file. Raises InputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: reading it needs pyarrow; .venv/bin/pip install -r requirements-data.txt"
        ) from None

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            for batch in f.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:{number}"
    except (pyarrow.ArrowException, OSError) as e:
        said = one_line(e, 200)
        raise InputError(f"{path}: cannot be read after row {number}: {said}") from None


def object_of(line, where, keys, example):
    """The object of a line of JSON, or of a row that is one, that has these keys; example: what is
    expected. Raises InputError."""
    try:
        said = json.loads(line) if isinstance(line, str) else line
    except ValueError as e:
        raise InputError(f"{where}: expected a line of JSON: {e}") from None
    if not isinstance(said, dict) or not keys <= said.keys():
        raise InputError(f"{where}: expected {example}")
    return said


def conversation(line, where):
    """[Message, ...] of a line, checked to be one that can be learned from. Raises InputError."""
    said = messages_of_line(object_of(line, where, set(), '{"messages": [...]}'), where)
    try:
        messages = read_messages(said)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    check_order(messages, where)
    return messages


def check_order(messages, where):
    """Refuse roles out of order, answers without a text, and a conversation without an answer at
    its end. Raises InputError."""
    check_turns(messages, where)
    last = messages[-1].role
    if last != "assistant":
        raise InputError(f"{where}: expected the assistant's message last, found {last}'s")


def check_turns(messages, where):
    """Refuse roles out of order and messages without a text. Raises InputError."""
    before = None
    for i, message in enumerate(messages):
        allowed = FOLLOWS[before]
        if message.role not in allowed:
            after = f" after {before}" if before else " first"
            raise InputError(
                f"{where}: messages[{i}].role: expected {' or '.join(allowed)}{after}, found "
                f"{message.role}"
            )
        if message.role in ("user", "assistant") and not message.text.strip():
            raise InputError(f"{where}: messages[{i}].content: expected a text, found none")
        before = message.role


# Who may speak after whom; a tool answers what an assistant asked of it
FOLLOWS = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


# --------------------------------------------------------------------------------------------------
# Pairs of answers to the same conversation, one preferred to the other


class Pair(NamedTuple):
    """Two conversations that differ in their last message."""

    chosen: list
    rejected: list


def pair(line, where):
    """The Pair of a line: {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of
    messages; without a prompt, chosen and rejected are whole conversations that begin alike. Raises
    InputError, which names the place."""
    example = '{"prompt": ..., "chosen": ..., "rejected": ...}'
    said = pair_of_line(object_of(line, where, {"chosen", "rejected"}, example))
    before = []
    if said.get("prompt") is not None:
        before = messages_of(said["prompt"], "user", f"{where}: prompt")
    sides = []
    for name in "chosen", "rejected":
        messages = before + messages_of(said[name], "assistant", f"{where}: {name}")
        check_order(messages, f"{where}: {name}")
        sides.append(messages)
    found = Pair(*sides)
    if found.chosen[:-1] != found.rejected[:-1]:
        raise InputError(f"{where}: chosen and rejected answer different conversations")
    if found.chosen[-1].text.strip() == found.rejected[-1].text.strip():
        raise InputError(f"{where}: chosen and rejected are equal: expected two different answers")
    return found


def messages_of(said, role, where):
    """[Message, ...] of a text or a list of messages. Raises InputError."""
    if isinstance(said, str):
        return [Message(role, said)]
    try:
        return read_messages(said)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None


def read_pairs(path, left_out=None):
    """Yield the Pairs of a .jsonl or .parquet file. Raises InputError, which names the line;
    left_out: as of_lines()."""
    return of_lines(path, pair, left_out)


def render_pair(found, tokenizer):
    """(ids, counts) of both conversations, one after the other; the last message of each counts."""
    ids = []
    counts = []
    for messages in found:
        tokens, said = render(messages, tokenizer)
        before, _ = render(messages[:-1], tokenizer)
        said[: len(before)] = False
        ids.append(tokens)
        counts.append(said)
    return np.concatenate(ids), np.concatenate(counts)
