"""An answer to a request, whole or in pieces, in OpenAI's shape.

Where the model asks for a tool that the server has, the tool is used and the model goes on, all in
one answer. Where it asks for one of the client's, the answer is that call. In both cases the text
that asks for it is not shown.
"""

import asyncio
import dataclasses
import time
from typing import NamedTuple

from data.chat import OPEN, Message, calls_in, prompt_of

from .completion import overlap
from .protocol import (
    DONE,
    ApiError,
    chat_choice,
    chat_delta,
    chat_logprobs,
    drawn_until,
    event,
    text_choice,
    text_logprobs,
    tool_calls,
    usage_of,
)
from .tools import MOST_ROUNDS


class Echo(NamedTuple):
    """A prompt that is said before what follows it."""

    text: str
    logprobs: dict | None  # of its tokens, in the form of completions


NOTHING = Echo("", None)


class Answer:
    """What becomes of one request."""

    def __init__(self, asked, head, job, served, echoes=None, worker=None):
        """asked: a protocol.Asked; head: a protocol.Head; job: a worker.Job; served: a
        protocol.Served; echoes: an Echo for each of its completions; worker: which goes on behind
        what a tool says."""
        self.asked = asked
        self.head = head
        self.job = job
        self.tokenizer = served.tokenizer
        self.tools = served.tools if asked.messages else None  # of a chat
        self.worker = worker
        self.completions = job.completions
        self.first = list(job.completions)
        self.later = []  # those that went on with what tools said
        self.messages = [list(asked.messages) for _ in self.first]
        self.rounds = [0] * len(self.first)  # times that tools were used
        self.echoes = echoes or [NOTHING] * len(self.completions)
        # Of each completion, what is said already
        self.n_characters = [0] * len(self.completions)
        self.n_drawn = [0] * len(self.completions)

    async def whole(self):
        """The JSON object of the answer. Raises ApiError."""
        while not self.job.done():
            await self.job.wait()
        if self.job.error:
            raise self.job.error
        choices = []
        for i in range(len(self.completions)):
            text, logprobs = self.next_of(i)
            while await self.use_tools(i):
                while self.completions[i].finish_reason is None:
                    await self.job.wait()
                more, logprobs = self.next_of(i)
                text += more
            reason = self.completions[i].finish_reason
            if self.asked.chat:
                choices.append(chat_choice(i, text, reason, logprobs, self.calls_of(i)))
                continue
            text, logprobs = after(self.echoes[i], text, logprobs)
            choices.append(text_choice(i, text, reason, logprobs))
        return self.head.answer(choices, usage_of(self.asked, self.first, self.later))

    async def begin(self):
        """Wait until there is something to say. Raises ApiError."""
        if not self.job.done():
            await self.job.wait()
            self.job.news.set()  # for pieces()
        elif self.job.error:
            raise self.job.error

    async def pieces(self):
        """Yield the answer as server-sent events."""
        try:
            for i, echo in enumerate(self.echoes):
                if self.asked.chat:
                    yield self.chunk([chat_delta(i, dict(role="assistant", content=""))])
                elif self.asked.echo:
                    yield self.chunk([text_choice(i, echo.text, logprobs=echo.logprobs)])

            going_on = list(range(len(self.completions)))
            while going_on:
                for i in list(going_on):
                    # Whether it is over comes first: the text is complete then
                    reason = self.completions[i].finish_reason
                    text, logprobs = self.next_of(i)
                    if text:
                        yield self.chunk([self.choice(i, text, logprobs)])
                    if reason is None or await self.use_tools(i):
                        continue
                    if calls := self.calls_of(i):
                        delta = dict(tool_calls=tool_calls(calls, in_pieces=True))
                        yield self.chunk([chat_delta(i, delta)])
                        reason = "tool_calls"
                    yield self.chunk([self.last_choice(i, reason)])
                    going_on.remove(i)
                if going_on:
                    await self.job.wait()
            if self.job.error:
                raise self.job.error
        except ApiError as e:  # the status has been said: clients look for this
            yield event(e.as_dict())
            return
        if self.asked.include_usage:
            usage = usage_of(self.asked, self.first, self.later)
            yield event(self.head.chunk([]) | dict(usage=usage))
        yield DONE

    def next_of(self, i):
        """(text, logprobs or None) of a completion that were not said yet."""
        completion = self.completions[i]
        text = self.shown(completion)[self.n_characters[i] :]
        self.n_characters[i] += len(text)
        if completion.request.alternatives is None:
            return text, None
        drawn = drawn_until(completion, self.n_drawn[i], self.n_characters[i])
        self.n_drawn[i] += len(drawn)
        if self.asked.chat:
            return text, chat_logprobs(drawn, self.tokenizer)
        return text, text_logprobs(drawn, self.tokenizer, len(self.echoes[i].text))

    def shown(self, completion):
        """Its text so far, without calls of tools where somebody does them, and what may become
        one."""
        text = completion.text
        if not (self.tools or self.asked.tools):
            return text
        done = completion.finish_reason is not None
        if done and not self.is_call(completion):
            return text
        before, mark, _ = text.partition(OPEN)
        if not mark:
            before = text[: len(text) - overlap(text, OPEN)]
        return before.rstrip()

    def is_call(self, completion):
        """Whether an answer that is done is a call of tools, which the client does not see."""
        if completion.finish_reason != "stop":
            return False
        calls, _ = calls_in(completion.text)
        return bool(calls) and (self.asked.tools or self.tools.has_all(calls))

    def calls_of(self, i):
        """What the client is to do; [] where the answer is one by itself."""
        completion = self.completions[i]
        if not self.asked.tools or not self.is_call(completion):
            return []
        return calls_in(completion.text)[0]

    async def use_tools(self, i):
        """Have the server's tools do what a completion that is done asks for, and begin another one
        behind what they say. Returns whether it did."""
        completion = self.completions[i]
        if not self.tools or self.job.error or time.monotonic() > self.job.deadline:
            return False
        calls = self.tools.asked_for(completion.text)
        if completion.finish_reason != "stop" or not calls or self.rounds[i] == MOST_ROUNDS:
            return False
        self.rounds[i] += 1
        results = await asyncio.to_thread(self.tools.do, calls)
        self.messages[i] += [Message("assistant", completion.text), *results]
        prompt = tuple(prompt_of(self.messages[i], self.tokenizer))
        request = dataclasses.replace(completion.request, prompt=prompt)
        self.worker.go_on(self.job, i, request)
        if self.completions[i] is completion:
            return False
        self.later.append(self.completions[i])
        self.n_characters[i] = 0
        self.n_drawn[i] = 0
        return True

    def choice(self, i, text, logprobs):
        if self.asked.chat:
            return chat_delta(i, dict(content=text), logprobs=logprobs)
        return text_choice(i, text, logprobs=logprobs)

    def last_choice(self, i, reason):
        if self.asked.chat:
            return chat_delta(i, {}, reason)
        return text_choice(i, "", reason)

    def chunk(self, choices):
        said = self.head.chunk(choices)
        if self.asked.include_usage:
            said["usage"] = None
        return event(said)


def after(echo, text, logprobs):
    """(text, logprobs) with those of the prompt before them."""
    if echo.logprobs is not None:
        logprobs = {name: echo.logprobs[name] + logprobs[name] for name in logprobs}
    return echo.text + text, logprobs
