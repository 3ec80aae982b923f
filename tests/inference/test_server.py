"""The server as its clients see it: the openai package, curl, and those that know no manners."""

import asyncio
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
import torch
import uvicorn
from helpers import ROOT, stage_of, tiny_model
from test_engine import BPE, ENDLESS, Scripted

from data import Tokenizer
from inference import serve
from inference.engine import Engine, Request
from inference.protocol import Served
from inference.sampling import Sampling
from inference.server import Limits, Server

KEEP_ON = {str(BPE.eot): -100}  # a logit bias
PARTS = dict(n_layer=1, value_embed_layers=(), n_gram=2, smear=True)


@pytest.fixture(scope="module")
def small():
    c, model = tiny_model(n_vocab=BPE.n_vocab, max_len=64, **PARTS)
    return model, stage_of(c, max_doc_len=64)


def engine_of(small, **about):
    return Engine(*small, BPE, 64, **about)


NO_LIMITS = Limits()


class Running:
    """A server in a thread of its own."""

    def __init__(self, engine, limits=NO_LIMITS, tokens=16, taught=False, **options):
        served = Served("tiny", taught, engine.tokenizer, engine.max_len, {}, (), tokens, 500)
        self.server = Server(engine, served, dict(kind="base"), limits, **options)
        self.engine = engine
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.server.app,
            http="h11",
            ws="none",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        self.uvicorn = uvicorn.Server(config)
        self.loop = None
        self.thread = threading.Thread(target=asyncio.run, args=(self.serve(),))

    async def serve(self):
        self.loop = asyncio.get_running_loop()
        await self.uvicorn.serve([self.socket])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def client(self, key="any", **options):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options
        )

    def call(self, path, body=None, method=None, **headers):
        """(status, headers, body) of a request; body: bytes, or what becomes JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as e:
            return e.code, e.headers, e.read()

    def complete(self, **body):
        status, _, said = self.call("/v1/completions", body)
        assert status == 200, said
        return json.loads(said)

    def until_idle(self, seconds=10):
        """Wait until the engine has nothing to do."""
        until = time.monotonic() + seconds
        while self.engine.busy() or self.server.worker.jobs:
            assert time.monotonic() < until, "still busy"
            time.sleep(0.005)
        assert self.engine.cache.lengths == []


@pytest.fixture(scope="module")
def running(small):
    with Running(engine_of(small)) as running:
        yield running


@pytest.fixture
def client(running):
    return running.client()


def expected(small, prompt, n=16, seed=0, **options):
    sampling = Sampling(**options, logit_bias=ENDLESS)
    [done] = engine_of(small).generate([Request(prompt, n, sampling, seed)])
    return done


# --- The openai package


def test_a_completion_is_the_engines(small, client):
    said = client.completions.create(
        model="tiny", prompt="def foo", seed=3, temperature=0.9, logit_bias=KEEP_ON
    )
    ours = expected(small, "def foo", seed=3, temperature=0.9, repetition_penalty=1.2,
                    no_repeat_ngram=4, top_p=0.9)  # fmt: skip
    assert said.choices[0].text == ours.text
    assert said.choices[0].finish_reason == "length"
    assert said.object == "text_completion" and said.model == "tiny"
    assert said.usage.completion_tokens == 16
    assert said.usage.total_tokens == 16 + said.usage.prompt_tokens


@pytest.mark.parametrize("chat", [True, False])
def test_in_pieces_it_is_what_it_is_whole(client, chat):
    options = dict(model="tiny", seed=5, n=2, max_tokens=40, logit_bias=KEEP_ON)
    if chat:
        create = client.chat.completions.create
        options |= dict(messages=[dict(role="user", content="def ")])
        options |= dict(logprobs=True, top_logprobs=2)
    else:
        create = client.completions.create
        options |= dict(prompt="def ", logprobs=2)
    whole = create(**options)
    texts = ["", ""]
    reasons = [None, None]
    logprobs = [[], []]
    chunks = list(create(**options, stream=True, stream_options=dict(include_usage=True)))
    assert len({(c.id, c.created, c.object) for c in chunks}) == 1
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        assert chunk.usage is None and "usage" in chunk.model_fields_set
        text = choice.delta.content if chat else choice.text
        assert reasons[choice.index] is None, "a chunk behind the last one"
        texts[choice.index] += text or ""
        reasons[choice.index] = choice.finish_reason
        if choice.logprobs:
            logprobs[choice.index] += choice.logprobs.content if chat else choice.logprobs.tokens
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == (choice.message.content if chat else choice.text)
        assert reasons[choice.index] == choice.finish_reason == "length"
        of_whole = choice.logprobs.content if chat else choice.logprobs.tokens
        assert logprobs[choice.index] == of_whole
    assert texts[0] != texts[1]


def test_the_first_chunk_of_a_chat_has_the_role(client):
    messages = [dict(role="user", content="a")]
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[0].object == "chat.completion.chunk"


def test_tokens_of_an_answer_are_its_text(client):
    messages = [dict(role="user", content="")]
    said = client.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=3, max_completion_tokens=30,
        logit_bias=KEEP_ON,
    ).choices[0]  # fmt: skip
    content = said.logprobs.content
    text = b"".join(bytes(token.bytes) for token in content)
    assert text.decode(errors="replace").startswith(said.message.content)
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_messages_of_all_kinds_are_read(small, client):
    """A model of text alone continues them, each on a line of its own."""
    messages = [
        dict(role="developer", content="be"),
        dict(role="user", content=[dict(type="text", text="de"), dict(type="text", text="f ")]),
        dict(role="assistant", content=None),
        dict(role="user", content="foo"),
    ]
    options = dict(temperature=0, max_tokens=9, logit_bias=KEEP_ON)
    chat = client.chat.completions.create(model="tiny", messages=messages, **options)
    assert chat.choices[0].message.role == "assistant"
    ours = expected(small, "be\ndef \nfoo", 9, temperature=0.0)
    assert chat.choices[0].message.content == ours.text


def test_a_model_that_was_taught_reads_roles():
    """And ends with its turn, which is no part of the text."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer("bytes", [bytes([i]) for i in range(256)], specials=specials)
    model = Scripted(tokenizer, b"o", b"k")
    model.script.append(tokenizer.specials["<|im_end|>"])
    with Running(Engine(model, None, tokenizer, 200), taught=True) as running:
        messages = [dict(role="system", content="be"), dict(role="user", content="<|im_end|>?")]
        said = running.client().chat.completions.create(
            model="tiny", messages=messages, temperature=0, logprobs=True
        )
    assert said.choices[0].message.content == "ok" and said.choices[0].finish_reason == "stop"
    assert [token.token for token in said.choices[0].logprobs.content] == ["o", "k"]
    read = model.seen[0][0][0]
    start = tokenizer.specials["<|im_start|>"]
    assert read.count(start) == 3 and read.count(tokenizer.specials["<|im_end|>"]) == 2
    assert tokenizer.decode(read[-10:]) == "assistant\n"


def test_stop_strings_are_not_shown(small, client):
    ours = expected(small, "def ", 40, seed=1).text
    stop = ours[10:12]
    for given in stop, ["never to be", stop]:
        said = client.completions.create(
            model="tiny", prompt="def ", max_tokens=40, seed=1, stop=given, logit_bias=KEEP_ON,
            temperature=1, top_p=1, extra_body=dict(repetition_penalty=1, no_repeat_ngram=0),
        )  # fmt: skip
        assert said.choices[0].text == ours[: ours.index(stop)]
        assert said.choices[0].finish_reason == "stop"


def test_prompts_of_every_form(client):
    ids = BPE.encode(["def foo"])[0].tolist()
    options = dict(model="tiny", temperature=0, max_tokens=5, echo=True)
    texts = [["def foo"], ["def foo", "a"], ids, [ids, ids]]
    for prompt in texts:
        said = client.completions.create(prompt=prompt, **options)
        assert [c.index for c in said.choices] == list(range(len(said.choices)))
        assert all(c.text.startswith(("def foo", "a")) for c in said.choices)
    assert len(said.choices) == 2 and said.choices[0].text == said.choices[1].text


def test_a_prompt_is_scored(small, client):
    """What evaluations ask for: log probabilities of a prompt's own tokens."""
    ids = BPE.encode(["def foo foot return"])[0].tolist()
    model, stage = small
    whole = torch.tensor([0, len(ids) + 1], dtype=torch.int32)
    with torch.no_grad():
        logits = model.logits(torch.tensor([[BPE.eot, *ids]]), whole, stage)[0]
    logprobs = logits.log_softmax(-1)
    for prompt, n in [(ids, 1), ("def foo foot return", 0), ([BPE.eot, *ids], 0)]:
        said = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=n, logprobs=1, echo=True, temperature=0
        )
        got = said.choices[0].logprobs
        first = int(prompt[0] == BPE.eot)  # where end-of-text is a token of the prompt's own
        assert got.token_logprobs[0] is None
        for i in range(1, len(ids)):
            own = logprobs[i, ids[i]].item()
            assert got.token_logprobs[i + first] == pytest.approx(own, abs=1e-4)
            best = max(got.top_logprobs[i + first].values())
            assert best == pytest.approx(logprobs[i].max().item(), abs=1e-4)
        assert len(got.tokens) == len(ids) + first + n
        assert "".join(got.tokens[first : len(ids) + first]) == "def foo foot return"
        if n:
            assert got.text_offset[-1] == len("def foo foot return")


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "tiny" and model.object == "model"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("other")


# --- Errors


@pytest.mark.parametrize(
    ["fields", "param"],
    [
        (dict(temperature=-1), "temperature"),
        (dict(temperature="hot"), "temperature"),
        (dict(top_p=1.5), "top_p"),
        (dict(n=0), "n"),
        (dict(n=True), "n"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(stop=[""]), "stop"),
        (dict(stop=["a"] * 99), "stop"),
        (dict(logit_bias={"x": 1}), "logit_bias"),
        (dict(logit_bias={"99999": 1}), "logit_bias"),
        (dict(prompt=[99999]), "prompt"),
        (dict(prompt=[]), "prompt"),
        (dict(prompt=["a"] * 65), "prompt"),
        (dict(prompt=[["a"]]), "prompt"),
        (dict(prompt="\ud800"), "prompt"),
        (dict(logprobs=21), "logprobs"),
        (dict(best_of=2), "best_of"),
        (dict(suffix="x"), "suffix"),
        (dict(seed=1.5), "seed"),
        (dict(frequency_penalty=3), "frequency_penalty"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(temperature=10**400), "temperature"),
    ],
    ids=str,
)
def test_a_field_that_is_wrong_is_named(running, fields, param):
    status, _, said = running.call("/v1/completions", dict(prompt="a") | fields)
    error = json.loads(said)["error"]
    assert status == 400 and error["param"] == param
    assert error["type"] == "invalid_request_error" and error["message"].startswith(param)


@pytest.mark.parametrize(
    ["messages", "where"],
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ([1], "messages[0]"),
        ([dict(role="king", content="a")], "messages[0].role"),
        ([dict(content="a")], "messages[0].role"),
        ([dict(role="user", content=3)], "messages[0].content"),
        ([dict(role="user", content=[dict(type="image_url")])], "messages[0].content[0]"),
        ([dict(role="user", content=[dict(type="text")])], "messages[0].content[0].text"),
        ([dict(role="user", content="\ud800")], "messages"),
    ],
    ids=str,
)
def test_a_message_that_is_wrong_is_named(running, messages, where):
    status, _, said = running.call("/v1/chat/completions", dict(messages=messages))
    assert status == 400 and json.loads(said)["error"]["message"].startswith(where + ":")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a":NaN}', b"\xff\xfe", b"[" * 10**5])
def test_a_body_that_is_no_object(running, body):
    status, _, said = running.call("/v1/completions", body)
    assert status == 400 and json.loads(said)["error"]["message"].startswith("body: ")


def test_what_is_null_or_unknown_is_as_if_it_were_not_there(running):
    body = dict(prompt="a", temperature=0, max_tokens=4)
    null = dict(n=None, stop=None, stream=None, logprobs=None, user="me", tools=[], metadata={})
    assert running.complete(**body, **null)["choices"] == running.complete(**body)["choices"]


def test_errors_have_the_clients_classes(running, client):
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert e.value.param == "temperature"
    assert running.call("/v1/completions", method="GET")[0] == 405
    assert running.call("/v2/nothing", {})[0] == 404
    for path in "/v1/completions", "/v2/nothing":
        assert json.loads(running.call(path, method="PUT")[2])["error"]["message"]


def test_of_a_prompt_that_is_too_long_it_says_what_is_cut(client):
    long = "a" * 200
    said = client.completions.create(model="tiny", prompt=long, max_tokens=2)
    # End-of-text and 200 bytes, the last of which is drawn again
    assert said.usage.prompt_tokens_cut == 200 - 64 and said.usage.prompt_tokens == 65
    for extra in dict(extra_body=dict(truncation="disabled")), dict(echo=True, logprobs=0):
        with pytest.raises(openai.BadRequestError, match="looks back at 64") as e:
            client.completions.create(model="tiny", prompt=long, max_tokens=2, **extra)
        assert e.value.code == "context_length_exceeded"


def test_a_character_that_the_tokenizer_does_not_know():
    chars = Tokenizer("chars", list("ab"))
    with Running(Engine(Scripted(chars, "a"), None, chars, 64)) as running:
        with pytest.raises(openai.BadRequestError, match="'Q'"):
            running.client().completions.create(model="tiny", prompt="Q")


def test_the_key(small):
    with Running(engine_of(small), api_key="secret") as running:
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").completions.create(model="tiny", prompt="a")
        assert running.client("secret").models.list().data
        assert running.call("/metrics")[0] == 401
        assert running.call("/health")[0] == running.call("/health")[0] == 200


def test_a_body_that_is_too_large(small):
    with Running(engine_of(small), Limits(body=1000)) as running:
        assert running.call("/v1/completions", dict(prompt="a" * 990))[0] == 413
        assert running.call("/v1/completions", dict(prompt="a" * 900))[0] == 200


def test_when_it_is_full_it_says_so_and_when_to_come_again(small):
    with Running(engine_of(small, places=1), Limits(queue=2)) as running:
        status, headers, said = running.call("/v1/completions", dict(prompt="a", n=4))
        assert status == 503 and int(headers["Retry-After"]) > 0
        assert json.loads(said)["error"]["code"] == "overloaded"
        # One has the place, two wait
        assert running.call("/v1/completions", dict(prompt="a", n=3))[0] == 200


def test_time_is_limited(small):
    """Whose turn has not come by then is told so, others have what there is."""
    with Running(engine_of(small, places=1), Limits(seconds=0.5)) as running:
        body = dict(prompt="a", max_tokens=500, n=2, logit_bias=KEEP_ON)
        slow = running.engine.step
        running.engine.step = lambda: time.sleep(0.05) or slow()
        said = running.complete(**body)
        first, second = said["choices"]
        assert first["text"] and first["finish_reason"] == "length"
        assert said["usage"]["completion_tokens"] < 500 and second["text"] == ""

        running.until_idle()
        long = threading.Thread(target=lambda: running.complete(**body | dict(n=1)))
        long.start()
        while not running.engine.live:
            time.sleep(0.005)
        running.server.worker.seconds = 0.1
        status, headers, said = running.call("/v1/completions", dict(prompt="a", stream=True))
        assert status == 503 and b"before its turn" in said and headers["Retry-After"]
        long.join()


def test_a_failure_is_of_those_whose_step_it_was(small, capsys):
    """They are told, in a stream as a line of its own; the next request is answered."""
    with Running(engine_of(small)) as running:
        client = running.client()
        step = running.engine.step
        n = 0

        def failing():
            nonlocal n
            n += 1
            if n == 5:
                raise RuntimeError("it broke")
            return step()

        running.engine.step = failing
        options = dict(model="tiny", prompt="def ", logit_bias=KEEP_ON)
        text = ""
        with pytest.raises(openai.APIError, match="the server failed"):
            for chunk in client.completions.create(**options, stream=True):
                text += chunk.choices[0].text
        assert text
        n = 4
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**options)
        assert client.completions.create(**options).choices[0].text
    assert "RuntimeError: it broke" in capsys.readouterr().err


# --- Web pages of others


def test_pages_of_this_machine_may_call_and_others_may_not(running):
    ask = dict(Access_Control_Request_Method="POST", Access_Control_Request_Headers="content-type")
    for origin, allowed in [
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
    ]:
        status, headers, _ = running.call("/v1/completions", None, "OPTIONS", Origin=origin, **ask)
        assert (status == 200) == allowed
        assert (headers.get("Access-Control-Allow-Origin") == origin) == allowed
        body = dict(prompt="a", max_tokens=1)
        status, headers, said = running.call("/v1/completions", body, Origin=origin)
        assert status == (200 if allowed else 403)
    # A page whose name has come to mean this machine
    assert running.call("/v1/models", Host="evil.example")[0] == 403
    assert running.call("/v1/models", Host=f"localhost:{running.port}")[0] == 200


def test_origins_that_are_named(small):
    with Running(engine_of(small), origins=("https://a.example",)) as running:
        for origin, status in [("https://a.example", 200), ("https://b.example", 403)]:
            assert running.call("/v1/models", Origin=origin)[0] == status


# --- Who goes


def raw(running, body, path="/v1/completions"):
    """A socket on which a request was sent."""
    s = socket.create_connection(("127.0.0.1", running.port))
    body = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    s.sendall(head.encode() + body)
    return s


@pytest.mark.parametrize("stream", [True, False])
def test_when_a_client_goes_its_place_is_free(small, stream):
    with Running(engine_of(small)) as running:
        slow = running.engine.step
        running.engine.step = lambda: time.sleep(0.01) or slow()
        body = dict(prompt="a", max_tokens=500, logit_bias=KEEP_ON, stream=stream)
        s = raw(running, body)
        if stream:
            assert s.recv(100)
        while not running.engine.live:
            time.sleep(0.005)
        s.close()
        running.until_idle(2)  # 500 tokens would take 5 s
        assert running.server.worker.n_written < 200
        assert running.complete(prompt="b", max_tokens=2)


def test_half_a_request_holds_up_nobody(running):
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"):
        with socket.create_connection(("127.0.0.1", running.port)) as s:
            s.sendall(sent)
            assert running.complete(prompt="a", max_tokens=1)


# --- Many at once


def test_several_clients_at_once_have_what_each_has_alone(small):
    check_crowd(small, clients=8, requests=12)


@pytest.mark.slow
def test_no_request_of_a_crowd_is_lost(small):
    check_crowd(small, clients=32, requests=400)


def check_crowd(small, clients, requests):
    """Some stream, some go before the end; the others have the text of their seeds."""
    answers = {}
    with Running(engine_of(small, places=8), Limits(queue=1000)) as running:
        todo = list(range(requests))

        def work():
            client = running.client()
            while True:
                try:
                    i = todo.pop()
                except IndexError:
                    return
                options = dict(model="tiny", prompt="def " * (i % 4), seed=i, max_tokens=5 + i % 20)
                options |= dict(temperature=0.8, logit_bias=KEEP_ON)
                if i % 3 == 0:
                    answers[i] = client.completions.create(**options).choices[0].text
                    continue
                text = ""
                with client.completions.create(**options, stream=True) as stream:
                    for chunk in stream:
                        text += chunk.choices[0].text
                        if i % 5 == 1:
                            break
                answers[i] = text

        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        running.until_idle()
        counted = running.call("/metrics")[2].decode()
        engine = running.engine
    assert sorted(answers) == list(range(requests))
    for i, text in random.Random(0).sample(sorted(answers.items()), 12):
        ours = expected(
            small, "def " * (i % 4), 5 + i % 20, i, temperature=0.8, top_p=0.9,
            repetition_penalty=1.2, no_repeat_ngram=4,
        ).text  # fmt: skip
        assert ours.startswith(text) if i % 5 == 1 and i % 3 else ours == text
    assert f'path="/v1/completions",status="200"}} {requests}\n' in counted
    assert engine.cache.kv == {} and not engine.waiting


# --- Bad requests by the hundred


def test_it_survives_bad_requests(running):
    fuzz(running, 200)


@pytest.mark.slow
def test_it_survives_ten_thousand_bad_requests(running):
    fuzz(running, 10_000)


def fuzz(running, n):
    """Every answer is OpenAI's, an error or not, and after all of them it works as before."""
    before = running.complete(prompt="def ", temperature=0)["choices"]
    r = random.Random(n)
    statuses = set()
    for _ in range(n):
        path, body = bad_request(r)
        status, _, said = running.call(path, body)
        statuses.add(status)
        assert status in (200, 400, 404, 405, 413), (status, body, said)
        if status != 200:
            error = json.loads(said)["error"]
            assert error["message"] and error["type"] == "invalid_request_error"
    assert {200, 400, 404} <= statuses
    running.until_idle()
    assert running.complete(prompt="def ", temperature=0)["choices"] == before


NAMES = (
    "prompt messages temperature top_p n stream stop max_tokens max_completion_tokens seed "
    "logprobs top_logprobs logit_bias echo best_of suffix stream_options response_format model "
    "top_k min_p repetition_penalty no_repeat_ngram frequency_penalty presence_penalty truncation "
    "user tools"
).split()
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e308, 1e-320, 10**30, 10**400, -(10**400), "",
    "a", "def ", "x" * 3000, "\ud800", "\x00", "é🙂", "auto", [], [1], [[1]], [[]], [-1], [256],
    ["a"], ["a", 1], [None], {}, {"a": 1}, {"1": 100}, {"1": "x"}, {"include_usage": 1},
    {"type": "json"}, {"include_usage": True}, [{"role": "user", "content": "a"}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user"}], [{}],
    [[[[[[]]]]]], 2**63, 3.0, "stop", ["\n"],
]  # fmt: skip


def bad_request(r):
    """(path, body) of a request that somebody could send."""
    path = r.choice(["/v1/completions", "/v1/chat/completions"])
    body = dict(max_tokens=r.randint(1, 3))
    if r.random() < 0.7:
        body |= dict(prompt="a", messages=[dict(role="user", content="a")])
    for name in r.sample(NAMES, r.randint(0, 4)):
        body[name] = r.choice(VALUES)
    body.setdefault("max_tokens", 2)
    if type(body.get("max_tokens")) is int:
        body["max_tokens"] = min(body["max_tokens"], 20)
    text = json.dumps(body).encode()
    kind = r.random()
    if kind < 0.1:
        text = text[: r.randrange(len(text))]
    elif kind < 0.2:
        at = r.randrange(len(text))
        text = text[:at] + bytes([r.randrange(256)]) + text[at + 1 :]
    elif kind < 0.23:
        text = r.randbytes(r.randint(1, 300))
    elif kind < 0.27:
        path = r.choice(["/v1/", "/v1/complet%69ons/x", "/v1/models", "/%00", "/page.css"])
    return path, text


# --- What else is there


def test_health_and_metrics(running):
    running.complete(prompt="a", max_tokens=3, logit_bias=KEEP_ON)
    running.until_idle()
    assert json.loads(running.call("/health")[2])["status"] == "ok"
    _, headers, text = running.call("/metrics")
    assert headers["Content-Type"].startswith("text/plain")
    values = {}
    for line in text.decode().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    assert values["stopwatch_requests_running"] == 0
    assert values["stopwatch_generated_tokens_total"] >= 3
    assert values["stopwatch_first_text_seconds_count"] >= 1
    assert values['stopwatch_request_seconds_bucket{le="+Inf"}'] >= 1


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl(running):
    def curl(*argv):
        done = subprocess.run(["curl", "-sSN", *argv], capture_output=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    body = json.dumps(dict(prompt="def ", max_tokens=4, stream=True, logit_bias=KEEP_ON))
    said = curl(f"{running.url}/v1/completions", "-d", body)
    lines = said.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-2])
    head = curl("-i", f"{running.url}/v1/completions", "-d", body)
    assert "content-type: text/event-stream; charset=utf-8" in head
    assert "cache-control: no-cache" in head


def test_characters_come_whole_in_a_stream():
    script = [bytes([b]) for b in "aé🙂".encode()]
    bytes_ = Tokenizer("bytes", [bytes([i]) for i in range(256)])
    with Running(Engine(Scripted(bytes_, *script), None, bytes_, 64)) as running:
        stream = running.client().completions.create(
            model="tiny", prompt="", max_tokens=7, temperature=0, stream=True, logprobs=0
        )
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(c.text for c in chunks) == "aé🙂"
    assert "\ufffd" not in "".join(c.text for c in chunks)
    tokens = [t for c in chunks if c.logprobs for t in c.logprobs.tokens]
    assert tokens == [
        "a",
        "bytes:\\xc3",
        "bytes:\\xa9",
        *(f"bytes:\\x{b:02x}" for b in "🙂".encode()),
    ]


# --- The command


@pytest.mark.parametrize(
    ["argv", "message"],
    [
        (["--places", 0], "--places 0: expected a positive number"),
        (["--max-seconds", "nan"], "--max-seconds nan: expected a positive number"),
        (["--port", 99999], "--port 99999: expected 0 to 65535"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid"),
        (["--api-key", ""], "--api-key: expected a text"),
        (["--run", "/nowhere", "--port", 0], "expected the folder of a finished run"),
        (["--temperature", -1], "--temperature -1.0: expected"),
    ],
    ids=str,
)
def test_options_that_are_wrong(capsys, argv, message):
    assert serve.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--port {port}: Address already in use" in err


def test_loopback():
    assert all(map(serve.is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(serve.is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.org"]))


def test_what_runs_has_a_moment_when_the_server_ends(small):
    """Then it is told; who comes meanwhile is told so at once."""
    with Running(engine_of(small)) as running:
        step = running.engine.step
        running.engine.step = lambda: time.sleep(0.02) or step()
        client = running.client()
        options = dict(model="tiny", prompt="def ", logit_bias=KEEP_ON, stream=True)
        short = client.completions.create(**options, max_tokens=10)
        long = client.completions.create(**options, max_tokens=400)
        finish = running.server.worker.finish(0.8, at_once=lambda: False)
        ended = asyncio.run_coroutine_threadsafe(finish, running.loop)
        assert sum(len(c.choices[0].text) > 0 for c in short) > 1
        assert running.call("/v1/completions", dict(prompt="a"))[0] == 503
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(long)
        ended.result(10)


@pytest.mark.slow
def test_ctrl_c_ends_it(trained):
    """With status 0 and nothing but its own lines, even in the middle of an answer."""
    argv = [sys.executable, "door.py", "serve", "--run", trained[0].run.run_dir, "--port", "0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*map(str, argv)], cwd=ROOT, **pipes) as process:
        url = json.loads(process.stdout.readline())["url"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        bias = {client.models.list().data[0].model_extra["end_token"]: -100}
        options = dict(prompt="a", max_tokens=4000, logit_bias=bias, stream=True)
        stream = client.completions.create(model="run", **options)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(stream)
        assert process.wait(60) == 0
        assert process.stdout.read() == "" and process.stderr.read().count("\n") == 1


def test_the_command_serves_a_run_and_ends(trained, capsys, monkeypatch):
    """Its options are what a request has that does not say."""

    def ended_at_once(self, sockets):
        self.sockets = sockets
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", ended_at_once)
    argv = ["--run", trained[0].run.run_dir, "--port", 0, "--temperature", 0.5, "--name", "me"]
    assert serve.main([*map(str, argv)]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["model"] == "me" and said["url"].startswith("http://127.0.0.1:")
    assert "serving me at" in err
