"""Which token comes next: what is done to a model's logits, and the draw.

All are pure functions on logits (B, V) in fp32 that return new ones, with the names, the meaning
and the order of Hugging Face's transformers (generation/logits_process.py): a token that is ruled
out has -inf. Frequency and presence penalty are OpenAI's and come between those that transformers
has. `tokens`, `written`: B lists of token ids, of any length.
"""

import dataclasses

import torch

from base.options import COUNT, FRACTION, Options, option

NEVER = float("-inf")
TEMPERATURE = lambda x: 0 <= x <= 100, "a number from 0 to 100"  # beyond, all are equally likely
PENALTY = lambda x: -2 <= x <= 2, "a number from -2 to 2"
FACTOR = lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100"  # beyond, logits are infinite
AS_GOOD_AS_ZERO = 1e-5  # a temperature; divided by a lower one, logits are infinite


@dataclasses.dataclass(frozen=True)
class Sampling(Options):
    """How the next token is drawn; by default as the model's own distribution has it. Raises
    InputError for what is not valid."""

    temperature: float = option(
        1.0,
        "below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest",
        TEMPERATURE,
    )
    top_k: int = option(0, "draw from so many of the likeliest tokens; 0 is all", COUNT)
    top_p: float = option(
        1.0, "draw from the fewest tokens that have this probability together", FRACTION
    )
    min_p: float = option(
        0.0, "leave out tokens below this part of the likeliest one's probability", FRACTION
    )
    repetition_penalty: float = option(
        1.0, "divide logits of tokens that are there already, prompt included; 1 is off", FACTOR
    )
    no_repeat_ngram: int = option(
        0, "never the same so many tokens in a row a second time; 0 is off", COUNT
    )
    frequency_penalty: float = option(
        0.0, "subtract this for each time that a token was written, prompt not included", PENALTY
    )
    presence_penalty: float = option(
        0.0, "subtract this for tokens that were written at all, prompt not included", PENALTY
    )
    logit_bias: tuple = option((), "pairs of a token's id and what is added to its logit")


# What small models write well with. Where tokens are characters, all of them are there after a few
# lines, and a penalty for that would leave only the rare ones
OF_WORDS = dict(temperature=0.7, top_p=0.9, repetition_penalty=1.2, no_repeat_ngram=4)
OF_CHARACTERS = dict(temperature=0.8, top_p=0.95)


def default_sampling(tokenizer, **given):
    """A Sampling that suits the tokens, but for what is given. Raises InputError."""
    default = OF_CHARACTERS if tokenizer.kind in ("chars", "bytes") else OF_WORDS
    return Sampling(**(default | given))


def next_tokens(logits, sampling, tokens, written, generators, drawing=None):
    """Token ids, one for each row of (B, V) logits; the rest as process() and draw() have it, which
    drawing, a kernels.drawing.Drawing, does in one."""
    s = sampling
    if s.temperature < AS_GOOD_AS_ZERO:
        return penalised(logits, s, tokens, written).argmax(-1).tolist()
    if drawing is None:
        return draw(process(logits, s, tokens, written), generators)
    logits = penalised(logits, s, tokens, written)
    if s.top_k:
        logits = top_k(logits, s.top_k)
    at = uniform(generators)
    return drawing.draw(logits, at, s.temperature, s.top_p, s.min_p).tolist()


def process(logits, sampling, tokens, written):
    """(B, V) logits whose softmax the next tokens are drawn from.

    tokens: what each row holds, prompt included; written: the same without the prompt.
    """
    s = sampling
    logits = penalised(logits, s, tokens, written)
    if s.temperature < AS_GOOD_AS_ZERO:
        return top_k(logits, 1)
    logits = logits / s.temperature
    if s.top_k:
        logits = top_k(logits, s.top_k)
    if s.top_p < 1:
        logits = top_p(logits, s.top_p)
    if s.min_p:
        logits = min_p(logits, s.min_p)
    return logits


def penalised(logits, sampling, tokens, written):
    """What process() does first: bias, and what was said before; `logits` itself without those."""
    s = sampling
    of_counts = s.frequency_penalty or s.presence_penalty
    if not (s.logit_bias or s.repetition_penalty != 1 or s.no_repeat_ngram or of_counts):
        return logits
    logits = logits.clone()
    if s.logit_bias:
        add_logit_bias(logits, s.logit_bias)
    if s.repetition_penalty != 1:
        penalise_repetition(logits, tokens, s.repetition_penalty)
    if s.no_repeat_ngram:
        rule_out_ngrams(logits, tokens, s.no_repeat_ngram)
    if of_counts:
        subtract_penalties(logits, written, s.frequency_penalty, s.presence_penalty)
    return logits


def draw(logits, generators):
    """Token ids, one for each row of (B, V) logits.

    generators: a CPU torch.Generator for each row, so that a row's draws do not depend on others.
    """
    reached = logits.softmax(-1).double().cumsum(-1)
    at = uniform(generators)[:, None] * reached[:, -1:]  # (B, 1)
    # The first token whose probability, with those before it, is more
    tokens = torch.searchsorted(reached, at, right=True).clamp(max=logits.size(-1) - 1)
    return tokens[:, 0].tolist()


def uniform(generators):
    """(B,) float64 from 0 to 1, one of each generator."""
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])


# --------------------------------------------------------------------------------------------------
# By what was said before. In place: a copy of many rows of a large vocabulary takes 1.5 ms


def add_logit_bias(logits, pairs):
    """Add a number to the logits of some tokens; pairs: (id, number) each."""
    for token, number in pairs:
        logits[:, token] += number


def penalise_repetition(logits, tokens, penalty):
    """Make tokens that are there already less likely, each by the same, however often it is there:
    positive logits are divided by the penalty, negative ones multiplied."""
    pairs = in_pairs(tokens)
    there = logits[pairs]
    # What is there twice becomes the same twice
    logits.index_put_(pairs, torch.where(there < 0, there * penalty, there / penalty))


def rule_out_ngrams(logits, tokens, n):
    """Rule out each token that would complete n tokens in a row that are there already. Where that
    would rule out all of them, it rules out none."""
    again = []
    for ids in tokens:
        end = ids[len(ids) - n + 1 :] if n > 1 else []  # n - 1 tokens
        starts = range(len(ids) - n + 1)
        again.append([ids[i + n - 1] for i in starts if ids[i : i + n - 1] == end])
    rows, ids = in_pairs(again)
    before = logits[rows, ids]
    logits[rows, ids] = NEVER
    some = rows.unique()
    none_left = some[logits[some].amax(-1) == NEVER]
    undone = torch.isin(rows, none_left)
    logits[rows[undone], ids[undone]] = before[undone]


def subtract_penalties(logits, written, frequency, presence):
    """Subtract `frequency` for each time that a token was written, and `presence` once."""
    rows, ids = in_pairs(written)
    pairs = torch.stack([rows, ids])
    pairs, times = pairs.unique(dim=1, return_counts=True)
    logits[pairs[0], pairs[1]] -= times * frequency + presence


def in_pairs(lists):
    """Lists of token ids -> (rows, ids), int64 alike: each list's number beside each of its ids."""
    rows = torch.arange(len(lists)).repeat_interleave(torch.tensor([len(ids) for ids in lists]))
    return rows, torch.tensor([token for ids in lists for token in ids], dtype=torch.long)


# --------------------------------------------------------------------------------------------------
# By the distribution


def top_k(logits, k):
    """Rule out all but the k likeliest, and those equal to the last of them."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, NEVER)


def top_p(logits, p):
    """Rule out the least likely ones, as many as have a probability of 1 - p together."""
    ascending, order = logits.sort()
    ruled_out = ascending.softmax(-1).cumsum(-1) <= 1 - p
    ruled_out[:, -1] = False  # the likeliest stays
    return logits.masked_fill(ruled_out.scatter(-1, order, ruled_out), NEVER)


def min_p(logits, p):
    """Rule out those less likely than p times the likeliest."""
    probabilities = logits.softmax(-1)
    least = p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < least, NEVER)
