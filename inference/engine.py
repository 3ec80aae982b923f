"""Text from a model: requests in, pieces of text out as soon as they are certain.

An Engine decodes many requests together, each with its own sampling, seed and stop strings, and
what it says to one does not depend on the others. They come and go between steps (continuous
batching): a step decodes one token of every request that has a place, and reads a part of a prompt
that waits for one. So a long prompt holds up the others for no longer than a part of it takes.

    waiting -> prompt is read, a part in each step -> decoded with the others -> done
       ^                                                        |
       '------ no more room: again, with half of its text ------'

Memory is bounded: there are so many places, of max_len tokens at most.
"""

import collections
import dataclasses

import torch

from base import InputError
from models.cache import decoder_of

from .completion import Completion, Request
from .sampling import NEVER, next_tokens

__all__ = ["Completion", "Engine", "Request"]

PART = 256  # tokens of prompts that are read between two steps of decoding
PLACES = 32  # requests that are decoded together
BEGINNINGS = 1000  # of prompts' last tokens, for which it is remembered what fits them


class Engine:
    """A model that answers requests.

    model: a template's Model; stage: the template's, one for validation; tokenizer: the one it was
    trained with; max_len: tokens that the model holds of a text. When they are used up, it goes on
    with the second half of them. prompt_lookup: tokens that are tried at once, as what followed
    when the text had its last words before; those that would have been drawn anyway stay (Saxena
    2023, prompt lookup decoding), so only the time changes. drawing: a kernels.drawing.Drawing.
    """

    def __init__(
        self,
        model,
        stage,
        tokenizer,
        max_len,
        places=PLACES,
        part=PART,
        prompt_lookup=0,
        drawing=None,
    ):
        self.decoder = decoder_of(model)
        self.model = model
        self.stage = stage
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.places = places
        self.part = part
        # Templates without a cache have nothing to gain
        self.prompt_lookup = prompt_lookup if self.decoder is model else 0
        self.drawing = drawing
        self.device = next(model.parameters()).device
        self.beginnings = {}  # promised text -> (n_vocab,) bool: tokens that keep the promise
        self.waiting = collections.deque()  # Completions that have no place yet
        self.clear()

    # ----------------------------------------------------------------------------------------------
    # What others call

    def begin(self, request):
        """A Completion for run() or add(). Raises InputError."""
        return Completion(request, self.tokenizer, self.max_len)

    def generate(self, requests):
        """The requests' Completions, done. Raises InputError."""
        completions = [self.begin(request) for request in requests]
        for _ in self.run(completions):
            pass
        return completions

    def run(self, completions):
        """Decode until all are done; yields (completion, new text) whenever there is some. For a
        program that has the engine to itself: what is not done when it stops looking is gone."""
        for completion in completions:
            self.add(completion)
        try:
            while self.busy():
                for completion, text in self.step():
                    if text:
                        yield completion, text
        finally:
            self.clear()

    def add(self, completion):
        """Have it decoded with the others. May be called from another thread than step()."""
        self.waiting.append(completion)

    def busy(self):
        return bool(self.waiting or self.reading or self.live)

    def clear(self):
        """Forget all requests."""
        self.waiting.clear()
        # Those whose prompts are read, how much of them is, and their own cache; equal prompts are
        # read once
        self.reading = []
        self.alike = []  # lists of those with equal prompts, long lists first
        self.n_read = 0
        self.reading_cache = None
        # Those that are decoded together, and the rows of their cache in the same order
        self.live = []
        self.cache = self.decoder.new_cache(0)

    @torch.inference_mode()
    def step(self):
        """One token more for every request that has a place. Returns [(completion, text), ...] for
        those that have new text or are done. Raises InputError for a model that is of no use."""
        self.leave()
        decoded = list(self.live)
        joined, logits = self.read_prompts()
        said = []
        if joined:
            each = torch.tensor([i for i, same in enumerate(self.alike) for _ in same])
            said += self.say(joined, logits[each])
        if decoded:
            guesses = [self.guess(c) for c in decoded]
            if any(guesses):
                said += self.try_guesses(decoded, guesses)
            else:
                new = [c.tokens[-1:] for c in decoded]
                logits = self.decode(new, self.cache)
                said += self.say(decoded, logits)
        if joined:
            self.join()
        return said

    def join(self):
        """Those whose prompts are read are decoded from now on."""
        self.cache.expected = len(self.live) + len(self.reading)
        # The first of every prompt, then the second ones of those that have one, and so on
        for n in range(len(self.alike[0])):
            those = [same[n] for same in self.alike if len(same) > n]
            if len(those) < len(self.reading_cache.lengths):
                self.reading_cache.keep(list(range(len(those))))
            self.cache.join(self.reading_cache)
            self.live += those
        self.reading = []
        self.alike = []
        self.reading_cache = None

    @torch.inference_mode()
    def score(self, tokens, alternatives):
        """[(log probability, [(token, log probability), ...]), ...] of each token but the first,
        given those before it: its own, and those of the likeliest ones. tokens: ids, max_len at
        most; all are computed at once."""
        inputs = torch.tensor([tokens], device=self.device)
        whole = torch.tensor([0, len(tokens)], dtype=torch.int32, device=self.device)
        logprobs = self.model.logits(inputs, whole, self.stage)[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, inputs[0, 1:, None])[:, 0].tolist()
        best = logprobs.topk(min(alternatives, logprobs.size(1)))
        likeliest = [list(zip(*pair)) for pair in zip(best.indices.tolist(), best.values.tolist())]
        return list(zip(own, likeliest))

    # ----------------------------------------------------------------------------------------------
    # The parts of a step

    def leave(self):
        """Those that are done leave their places; those that have no more room wait for another
        one, with the second half of their text."""
        stay = []
        for row, completion in enumerate(self.live):
            if completion.finish_reason is not None:
                continue
            if self.cache.lengths[row] < self.max_len:
                stay.append(row)
                continue
            completion.out_of_sight = len(completion.tokens) - max(1, self.max_len // 2)
            self.waiting.appendleft(completion)
        if len(stay) < len(self.live):
            rows = with_few_moves(stay)
            self.cache.keep(rows)
            self.live = [self.live[row] for row in rows]

    def read_prompts(self):
        """Read a part of the prompts whose turn it is. Returns those that are read to their end,
        with the logits of each list of those alike (n, n_vocab), or an empty list."""
        if all(c.finish_reason is not None for c in self.reading):
            self.alike = self.next_prompts()
            self.reading = sum(self.alike, [])
            self.n_read = 0
            self.reading_cache = self.decoder.new_cache(len(self.alike))
        if not self.reading:
            return [], None
        prompts = [same[0].in_sight for same in self.alike]
        longest = max(map(len, prompts))
        part = [ids[self.n_read : self.n_read + self.part] for ids in prompts]
        logits = self.decode(part, self.reading_cache)
        self.n_read += self.part
        if self.n_read < longest:
            return [], None
        return self.reading, logits

    def next_prompts(self):
        """Lists of those with equal prompts that are to be read next: as many as fit into one part
        together, padded, or a longer one alone; long lists first."""
        free = self.places - len(self.live)
        chosen = {}  # prompt -> those that have it
        longest = 0
        while self.waiting and free:
            completion = self.waiting[0]
            prompt = tuple(completion.in_sight)
            longest = max(longest, len(prompt))
            if chosen and prompt not in chosen and longest * (len(chosen) + 1) > self.part:
                break
            self.waiting.popleft()
            if completion.finish_reason is None:
                chosen.setdefault(prompt, []).append(completion)
                free -= 1
        return sorted(chosen.values(), key=len, reverse=True)

    def guess(self, completion):
        """Tokens that may follow: those that did when the last three, or two, were there before."""
        room = self.max_len - max(self.cache.lengths)  # rows are padded to the longest guess
        most = min(self.prompt_lookup, completion.n_left - 1, room - 1)
        if most < 1 or completion.finish_reason is not None:
            return []
        tokens = completion.in_sight
        for n in 3, 2:
            last = tokens[-n:]
            for i in range(len(tokens) - n - 1, -1, -1):
                if tokens[i : i + n] == last:
                    return tokens[i + n : i + n + most]
        return []

    def try_guesses(self, completions, guesses):
        """Decode the last token of each with its guesses, and draw as many as those agree with;
        returns [(completion, text), ...] as step() does."""
        new = [c.tokens[-1:] + guess for c, guess in zip(completions, guesses)]
        logits = self.decode(new, self.cache, every=True)
        said = []
        stay = []  # of the new tokens, by row
        for row, (completion, guess) in enumerate(zip(completions, guesses)):
            n = 0
            text = ""
            while completion.finish_reason is None and n <= len(guess):
                [token] = self.choose([completion], logits[row, n : n + 1])
                text += completion.add(token)
                n += 1
                if guess[n - 1 : n] != [token]:
                    break
            stay.append(max(1, n))
            if text or completion.finish_reason is not None:
                said.append((completion, text))
        self.cache.end(stay)
        return said

    def decode(self, rows, cache, **how):
        """Lists of new token ids -> logits (B, n_vocab) of what follows them, on the CPU."""
        logits = self.decoder.decode(*padded(rows, self.device), cache, self.stage, **how)
        if not logits.sum().isfinite():  # a tenth of what it takes to ask each
            raise InputError("the model's logits are not finite: its weights are of no use")
        return logits.cpu()

    def say(self, completions, logits):
        """Draw the next token of each; returns [(completion, text), ...] as step() does."""
        said = []
        chosen = self.choose(completions, logits)
        for completion, token in zip(completions, chosen):
            if completion.finish_reason is not None:  # cancelled meanwhile
                continue
            text = completion.add(token)
            if text or completion.finish_reason is not None:
                said.append((completion, text))
        return said

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
            written = [c.written for c in of_rows]
            generators = [c.generator for c in of_rows]
            of_these = logits if len(rows) == len(logits) else logits[rows]
            drawn = next_tokens(of_these, sampling, tokens, written, generators, self.drawing)
            for row, token in zip(rows, drawn):
                chosen[row] = token
        self.note(completions, chosen, logits)
        return [chosen[row] for row in range(len(completions))]

    def note(self, completions, chosen, logits):
        """Have those that ask for it keep the probabilities that their tokens were drawn with."""
        rows = [row for row, c in enumerate(completions) if c.request.alternatives is not None]
        if not rows:
            return
        logprobs = logits[rows].log_softmax(-1)
        tokens = torch.tensor([chosen[row] for row in rows])
        own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        for row, logprob, of_all in zip(rows, own, logprobs):
            completions[row].note(chosen[row], logprob, of_all)

    def keeps(self, promised):
        """(n_vocab,) bool: tokens that begin with this text, or are its beginning."""
        if promised not in self.beginnings:
            keep = [False] * self.tokenizer.n_vocab
            for i, token in enumerate(self.tokenizer.tokens):
                if token.startswith(promised) or promised.startswith(token):
                    keep[i] = token != b""  # special ones have no text
            if len(self.beginnings) >= BEGINNINGS:
                self.beginnings.clear()
            self.beginnings[promised] = torch.tensor(keep)
        return self.beginnings[promised]


def padded(rows, device):
    """Lists of token ids -> (B, S) int64, padded on the right, and B lengths."""
    counts = [len(row) for row in rows]
    longest = max(counts)
    inputs = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(inputs, device=device), counts


def with_few_moves(rows):
    """The same numbers, ascending ones, in an order in which most are at their own index."""
    n = len(rows)
    stay = {row for row in rows if row < n}
    behind = [row for row in rows if row >= n]
    return [row if row in stay else behind.pop() for row in range(n)]
