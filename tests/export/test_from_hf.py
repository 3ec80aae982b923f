"""export/from_hf.py: what transformers writes becomes a run; what we have written comes back."""

import json
import shutil

import pytest
import torch
from export_helpers import Ours, export, gpt_run, llama_run, qwen2
from helpers import write_text
from safetensors.torch import load_file, save_file

import train_gpt as tg
from data import Tokenizer
from data.tokenizers import load_tokenizer
from export import weights as weights_files
from export.from_hf import main as import_main

TOKENIZER = qwen2(500)  # so that 12 rows pad the table


def bring(capsys, folder, out, *more):
    """(exit status, stdout, stderr) of ./run.sh import."""
    capsys.readouterr()
    status = import_main([*map(str, ("--from", folder, "--out", out, *more))])
    return status, *capsys.readouterr()


def refused(result, out, *said):
    status, stdout, err = result
    assert (status, stdout) == (2, ""), result
    assert err.count("\n") == 1
    for words in said:
        assert str(words) in err, err
    assert not out.exists()
    assert not list(out.parent.glob("*.tmp"))


SHAPES = [
    pytest.param({}, torch.float32, id="llama"),
    pytest.param(
        dict(qk_norm=True, tied_embeddings=False, n_embd=40, rope_theta=500.0, norm_eps=1e-5),
        torch.bfloat16,
        id="qwen3 in bf16",
    ),
    pytest.param(
        dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=32), torch.float32, id="yarn"
    ),
    pytest.param(
        dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=32), torch.bfloat16, id="3"
    ),
]


@pytest.mark.parametrize("fields, dtype", SHAPES)
def test_there_and_back(tmp_path, capsys, monkeypatch, fields, dtype):
    """Every weight bit for bit, in one file or several, the configuration, the tokenizer; and what
    is exported again is the same."""
    monkeypatch.setattr(weights_files, "SHARD_BYTES", 90_000)
    run = llama_run(tmp_path / "run", TOKENIZER, dtype=dtype, **fields)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    status, out, err = bring(capsys, tmp_path / "out", tmp_path / "back")
    assert (status, out) == (0, f"{tmp_path / 'back'}\n"), err
    ours = load_file(run / "model.safetensors")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    again = load_tokenizer(tmp_path / "back")
    assert (again.tokens, again.specials) == (TOKENIZER.tokens, TOKENIZER.specials)
    assert export(capsys, tmp_path / "back", "hf", tmp_path / "out2")[0] == 0
    first, second = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "out2")
    )
    assert first == second


def test_training_goes_on(tmp_path, capsys, monkeypatch):
    """With its tokenizer, by the command that import suggests."""
    run = llama_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "out")[0] == 0
    status, _, err = bring(capsys, tmp_path / "out", tmp_path / "back")
    assert status == 0
    words = err.split("more: ./run.sh ")[1].split()
    assert words[-2:] == ["--text", "FILE"]
    text = write_text(tmp_path / "words.txt", 3000)
    options = [*words[:-1], text, "--steps", 1, "--batch-tokens", 256, "--row-len", 64]
    options += ["--val-row-len", 64, "--max-doc-len", 64, "--sample-tokens", 0, "--no-compile"]
    options += ["--run-dir", tmp_path / "on", "--cache-dir", tmp_path / "cache", "--adam-lr", 1e-9]
    options += ["--muon-lr", 1e-9, "--dtype", "float32", "--target", 0.1, "--val-tokens", 512]
    assert tg.main([*map(str, options)]) == 3
    before = load_file(run / "model.safetensors")["q_bank"]
    after = load_file(tmp_path / "on/model.safetensors")["q_bank"]
    torch.testing.assert_close(after, before)
    assert load_tokenizer(tmp_path / "on").n_vocab == 500


def test_what_transformers_has_written(tmp_path, capsys):
    """By version 5, which has the positions' numbers in a dict of their own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=700,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_theta=700.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_text(TOKENIZER.to_json())
    assert "rope_theta" not in json.loads((tmp_path / "theirs/config.json").read_text())
    status, _, err = bring(capsys, tmp_path / "theirs", tmp_path / "run")
    assert status == 0, err
    ours = Ours(tmp_path / "run", tmp_path)
    ids = torch.tensor([ours.ids("def main(argv):\n    return 1")])
    with torch.no_grad():
        expected = theirs(ids).logits[..., : TOKENIZER.n_vocab]
    torch.testing.assert_close(ours.logits(ids), expected, rtol=0, atol=1e-4)


# --- What is refused


@pytest.fixture
def folder(tmp_path, capsys):
    run = llama_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "folder")[0] == 0
    return tmp_path / "folder"


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(model_type="gpt2"), "model_type gpt2: expected llama or qwen3"),
        (dict(model_type=None), "model_type None"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="gelu"), "hidden_act is gelu"),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "--rope-scaling dynamic"),
        (
            dict(
                rope_scaling=dict(
                    rope_type="llama3",
                    factor=8.0,
                    low_freq_factor=2.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=32,
                )
            ),
            "low_freq_factor of its positions is 2.0",
        ),
        (dict(num_attention_heads=None), "not the configuration of a llama"),
        (dict(hidden_size=128), "config.json promises (512, 128)"),
        (dict(num_hidden_layers=3), "has no model.layers.2."),
        (dict(num_hidden_layers=1), "have no place in models/llama.py"),
        (dict(tie_word_embeddings=False), "has no lm_head.weight"),
    ],
)
def test_folders_that_do_not_fit(folder, tmp_path, capsys, fields, said):
    edit(folder, **fields)
    refused(bring(capsys, folder, tmp_path / "back"), tmp_path / "back", said)


def test_vocabularies_that_do_not_fit(folder, tmp_path, capsys):
    out = tmp_path / "back"
    large = tmp_path / "large.json"
    large.write_text(qwen2(700).to_json())
    said = "has 512 rows, the tokenizer 700 tokens"
    refused(bring(capsys, folder, out, "--tokenizer", large), out, said)
    (folder / "tokenizer.json").unlink()
    refused(bring(capsys, folder, out), out, "tokenizer.json", "--tokenizer names")
    (folder / "tokenizer.json").write_text("{}")
    refused(bring(capsys, folder, out), out, folder / "tokenizer.json")


def test_rows_beyond_the_tokens(folder, tmp_path, capsys):
    """Fewer or more than ours: those of tokens are what counts."""
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].clone()
    for n in 500, 640:
        tensors["model.embed_tokens.weight"] = torch.cat([table, table])[:n]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert bring(capsys, folder, tmp_path / f"back{n}")[0] == 0
        found = load_file(tmp_path / f"back{n}/model.safetensors")["embed"]
        assert found.shape == (512, 64)
        assert torch.equal(found[:500], table[:500])
        assert not found[500:].any() or n > 500


def test_weights_that_are_not_there(folder, tmp_path, capsys):
    out = tmp_path / "back"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-9])
    refused(bring(capsys, folder, out), out, "model.safetensors: cannot be read")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(bring(capsys, folder, out), out, "expected safetensors (pickles are not read)")
    index = dict(weight_map=dict(a="../../elsewhere.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(bring(capsys, folder, out), out, "expected names of files beside it")


def test_a_head_that_is_tied_and_differs(folder, tmp_path, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert bring(capsys, folder, tmp_path / "same")[0] == 0
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(bring(capsys, folder, tmp_path / "back"), tmp_path / "back", "lm_head.weight differs")


def test_other_folders(tmp_path, capsys):
    out = tmp_path / "back"
    refused(bring(capsys, tmp_path / "nowhere", out), out, "config.json: No such file")
    run = gpt_run(tmp_path / "run", TOKENIZER)
    assert export(capsys, run, "hf", tmp_path / "folder")[0] == 0
    refused(bring(capsys, tmp_path / "folder", out), out, "model_type stopwatch")
    shutil.copytree(tmp_path / "folder", out)
    status, _, err = bring(capsys, tmp_path / "folder", out)
    assert status == 2
    assert "is there already" in err
    assert isinstance(load_tokenizer(out), Tokenizer)
