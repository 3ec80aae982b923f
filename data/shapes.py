"""Lines of well-known data sets as conversations, pairs of them and questions, by their fields.

    {"messages": [...]}                                             OpenAI, SmolTalk
    {"question": ..., "answer": "... #### 18"}                      GSM8K
    {"query": ..., "choices": [...], "gold": 2}                     multiple choice: CORE
    {"ctx": ..., "endings": [...], "label": 2}                      HellaSwag
    {"question": ..., "choices": [...], "answer": 2}                MMLU
    {"question": ..., "choices": {"text": [...], "label": ["A", ...]}, "answerKey": "C"}     ARC
    {"prompt": ..., "chosen": [...], "rejected": [...]}             UltraFeedback: whole
                                                                    conversations beside a prompt

Multiple choice becomes a conversation: the choices under letters, and the letter of the right one
for an answer.
"""

import re
import string

from base import InputError

RESULT = re.compile(r"####\s*(-?[\d.,]+)\s*$")  # of GSM8K's answers
NOTES = re.compile(r"<<[^<>]*>>")  # and what a calculator is to be told
EXPECTED = (
    'expected {"messages": [...]}, GSM8K\'s question and answer, or multiple choice: query, '
    "choices and gold, ctx, endings and label, or question, choices and answer or answerKey"
)


def messages_of_line(said, where):
    """The list of OpenAI's messages that an object stands for. Raises InputError."""
    if "messages" in said:
        return said["messages"]
    if "choices" in said or "endings" in said:
        return multiple_choice(said, where)
    question, answer = said.get("question"), said.get("answer")
    if isinstance(question, str) and isinstance(answer, str):
        return turns(question, NOTES.sub("", answer))
    raise InputError(f"{where}: {EXPECTED}")


def question_of_line(said, where):
    """The same of a question with what is said of its answer beside it: the object, with messages
    that end with the user's and, of GSM8K and multiple choice, the answer alone. Raises
    InputError."""
    if "messages" in said:
        return said
    messages = messages_of_line(said, where)
    answer = messages[-1]["content"]
    if found := RESULT.search(answer):
        answer = found[1].replace(",", "").rstrip(".")
    return said | dict(messages=messages[:-1], answer=answer)


def pair_of_line(said):
    """The object of a pair without its prompt where both answers are whole conversations."""
    sides = [said.get("chosen"), said.get("rejected")]
    whole = all(isinstance(x, list) and len(x) > 1 and begins(x) for x in sides)
    return said | dict(prompt=None) if whole else said


def begins(messages):
    """Whether a conversation begins here."""
    first = messages[0]
    return isinstance(first, dict) and first.get("role") in ("system", "developer", "user")


def turns(question, answer):
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


# --------------------------------------------------------------------------------------------------
# Multiple choice


def multiple_choice(said, where):
    """A question and its choices under letters, answered by the right letter. Raises InputError."""
    asked, choices, right = parts_of(said)
    letters = string.ascii_uppercase
    if not isinstance(asked, str) or not is_texts(choices):
        raise InputError(f"{where}: {EXPECTED}")
    if not 2 <= len(choices) <= len(letters):
        raise InputError(f"{where}: expected 2 to {len(letters)} choices, found {len(choices)}")
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise InputError(
            f"{where}: expected the number of the right choice, from 0 to {len(choices) - 1}, "
            f"found {right!r}"
        )
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(letters, choices)]
    return turns("\n".join([asked.strip(), *lines, "Answer with a letter."]), letters[right])


def parts_of(said):
    """(question, choices, number of the right one) by any of the names that these have."""
    if "endings" in said:
        asked = said.get("ctx", said.get("ctx_a"))
        return asked, said["endings"], number(said.get("label"))
    asked = said.get("query", said.get("question"))
    choices = said["choices"]
    if isinstance(choices, dict):  # ARC
        labels = choices.get("label")
        key = said.get("answerKey")
        right = labels.index(key) if isinstance(labels, list) and key in labels else key
        return asked, choices.get("text"), right
    return asked, choices, number(said.get("gold", said.get("answer")))


def number(said):
    return int(said) if isinstance(said, str) and said.isdecimal() else said


def is_texts(said):
    return isinstance(said, list) and all(isinstance(x, str) for x in said)
