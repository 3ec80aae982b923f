"""A request, and what a model has made of it so far: text that is certain, and where it ends.

Where tokens are words, a prompt that is cut off anywhere ends in one that no text has there: "def "
ends in a lone space, while in running text the space belongs to the next word. So a prompt's last
token is taken back, and the first ones that are drawn have to begin with its text or be its
beginning.
"""

import codecs
import dataclasses
from typing import NamedTuple

import torch

from data.chat import CLOSE, OPEN

from .sampling import Sampling

END_OF_TURN = "<|im_end|>"  # which ends an answer, as end-of-text does


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued. An empty prompt is a document that begins."""

    prompt: str | tuple[int, ...] = ""  # a text, or token ids that are taken as they are
    max_tokens: int = 200
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    alternatives: int | None = None  # of each token, whose probabilities are kept; None: nothing is


class Drawn(NamedTuple):
    """A token that was drawn, with its log probability and those of the likeliest ones.

    The probabilities are the model's own, before sampling changes them.
    """

    token: int
    logprob: float
    likeliest: list  # (token, log probability) each, in descending order
    offset: int  # characters of the continuation before it
    skip: int  # bytes of the token that are the prompt's


class Completion:
    """A request on its way, or done.

    text: what follows the prompt, as far as it is certain; tokens: all ids, prompt included;
    n_prompt: how many are the prompt's; n_cut: how many of the prompt's first tokens did not fit;
    finish_reason: None while it goes on, then stop or length, or cancelled.
    """

    def __init__(self, request, tokenizer, most):
        """most: tokens of the prompt that fit. Raises InputError for text that the tokenizer does
        not know."""
        self.request = request
        self.tokenizer = tokenizer
        self.text = ""
        self.finish_reason = None
        self.generator = torch.Generator().manual_seed(request.seed)
        self.promised = b""  # what is to be written first
        self.redrawn = 0  # tokens of the prompt
        self.tokens = ids_of(request.prompt, tokenizer)
        # Of a text's words, the last token is drawn again
        words = isinstance(request.prompt, str) and tokenizer.kind not in ("chars", "bytes")
        if words and len(self.tokens) > 1:
            self.promised = tokenizer.tokens[self.tokens.pop()]
            self.redrawn = 1
        self.n_cut = max(0, len(self.tokens) - most)
        self.tokens = self.tokens[self.n_cut :]
        self.n_prompt = len(self.tokens)
        self.out_of_sight = 0  # of the tokens, those that the model no longer looks back at
        self.drawn = []  # where the request wants alternatives
        # What tools are asked for with has a text, unlike other special tokens
        self.marks = {}
        for mark in OPEN, CLOSE:
            if mark in tokenizer.specials:
                self.marks[tokenizer.specials[mark]] = mark.encode()
        self.ends = {tokenizer.eot, tokenizer.specials.get(END_OF_TURN)}
        # Bytes that are no character yet, and characters that may be the beginning of a stop string
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held_back = ""

    @property
    def written(self):
        return self.tokens[self.n_prompt :]

    @property
    def n_new(self):
        """How many tokens were written behind the prompt, whose last one may be drawn again."""
        return max(0, len(self.written) - self.redrawn)

    @property
    def n_left(self):
        """How many may still be drawn."""
        return self.request.max_tokens + self.redrawn - len(self.written)

    @property
    def in_sight(self):
        """Tokens that the model looks back at."""
        return self.tokens[self.out_of_sight :]

    def cancel(self, reason="cancelled"):
        """End it as it is; the engine gives its place to the next one. May be called from another
        thread than the engine's."""
        if self.finish_reason is None:
            self.finish_reason = reason

    def note(self, token, logprob, logprobs):
        """Keep the probabilities that this token was drawn with: its own, and those of the
        likeliest ones of all, (n_vocab,)."""
        likeliest = []
        if self.request.alternatives:
            best = logprobs.topk(min(self.request.alternatives, len(logprobs)))
            likeliest = list(zip(best.indices.tolist(), best.values.tolist()))
        self.drawn.append(
            Drawn(
                token=token,
                logprob=logprob,
                likeliest=likeliest,
                offset=len(self.text) + len(self.held_back),
                skip=len(self.promised),
            )
        )

    def add(self, token):
        """Take the next token; returns the text that is certain by now and was not before."""
        self.tokens.append(token)
        finished = None
        if token in self.ends:
            finished = "stop"
        else:
            self.held_back += self.text_of(token)
            if self.ends_at_stop():
                finished = "stop"
        if finished is None and self.n_left <= 0:
            finished = "length"

        # What may turn out to be a stop string has to wait
        wait = 0
        if finished is None:
            wait = max((overlap(self.held_back, s) for s in self.request.stop), default=0)
        certain = self.held_back[: len(self.held_back) - wait]
        self.held_back = self.held_back[len(certain) :]
        self.text += certain
        self.finish_reason = self.finish_reason or finished
        return certain

    def text_of(self, token):
        """The characters that a token completes, without what the prompt had of it."""
        text = self.marks.get(token) or written_as(token, self.tokenizer)
        if isinstance(text, str):
            return text
        n = min(len(text), len(self.promised))
        self.promised = self.promised[n:]
        return self.characters.decode(text[n:])

    def ends_at_stop(self):
        """Whether a stop string is there; it is left out, with what follows."""
        found = [self.held_back.find(s) for s in self.request.stop if s in self.held_back]
        if found:
            self.held_back = self.held_back[: min(found)]
        return bool(found)


def ids_of(prompt, tokenizer):
    """The token ids of a prompt, end-of-text first. Raises InputError for text that the tokenizer
    does not know."""
    if isinstance(prompt, str):
        prompt = tokenizer.encode([prompt])[0].tolist()
    ids = list(prompt)
    return ids if ids[:1] == [tokenizer.eot] else [tokenizer.eot, *ids]


def written_as(token, tokenizer):
    """The text of a token: bytes, str where tokens are characters; nothing of special ones."""
    return b"" if token >= len(tokenizer.tokens) else tokenizer.tokens[token]


def overlap(text, stop):
    """How many characters at the end of the text are the beginning of `stop`."""
    lengths = range(min(len(text), len(stop)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
