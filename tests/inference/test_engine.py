"""Text comes out as the model says it: whole characters, ended where it should be, the same with
and without a cache and whoever else is in the batch."""

import pytest
import torch
from helpers import PIECES, stage_of, tiny_model

from base import InputError
from data import Tokenizer
from inference.engine import Engine, Request
from inference.sampling import Sampling
from models.cache import Recomputing

GREEDY = Sampling(temperature=0.0)
PLAIN = Sampling()

BYTES = Tokenizer("bytes", [bytes([i]) for i in range(256)])
CHARS = Tokenizer("chars", sorted("abcdefghijklmnopqrstuvwxyz .\né"))
# Every byte, and words as a BPE has them: with the space before them
WORDS = [b"de", b"def", b" f", b" foo", b" foot", b"    ", b"   ", b" return"]
BPE = Tokenizer("bpe", [bytes([i]) for i in range(256)] + WORDS, r" ?\w+|\s+(?!\S)|\s+|\W")
EOT = object()


class Scripted(torch.nn.Module):
    """Says the same whatever it is asked: a list of texts, each a token or bytes of several."""

    def __init__(self, tokenizer, *script):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.script = []
        for piece in script:
            self.script.append(tokenizer.eot if piece is EOT else tokenizer.tokens.index(piece))
        self.seen = []  # the inputs of each call

    def new_cache(self, rows):
        return Recomputing(self).new_cache(rows)

    def decode(self, inputs, counts, cache, stage):
        self.seen.append((inputs.tolist(), counts))
        step = len(self.seen) - 1
        for row, n in zip(cache.tokens, counts):
            row += [0] * n
        logits = torch.zeros(len(inputs), self.tokenizer.n_vocab)
        logits[:, self.script[step % len(self.script)]] = 9.0
        return logits


def say(tokenizer, script, prompt="", max_tokens=50, **options):
    """(pieces as they came, the Completion) of a model that says the script."""
    model = Scripted(tokenizer, *script)
    engine = Engine(model, None, tokenizer, 1000)
    completion = engine.begin(Request(prompt, max_tokens, GREEDY, **options))
    pieces = [text for _, text in engine.run([completion])]
    assert "".join(pieces) == completion.text
    return pieces, completion


def bytes_of(text):
    return [bytes([b]) for b in text.encode()]


# --- Characters


@pytest.mark.parametrize("text", ["naïve 中文 🙂!", "plain"])
def test_characters_come_whole(text):
    pieces, done = say(BYTES, [*bytes_of(text), EOT])
    assert pieces == list(text)
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("n", range(1, 4))
def test_a_character_that_is_not_complete_at_the_end_is_not_shown(n):
    script = bytes_of("a🙂")[: 1 + n]
    assert say(BYTES, [*script, EOT])[1].text == "a"
    done = say(BYTES, script, max_tokens=1 + n)[1]
    assert done.text == "a" and done.finish_reason == "length"


def test_bytes_that_are_no_character_are_said_to_be_none():
    assert say(BYTES, [b"a", b"\xff", b"b", EOT])[1].text == "a\ufffdb"


# --- Where text ends


def test_it_ends_after_so_many_tokens():
    _, done = say(CHARS, list("ab"), max_tokens=5)
    assert done.text == "ababa" and done.finish_reason == "length"
    assert done.written == CHARS.encode(["ababa"])[0].tolist()


def test_it_ends_before_a_stop_string_and_never_shows_a_part_of_it():
    pieces, done = say(CHARS, list("so. the end. no"), stop=("the end", "no"))
    assert done.text == "so. " and done.finish_reason == "stop"
    assert pieces == ["s", "o", ".", " "]


def test_what_only_looked_like_a_stop_string_is_shown():
    pieces, done = say(CHARS, list("abac"), max_tokens=4, stop=("abab",))
    assert done.text == "abac" and done.finish_reason == "length"
    assert pieces == ["abac"]
    assert say(CHARS, list("xabab"), stop=("abab",))[0] == ["x"]
    # It starts again within what looked like it
    assert say(CHARS, list("aabz"), stop=("abz",))[1].text == "a"


def test_the_first_of_several_stop_strings_counts():
    script = [b"def", b" return"]
    assert say(BPE, script, stop=("turn", "ret", "urn"))[1].text == "def "


def test_a_stop_string_at_the_very_end_is_left_out():
    done = say(CHARS, list("abc"), max_tokens=3, stop=("bc",))[1]
    assert done.text == "a" and done.finish_reason == "stop"


# --- Prompts


def test_an_empty_prompt_is_a_document_that_begins():
    model = Scripted(CHARS, "a")
    Engine(model, None, CHARS, 100).generate([Request("", 2, GREEDY)])
    assert model.seen[0] == ([[CHARS.eot]], [1])


def test_the_space_at_a_prompts_end_becomes_part_of_the_next_word():
    """The model would say something else first; what it may say has the space."""
    model = Scripted(BPE, b"def", b" return")
    engine = Engine(model, None, BPE, 100)
    [done] = engine.generate([Request("def ", 2, PLAIN)])
    assert model.seen[0] == ([[BPE.eot, BPE.tokens.index(b"def")]], [1 + 1])
    assert BPE.tokens[done.written[0]].startswith(b" ")
    assert done.tokens[0] == BPE.eot and BPE.decode(done.tokens) == "def " + done.text


def test_a_prompts_last_token_is_written_again_in_parts_if_need_be():
    """Four spaces in running text are three and those of the next word."""
    script = [b"   ", b" return", EOT]
    _, done = say(BPE, script, prompt="    ")
    assert done.text == "return"
    assert BPE.decode(done.tokens) == "    return"
    assert say(BPE, [b" foot", EOT], prompt="def foo")[1].text == "t"


def test_a_prompt_with_characters_that_the_tokenizer_does_not_know():
    with pytest.raises(InputError, match="character 'Q'"):
        say(CHARS, ["a"], prompt="aQb")


def test_a_prompt_that_is_too_long_loses_its_beginning_and_it_is_said():
    model = Scripted(CHARS, "a")
    engine = Engine(model, None, CHARS, 10)
    done = engine.begin(Request("abcdefghijklmnop", 1, GREEDY))
    assert done.n_cut == 7  # end-of-text among them
    assert CHARS.decode(done.tokens) == "ghijklmnop"
    assert engine.begin(Request("abcdefghi", 1, GREEDY)).n_cut == 0


def test_when_there_is_no_more_room_it_goes_on_with_the_second_half():
    model = Scripted(CHARS, *"abcdefghijklm")
    engine = Engine(model, None, CHARS, 8)
    [done] = engine.generate([Request("", 12, GREEDY)])
    assert done.text == "abcdefghijkl"
    again = [inputs for inputs, counts in model.seen if counts != [1]]
    assert CHARS.decode(again[0][0]) == "efgh"


def test_only_the_row_that_has_no_more_room_loses_its_first_half():
    model = Scripted(CHARS, "a")
    engine = Engine(model, None, CHARS, 8)
    engine.generate([Request("ab", 6, GREEDY), Request("abcde", 6, GREEDY)])
    # The prompts; then all that each row holds, when the second one has reached 8
    assert [counts for _, counts in model.seen if counts != [1, 1]] == [[3, 6], [6, 4]]


# --- A model


@pytest.fixture(scope="module")
def small():
    c, model = tiny_model(n_vocab=BPE.n_vocab, max_len=64, **PIECES)
    return model, stage_of(c, max_doc_len=64)


def engine_of(small, cached=True, max_len=64):
    model, stage = small
    engine = Engine(model, stage, BPE, max_len)
    if not cached:
        engine.decoder = Recomputing(model)
    return engine


ENDLESS = ((BPE.eot, -100.0),)  # a bias
REQUESTS = [
    Request("def foo", 30, Sampling(logit_bias=ENDLESS), seed=1),
    Request("", 12, Sampling(0.7, 0, 0.9, 0.0, 1.2, 3, logit_bias=ENDLESS), seed=2),
    Request("a longer prompt than the others", 40, GREEDY, seed=3),
    Request(" ", 1, PLAIN, seed=4),
]


@pytest.mark.parametrize("max_len", [64, 40, 34])
def test_cached_it_says_what_it_says_without(small, max_len):
    """Also where a row has to leave its first half behind."""
    ours = engine_of(small, max_len=max_len).generate(REQUESTS)
    theirs = engine_of(small, cached=False, max_len=max_len).generate(REQUESTS)
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert [len(c.written) for c in ours] == [30, 12, 40, 1]


@pytest.mark.parametrize("max_len", [64, 34])
def test_whoever_else_is_in_the_batch(small, max_len):
    together = engine_of(small, max_len=max_len).generate(REQUESTS)
    for request, done in zip(REQUESTS, together):
        [alone] = engine_of(small, max_len=max_len).generate([request])
        assert alone.tokens == done.tokens and alone.text == done.text


def test_the_seed_decides(small):
    texts = []
    for seed in (1, 1, 2):
        [done] = engine_of(small).generate([Request("def ", 20, PLAIN, seed=seed)])
        texts.append(done.text)
    assert texts[0] == texts[1] != texts[2]


def test_weights_that_are_not_finite_are_said_to_be():
    c, model = tiny_model(n_vocab=BPE.n_vocab)
    with torch.no_grad():
        model.lm_head[5, 5] = float("nan")
    engine = Engine(model, stage_of(c), BPE, 24)
    with pytest.raises(InputError, match="not finite"):
        engine.generate([Request("a", 3)])
