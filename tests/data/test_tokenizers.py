"""data/tokenizers.py: text to ids and back without loss, and the same vocabulary every time."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HF

from base import InputError
from data.tokenizers import (
    Tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    longest_prefixes,
    make_tokenizer,
    size_for,
)

ROOT = Path(__file__).resolve().parents[2]
FAST = settings(deadline=None, max_examples=30)
SAMPLE = (
    "It's a test, isn't it? 12345 and 3.14; the other the then there this that.\n\n"
    "\tdef f(x):\r\n        return x ** 2  # naïve café — 中文字符 🙂\n    <|endoftext|> "
) * 8
SPECIAL = [
    "<|endoftext|>",
    "\r\n",
    "\n\n",
    "  ",
    "🙂",
    "é",
    "e\u0301",
    "\0",
    "\ufeff",
    "\u2028",
    "'LL",
    "1234",
    "中",
]
# Any text the decoder of a file can yield (it never yields surrogates), rich in what tokenizers
# trip over.
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIAL)), max_size=12).map("".join)


def once(text):
    return lambda: iter([text])


def never():
    pytest.fail("this tokenizer has no need of the text")


@pytest.fixture(scope="module", params=["bytes", "bpe:257", "bpe:300", "bpe:1000"])
def tokenizer(request):
    """Those that can encode any text."""
    return make_tokenizer(request.param, once(SAMPLE))


def fake_gpt2():
    """tiktoken's own class with 256 bytes and one merge, in an order that is not the bytes'
    order."""
    import tiktoken

    ranks = {bytes([255 - i]): i for i in range(256)} | {b"th": 256}
    return tiktoken.Encoding(
        "gpt2", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )


def check_round_trip(tok, text):
    (ids,) = tok.encode([text])
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert tok.decode(ids) == tok.decode(ids.tolist()) == text
    assert tok.token_bytes[ids].sum() == len(text.encode())
    assert not (ids == tok.eot).any()
    return ids


@FAST
@given(TEXT)
@example("<|endoftext|>")
@example(SAMPLE)
def test_round_trip_and_byte_count(tokenizer, text):
    """Nothing is lost, end-of-text spelled out is ordinary text, token_bytes adds up."""
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize("white", [" ", " \n"])
def test_very_long_runs_of_whitespace(white):
    """More than a regex engine has stack for, inside of lines."""
    tok = make_tokenizer("bpe:300", once(SAMPLE))
    check_round_trip(tok, "one\ntwo" + white * 1_000_000 + "three\nfour\n")


def test_runs_of_whitespace_take_the_usual_time():
    """A run as long as is just not cut takes no more than words of the same length do."""
    tok = make_tokenizer("bpe:300", once(SAMPLE))

    def best(text):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            tok.encode([text])
            times.append(time.perf_counter() - start)
        return min(times)

    # 20 times faster than the words; 70 times slower where every place begins a search
    assert best((" " * 9999 + "x") * 20) < 5 * best("some words " * 20_000)


@FAST
@given(TEXT)
@example("<|endoftext|>")
@example("\U0010ffff\0")
def test_round_trip_of_characters(text):
    tok = make_tokenizer("chars", once(text + "z"))
    ids = check_round_trip(tok, text)
    assert len(ids) == len(text) and tok.n_vocab == len(set(text + "z")) + 1


@given(st.lists(TEXT, max_size=5))
@FAST
def test_a_batch_is_each_text_alone_in_order(tokenizer, texts):
    together = tokenizer.encode(texts)
    assert [ids.tolist() for ids in together] == [tokenizer.encode([t])[0].tolist() for t in texts]


def test_conventions(tokenizer):
    """End-of-text is the last id and stands for no bytes; everything fits uint16."""
    n = tokenizer.n_vocab
    assert n <= 65536 and tokenizer.eot == n - 1 == len(tokenizer.tokens)
    assert tokenizer.token_bytes.shape == (n,) and tokenizer.token_bytes.dtype == np.int64
    assert tokenizer.token_bytes[tokenizer.eot] == 0 and (tokenizer.token_bytes[:-1] > 0).all()
    assert tokenizer.token_bytes[:-1].tolist() == [len(t) for t in tokenizer.tokens]


def test_decode_leaves_out_end_of_text_and_replaces_broken_utf8(tokenizer):
    a, b = (tokenizer.encode([t])[0].tolist() for t in ("ab", "c"))
    assert tokenizer.decode([tokenizer.eot, *a, tokenizer.eot, *b]) == "abc"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.eot]) == ""
    broken = tokenizer.tokens.index(b"\xe9")
    assert tokenizer.decode([*a, broken]) == "ab\ufffd"


@FAST
@given(TEXT)
def test_json_round_trip_gives_the_same_ids(tokenizer, text):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode([text])[0].tolist() == tokenizer.encode([text])[0].tolist()
    assert again.to_json() == tokenizer.to_json()
    assert (again.kind, again.n_vocab, again.eot) == (
        tokenizer.kind,
        tokenizer.n_vocab,
        tokenizer.eot,
    )
    assert (again.token_bytes == tokenizer.token_bytes).all()


@FAST
@given(TEXT)
def test_hugging_faces_library_reads_the_same_file(tokenizer, text):
    theirs = HF.from_str(tokenizer.to_json())
    assert theirs.encode(text.replace("<|endoftext|>", "")).ids == (
        tokenizer.encode([text.replace("<|endoftext|>", "")])[0].tolist()
    )
    assert theirs.token_to_id("<|endoftext|>") == tokenizer.eot


def test_a_run_s_tokenizer_is_loaded_from_its_folder(tmp_path):
    tok = make_tokenizer("bpe:300", once(SAMPLE))
    with pytest.raises(InputError, match="tokenizer.json: No such file.* expected the folder of"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tok.to_json())
    assert load_tokenizer(tmp_path).tokens == tok.tokens
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer of this program"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "chars", ["a", "ba\0\n", 'é\U0001f642\ufeff\u2028"\\', "\x7f\x80\xff\u0100"]
)
def test_json_round_trip_of_characters(chars):
    tok = make_tokenizer("chars", once(chars))
    again = Tokenizer.from_json(json.dumps(json.loads(tok.to_json()), ensure_ascii=False))
    assert again.encode([chars])[0].tolist() == tok.encode([chars])[0].tolist()
    assert again.decode(range(tok.n_vocab)) == "".join(sorted(chars))


def test_bytes():
    tok = make_tokenizer("bytes", never)
    assert (tok.n_vocab, tok.eot) == (257, 256)
    assert tok.encode(["aé", ""])[0].tolist() == [97, 0xC3, 0xA9]
    assert tok.tokens == [bytes([i]) for i in range(256)]


def test_chars_are_numbered_by_code_point():
    tok = make_tokenizer("chars", lambda: iter(["cab", "🙂ac"]))
    assert tok.encode(["abc🙂"])[0].tolist() == [0, 1, 2, 3] and tok.eot == 4


@pytest.mark.parametrize("unknown", ["b", "\0", "z", "🙂", "c" + "🙂"])
def test_unknown_character_is_named(unknown):
    """Below, between and above the known ones."""
    tok = make_tokenizer("chars", once("ac"))
    with pytest.raises(InputError) as e:
        tok.encode(["ac", "a" + unknown])
    assert repr(unknown[-1]) in str(e.value) and "2 " in str(e.value) and "\n" not in str(e.value)


def test_too_many_characters():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10FFFF)]))
    assert make_tokenizer("chars", once(every[:65535])).n_vocab == 65536
    with pytest.raises(InputError, match="65536 distinct"):
        make_tokenizer("chars", once(every[:65536]))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "bpe:",
        "bpe:x",
        "bpe:-300",
        "bpe:300 ",
        "bpe:3e2",
        "Bytes",
        "gpt4",
        "char",
        "../x",
        "bytes\n",
    ],
)
def test_unknown_name(name):
    with pytest.raises(InputError) as e:
        make_tokenizer(name, never)
    line = str(e.value)
    assert repr(name) in line and "\n" not in line
    assert all(known in line for known in ("chars", "bytes", "bpe:N", "gpt2"))


@pytest.mark.parametrize("size", [0, 1, 256, 65537, 10**9])
def test_bad_size(size):
    with pytest.raises(InputError, match=f"bpe:{size}: .*257 to 65536"):
        make_tokenizer(f"bpe:{size}", never)


# BPE


def test_bpe_begins_with_the_256_bytes(tokenizer):
    """So any text at all can be encoded, and an id below 256 costs one byte."""
    assert sorted(tokenizer.tokens[:256]) == [bytes([i]) for i in range(256)]
    assert len(set(tokenizer.tokens)) == len(tokenizer.tokens)


def test_bpe_has_the_size_asked_for_and_merges_earlier_tokens():
    tok = make_tokenizer("bpe:300", once(SAMPLE))
    assert tok.n_vocab == 300
    for i in range(256, 299):
        token, before = tok.tokens[i], tok.tokens[:i]
        assert any(token[:k] in before and token[k:] in before for k in range(1, len(token))), token


def test_the_size_of_bpe_follows_that_of_the_text():
    """In bytes, whatever the texts are cut into; no more is read than it takes."""
    sizes = {10: 1024, 245_000: 1024, 246_000: 2048, 491_000: 2048, 492_000: 4096}
    for n_bytes, expected in sizes.items():
        assert size_for(["ab\u00e9" * (n_bytes // 4)]) == expected
        assert size_for(["ab\u00e9"] * (n_bytes // 4)) == expected
    endless = itertools.repeat("a" * 1000)
    assert size_for(endless) == 4096
    words = [f"{a}{b} " for a in "abcdefghijklmnopqrstuvwxyz" for b in range(60)]
    assert make_tokenizer("bpe", lambda: iter(words)).n_vocab <= 1024


def test_bpe_learns_the_commonest_pair_first():
    assert make_tokenizer("bpe:257", once("zq")).tokens[256:] == []
    assert make_tokenizer("bpe:258", once("zqx zqx qy zq")).tokens[256:] == [b"zq"]


def test_bpe_compresses_what_it_was_trained_on():
    (ids,) = make_tokenizer("bpe:1000", once(SAMPLE)).encode([SAMPLE])
    assert len(ids) < len(SAMPLE) / 3


@pytest.mark.parametrize("corpus", [[], [""], ["a"], ["ab" * 3], ["\n"], ["🙂"], ["a", "", "b"]])
def test_bpe_of_a_small_corpus_has_fewer_merges(corpus):
    tok = make_tokenizer("bpe:5000", lambda: iter(corpus))
    assert 257 <= tok.n_vocab < 300 and tok.eot == tok.n_vocab - 1
    check_round_trip(tok, "any text, 🙂, at all" + "".join(corpus))
    check_round_trip(Tokenizer.from_json(tok.to_json()), "any text, 🙂, at all")


def test_bpe_keeps_numbers_to_two_digits_and_words_apart():
    """The split pattern is in force in training and in encoding."""
    tok = make_tokenizer("bpe:2000", once("12345678 one two\n" * 500))
    digits = [t for t in tok.tokens if t.strip().isdigit()]
    assert max(map(len, digits)) == 2 and b"12" in digits and b" one" in tok.tokens
    assert not any(b"e t" in t for t in tok.tokens)


def test_bpe_is_the_same_whatever_the_texts_are_cut_into():
    lines = ["the cat\n", "sat on 1234 mats\n", "for naïve cats\n"] * 20
    assert (
        make_tokenizer("bpe:290", lambda: iter(lines)).tokens
        == make_tokenizer("bpe:290", once("".join(lines))).tokens
    )


def test_bpe_training_is_deterministic_whatever_the_threads():
    """Here; with one thread and with four in a process with another hash seed."""
    text = (ROOT / "data/loader.py").read_text()
    here = [make_tokenizer("bpe:600", once(text)).to_json()]
    command = """
import os, sys
from data.tokenizers import make_tokenizer
slow = {"tiktoken", "tokenizers", "huggingface_hub"}
assert not slow & set(sys.modules), "importing data must stay quick"
text = sys.stdin.buffer.read().decode()
for parallel in ("false", "true"):
    os.environ["TOKENIZERS_PARALLELISM"] = parallel
    print(make_tokenizer("bpe:600", lambda: iter([text])).to_json())
"""
    env = os.environ | dict(RAYON_NUM_THREADS="4", PYTHONHASHSEED="1")
    done = subprocess.run(
        [sys.executable, "-c", command],
        input=text.encode(),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=env,
        check=True,
    )
    there = done.stdout.decode().splitlines()
    assert len(there) == 2 and len(set(here + there)) == 1


@pytest.mark.slow
def test_bpe_training_does_not_choke_on_text_without_spaces():
    """Base64, DNA or minified code: 300 kB without a break, learned in seconds and not in
    minutes."""
    letters = (
        np.random.default_rng(0).integers(ord("a"), ord("m"), 300_000, dtype=np.uint8).tobytes()
    )
    command = (
        "import sys; from data.tokenizers import make_tokenizer; text = sys.stdin.read();"
        "make_tokenizer('bpe:400', lambda: iter([text]))"
    )
    subprocess.run([sys.executable, "-c", command], input=letters, cwd=ROOT, timeout=5, check=True)


# GPT-2


def test_gpt2_is_what_tiktoken_ships(monkeypatch):
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": fake_gpt2()}.__getitem__)
    tok = make_tokenizer("gpt2", never)
    assert (tok.kind, tok.n_vocab, tok.eot) == ("bpe", 258, 257)
    assert tok.tokens == [bytes([255 - i]) for i in range(256)] + [b"th"]
    for t in (tok, Tokenizer.from_json(tok.to_json())):
        text = "the thé <|endoftext|>"
        assert check_round_trip(t, text).tolist() == fake_gpt2().encode_ordinary(text)


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("x"), KeyError("x")])
def test_gpt2_without_a_network(monkeypatch, error):
    import tiktoken

    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    for call in (gpt2_tokenizer, lambda: make_tokenizer("gpt2", never)):
        with pytest.raises(InputError) as e:
            call()
        assert (
            "bpe:N" in str(e.value)
            and type(error).__name__ in str(e.value)
            and "\n" not in str(e.value)
        )


# --- Prefixes


def test_the_longest_prefix_of_each_token():
    """Proper ones, by bytes; of no text there is none, nor one that is it."""
    tokens = [b"a", b"b", b"ab", b"abc", b"abcde", b"", b"\xc3", "\u00e9".encode(), b"zz"]
    found = longest_prefixes(tokens, 12)
    assert found.tolist() == [-1, -1, 0, 2, 3, -1, -1, 6, -1, -1, -1, -1]
    assert found.dtype == np.int64


def test_longest_prefixes_of_a_trained_vocabulary():
    """Against every pair of tokens."""
    words = make_tokenizer("bpe:400", once(SAMPLE))
    tokens = words.tokens
    found = longest_prefixes(tokens, words.n_vocab)
    for token, number in zip(tokens, found):
        begins = [t for t in tokens if len(t) < len(token) and token.startswith(t)]
        expected = max(begins, key=len) if begins else None
        assert (tokens[number] if number >= 0 else None) == expected
    assert (found >= 0).sum() > 50
