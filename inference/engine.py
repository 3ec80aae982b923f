"""Text from a model: prompts in, pieces of text out as soon as they are certain.

An Engine decodes any number of requests together, each with its own sampling, seed and stop
strings. A request is done when its model says end-of-text, when a stop string appears, or after
max_tokens.

Where tokens are words, a prompt that is cut off anywhere ends in one that no text has there: "def "
ends in a lone space, while in running text the space belongs to the next word. So a prompt's last
token is taken back, and the first ones that are drawn have to begin with its text or be its
beginning.
"""

import codecs
import dataclasses

import torch

from base import InputError
from models.cache import decoder_of

from .sampling import NEVER, Sampling, draw, process


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued. An empty prompt is a document that begins."""

    prompt: str = ""
    max_tokens: int = 200
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()  # the text ends before the first of these


class Completion:
    """A request on its way, or done.

    text: what follows the prompt, as far as it is certain; tokens: all ids, prompt included;
    n_prompt: how many are the prompt's; n_cut: how many of the prompt's first tokens did not fit;
    finish_reason: None while it goes on, then stop or length.
    """

    def __init__(self, request, tokenizer, most):
        """most: tokens of the prompt that fit. Raises InputError for text that the tokenizer does
        not know."""
        self.request = request
        self.tokenizer = tokenizer
        self.text = ""
        self.finish_reason = None
        self.generator = torch.Generator().manual_seed(request.seed)
        self.tokens = [tokenizer.eot, *map(int, tokenizer.encode([request.prompt])[0])]

        # Of a word, the prompt's last token is drawn again
        self.promised = b""  # what is to be written first
        if tokenizer.kind == "bpe" and len(self.tokens) > 1:
            self.promised = tokenizer.tokens[self.tokens.pop()]
        self.n_cut = max(0, len(self.tokens) - most)
        self.tokens = self.tokens[self.n_cut :]
        self.n_prompt = len(self.tokens)
        # Bytes that are no character yet, and characters that may be the beginning of a stop string
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held_back = ""

    @property
    def written(self):
        return self.tokens[self.n_prompt :]

    def add(self, token):
        """Take the next token; returns the text that is certain by now and was not before."""
        self.tokens.append(token)
        if token == self.tokenizer.eot:
            self.finish_reason = "stop"
        else:
            self.held_back += self.text_of(token)
            self.look_for_stop()
        if self.finish_reason is None and len(self.written) >= self.request.max_tokens:
            self.finish_reason = "length"

        # What may turn out to be a stop string has to wait
        wait = 0
        if self.finish_reason is None:
            wait = max((overlap(self.held_back, s) for s in self.request.stop), default=0)
        certain = self.held_back[: len(self.held_back) - wait]
        self.held_back = self.held_back[len(certain) :]
        self.text += certain
        return certain

    def text_of(self, token):
        """The characters that a token completes, without what the prompt had of it."""
        text = self.tokenizer.tokens[token]
        if isinstance(text, str):
            return text
        n = min(len(text), len(self.promised))
        self.promised = self.promised[n:]
        return self.characters.decode(text[n:])

    def look_for_stop(self):
        found = [self.held_back.find(s) for s in self.request.stop if s in self.held_back]
        if found:
            self.held_back = self.held_back[: min(found)]
            self.finish_reason = "stop"


def overlap(text, stop):
    """How many characters at the end of the text are the beginning of `stop`."""
    lengths = range(min(len(text), len(stop)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


class Engine:
    """A model that answers requests.

    model: a template's Model; stage: the template's, one for validation; tokenizer: the one it was
    trained with; max_len: tokens that the model holds of a text. When they are used up, it goes on
    with the second half of them.
    """

    def __init__(self, model, stage, tokenizer, max_len):
        self.decoder = decoder_of(model)
        self.stage = stage
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.device = next(model.parameters()).device
        self.beginnings = {}  # promised text -> (n_vocab,) bool: tokens that keep the promise

    def begin(self, request):
        """A Completion for run(). Raises InputError."""
        return Completion(request, self.tokenizer, self.max_len)

    def generate(self, requests):
        """The requests' Completions, done. Raises InputError."""
        completions = [self.begin(request) for request in requests]
        for _ in self.run(completions):
            pass
        return completions

    @torch.inference_mode()
    def run(self, completions):
        """Decode until all are done; yields (completion, new text) whenever there is some."""
        live = [c for c in completions if c.finish_reason is None]
        cache = None
        while live:
            # What the model has not seen yet: the token that was drawn last. At first that is the
            # prompts, and where a row has no more room all is computed again, half of that row's
            if cache is None:
                new = [c.tokens for c in live]
            elif max(cache.lengths) == self.max_len:
                half = max(1, self.max_len // 2)
                held = [half if n == self.max_len else n + 1 for n in cache.lengths]
                new = [c.tokens[-n:] for c, n in zip(live, held)]
                cache = None
            else:
                new = [c.tokens[-1:] for c in live]
            cache = cache or self.decoder.new_cache(len(live))
            logits = self.decoder.decode(*padded(new, self.device), cache, self.stage)
            if not logits.isfinite().all():
                raise InputError("the model's logits are not finite: its weights are of no use")

            for completion, token in zip(live, self.choose(live, logits.cpu())):
                text = completion.add(token)
                if text:
                    yield completion, text

            # Those that are done leave their place
            rows = [row for row, c in enumerate(live) if c.finish_reason is None]
            if 0 < len(rows) < len(live):
                cache.keep(rows)
            live = [live[row] for row in rows]

    def choose(self, completions, logits):
        """The next token of each; logits: (B, n_vocab)."""
        alike = {}  # Sampling -> rows that have it
        for row, completion in enumerate(completions):
            sampling = completion.request.sampling
            if completion.promised:
                logits[row].masked_fill_(~self.keeps(completion.promised), NEVER)
                sampling = dataclasses.replace(sampling, no_repeat_ngram=0)
            alike.setdefault(sampling, []).append(row)

        chosen = {}
        for sampling, rows in alike.items():
            of_rows = [completions[row] for row in rows]
            tokens = [c.tokens for c in of_rows]
            processed = process(logits[rows], sampling, tokens, [c.written for c in of_rows])
            for row, completion, scores in zip(rows, of_rows, processed):
                chosen[row] = draw(scores, completion.generator)
        return [chosen[row] for row in range(len(completions))]

    def keeps(self, promised):
        """(n_vocab,) bool: tokens that begin with this text, or are its beginning."""
        if promised not in self.beginnings:
            keep = [
                token.startswith(promised) or promised.startswith(token)
                for token in self.tokenizer.tokens
            ]
            self.beginnings[promised] = torch.tensor([*keep, False])  # end-of-text is none
        return self.beginnings[promised]


def padded(rows, device):
    """Lists of token ids -> (B, S) int64, padded on the right, and B lengths."""
    counts = [len(row) for row in rows]
    longest = max(counts)
    inputs = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(inputs, device=device), counts
