"""export/tokenizer.py: Hugging Face's library makes the same ids of a text."""

import json

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as HF

from data.tokenizers import PATTERN, Tokenizer, make_tokenizer
from export.tokenizer import save_tokenizer

TEXT = "Naïve 中文,  don't 12345\r\n\t🙂 they'll  see\n\n the the cat cats <x> \x00é" * 3
TOKENIZERS = {
    "bytes": make_tokenizer("bytes", None),
    "chars": make_tokenizer("chars", lambda: [TEXT + "abc"]),
    "bpe": make_tokenizer(
        "bpe:400", lambda: iter([TEXT, (ROOT / "train_gpt.py").read_text()[:20000]])
    ),
}
LEAPS = [
    *TOKENIZERS["bytes"].tokens,
    b"they",
    b"cat",
    b"the",
    b"ll",
    b" the",
]  # that no merges lead to
TOKENIZERS["leaps"] = Tokenizer("bpe", LEAPS, PATTERN)
TOKENIZERS["gpt2"] = Tokenizer("bpe", TOKENIZERS["bpe"].tokens, r50k_pat_str)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{kind: (ours, Hugging Face's from the exported file)}"""
    pairs = {}
    for kind, ours in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(kind)
        save_tokenizer(ours, json.loads(ours.to_json()), 64, folder)
        pairs[kind] = ours, HF.from_file(str(folder / "tokenizer.json"))
    return pairs


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_agree(exported, kind):
    ours, theirs = exported[kind]
    assert (
        theirs.get_vocab_size() == ours.n_vocab and theirs.token_to_id("<|endoftext|>") == ours.eot
    )
    texts = (
        st.text(sorted(set(TEXT)))
        if kind == "chars"
        else st.text()
        | st.text("the cats don'l\n 12")
        | st.lists(st.sampled_from(TEXT.split(" ") + [" ", "\n", "  "])).map("".join)
    )

    @settings(max_examples=200, deadline=None)
    @given(texts.filter(lambda text: "\ud800" not in text))
    def agree(text):
        ids = ours.encode([text])[0].tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.encode(text).ids == [ours.eot, *ids]  # a document's beginning
        assert theirs.decode(ids) == text

    agree()
    if kind == "chars":
        with pytest.raises(Exception, match="unk|UNK"):
            theirs.encode("Ω")


def test_the_pattern_of_our_own_bpe_is_what_is_tested():
    assert TOKENIZERS["bpe"].pattern == PATTERN
