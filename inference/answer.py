"""An answer to a request, whole or in pieces, in OpenAI's shape."""

from typing import NamedTuple

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
    usage_of,
)


class Echo(NamedTuple):
    """A prompt that is said before what follows it."""

    text: str
    logprobs: dict | None  # of its tokens, in the form of completions


NOTHING = Echo("", None)


class Answer:
    """What becomes of one request."""

    def __init__(self, asked, head, job, tokenizer, echoes=None):
        """asked: a protocol.Asked; head: a protocol.Head; job: a worker.Job; echoes: an Echo for
        each of its completions."""
        self.asked = asked
        self.head = head
        self.job = job
        self.tokenizer = tokenizer
        self.completions = job.completions
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
        for i, completion in enumerate(self.completions):
            text, logprobs = self.next_of(i)
            if self.asked.chat:
                choices.append(chat_choice(i, text, completion.finish_reason, logprobs))
                continue
            text, logprobs = after(self.echoes[i], text, logprobs)
            choices.append(text_choice(i, text, completion.finish_reason, logprobs))
        return self.head.answer(choices, usage_of(self.asked, self.completions))

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
                    if reason is not None:
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
            usage = usage_of(self.asked, self.completions)
            yield event(self.head.chunk([]) | dict(usage=usage))
        yield DONE

    def next_of(self, i):
        """(text, logprobs or None) of a completion that were not said yet."""
        completion = self.completions[i]
        text = completion.text[self.n_characters[i] :]
        self.n_characters[i] += len(text)
        if completion.request.alternatives is None:
            return text, None
        drawn = drawn_until(completion, self.n_drawn[i], self.n_characters[i])
        self.n_drawn[i] += len(drawn)
        if self.asked.chat:
            return text, chat_logprobs(drawn, self.tokenizer)
        return text, text_logprobs(drawn, self.tokenizer, len(self.echoes[i].text))

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
