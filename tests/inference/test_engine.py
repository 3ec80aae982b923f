"""Text comes out as the model says it: whole characters, ended where it should be, the same with
and without a cache and whoever else is in the batch."""

import copy

import pytest
import torch
from helpers import PIECES, stage_of, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

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
    # The prompts; then half of what the second row holds, when it has reached 8. It ends alone
    assert [counts for _, counts in model.seen if counts != [1, 1]] == [[3, 6], [4], [1]]


# --- A model


@pytest.fixture(scope="module")
def small():
    c, model = tiny_model(n_vocab=BPE.n_vocab, max_len=64, **PIECES)
    return model, stage_of(c, max_doc_len=64)


def engine_of(small, cached=True, max_len=64, **about):
    model, stage = small
    engine = Engine(model, stage, BPE, max_len, **about)
    if not cached:
        engine.decoder = Recomputing(model)
        engine.clear()
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
    assert [c.n_new for c in ours] == [30, 12, 40, 1]


@pytest.mark.parametrize(["max_len", "order"], [(64, -1), (34, 1)])
def test_whoever_else_is_in_the_batch(small, max_len, order):
    """Also where the first rows are done first, and others take their places."""
    requests = REQUESTS[::order]
    together = engine_of(small, max_len=max_len).generate(requests)
    for request, done in zip(requests, together):
        [alone] = engine_of(small, max_len=max_len).generate([request])
        assert alone.tokens == done.tokens and alone.text == done.text


REPEATING = [
    Request("def foo foo bar foo foo bar foo", 40, GREEDY, seed=1, alternatives=2),
    Request("aaaaaaaaaaaaaaaaaaaaaaaa", 30, Sampling(0.3, logit_bias=ENDLESS), seed=2),
    Request("ab ab ab ab ab", 25, Sampling(0.7, 0, 0.9, 0.0, 1.2, 3, logit_bias=ENDLESS), seed=3),
    Request("x y x y", 30, PLAIN, seed=4, stop=("e", "o")),
    Request("", 1, GREEDY, seed=5),
]


@pytest.mark.parametrize("max_len", [64, 34])
def test_tokens_that_are_looked_up_change_the_time_only(small, max_len):
    plain = engine_of(small, max_len=max_len)
    quick = engine_of(small, max_len=max_len, prompt_lookup=4)
    calls = {plain: 0, quick: 0}
    for engine in calls:
        decode = engine.decode

        def counted(rows, cache, engine=engine, decode=decode, **how):
            calls[engine] += 1
            # Padding has positions as well
            assert max(cache.lengths) + max(map(len, rows)) <= max_len
            return decode(rows, cache, **how)

        engine.decode = counted
    for requests in REPEATING, REQUESTS, *([r] for r in REPEATING):
        expected = plain.generate(requests)
        found = quick.generate(requests)
        for one, other in zip(expected, found):
            assert one.tokens == other.tokens and one.text == other.text
            assert one.finish_reason == other.finish_reason
            assert [d.token for d in one.drawn] == [d.token for d in other.drawn]
    assert calls[quick] < 0.9 * calls[plain]


@torch.no_grad()
def test_weights_may_change_between_answers():
    """As they do in reinforcement learning: nothing that was made of the old ones is used."""
    parts = PIECES | dict(qkvo_scales=True)
    c, changing = tiny_model(n_vocab=BPE.n_vocab, max_len=64, **parts)
    stage = stage_of(c, max_doc_len=64)
    engine = engine_of((changing, stage))
    engine.generate(REQUESTS)
    for parameter in changing.parameters():
        parameter.mul_(1.5)
    expected = engine_of((copy.deepcopy(changing), stage)).generate(REQUESTS)
    assert [c.tokens for c in engine.generate(REQUESTS)] == [c.tokens for c in expected]


def test_the_seed_decides(small):
    texts = []
    for seed in (1, 1, 2):
        [done] = engine_of(small).generate([Request("def ", 20, PLAIN, seed=seed)])
        texts.append(done.text)
    assert texts[0] == texts[1] != texts[2]


# --- Requests that come and go


def test_a_long_prompt_holds_up_the_others_for_a_part_of_it_only():
    model = Scripted(CHARS, "a")
    engine = Engine(model, None, CHARS, 100, part=8)
    short = engine.begin(Request("", 20, GREEDY))
    engine.add(short)
    engine.step()
    engine.add(engine.begin(Request("b" * 29, 1, GREEDY)))
    for n in range(4):
        engine.step()
        assert len(short.written) == n + 2
    assert [counts for _, counts in model.seen if counts != [1]] == [[8], [8], [8], [6]]


def test_short_prompts_are_read_together_and_there_are_so_many_places():
    model = Scripted(CHARS, "a")
    engine = Engine(model, None, CHARS, 100, places=3, part=8)
    engine.generate([Request("b" * n, 3, GREEDY) for n in (1, 2, 5, 0, 0)])
    sizes = [len(counts) for _, counts in model.seen]
    assert max(sizes) == 3
    # The third prompt does not fit beside the first two, and the last ones wait for places
    assert [c for _, c in model.seen if set(c) != {1}] == [[2, 3], [6]]


def test_who_is_cancelled_leaves_its_place():
    model = Scripted(CHARS, "a")
    engine = Engine(model, None, CHARS, 100, places=1)
    first, second, third = (engine.begin(Request("b", 50, GREEDY)) for _ in range(3))
    for completion in first, second, third:
        engine.add(completion)
    engine.step()
    first.cancel()
    second.cancel()
    engine.step()
    assert [len(c.written) for c in (first, second, third)] == [1, 0, 1]
    third.cancel()
    engine.step()
    assert not engine.busy() and engine.cache.lengths == []
    assert first.finish_reason == "cancelled"


def test_a_generator_that_is_left_takes_its_requests_along(small):
    engine = engine_of(small)
    for _ in engine.run([engine.begin(request) for request in REQUESTS]):
        break
    assert not engine.busy()
    assert engine.generate(REQUESTS[:1])[0].n_new == 30


@pytest.fixture(scope="module")
def smallest():
    parts = dict(n_layer=1, value_embed_layers=(), n_gram=2, smear=True, key_offset=True)
    c, model = tiny_model(n_vocab=BPE.n_vocab, max_len=64, **parts)
    return model, stage_of(c, max_doc_len=64)


arrivals = st.tuples(
    st.integers(0, 6),  # steps since the one before
    st.text("abc def", max_size=40),
    st.integers(1, 25),  # tokens
    st.sampled_from([GREEDY, PLAIN, Sampling(0.7, 0, 0.9, 0.0, 1.2, 3)]),
    st.integers(0, 3),  # seed
    st.sampled_from([(), ("e",), ("ab", "c d")]),
    st.none() | st.integers(0, 20),  # steps until it is cancelled
)


@given(st.lists(arrivals, min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=12, deadline=None)
def test_what_is_said_to_one_does_not_depend_on_the_others(smallest, given, places, part):
    """Whenever they come, however long they are, whoever is cancelled."""
    check_company(smallest, given, places, part)


@pytest.mark.slow
@given(st.lists(arrivals, min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_what_is_said_to_one_does_not_depend_on_the_others_often(small, given, places, part):
    check_company(small, given, places, part)


def check_company(small, given, places, part):
    model, stage = small
    engine = Engine(model, stage, BPE, 34, places, part)
    steps = 0
    said = {}  # Completion -> its text as it came
    cancelled = []  # (step, Completion)
    for wait, prompt, max_tokens, sampling, seed, stop, patience in given:
        for _ in range(wait):
            steps = one_step(engine, steps, said, cancelled)
        completion = engine.begin(Request(prompt, max_tokens, sampling, seed, stop))
        said[completion] = ""
        engine.add(completion)
        if patience is not None:
            cancelled.append((steps + patience, completion))
    while engine.busy():
        steps = one_step(engine, steps, said, cancelled)
        assert steps < 1000

    for completion, text in said.items():
        assert text == completion.text
        [expected] = Engine(model, stage, BPE, 34).generate([completion.request])
        if completion.finish_reason == "cancelled":
            n = len(completion.tokens)
            assert completion.tokens == expected.tokens[:n]
            assert expected.text.startswith(text)
        else:
            assert completion.tokens == expected.tokens
            assert completion.finish_reason == expected.finish_reason
            assert text == expected.text
    assert engine.cache.kv == {}


def one_step(engine, steps, said, cancelled):
    for at, completion in cancelled:
        if at == steps:
            completion.cancel()
    for completion, text in engine.step():
        said[completion] += text
    assert len(engine.live) <= engine.places
    return steps + 1


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_five_hundred_tokens_in_company(temperature):
    """Others come and go meanwhile; all of the text is in sight. test_cache.py has the same
    without a cache."""
    c, model = tiny_model(n_vocab=BPE.n_vocab, max_len=512, n_layer=1, value_embed_layers=(0,))
    stage = stage_of(c, max_doc_len=512)
    long = Request("def foo", 500, Sampling(temperature, logit_bias=ENDLESS))
    [expected] = Engine(model, stage, BPE, 512).generate([long])

    engine = Engine(model, stage, BPE, 512, places=3)
    completion = engine.begin(long)
    engine.add(completion)
    for i in range(600):
        if i % 40 == 7:
            engine.add(engine.begin(Request("def " * (i % 3), 60, PLAIN, seed=i)))
        if completion.finish_reason is None:
            engine.step()
    assert completion.n_new == 500
    assert completion.tokens == expected.tokens


# --- Probabilities


def test_probabilities_are_the_models_own(small):
    """Before sampling changes them; with the likeliest others, and where in the text they are."""
    sampling = Sampling(0.5, 3, logit_bias=ENDLESS)
    request = Request((97, 98), 8, sampling, seed=1, alternatives=4)
    [done] = engine_of(small).generate([request])
    model, stage = small
    tokens = torch.tensor([done.tokens])
    whole = torch.tensor([0, len(done.tokens)], dtype=torch.int32)
    with torch.no_grad():
        logprobs = model.logits(tokens, whole, stage)[0].log_softmax(-1)
    assert [d.token for d in done.drawn] == done.written
    for i, drawn in enumerate(done.drawn):
        expected = logprobs[done.n_prompt + i - 1]
        assert drawn.logprob == pytest.approx(expected[drawn.token].item(), abs=1e-4)
        best = expected.topk(4)
        assert [t for t, _ in drawn.likeliest] == best.indices.tolist()
        assert [p for _, p in drawn.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_where_in_the_text_a_token_is():
    """What is the prompt's of the first one does not count."""
    model = Scripted(BPE, b" foot", b"de", "é".encode()[:1], "é".encode()[1:], EOT)
    engine = Engine(model, None, BPE, 100)
    [done] = engine.generate([Request(" f", 5, GREEDY, alternatives=0)])
    assert done.text == "ootdeé"
    assert [(d.offset, d.skip) for d in done.drawn] == [(0, 2), (3, 0), (5, 0), (5, 0), (6, 0)]
    assert all(d.likeliest == [] for d in done.drawn)


def test_token_ids_are_a_prompt_as_they_are(small):
    model = Scripted(BPE, b"def")
    engine = Engine(model, None, BPE, 100)
    ids = (BPE.tokens.index(b"def"), BPE.tokens.index(b" "))
    for prompt in ids, (BPE.eot, *ids):
        done = engine.begin(Request(prompt, 1, GREEDY))
        assert done.tokens == [BPE.eot, *ids] and not done.promised


def test_weights_that_are_not_finite_are_said_to_be():
    c, model = tiny_model(n_vocab=BPE.n_vocab)
    with torch.no_grad():
        model.lm_head[5, 5] = float("nan")
    engine = Engine(model, stage_of(c), BPE, 24)
    with pytest.raises(InputError, match="not finite"):
        engine.generate([Request("a", 3)])
