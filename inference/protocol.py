"""OpenAI's protocol: what a request's JSON asks for, and the JSON of what is said.

Pure functions: no network, no clock. Facts: the types of the openai package, and what clients send.
Fields that are not here are ignored, as clients send many.
"""

import dataclasses
import secrets
from typing import NamedTuple

from base import InputError, to_json
from base.options import COUNT
from data.chat import as_plain_text, prompt_of, read_messages

from .completion import Request
from .options import KNOBS, is_text
from .sampling import Sampling, default_sampling

MOST_CHOICES = 64  # continuations of one request
MOST_STOPS = 16
STOP_LENGTH = 256  # characters
MOST_ALTERNATIVES = 20
CUTS = lambda x: x in ("auto", "disabled"), "auto or disabled"
LEAST_LOGPROB = -9999.0  # what the protocol has in place of minus infinity


class ApiError(Exception):
    """What a client is told, with its HTTP status."""

    def __init__(self, status, message, param=None, code=None, kind="invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind

    def as_dict(self):
        return dict(
            error=dict(message=self.message, type=self.kind, param=self.param, code=self.code)
        )


def wrong(param, expected):
    return ApiError(400, f"{param}: expected {expected}", param)


class Served(NamedTuple):
    """What requests are checked against."""

    model: str  # its name
    taught: bool  # to answer; else it continues text
    tokenizer: object
    max_len: int
    knobs: dict  # {field of Sampling: value} where a request says nothing
    stop: tuple  # the same of stop
    tokens: int  # and of max_tokens
    most_tokens: int  # that a request gets, whatever it asks for
    tools: object = None  # inference.tools.Tools that the server has itself


class Asked(NamedTuple):
    """What a request asks for."""

    chat: bool
    requests: list  # of the engine, n of each prompt
    stream: bool
    include_usage: bool
    echo: bool
    cut: bool  # the beginning of a prompt that is too long
    n: int
    messages: tuple = ()  # of a chat with a taught model
    tools: bool = False  # whether the client takes calls of tools for an answer


# --------------------------------------------------------------------------------------------------
# Requests


def field(body, name, kind, default=None, expect=None):
    """The value of a field; the default where it is missing or null. Raises ApiError.

    kind: a type, or a tuple of them; expect: (predicate, in words).
    """
    value = body.get(name)
    if value is None:
        return default
    words = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if float in kinds and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise wrong(name, "a number") from None
    if type(value) not in kinds:  # a bool is an int, which is not what is meant
        raise wrong(name, " or ".join(words.get(k, "a list") for k in kinds))
    if expect and not expect[0](value):
        raise wrong(name, expect[1])
    return value


def read_chat(body, served):
    """Asked, by the JSON object of a request for a chat completion. Raises ApiError."""
    try:
        messages = read_messages(body.get("messages"))
        if not all(is_text(message.text) for message in messages):
            raise InputError("messages: expected Unicode, found half of a surrogate pair")
        if served.taught:
            prompt = tuple(prompt_of(messages, served.tokenizer))
        else:
            prompt = as_plain_text(messages)
    except InputError as e:
        raise ApiError(400, str(e), "messages") from None
    if field(body, "logprobs", bool, False):
        alternatives = alternatives_of(body, "top_logprobs", 0)
    elif field(body, "top_logprobs", int):
        raise ApiError(400, "top_logprobs: expected with logprobs: true only", "top_logprobs")
    else:
        alternatives = None
    kind = field(body, "response_format", dict, {}).get("type", "text")
    if kind != "text":
        raise wrong("response_format", 'type "text", as this model cannot promise another')
    asked = read_rest(body, served, [prompt], alternatives, chat=True)
    if not served.taught:
        return asked
    return asked._replace(messages=tuple(messages), tools=takes_calls(body))


def takes_calls(body):
    """Whether a client says that there are tools. Raises ApiError."""
    tools = field(body, "tools", list, [])
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"tools[{i}]", '{"type": "function", "function": {"name": ...}}')
    return bool(tools) and body.get("tool_choice") != "none"


def read_completion(body, served):
    """Asked, by the JSON object of a request for a completion. Raises ApiError."""
    prompts = read_prompts(body.get("prompt"), served.tokenizer.n_vocab)
    if field(body, "suffix", str):
        raise wrong("suffix", "none, as this model cannot fill in")
    alternatives = alternatives_of(body, "logprobs", None)
    return read_rest(body, served, prompts, alternatives, chat=False)


def read_rest(body, served, prompts, alternatives, chat):
    """What both kinds of request have."""
    model = field(body, "model", str, served.model)
    if model != served.model:
        said = f"model: {model[:100]!r} is not served here, {served.model!r} is"
        raise ApiError(404, said, "model", "model_not_found")
    echo = not chat and field(body, "echo", bool, False)
    max_tokens = tokens_of(body, served, least=0 if echo else 1)
    n = field(body, "n", int, 1, (lambda n: 1 <= n <= MOST_CHOICES, f"1 to {MOST_CHOICES}"))
    best_of = field(body, "best_of", int, n)
    if best_of != n and not chat:
        raise wrong("best_of", "the same as n")
    if n * len(prompts) > MOST_CHOICES:
        raise wrong("prompt", f"{MOST_CHOICES} continuations at most, n of each prompt")
    seed = field(body, "seed", int)
    if seed is None:
        seed = secrets.randbelow(2**62)
    stream_options = field(body, "stream_options", dict, {})

    settings = dict(
        sampling=read_sampling(body, served),
        stop=read_stop(body, served),
        max_tokens=max_tokens,
        alternatives=alternatives,
    )
    requests = []
    for prompt in prompts:
        for _ in range(n):
            requests.append(Request(prompt, seed=(seed + len(requests)) % 2**62, **settings))
    return Asked(
        chat=chat,
        requests=requests,
        stream=field(body, "stream", bool, False),
        include_usage=field(stream_options, "include_usage", bool, False),
        echo=echo,
        cut=field(body, "truncation", str, "auto", CUTS) == "auto",
        n=n,
    )


def tokens_of(body, served, least):
    """How many tokens are written at most; both names that the protocol has had for it."""
    for name in "max_completion_tokens", "max_tokens":
        given = field(body, name, int, None, (lambda n: n >= least, f"{least} or more"))
        if given is not None:
            return min(given, served.most_tokens)
    return served.tokens


def alternatives_of(body, name, default):
    expected = lambda n: 0 <= n <= MOST_ALTERNATIVES, f"0 to {MOST_ALTERNATIVES}"
    if body.get(name) is False:  # which some clients send
        return default
    return field(body, name, int, default, expected)


def read_prompts(said, n_vocab):
    """A list of texts and of tuples of token ids. Raises ApiError."""
    expected = "a text, a list of texts, a list of token ids or a list of those"
    if said is None:
        said = ""
    if isinstance(said, str):
        said = [said]
    if not isinstance(said, list) or not said:
        raise wrong("prompt", expected)
    if all(type(x) is int for x in said):
        said = [said]
    prompts = []
    for prompt in said:
        if isinstance(prompt, str):
            if not is_text(prompt):
                raise wrong("prompt", "Unicode, found half of a surrogate pair")
            prompts.append(prompt)
        elif isinstance(prompt, list) and all(type(x) is int for x in prompt):
            if not all(0 <= x < n_vocab for x in prompt):
                raise wrong("prompt", f"token ids from 0 to {n_vocab - 1}")
            prompts.append(tuple(prompt))
        else:
            raise wrong("prompt", expected)
    return prompts


def read_stop(body, served):
    stop = field(body, "stop", (str, list))
    if stop is None:
        return served.stop
    if isinstance(stop, str):
        stop = [stop]
    right = len(stop) <= MOST_STOPS and all(
        isinstance(s, str) and 0 < len(s) <= STOP_LENGTH and is_text(s) for s in stop
    )
    if not right:
        raise wrong("stop", f"up to {MOST_STOPS} texts of 1 to {STOP_LENGTH} characters")
    return tuple(stop)


def read_sampling(body, served):
    """A Sampling by the fields of its options' names; others are as served. With a temperature of
    0, which asks for the likeliest token, no penalties are added that the request does not name."""
    given = {}
    for knob in KNOBS:
        kind = type(knob.default)
        value = field(body, knob.name, kind)
        if value == -1 and knob.metadata["expect"] is COUNT:  # another way to say it is off
            value = knob.default
        if value is None:
            continue
        if knob.metadata["expect"] and not knob.metadata["expect"][0](value):
            raise wrong(knob.name, knob.metadata["expect"][1])
        given[knob.name] = value
    bias = read_bias(field(body, "logit_bias", dict, {}), served.tokenizer.n_vocab)
    if given.get("temperature") == 0:
        return Sampling(**given, logit_bias=bias)
    return default_sampling(served.tokenizer, **(served.knobs | given), logit_bias=bias)


def read_bias(said, n_vocab):
    expected = f"numbers from -100 to 100 by token ids from 0 to {n_vocab - 1}"
    pairs = []
    for token, number in said.items():
        if not token.isdecimal() or not token.isascii() or len(token) > 9 or int(token) >= n_vocab:
            raise wrong("logit_bias", expected)
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise wrong("logit_bias", expected)
        pairs.append((int(token), float(number)))
    return tuple(sorted(pairs))


# --------------------------------------------------------------------------------------------------
# Answers


@dataclasses.dataclass(frozen=True)
class Head:
    """What all parts of an answer begin with."""

    id: str
    created: int  # seconds since 1970
    model: str
    chat: bool

    def answer(self, choices, usage):
        kind = "chat.completion" if self.chat else "text_completion"
        return self.begin(kind) | dict(choices=choices, usage=usage)

    def chunk(self, choices):
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self.begin(kind) | dict(choices=choices)

    def begin(self, kind):
        return dict(id=self.id, object=kind, created=self.created, model=self.model)


def chat_choice(index, text, finish_reason, logprobs, calls=()):
    """A choice of a whole answer; calls: of tools, for the client to do."""
    message = dict(role="assistant", content=text, refusal=None)
    if calls:
        message |= dict(content=text or None, tool_calls=tool_calls(calls))
        finish_reason = "tool_calls"
    return dict(index=index, message=message, finish_reason=finish_reason, logprobs=logprobs)


def tool_calls(calls, in_pieces=False):
    """Calls in the protocol's form, each with an id of its own."""
    found = []
    for i, call in enumerate(calls):
        function = dict(name=call.name, arguments=to_json(call.arguments, ensure_ascii=False))
        said = dict(id=f"call_{secrets.token_hex(12)}", type="function", function=function)
        found.append(dict(index=i, **said) if in_pieces else said)
    return found


def chat_delta(index, delta, finish_reason=None, logprobs=None):
    """A choice of a chunk."""
    return dict(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs)


def text_choice(index, text, finish_reason=None, logprobs=None):
    """A choice of a completion, whole or in a chunk."""
    return dict(index=index, text=text, finish_reason=finish_reason, logprobs=logprobs)


def usage_of(asked, completions, later=()):
    """Tokens that the model read and wrote; a prompt counts once, however many continuations. What
    did not fit of prompts is said, too. later: completions that went on with what tools said."""
    prompts = completions[:: asked.n]
    read = sum(c.n_prompt + c.redrawn for c in prompts)
    wrote = sum(c.n_new for c in (*completions, *later))
    usage = dict(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote)
    cut = sum(c.n_cut for c in prompts)
    return usage | (dict(prompt_tokens_cut=cut) if cut else {})


def drawn_until(completion, begin, end):
    """Of the tokens whose probabilities are kept, from number `begin` on: those that the text has
    before character `end`. Those of a stop string are left out, and what ends an answer."""
    found = []
    for drawn in completion.drawn[begin:]:
        if drawn.token in completion.ends or drawn.offset >= end:
            break
        found.append(drawn)
    return found


def bytes_of(token, tokenizer, skip=0):
    """The UTF-8 of a token, without the first `skip` bytes; of a special one its name."""
    for name, special in tokenizer.specials.items():
        if special == token:
            return name.encode()
    text = tokenizer.tokens[token]
    return (text.encode() if isinstance(text, str) else text)[skip:]


def chat_logprobs(drawn, tokenizer):
    """{content: [...]} of some Drawn tokens."""

    def entry(token, logprob, skip):
        text = bytes_of(token, tokenizer, skip)
        return dict(
            token=text.decode(errors="replace"),
            logprob=max(logprob, LEAST_LOGPROB),
            bytes=list(text),
        )

    content = []
    for d in drawn:
        top = [entry(*pair, d.skip) for pair in d.likeliest if pair[1] > LEAST_LOGPROB]
        content.append(entry(d.token, d.logprob, d.skip) | dict(top_logprobs=top))
    return dict(content=content, refusal=None)


def text_logprobs(drawn, tokenizer, shift=0):
    """The same in the form of completions; shift: characters that come before the text."""
    return dict(
        tokens=[name_of(d.token, tokenizer, d.skip) for d in drawn],
        token_logprobs=[max(d.logprob, LEAST_LOGPROB) for d in drawn],
        top_logprobs=[top_of(d.token, d.logprob, d.likeliest, tokenizer, d.skip) for d in drawn],
        text_offset=[shift + d.offset for d in drawn],
    )


def top_of(token, logprob, likeliest, tokenizer, skip=0):
    """{text: log probability} of the likeliest tokens, and of the one that is there."""
    top = {}
    for other, its in [*likeliest, (token, logprob)]:
        if its > LEAST_LOGPROB:
            top.setdefault(name_of(other, tokenizer, skip), its)
    return top


def name_of(token, tokenizer, skip=0):
    """A token's text; one that is no whole characters as bytes:\\xe2."""
    text = bytes_of(token, tokenizer, skip)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in text)


def echoed_logprobs(tokens, scores, tokenizer):
    """Of a prompt's own tokens: the first has no probability.

    tokens: ids; scores: (log probability, likeliest) of each but the first.
    """
    offsets = []
    at = 0
    for token in tokens:
        offsets.append(at)
        at += len(tokenizer.decode([token]))
    top = [top_of(token, *score, tokenizer) for token, score in zip(tokens[1:], scores)]
    return dict(
        tokens=[name_of(token, tokenizer) for token in tokens],
        token_logprobs=[None, *(max(p, LEAST_LOGPROB) for p, _ in scores)],
        top_logprobs=[None, *top],
        text_offset=offsets,
    )


def event(said):
    """A server-sent event of a JSON object."""
    return f"data: {to_json(said)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
