"""export/gguf.py: llama.cpp loads what is written, makes the same ids of a text and goes on with
the same tokens."""

import json
import random
import urllib.request

import gguf
import numpy as np
import pytest
import torch
from export_helpers import Ours, export, gpt_run, llama_run, qwen2, refused
from helpers import ROOT
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

import train_gpt as tg
from data.tokenizers import GPT2_PATTERN, QWEN2_PATTERN, Tokenizer, learn_bpe, make_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
TOKENIZER = qwen2(500)  # so that 12 rows pad the table
SOURCE = (ROOT / "train_gpt.py").read_text()
LIKE_GPT2 = Tokenizer("bpe", learn_bpe([SOURCE], 600, GPT2_PATTERN), GPT2_PATTERN)


class LlamaCpp:
    """llama.cpp with a file loaded, in fp32 throughout but for the weights."""

    def __init__(self, file):
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = 512
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.warmup = False
        params.n_gpu_layers = 0
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        del self.server  # ends its threads, also where a test has failed

    def post(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text, add_special=False):
        return self.post("/tokenize", content=text, add_special=add_special)["tokens"]

    def text(self, ids):
        return self.post("/detokenize", tokens=ids)["content"]

    def greedy(self, prompt, n_tokens):
        """The likeliest tokens that follow but for what ends a text."""
        said = self.post(
            "/completion",
            prompt=prompt,
            n_predict=n_tokens,
            temperature=0,
            ignore_eos=True,
            return_tokens=True,
            cache_prompt=False,
        )
        return said["tokens"]

    def log_prob(self, prompt):
        """(the likeliest next token, its log probability)"""
        said = self.post(
            "/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=1, cache_prompt=False
        )
        [first] = said["completion_probabilities"][0]["top_logprobs"]
        return first["id"], first["logprob"]


def likeliest(ours, ids):
    """(prompt, the likeliest next token, its log probability) for a beginning of a text after which
    that token is ASCII: llama.cpp does not tell of one that is no whole character."""
    for n in range(len(ids), 0, -1):
        log_probs = ours.logits(torch.tensor([ids[:n]]))[0, -1].log_softmax(-1)
        token = int(log_probs.argmax())
        tokens = ours.tokenizer.tokens  # special ones have no text
        if token < len(tokens) and tokens[token].isascii():
            return ids[:n], token, log_probs[token].item()
    raise AssertionError("no such beginning")


def written(capsys, run, out, kind="f32"):
    """A GGUF of a run."""
    status, _, err = export(capsys, run, "gguf", out, "--type", kind)
    assert status == 0, err
    return out


def torture(n, seed=0):
    """Texts with what tokenizers disagree on."""
    r = random.Random(seed)
    pieces = ["Naïve", "中文", "don't", "DON'T", "we'LL", "'s", "12345", "3.14", "\r\n", "\t", "🙂"]
    pieces += [
        "e\u0301",
        "  ",
        " ",
        "\n\n",
        "\u00a0",
        "\u3000",
        "ﬁ",
        "ß",
        "İ",
        "١٢٣",
        "½",
        "_",
        "__",
    ]
    pieces += [
        "<|endoftext|>"[:5],
        "\x7f",
        "\u200d",
        "👨‍👩‍👧",
        "e=mc²",
        "a" * 40,
        " " * 30,
        "()",
        "];",
    ]
    texts = []
    for i in range(n):
        if i % 3:
            texts.append("".join(r.choice(pieces) for _ in range(r.randint(1, 12))))
        else:
            at = r.randrange(len(SOURCE) - 300)
            texts.append(SOURCE[at : at + r.randint(1, 300)])
    return texts


# --- Models

SHAPES = [
    pytest.param({}, id="llama"),
    pytest.param(dict(qk_norm=True, n_embd=96, tied_embeddings=False), id="qwen3, untied"),
    pytest.param(dict(rope_theta=500.0, rope_scaling="linear", rope_factor=4.0), id="linear"),
    pytest.param(dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=32), id="llama3"),
    pytest.param(dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=32), id="yarn"),
]


@pytest.mark.parametrize("fields", SHAPES)
def test_the_same_tokens_follow(tmp_path, capsys, fields):
    run = llama_run(tmp_path / "run", TOKENIZER, **fields)
    ours = Ours(run, tmp_path)
    prompt = ours.ids("def main(argv):\n    return main(argv)")
    with LlamaCpp(written(capsys, run, tmp_path / "model.gguf")) as theirs:
        # What ends a text or a turn is ruled out there
        ends = [TOKENIZER.eot, TOKENIZER.specials["<|im_end|>"]]
        assert theirs.greedy(prompt, 30) == ours.greedy(prompt, 30, never=ends)
        prompt, token, log_prob = likeliest(ours, prompt)
        assert theirs.log_prob(prompt) == (token, pytest.approx(log_prob, abs=1e-4))


@pytest.mark.parametrize("kind, most", [("f16", 0.02), ("q8_0", 0.1), ("q4_0", 0.9)])
def test_smaller_types(tmp_path, capsys, kind, most):
    """They load and are near; the file has what its name says."""
    run = llama_run(tmp_path / "run", TOKENIZER, dtype=torch.bfloat16)
    file = written(capsys, run, tmp_path / "model.gguf", kind)
    ours = Ours(run, tmp_path)
    prompt, _, log_prob = likeliest(ours, ours.ids("def main(argv):\n    return main(argv)"))
    with LlamaCpp(file) as theirs:
        assert theirs.log_prob(prompt)[1] == pytest.approx(log_prob, abs=most)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["blk.1.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q8_0" if kind == "q4_0" else kind.upper())


def test_rows_that_are_no_whole_blocks(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER, ffn_dim=80)
    file = written(capsys, run, tmp_path / "model.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 80
    assert types["blk.0.ffn_up.weight"] == "Q8_0"  # of 64
    with LlamaCpp(file) as theirs:
        assert len(theirs.greedy([1, 2, 3], 4)) == 4


def test_the_numbers_are_those_of_the_run(tmp_path, capsys):
    """Bit for bit in f32, and q and k of a llama in another order."""
    run = llama_run(tmp_path / "run", TOKENIZER)
    file = written(capsys, run, tmp_path / "model.gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(file).tensors}
    model = Ours(run, tmp_path).saved.model
    assert np.array_equal(tensors["token_embd.weight"], model.embed.detach()[:500])
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], model.mlp_bank[5].detach().T)
    q = model.q_bank[0].detach().view(4, 16, 64)
    theirs = torch.from_numpy(tensors["blk.0.attn_q.weight"].copy()).view(4, 16, 64)
    assert torch.equal(theirs[:, 0::2], q[:, :8])
    assert torch.equal(theirs[:, 1::2], q[:, 8:])


def test_keys_that_llama_cpp_would_guess(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER, rope_theta=500.0, norm_eps=1e-5, n_embd=96)
    reader = gguf.GGUFReader(written(capsys, run, tmp_path / "model.gguf"))
    said = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.context_length": 64,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
        "llama.vocab_size": 500,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 492,
        "tokenizer.ggml.eos_token_id": 492,
        "tokenizer.ggml.eot_token_id": 494,
        "tokenizer.ggml.padding_token_id": 495,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {name: said[name] for name in expected} == expected
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens = said["tokenizer.ggml.tokens"]
    types = said["tokenizer.ggml.token_type"]
    assert len(set(tokens)) == len(tokens) == len(types) == 500  # the rows that pad are left out
    assert tokens[492:496] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert types == [1] * 492 + [3] * 8


@pytest.mark.slow
def test_a_trained_model_goes_on_the_same(tmp_path, capsys):
    """200 greedy tokens after each of 20 prompts in f32; smaller types begin the same way."""
    run = tmp_path / "run"
    options = ["--template", "llama", "--data", "stdlib", "--tokenizer", "qwen2:2048"]
    options += ["--n-embd", 128, "--n-layer", 3, "--n-head", 4, "--n-kv-head", 2, "--head-dim", 32]
    options += ["--steps", 60, "--eval-every", 60, "--val-tokens", 8192, "--adam-lr", 0.004]
    options += ["--run-dir", run, "--cache-dir", tmp_path / "cache", "--no-compile"]
    assert tg.main([*map(str, options), "--sample-tokens", "0"]) in (0, 3)
    ours = Ours(run, tmp_path)
    ids = ours.ids(SOURCE)
    prompts = [[ids[0], *ids[1 + 50 * i : 11 + 52 * i]] for i in range(20)]
    expected = [ours.greedy(prompt, 200, never=None) for prompt in prompts]
    with LlamaCpp(written(capsys, run, tmp_path / "model.gguf")) as theirs:
        for prompt, tokens in zip(prompts, expected):
            assert theirs.greedy(prompt, 200) == tokens
    for kind in "f16", "q8_0", "q4_0":
        with LlamaCpp(written(capsys, run, tmp_path / f"{kind}.gguf", kind)) as theirs:
            firsts = [theirs.greedy(prompt, 1)[0] for prompt in prompts]
        same = sum(first == tokens[0] for first, tokens in zip(firsts, expected))
        assert same >= (12 if kind == "q4_0" else 18), kind


# --- Text


@pytest.mark.parametrize("n", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, LIKE_GPT2], ids=["qwen2", "gpt2"])
def test_it_tokenizes_like_ours(tmp_path, capsys, tokenizer, n):
    run = llama_run(tmp_path / "run", tokenizer)
    with LlamaCpp(written(capsys, run, tmp_path / "model.gguf")) as theirs:
        for text in torture(n):
            ids = tokenizer.encode([text])[0].tolist()
            assert theirs.ids(text) == ids, text
            assert theirs.text(ids) == text
        assert theirs.ids("a", add_special=True) == [tokenizer.eot, *tokenizer.encode(["a"])[0]]


def test_a_conversation_is_rendered_like_ours(tmp_path, capsys):
    """Without its first token, which is added when the text is tokenized."""
    run = llama_run(tmp_path / "run", TOKENIZER)
    said = [
        dict(role="user", content="Hi\n"),
        dict(role="assistant", content="Hello {{ you }}"),
        dict(role="user", content="Again"),
    ]
    with LlamaCpp(written(capsys, run, tmp_path / "model.gguf")) as theirs:
        found = theirs.post("/apply-template", messages=said)["prompt"]
    assert found.removeprefix("<|endoftext|>") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello {{ you }}<|im_end|>\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    )


# --- What is refused


@pytest.mark.parametrize(
    "tokenizer, said",
    [
        (make_tokenizer("chars", lambda: ["abc"]), "a token for each character"),
        (make_tokenizer("bytes", None), "splits text in a way"),
        (make_tokenizer("bpe:300", lambda: [SOURCE]), "\\p{N}{1,2}"),
        (
            Tokenizer("bpe", [*[bytes([i]) for i in range(256)], b"they"], QWEN2_PATTERN),
            "1 tokens that no merges lead to, such as 'they'",
        ),
    ],
    ids=["characters", "bytes", "own split", "a leap"],
)
def test_tokenizers_that_it_has_no_words_for(tmp_path, capsys, tokenizer, said):
    run = llama_run(tmp_path / "run", tokenizer)
    out = tmp_path / "model.gguf"
    refused(export(capsys, run, "gguf", out), out, said, "--tokenizer qwen2:N or gpt2")


def of_others(*steps, added=()):
    """A tokenizer.json of another program: these steps before BPE, with these added tokens."""
    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence([*steps])
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|more|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([SOURCE], trainer)
    hf.add_tokens([*added])
    return Tokenizer.from_json(hf.to_str())


def qwen2_split(how, invert=False):
    return pre_tokenizers.Split(Regex(QWEN2_PATTERN), how, invert)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LIKE_GPT2S = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.mark.parametrize(
    "steps",
    [[LIKE_GPT2S], [qwen2_split("isolated"), BYTES], [qwen2_split("removed", invert=True), BYTES]],
    ids=["gpt2", "qwen2", "qwen2, matches kept"],
)
def test_tokenizers_of_others(tmp_path, capsys, steps):
    tokenizer = of_others(*steps, added=["  def"])
    run = llama_run(tmp_path / "run", tokenizer)
    with LlamaCpp(written(capsys, run, tmp_path / "model.gguf")) as theirs:
        for text in torture(50):
            assert theirs.ids(text) == tokenizer.encode([text])[0].tolist(), text


@pytest.mark.parametrize(
    "steps, added, said",
    [
        ([pre_tokenizers.Digits(True), LIKE_GPT2S], [], "not by a pattern, then '"),
        ([qwen2_split("isolated"), pre_tokenizers.Punctuation(), BYTES], [], "not by a pattern"),
        ([qwen2_split("contiguous"), BYTES], [], "not by a pattern"),
        ([BYTES, qwen2_split("isolated")], [], "not by a pattern"),
        ([qwen2_split("isolated"), LIKE_GPT2S], [], ", then '"),
        ([LIKE_GPT2S], [AddedToken("don", single_word=True)], "looks for 'don' as a word"),
        ([LIKE_GPT2S], [AddedToken("#", lstrip=True)], "looks for '#'"),
    ],
    ids=["digits", "punctuation", "joined", "bytes first", "twice", "a word", "spaces"],
)
def test_tokenizers_of_others_that_it_reads_otherwise(tmp_path, capsys, steps, added, said):
    run = llama_run(tmp_path / "run", of_others(*steps, added=added))
    out = tmp_path / "model.gguf"
    refused(export(capsys, run, "gguf", out), out, said)


def test_the_speedruns_model_is_refused(tmp_path, capsys):
    run = gpt_run(tmp_path / "run", TOKENIZER, copies=2, smear=True)
    out = tmp_path / "model.gguf"
    parts = "smear", "copies", "n-grams", "value embeddings", "ReLU squared", "--to hf"
    refused(export(capsys, run, "gguf", out), out, "its template gpt", *parts)


def test_a_type_that_is_none(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER)
    out = tmp_path / "model.gguf"
    said = "--type q4_k_m: expected f32, f16, q8_0 or q4_0"
    refused(export(capsys, run, "gguf", out, "--type", "q4_k_m"), out, said)
