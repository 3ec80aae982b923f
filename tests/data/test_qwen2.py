"""`qwen2:N`: what other programs make of the same file, and tokens of other programs' files."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import open_text, prepare_text
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HF

import data.tokenizers
from base import InputError
from data.conversations import with_chat_tokens
from data.foreign import ForeignTokenizer
from data.loader import TrainLoader
from data.shards import read_shard
from data.tokenizers import (
    QWEN2_PATTERN,
    SPECIALS,
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    train_qwen2,
)

ROOT = Path(__file__).resolve().parents[2]
FAST = settings(deadline=None, max_examples=40)
# As llama.cpp and transformers have it, spelled out once more
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = (
    "Don't, it'LL 12345; naïve cafe\u0301 中文字符 한국어 🙂🙂 \r\n\r\n"
    "  <|im_start|>user\n\t\tx = {}\n"
)
SAMPLE = (ROOT / "data" / "loader.py").read_text() + LINES * 20
PIECES = st.sampled_from(
    [
        *SPECIALS,
        "\r\n",
        "\n \n",
        "   ",
        "'ll",
        "'S",
        "é",
        "e\u0301",
        "12",
        "🙂",
        "\0",
        "\u2028",
        "the ",
    ]
)
WORDS = st.sampled_from(SAMPLE.split())
TEXT = st.lists(st.one_of(st.text(max_size=6), PIECES, WORDS), max_size=15).map("".join)


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer("qwen2:800", lambda: iter([SAMPLE]))


@pytest.fixture(scope="module")
def theirs(tok):
    """The same file in Hugging Face's library, for text alone."""
    hf = HF.from_str(tok.to_json())
    hf.encode_special_tokens = True
    return hf


@FAST
@given(TEXT)
@example(SAMPLE)
@example("".join(SPECIALS))
def test_ids_are_those_of_hugging_faces_library(tok, theirs, text):
    (ids,) = tok.encode([text])
    assert ids.tolist() == theirs.encode(text).ids
    assert tok.decode(ids) == text
    assert tok.token_bytes[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & set(tok.specials.values())


@FAST
@given(TEXT)
def test_it_is_read_back_as_it_was(tok, text):
    again = Tokenizer.from_json(tok.to_json().encode())
    assert type(again) is Tokenizer and again.kind == "bpe"  # run by tiktoken
    assert again.to_json() == tok.to_json() and again.specials == tok.specials
    assert again.encode([text])[0].tolist() == tok.encode([text])[0].tolist()


def test_size_and_special_tokens(tok):
    assert tok.n_vocab == 800 == len(tok.tokens) + len(SPECIALS)
    assert tok.specials == {text: 792 + i for i, text in enumerate(SPECIALS)}
    assert (
        tok.eot == 792 and (tok.token_bytes[792:] == 0).all() and (tok.token_bytes[:792] > 0).all()
    )
    assert SPECIALS[:4] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
    assert tok.decode([tok.specials["<|im_start|>"], *tok.encode(["user"])[0], 792]) == "user"


def test_the_file_is_what_exports_unchanged(tok):
    said = json.loads(tok.to_json())
    assert QWEN2_PATTERN == QWEN2 and said["normalizer"] is None
    split, byte_level = said["pre_tokenizer"]["pretokenizers"]
    assert split == dict(type="Split", pattern=dict(Regex=QWEN2), behavior="Isolated", invert=False)
    assert byte_level["add_prefix_space"] is False and byte_level["use_regex"] is False
    assert said["decoder"]["type"] == "ByteLevel"
    model = said["model"]
    assert model["ignore_merges"] is False and model["byte_fallback"] is False
    assert len(model["merges"]) == len(model["vocab"]) - 256
    assert all(token["special"] and not token["normalized"] for token in said["added_tokens"])


def test_every_token_of_text_is_one_that_merging_reaches(tok, theirs):
    """So that it makes no difference whether a library looks whole pieces up first."""
    for i, token in enumerate(tok.tokens):
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        assert tok.encode([text])[0].tolist() == theirs.encode(text).ids
        if len(theirs.pre_tokenizer.pre_tokenize_str(text)) == 1:
            assert theirs.encode(text).ids == [i]


def test_transformers_reads_it(tok):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=HF.from_str(tok.to_json()))
    text = SAMPLE.replace("<|im_start|>", "")
    assert fast(text)["input_ids"] == tok.encode([text])[0].tolist()
    turn = fast("<|im_start|>user")["input_ids"]
    assert turn[0] == tok.specials["<|im_start|>"] and fast.decode(turn) == "<|im_start|>user"


def test_numbers_are_single_digits_and_line_ends_one_piece(tok):
    assert len(tok.encode(["12345"])[0]) == 5
    learned = train_qwen2(iter(["x\n\n\n\ny 77 77 77\n" * 50]), 320)
    assert b"\n\n\n\n" in learned.tokens and b"77" not in learned.tokens


@FAST
@given(st.lists(st.sampled_from(["x", "yz ", " ", "\n", "a" * 300, " " * 20_000]), max_size=9))
def test_long_words_are_learned_from_in_parts(parts):
    text = "".join(parts)
    cut = list(data.tokenizers.without_long_words(text))
    assert "".join(cut) == text
    assert max((len(word) for part in cut for word in part.split()), default=0) <= 256
    if not re.search(r"\S{257}|\s{9000}", text):
        assert cut == [text]


def test_text_without_spaces_does_not_take_forever():
    letters = np.random.default_rng(0).integers(ord("a"), ord("m"), 300_000, dtype=np.uint8)
    began = time.process_time()
    train_qwen2(iter([letters.tobytes().decode()]), 400)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("size", [0, 263, 1 << 21])
def test_bad_sizes(size):
    with pytest.raises(InputError, match=f"qwen2:{size}: .*264 to 1048576"):
        make_tokenizer(f"qwen2:{size}", lambda: iter([]))


def test_a_small_text_has_fewer_tokens_and_still_all_bytes():
    small = make_tokenizer("qwen2:5000", lambda: iter(["ab ab"]))
    assert 264 <= small.n_vocab < 270
    assert small.decode(small.encode(["é 🙂"])[0]) == "é 🙂"


# --------------------------------------------------------------------------------------------------
# Other programs' files


def gpt2_like():
    """Byte-level with the split built in, and end-of-text in the vocabulary as its first id."""
    hf = HF(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    hf.train_from_iterator([SAMPLE], trainer)
    return hf


def llama2_like():
    """SentencePiece's: ▁ in place of spaces, one before the text, bytes to fall back on."""
    hf = HF(models.BPE(byte_fallback=True, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    hf.train_from_iterator(["the quick brown fox\n" * 20], trainer)
    said = json.loads(hf.to_str())
    said["added_tokens"] = said["added_tokens"][:3]  # bytes are ordinary tokens
    return HF.from_str(json.dumps(said))


@pytest.mark.parametrize("make, end", [(gpt2_like, "<|endoftext|>"), (llama2_like, "</s>")])
def test_taken_as_it_is(tmp_path, make, end):
    hf = make()
    path = tmp_path / "tokenizer.json"
    path.write_text(hf.to_str())
    taken = make_tokenizer(str(path), lambda: iter([]))
    assert isinstance(taken, ForeignTokenizer) and taken.to_json() == hf.to_str()
    assert taken.eot == hf.token_to_id(end) and taken.token_bytes[taken.eot] == 0
    assert taken.n_vocab == hf.get_vocab_size()
    for text in ("the quick brown fox", "Naïve 中文 🙂\n\n 12", f"{end} as text"):
        (ids,) = taken.encode([text])
        assert taken.decode(ids) == text and taken.eot not in ids.tolist()
        extra = make is llama2_like  # the space before a text
        assert taken.token_bytes[ids].sum() == len(text.encode()) + extra
        if end not in text:
            assert ids.tolist() == hf.encode(text, add_special_tokens=False).ids
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(taken.to_json())
    assert (
        load_tokenizer(tmp_path / "run").encode(["fox"])[0].tolist()
        == taken.encode(["fox"])[0].tolist()
    )


def test_another_program_s_tokenizer_gets_no_tokens_of_conversations():
    taken = Tokenizer.from_json(gpt2_like().to_str())
    with pytest.raises(InputError, match="another program's and has no <.im_start.>"):
        with_chat_tokens(taken)


def test_qwen2_s_own_split_with_another_order_of_merges_is_not_run_by_tiktoken(tok):
    said = json.loads(tok.to_json())
    merges = said["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    assert isinstance(Tokenizer.from_json(json.dumps(said)), ForeignTokenizer)


def word_pieces():
    return HF(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def lower_case():
    hf = gpt2_like()
    hf.normalizer = normalizers.Lowercase()
    return hf


def without_an_end():
    hf = HF(
        models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    return hf


@pytest.mark.parametrize(
    "make, why",
    [
        (word_pieces, "no token that ends"),
        (lower_case, "changes the text"),
        (without_an_end, "ends a text"),
    ],
)
def test_what_cannot_be_taken(make, why):
    with pytest.raises(InputError, match=f"here.json: not a tokenizer .*{why}"):
        Tokenizer.from_json(make().to_str(), "here.json")


def test_by_its_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    path = tmp_path / "tokenizer.json"
    path.write_text(gpt2_like().to_str())
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        if repo == "no/body":
            raise OSError("no route\nto host")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in "Qwen/Qwen3-0.6B", "some.one/x_y@v1.0":
        assert make_tokenizer(name, lambda: iter([])).n_vocab == 500
    expected = [("Qwen/Qwen3-0.6B", None), ("some.one/x_y", "v1.0")]
    assert asked == [(repo, "tokenizer.json", revision) for repo, revision in expected]
    with pytest.raises(InputError, match="no/body.*could not be fetched.*no route to host"):
        make_tokenizer("no/body", lambda: iter([]))

    text = tmp_path / "text.txt"
    text.write_text(SAMPLE)
    dataset = open_text(text, "some.one/x_y", tmp_path / "cache")
    assert dataset.n_vocab == 500
    assert "".join(dataset.tokenizer.decode(read_shard(p)) for p in dataset.train) in SAMPLE


def many_tokens():
    """More ids than uint16 has: every two bytes are a token."""
    letters = [data.tokenizers.LETTER[byte] for byte in range(256)]
    pairs = [(a, b) for a in letters for b in letters]
    ids = {letter: i for i, letter in enumerate(letters)}
    ids |= {a + b: 256 + i for i, (a, b) in enumerate(pairs)}
    hf = HF(models.BPE(ids, pairs))
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    return hf.to_str()


@pytest.mark.slow
def test_more_ids_than_uint16(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(many_tokens())
    text = tmp_path / "text.txt"
    text.write_text("été, naïve, größer\n" * 20 + SAMPLE)
    folder, meta, tok = prepare_text(text, str(file), tmp_path / "cache")
    assert type(tok) is Tokenizer and tok.dtype == np.uint32 and tok.eot == 65792
    shards = [folder / name for name in meta["train_shards"]]
    tokens = read_shard(shards[0], tok.n_vocab)
    assert tokens.dtype == np.uint32 and tokens[0] == 65792
    (expected,) = tok.encode([tok.decode(tokens)])
    assert expected.dtype == np.uint32 and expected.max() > 50_000
    hf = HF.from_str(file.read_text())
    hf.encode_special_tokens = True
    assert hf.encode(tok.decode(tokens)).ids == expected.tolist() == tokens[1:].tolist()

    loader = TrainLoader(
        shards,
        eot=tok.eot,
        n_vocab=tok.n_vocab,
        row_len=64,
        batch_rows=lambda step: 4,
        max_doc_len=lambda step: 64,
        long_docs="split",
        shuffle=False,
    )
    [batch] = loader.micro_batches(1)
    assert batch.inputs.flatten()[:256].tolist() == tokens[:256].tolist()
    assert batch.targets.flatten()[:256].tolist() == tokens[1:257].tolist()


@pytest.mark.slow
def test_a_build_with_more_ids_than_uint16(tmp_path):
    """From text to a corpus, with a tokenizer.json of anyone's."""
    from data.__main__ import main

    (tmp_path / "tokenizer.json").write_text(many_tokens())
    for i in range(10):
        part = SAMPLE[i * 700 : (i + 1) * 700]
        (tmp_path / f"{i}.txt").write_text(f"Document {i} of ten.\n{part}")
    out = tmp_path / "out"
    sources = [str(tmp_path / f"{i}.txt") for i in range(10)]
    options = ["--out", str(out), "--preset", "none", "--val-fraction", "0.3", "--processes", "1"]
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["build", *sources, *options, *tokenizer]) == 0
    tok = load_tokenizer(out)
    for split in "train", "val":
        tokens = read_shard(out / f"{split}_000000.bin", tok.n_vocab)
        assert tokens.dtype == np.uint32 and tokens[0] == tok.eot == 65792
        assert "Document" in tok.decode(tokens)
