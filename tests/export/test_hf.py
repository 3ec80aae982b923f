"""export/hf.py: transformers loads what is written, and computes and writes what our model does.

Version 5 is in this environment. STOPWATCH_TRANSFORMERS_4 names another Python, with version 4;
without it those tests are skipped.
"""

import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_helpers import Ours, export, gpt_run, llama_run, qwen2, refused
from helpers import PIECES, RECORD, write_text
from safetensors import safe_open
from safetensors.torch import load_file

import train_gpt as tg
from data.chat import read_messages, render
from data.tokenizers import make_tokenizer
from export import hf
from export import weights as weights_files
from export.card import APART
from models import gpt
from runtime.options import flat

TOKENIZER = qwen2(500)  # so that 12 rows pad the table


def in_transformers(folder, reference, python=sys.executable):
    """What in_transformers.py found, in a process of its own."""
    program = Path(__file__).with_name("in_transformers.py")
    done = subprocess.run(
        [python, program, folder, reference], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def agree(found, expected):
    """Logits to 1e-4, ids and greedy tokens exactly, one prompt at a time and together."""
    assert found["difference"] < 1e-4
    assert found["ids"] == expected["ids"]
    assert found["text"] == expected["text"]
    assert found["written"] == expected["written"]
    n = len(found["together"][0])
    assert found["together"] == [written[:n] for written in expected["written"]]


def load(folder):
    """transformers' model of a folder, in this process, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # nothing ends a text here
    return model


# --- The speedrun's template

MORE = dict(short_window=(5,), long_window=(9,), copies=3, softcap=(23.0, 5.0, 7.5))
EVERY_PART = RECORD | MORE
PARTS = [
    pytest.param(PIECES | MORE, id="every older part"),
    pytest.param(EVERY_PART, id="every part"),
    pytest.param(EVERY_PART | dict(mudd=(), mudd_gates=-1), id="every part by numbers"),
    pytest.param(dict(n_gram=1, softcap=(), value_embed_layers=()), id="hardly any"),
    pytest.param(dict(copies=2, n_gram=2, smear=True), id="copies"),
    pytest.param(dict(copies=2, counts=3), id="copies and counts"),
    pytest.param(dict(counts=2), id="counts"),
    pytest.param(dict(tied=1.0, key_offset=True, short_window=(8,)), id="tied"),
]


@pytest.mark.parametrize("fields", PARTS)
@torch.no_grad()
def test_the_speedruns_model_is_the_same(tmp_path, capsys, fields):
    run = gpt_run(tmp_path / "run", TOKENIZER, **fields)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    ours = Ours(run, tmp_path)
    theirs = load(tmp_path / "out")
    ids = ours.ids("def main(argv):\n    return main(argv), main(argv)")
    inputs = torch.tensor([ids, [ids[0], *ids[:0:-1]]])
    expected = ours.logits(inputs)
    found = theirs(inputs).logits
    if fields.get("copies") or fields.get("counts"):
        expected = expected.log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    last = theirs(inputs, logits_to_keep=2).logits
    torch.testing.assert_close(last, found[:, -2:], rtol=0, atol=1e-5)
    # With a cache, token by token and in two parts; the rows that pad are left out
    out = theirs.generate(inputs[:1, :9], max_new_tokens=12, do_sample=False)
    assert out[0, 9:].tolist() == ours.greedy(ids[:9], 12)
    half = len(ids) // 2
    part = theirs(inputs[:, :half], use_cache=True)
    rest = theirs(inputs, past_key_values=part.past_key_values)
    torch.testing.assert_close(rest.logits, found[:, half:], rtol=0, atol=1e-4)
    assert found.size(-1) == theirs.config.vocab_size == TOKENIZER.n_vocab


@torch.no_grad()
def test_rows_that_are_padded_are_the_same(tmp_path, capsys):
    run = gpt_run(tmp_path / "run", TOKENIZER, **EVERY_PART)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    theirs = load(tmp_path / "out")
    inputs = torch.randint(400, (1, 20), generator=torch.Generator().manual_seed(0))
    alone = theirs(inputs).logits
    padding = torch.full((1, 5), 7)
    mask = torch.tensor([[0] * 5 + [1] * 20])
    left = theirs(torch.cat([padding, inputs], 1), attention_mask=mask).logits[:, 5:]
    right = theirs(torch.cat([inputs, padding], 1), attention_mask=mask.flip(1)).logits[:, :20]
    torch.testing.assert_close(left, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(right, alone, rtol=0, atol=1e-4)
    loss = theirs(inputs, labels=inputs).loss
    expected = torch.nn.functional.cross_entropy(alone[0, :-1], inputs[0, 1:])
    torch.testing.assert_close(loss, expected)
    part = theirs(inputs, use_cache=True)
    with pytest.raises(ValueError, match="expected all tokens so far"):
        theirs(inputs[:, -1:], past_key_values=part.past_key_values)


def test_small_numbers_stay_fp32(tmp_path, capsys):
    """Of a model in bf16, as in the run."""
    from transformers import AutoModelForCausalLM

    run = gpt_run(tmp_path / "run", TOKENIZER, dtype=torch.bfloat16, attn_gate=True, copies=1)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype="auto"
    )
    ours = load_file(run / "model.safetensors")
    state = theirs.state_dict()
    for name in "lambdas", "scalars", "mix_gates", "mix_counts":
        assert torch.equal(state[name], ours[name])
    assert state["lambdas"].dtype == torch.float32
    assert state["model.layers.0.self_attn.output_gate.weight"].dtype == torch.float32
    assert state["lm_head.weight"].dtype == torch.bfloat16


def test_every_option_of_the_template_is_told():
    """A new part of models/gpt.py has to come into modeling_stopwatch.py as well."""
    in_training_only = {"mtp", "sampled_softmax", "prefix_loss"}
    in_windows = {"short_window", "long_window", "val_windows", "long_layers", "yarn"}
    in_windows |= {"paired_near", "extension_windows", "yarn_windows"}
    others = {"n_embd", "n_layer", "n_head", "mlp_ratio", "attn_scale", "rope_base", "tied"}
    renamed = {"attn_gate", "attn_gate_layers", "key_offset"}
    known = gpt.Config().hf_config(1.0).keys()
    for field in dataclasses.fields(gpt.Config):
        if field.name not in in_training_only | in_windows | others | renamed:
            assert field.name in known, field.name


def test_a_part_that_the_modelling_file_lacks_is_refused(tmp_path, capsys, monkeypatch):
    run = gpt_run(tmp_path / "run", TOKENIZER, smear=True)
    monkeypatch.setattr(hf, "PARTS", hf.PARTS - {"smear_gate"})
    refused(export(capsys, run, "hf", tmp_path / "out"), tmp_path / "out", "its part smear_gate")


# --- Llama and Qwen3

SHAPES = [
    pytest.param({}, id="llama"),
    pytest.param(dict(qk_norm=True, tied_embeddings=False, n_embd=40), id="qwen3"),
    pytest.param(dict(rope_theta=500.0, rope_scaling="linear", rope_factor=4.0), id="linear"),
    pytest.param(dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=32), id="llama3"),
    pytest.param(dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=32), id="yarn"),
]


@pytest.mark.parametrize("fields", SHAPES)
@torch.no_grad()
def test_llama_is_the_same(tmp_path, capsys, fields):
    run = llama_run(tmp_path / "run", TOKENIZER, **fields)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    ours = Ours(run, tmp_path)
    theirs = load(tmp_path / "out")
    ids = ours.ids("def main(argv):\n    return main(argv), main(argv)")
    expected = ours.logits(torch.tensor([ids]))
    found = theirs(torch.tensor([ids])).logits[..., : TOKENIZER.n_vocab]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # The rows that pad are never written
    out = theirs.generate(torch.tensor([ids[:9]]), max_new_tokens=12, do_sample=False)
    assert out[0, 9:].tolist() == ours.greedy(ids[:9], 12)


def test_what_the_configuration_says(tmp_path, capsys):
    """Version 4 reads rope_theta at the top level and nowhere else, 5 there as well; what has
    another default elsewhere is written."""
    run = llama_run(tmp_path / "run", TOKENIZER, rope_theta=500.0, qk_norm=True)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["rope_theta"] == 500.0
    assert said["head_dim"] == 16
    assert said["tie_word_embeddings"] is True
    assert said["vocab_size"] == 512
    assert (said["bos_token_id"], said["eos_token_id"]) == (492, 492)
    assert "pad_token_id" not in said  # which would keep that token from learning
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["suppress_tokens"] == [*range(500, 512)]
    assert generation["pad_token_id"] == TOKENIZER.specials["<|pad|>"]
    assert generation["eos_token_id"] == [492, TOKENIZER.specials["<|im_end|>"]]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in f.keys()


def test_large_ones_are_in_several_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights_files, "SHARD_BYTES", 50_000)
    run = llama_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    ours = load_file(run / "model.safetensors")
    theirs = load(tmp_path / "out").state_dict()
    assert torch.equal(theirs["model.layers.1.self_attn.q_proj.weight"], ours["q_bank"][1])
    assert torch.equal(theirs["lm_head.weight"], ours["embed"])


# --- Text


def test_the_tokenizer_in_transformers(tmp_path, capsys):
    from transformers import AutoTokenizer

    run = llama_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Naïve 中文,  don't 12345\r\n\t🙂 they'll  see\n\n e\u0301"
    ids = TOKENIZER.encode([text])[0].tolist()
    said = theirs(text)
    assert said["input_ids"] == [TOKENIZER.eot, *ids]
    assert sorted(said) == ["attention_mask", "input_ids"]
    assert theirs.decode(said["input_ids"], skip_special_tokens=True) == text
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert (theirs.pad_token, theirs.eos_token) == ("<|pad|>", "<|endoftext|>")


CONVERSATION = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="Hi\n"),
    dict(role="assistant", content=" Hello {{ you }}"),
]
RENDERED = (
    "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello {{ you }}<|im_end|>\n"
)


def test_a_conversation(tmp_path, capsys):
    """Its text, its ids, and which of them are what the assistant says."""
    from transformers import AutoTokenizer

    run = llama_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(CONVERSATION, tokenize=False) == RENDERED
    ids, counts = render(read_messages(CONVERSATION), TOKENIZER)
    both = theirs.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert both["input_ids"] == ids.tolist()
    assert both["assistant_masks"] == counts.astype(int).tolist()
    asked = theirs.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_with_tools(tmp_path, capsys):
    from transformers import AutoTokenizer

    run = llama_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    calls = [
        dict(type="function", function=dict(name="python", arguments=dict(code='print("ü")\n'))),
        dict(type="function", function=dict(name="f", arguments={})),
    ]
    for content in None, " Well.\n":
        said = [
            dict(role="user", content="6 * 7?"),
            dict(role="assistant", content=content, tool_calls=calls),
            dict(role="tool", content="42\n"),
            dict(role="assistant", content="42"),
        ]
        ids, counts = render(read_messages(said), TOKENIZER)
        both = theirs.apply_chat_template(
            said, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert both["input_ids"] == ids.tolist()
        assert both["assistant_masks"] == counts.astype(int).tolist()
        assert 0 < counts.sum() < len(counts)


def test_a_tokenizer_without_turns_has_no_template(tmp_path, capsys):
    run = gpt_run(tmp_path / "run", make_tokenizer("bytes", None))
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "chat_template" not in said
    # Version 4 would add token_type_ids, which no model of ours takes
    assert said["model_input_names"] == ["input_ids", "attention_mask"]
    assert said["pad_token"] == "<|endoftext|>"


# --- The model card


def test_the_card_says_where_it_comes_from(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER, track="laptop", data="stdlib", seed=3, target=1.5)
    result = json.loads((run / "result.json").read_text())
    result |= dict(val_loss=3.25, val_bpb=1.125, tokens=12345)
    (run / "result.json").write_text(json.dumps(result))
    given = "--licence", "apache-2.0"
    assert export(capsys, run, "hf", tmp_path / "out", *given)[0] == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n")
    for words in (
        "license: apache-2.0\n",
        "`stdlib`",
        "PSF-2.0",
        "`val_bpb`: 1.1250",
        "`val_loss`: 3.2500",
        "12,345",
        "--seed 3",
        "--track laptop",
        "at commit abc",
    ):
        assert words in card, words
    [command] = re.findall(r"^\./run\.sh (.*)$", card, re.M)
    said = json.loads((run / "config.json").read_text())["config"]
    again = flat(tg.parse_args(shlex.split(command)))
    for name, value in json.loads(json.dumps(again)).items():
        if name not in APART:
            assert value == said[name], name
    assert export(capsys, run, "hf", tmp_path / "out2")[0] == 0
    card = (tmp_path / "out2/README.md").read_text()
    assert "license:" not in card
    assert "none was named" in card
    assert str(tmp_path) not in card


# --- What is refused


def test_a_tokenizer_of_another_model(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER)
    other = tmp_path / "other.json"
    other.write_text(qwen2(300).to_json())
    out = tmp_path / "out"
    said = "has 300 tokens", "embeddings of 512"
    refused(export(capsys, run, "hf", out, "--tokenizer", other), out, *said)
    (run / "tokenizer.json").unlink()
    refused(export(capsys, run, "hf", out), out, "has no tokenizer.json", "--tokenizer")


def test_options_that_do_not_belong(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER)
    out = tmp_path / "out"
    refused(export(capsys, run, "hf", out, "--type", "f16"), out, "--type f16: is for --to gguf")
    refused(export(capsys, run, "safetensors", out), out, "invalid choice: 'safetensors'")
    refused(export(capsys, run, "hf", out, "--step", "3"), out, "no weights of step 3")


# --- Both versions, with models that were trained


def pythons():
    """This one, with version 5, and one with version 4 where there is one."""
    return [sys.executable, os.environ.get("STOPWATCH_TRANSFORMERS_4", "")]


# Options of small runs: laptop's own, gpt2-small's parts at a small size, and a llama
RUNS = dict(
    laptop="--track laptop --steps 40",
    small="--track gpt2-small --data text --text {text} --tokenizer bpe:512 --n-embd 96 --steps 30 "
    "--extension 2 --batch-tokens 1024 --row-len 256 --val-row-len 512 --max-doc-len 256 "
    "--ngram-rows 512 --target 0.1 --target-metric val_loss --val-tokens 4096 --eval-every 30 "
    "--fp8 off --short-window 32 --long-window 64 --val-windows 64 128",
    llama="--template llama --data stdlib --tokenizer qwen2:2048 --n-embd 128 --n-layer 3 "
    "--n-kv-head 2 --head-dim 32 --steps 60 --eval-every 60 --val-tokens 8192 --adam-lr 0.004",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name): the folder of that run, trained where it is first asked for."""
    tmp_path = tmp_path_factory.mktemp("trained")
    text = write_text(tmp_path / "words.txt", 40000)

    @functools.cache
    def train(name):
        options = RUNS[name].format(text=text).split()
        options += ["--run-dir", str(tmp_path / name), "--cache-dir", str(tmp_path / "cache")]
        assert tg.main([*options, "--no-compile", "--sample-tokens", "0"]) in (0, 3)
        return tmp_path / name

    return train


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5", "4"])
@pytest.mark.parametrize("name", ["laptop", "small", "llama"])
def test_a_trained_model_goes_on_the_same(trained, tmp_path, capsys, name, version):
    """200 greedy tokens after each of 20 prompts, and logits to 1e-4."""
    python = pythons()[version == "4"]
    if not python:
        pytest.skip("STOPWATCH_TRANSFORMERS_4 names no Python")
    assert export(capsys, trained(name), "hf", tmp_path / "out")[0] == 0
    ours = Ours(trained(name), tmp_path)
    said = dict(messages=CONVERSATION) if name == "llama" else {}
    file = tmp_path / "reference.json"
    expected = ours.reference(file, n_tokens=200, n_prompts=20, length=200, **said)
    if name == "laptop":
        expected["logits"] = torch.tensor(expected["logits"]).log_softmax(-1).tolist()
        file.write_text(json.dumps(expected))
    found = in_transformers(tmp_path / "out", file, python)
    assert found["version"].startswith(version)
    agree(found, expected)
    if said:
        ids, counts = render(read_messages(CONVERSATION), ours.tokenizer)
        assert found["chat"] == RENDERED
        assert found["chat_ids"] == ids.tolist()
        assert found["assistant"] == counts.astype(int).tolist()


@pytest.mark.parametrize("kind", ["bytes", "chars", "own split"])
def test_tokenizers_of_all_kinds_load(tmp_path, capsys, kind):
    from transformers import AutoTokenizer

    text = "the cat, and 12345 dogs\n"
    tokenizer = {
        "bytes": lambda: make_tokenizer("bytes", None),
        "chars": lambda: make_tokenizer("chars", lambda: [text]),
        "own split": lambda: make_tokenizer("bpe:300", lambda: [text * 9]),
    }[kind]()
    run = gpt_run(tmp_path / "run", tokenizer)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [tokenizer.eot, *tokenizer.encode([text])[0].tolist()]
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text
