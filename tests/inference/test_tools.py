"""A model asks for a tool, is told what came of it, and goes on: in chat and for clients."""

import json

import pytest
from test_engine import Scripted
from test_server import Running

from base import InputError
from data import Tokenizer
from data.chat import Call, Message, as_text, calls_in, read_messages, render
from inference import chat, serve
from inference.engine import Engine, Request
from inference.options import make_parser
from inference.protocol import ApiError, takes_calls
from inference.sampling import Sampling
from inference.tools import MOST_ROUNDS, Tools

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTES = Tokenizer("bytes", [bytes([i]) for i in range(256)], specials=SPECIALS)
END = BYTES.specials["<|im_end|>"]
MARKED = Tokenizer("bytes", BYTES.tokens, specials=(*SPECIALS, "<tool_call>", "</tool_call>"))
CALL = as_text(Call("python", dict(code="6 * 7")))
TOOLS = [dict(type="function", function=dict(name="python", parameters={}))]
ASK = [dict(role="user", content="6 * 7?")]


def engine_saying(*turns):
    """An Engine whose model says these, one after the other."""
    model = Scripted(BYTES)
    for turn in turns:
        model.script += [*turn.encode(), END]
    return Engine(model, None, BYTES, 1000, part=1000)


class Served(Running):
    """A server of a model that says these turns, with tools of its own or without."""

    def __init__(self, *turns, tools=()):
        super().__init__(engine_saying(*turns), tokens=200, taught=True)
        self.tools = Tools(tools)
        self.server.served = self.server.served._replace(tools=self.tools or None)

    def __exit__(self, *error):
        super().__exit__(*error)
        self.tools.close()

    def ask(self, **options):
        create = self.client().chat.completions.create
        return create(model="tiny", messages=ASK, temperature=0, **options)

    def prompts(self):
        """What the model has read, in turn."""
        return [BYTES.decode(rows[0]) for rows, _ in self.engine.model.seen if len(rows[0]) > 1]


def test_the_server_uses_its_tool_and_shows_the_answer():
    with Served(f"So: {CALL}", "It is 42.", tools=["python"]) as running:
        said = running.ask()
        assert said.choices[0].message.content == "So:It is 42."
        assert said.choices[0].finish_reason == "stop"
        assert said.usage.completion_tokens == len(f"So: {CALL}It is 42.") + 2
        first, second = running.prompts()
        assert second.removeprefix(first) == f"So: {CALL}\ntool\n42\nassistant\n"


def test_in_pieces_it_is_the_same():
    with Served(f"a < b {CALL}", "<tool", "x", tools=["python"]) as running:
        chunks = list(running.ask(stream=True, stream_options=dict(include_usage=True)))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "a < b<tool"
        assert chunks[-1].usage.completion_tokens == len(f"a < b {CALL}<tool") + 2
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_with_tools_gets_the_calls(stream):
    other = as_text(Call("weather", dict(city="Ulm")))
    with Served(f"Well. {CALL}\n{other}", tools=["python"]) as running:
        said = running.ask(tools=TOOLS, stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in said]
            content = "".join(c.delta.content or "" for c in chunks)
            calls = [call for c in chunks for call in c.delta.tool_calls or ()]
            assert [call.index for call in calls] == [0, 1]
            reason = chunks[-1].finish_reason
        else:
            message = said.choices[0].message
            content, calls, reason = (
                message.content,
                message.tool_calls,
                said.choices[0].finish_reason,
            )
    assert content == "Well." and reason == "tool_calls"
    assert [call.function.name for call in calls] == ["python", "weather"]
    assert json.loads(calls[0].function.arguments) == dict(code="6 * 7")
    assert calls[0].type == "function" and calls[0].id != calls[1].id


def test_the_client_goes_on_with_what_its_tool_said():
    with Served(CALL, "42") as running:
        message = running.ask(tools=TOOLS).choices[0].message
        assert message.content is None
        told = dict(role="tool", tool_call_id=message.tool_calls[0].id, content="42")
        said = running.client().chat.completions.create(
            model="tiny", messages=[*ASK, message, told], tools=TOOLS, temperature=0
        )
        assert said.choices[0].message.content == "42"
        first, second = running.prompts()
        assert second.removeprefix(first) == f"{CALL}\ntool\n42\nassistant\n"


@pytest.mark.parametrize(
    "turn, options",
    [
        (CALL, {}),  # nobody has tools
        (CALL, dict(tools=TOOLS, tool_choice="none")),
        ("<tool_call>{not json}</tool_call>", dict(tools=TOOLS)),
        ("<tool_call>[1]</tool_call>", dict(tools=TOOLS)),
        ("a <tool_call> b", dict(tools=TOOLS)),
        ("ends with <tool_c", dict(tools=TOOLS)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_text(turn, options, stream):
    with Served(turn) as running:
        said = running.ask(stream=stream, **options)
        if stream:
            chunks = [chunk.choices[0] for chunk in said]
            assert "".join(c.delta.content or "" for c in chunks) == turn
            assert chunks[-1].finish_reason == "stop"
        else:
            assert said.choices[0].message.content == turn
            assert said.choices[0].message.tool_calls is None


def test_a_model_that_asks_forever_comes_to_an_end():
    with Served(CALL, tools=["python"]) as running:
        said = running.ask()
        assert said.choices[0].message.content == ""
        assert len(running.prompts()) == 1 + MOST_ROUNDS


def test_several_choices_have_tools_each():
    with Served(CALL, "42", tools=["python"]) as running:
        said = running.ask(n=2)
        assert [choice.message.content for choice in said.choices] == ["42", "42"]


@pytest.mark.parametrize("tools", ["x", [1], [{}], [dict(function=dict(name=3))]])
def test_tools_that_are_wrong_are_named(tools):
    with pytest.raises(ApiError, match="tools"):
        takes_calls(dict(tools=tools))


# --- In the terminal


def talk(lines, tools, turns, capsys, monkeypatch):
    """What is said, in a conversation with a model that says these turns."""
    args = make_parser("chat", "", "", 200).parse_args(["--temperature", "0"])
    typed = iter([*lines, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    used = Tools(tools)
    conversation = chat.Conversation(
        engine_saying(*turns), args, lambda: chat.Answered(BYTES), used
    )
    conversation.hold()
    used.close()
    return capsys.readouterr().out, conversation.said.messages


def test_a_conversation_uses_the_calculator(capsys, monkeypatch):
    turns = CALL, "It is 42.", "Bye"
    out, messages = talk(["6 * 7?", "Thanks"], ["python"], turns, capsys, monkeypatch)
    assert out == f"{CALL}\n42\nIt is 42.\nBye\n"
    assert [m.role for m in messages] == [
        "user",
        "assistant",
        "tool",
        *["assistant", "user"],
        "assistant",
    ]
    assert messages[2] == Message("tool", "42")


def test_without_tools_a_call_is_what_it_says(capsys, monkeypatch):
    out, messages = talk(["6 * 7?"], [], [CALL, "no"], capsys, monkeypatch)
    assert out == f"{CALL}\n" and len(messages) == 2


@pytest.mark.parametrize("program", [chat, serve])
def test_a_base_model_and_a_tool_that_is_not_there_are_refused(program, trained, capsys):
    run = str(trained[0].run.run_dir)
    port = [] if program is chat else ["--port", "0"]
    assert program.main(["--run", run, "--tools", "python", *port]) == 2
    assert "is a base model: expected a taught one" in capsys.readouterr().err
    assert program.main(["--run", run, "--tools", "rocket", *port]) == 2
    assert "--tools rocket: expected one of python" in capsys.readouterr().err


# --- Calls as text


def test_marks_are_tokens_where_the_vocabulary_has_them():
    """In what the assistant says; a user who writes them has written text."""
    told = [Message("user", CALL), Message("assistant", f"So {CALL}"), Message("tool", CALL)]
    ids, counts = render(told, MARKED)
    first, last = MARKED.specials["<tool_call>"], MARKED.specials["</tool_call>"]
    assert (ids == first).sum() == (ids == last).sum() == 1
    assert counts[ids == first].all() and counts[ids == last].all()
    plain, _ = render(told, BYTES)
    assert len(plain) - len(ids) == len("<tool_call></tool_call>") - 2
    # And have their text in an answer
    model = Scripted(MARKED)
    said = ids[counts].tolist()
    model.script += said
    engine = Engine(model, None, MARKED, 1000, part=1000)
    [done] = engine.generate([Request((MARKED.eot,), 200, Sampling(temperature=0))])
    assert done.text == f"So {CALL}" and done.written == said


def test_what_a_tool_says():
    tools = Tools(["python"])

    def say(**arguments):
        return tools.result_of(Call("python", arguments))

    assert say(code="print(1)\n2 + 2") == "1\n4"
    assert say(code="x = 1") == "None"
    assert say(code="1 / 0") == "ZeroDivisionError: division by zero"
    assert say(code="print(5); open('x')") == "5\nPermissionError: opens the file x"
    assert say(text="1").startswith("error: expected")
    tools.close()


def test_calls_are_read_as_they_are_written():
    calls = [Call("python", dict(code='print("</b>ü")\n')), Call("f", {})]
    text = "\n".join(["Well.", *map(as_text, calls)])
    assert calls_in(text) == (calls, "Well.")
    said = [
        dict(id="1", type="function", function=dict(name=c.name, arguments=json.dumps(c.arguments)))
        for c in calls
    ]
    message = dict(role="assistant", content=" Well.\n", tool_calls=said)
    assert read_messages([message]) == [Message("assistant", text)]
    said[0]["function"]["arguments"] = calls[0].arguments
    assert read_messages([message]) == [Message("assistant", text)]
    message = dict(role="assistant", content=None, tool_calls=said[1:])
    assert read_messages([message]) == [Message("assistant", as_text(calls[1]))]


@pytest.mark.parametrize(
    "message, where",
    [
        (dict(role="user", tool_calls=[]), "messages[0].tool_calls: expected the assistant's"),
        (dict(role="assistant", tool_calls=[]), "messages[0].tool_calls: expected a list"),
        (dict(role="assistant", tool_calls=[{}]), "messages[0].tool_calls[0]: expected"),
        (
            dict(role="assistant", tool_calls=[dict(function=dict(name="f", arguments="{"))]),
            "messages[0].tool_calls[0].function.arguments: expected a JSON object",
        ),
    ],
)
def test_calls_that_are_wrong_are_named(message, where):
    with pytest.raises(InputError) as error:
        read_messages([message])
    assert str(error.value).startswith(where)
