"""export/torchtitan.py: every element comes back bit for bit, under names from which the model can
be built again."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from export_helpers import Ours, export, llama_run, make_run, qwen2, refused
from helpers import ROOT, model_fields, tiny, tiny_model, write_text
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HF
from torch.distributed.checkpoint import HuggingFaceStorageReader

import train_gpt as tg
from data.tokenizers import load_tokenizer, make_tokenizer
from export import weights as weights_files
from export.__main__ import main as export_main
from export.source import template_config, unstack
from models import gpt

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is:UserWarning"
)  # one process reads well alone


EVERY_PART = dict(
    n_layer=4,
    value_embed_layers=(0, 3),
    n_gram=3,
    ngram_rows=64,
    ngram_signs=True,
    smear=True,
    attn_gate=True,
    key_offset=True,
    paired_layers=(1,),
    skip=(1, 2),
    backout=2,
)


def small(dtype=torch.float32, run=None, **fields):
    """(Config, Model) of a small GPT; run: options besides the model's."""
    rows = dict(row_len=24, val_row_len=24, batch_tokens=(24,))
    c = tg.configure(**model_fields(**fields), **(rows | (run or {})))
    return c, tiny_model(dtype=dtype, **fields)[1]


def everything(dtype=torch.float32, **fields):
    """The same with every part of the model switched on."""
    return small(dtype, **(EVERY_PART | fields))


def main(capsys, source, to, *more):
    """(exit status, stdout, stderr) of ./run.sh export --to torchtitan."""
    return export(capsys, source, "torchtitan", to, *more)


def read_back(folder):
    """Every tensor as PyTorch's distributed checkpoints read it."""
    reader = HuggingFaceStorageReader(str(folder))
    about = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.full(m.size, torch.nan, dtype=m.properties.dtype) for name, m in about.items()
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def rebuild(folder):
    """{parameter: tensor} for GPT from an exported folder, by the names alone: what somebody
    else would write."""
    config, tensors = json.loads((folder / "config.json").read_text()), read_back(folder)
    c, out = config["training"], {}
    attn = [
        i for i in range(c["n_layer"]) if f"model.layers.{i}.self_attn.q_proj.weight" in tensors
    ]

    def take(*names):
        return torch.stack([tensors.pop(f"model.layers.{name}") for name in names])

    out["attn_bank"] = take(*(f"{i}.self_attn.{p}_proj.weight" for i in attn for p in "qkvo"))
    up = take(*(f"{i}.mlp.up_proj.weight" for i in range(c["n_layer"])))
    down = take(*(f"{i}.mlp.down_proj.weight" for i in range(c["n_layer"])))
    out["mlp_bank"] = torch.stack([up, down.mT], dim=1).flatten(0, 1)
    out["value_embeds"] = take(
        *(f"{i}.self_attn.value_embed.weight" for i in c["value_embed_layers"])
    )
    out["value_gates"] = take(
        *(f"{i}.self_attn.value_gate.weight" for i in c["value_embed_layers"])
    )
    if c.get("attn_gate"):
        out["attn_gates"] = take(*(f"{i}.self_attn.output_gate.weight" for i in attn))
    out["embed"], out["lm_head"] = (
        tensors.pop("model.embed_tokens.weight"),
        tensors.pop("lm_head.weight"),
    )
    return config, out | tensors


def bits(tensors):
    """All elements, whatever their order and names, as sorted bytes of 4."""
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    return flat.view(torch.int32).sort().values


# --- weights


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_comes_back(tmp_path, capsys, dtype, kind):
    """The same parameters bit for bit: fp32 masters of a checkpoint, a run's own dtypes else."""
    c, model = everything(dtype=dtype)
    masters = {
        name: p.detach().float() + 1e-4 * torch.randn(p.shape)
        for name, p in model.named_parameters()
        if p.numel()
    }
    run = make_run(tmp_path / "run", c, model, checkpoint=masters)
    source = run if kind == "run" else run / "checkpoints/step-000007"
    status, out, err = main(capsys, source, tmp_path / "out")
    assert (status, out) == (0, f"{tmp_path / 'out'}\n") and "no tokenizer is written" in err
    config, found = rebuild(tmp_path / "out")
    expected = dict(model.named_parameters()) if kind == "run" else masters
    expected = {name: p.detach() for name, p in expected.items() if p.numel()}
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert found[name].dtype == p.dtype and torch.equal(found[name], p), name
    assert config["torch_dtype"] == str(expected["embed"].dtype)[6:] and config["step"] == 7
    assert (config["weights"] == "of a finished run") == (kind == "run")


def test_the_rebuilt_model_computes_the_same(tmp_path, capsys):
    """Sizes and switches from config.json, weights from the files."""
    c, model = everything()
    assert main(capsys, make_run(tmp_path / "run", c, model), tmp_path / "out")[0] == 0
    config, weights = rebuild(tmp_path / "out")
    again = template_config(config["training"])
    assert again == c.model
    other = gpt.Model(again, 257, 24)
    sizes = config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
    assert sizes == (len(other.embed), 32, 4)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if p.numel():
                p.copy_(weights.pop(name))
    assert not weights
    inputs, targets = torch.randint(257, (2, 1, 24))
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32)
    batch = inputs, targets, cu_seqlens, c.model.stage(0.0, 24)
    assert torch.equal(other(*batch), model(*batch))


@pytest.mark.parametrize("fields", [{}, dict(n_gram=1), dict(value_embed_layers=())])
def test_no_element_is_lost_or_doubled(fields):
    """The union of what is exported is what the model has, whatever parameters it will have."""
    c, model = everything(**fields)
    tensors = {name: p.detach() for name, p in model.named_parameters()} | {
        "new_table": torch.randn(3, 5),
        "a.new.scalar": torch.randn(()),
    }
    out = unstack(tensors, c.model)
    assert torch.equal(bits(out.values()), bits(tensors.values()))
    assert torch.equal(out["new_table"], tensors["new_table"]) and out["a.new.scalar"].shape == ()
    elsewhere = c.model.hf_names()
    own = {name for name, t in tensors.items() if t.numel()} - elsewhere.keys()
    single = {name for name in elsewhere.values() if isinstance(name, str)}
    assert own <= out.keys()
    for name in out.keys() - own - single:
        assert re.fullmatch(r"model\.layers\.\d+\..+\.weight", name), name


def test_every_bank_of_the_model_is_in_the_table():
    """A parameter with a matrix per layer would pass as it is, which is right but unkind."""
    c, model = everything()
    elsewhere = c.model.hf_names()
    names = {name for name, _ in model.named_parameters()}
    assert elsewhere.keys() <= names
    assert {name for name in names if name.endswith("_bank")} <= elsewhere.keys()


def test_a_tensor_without_dimensions_and_odd_names_survive(tmp_path):
    tensors = {
        "a": torch.tensor(1.5),
        "b/c d": torch.arange(6.0).view(2, 3).T,
        "model.x": torch.zeros(1),
    }
    weights_files.save_weights(tensors, tmp_path)
    found = read_back(tmp_path)
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[n], t) for n, t in tensors.items()
    )


@pytest.mark.parametrize("size", [4096, 20_000, 1])
def test_shards(tmp_path, capsys, monkeypatch, size):
    """Above the limit there are several files and the Hub's index; PyTorch reads them as one."""
    c, model = everything()
    run = make_run(tmp_path / "run", c, model)
    assert main(capsys, run, tmp_path / "whole")[0] == 0
    monkeypatch.setattr(weights_files, "SHARD_BYTES", size)
    assert main(capsys, run, tmp_path / "out")[0] == 0
    whole, found = read_back(tmp_path / "whole"), read_back(tmp_path / "out")
    assert found.keys() == whole.keys() and all(
        torch.equal(found[name], t) for name, t in whole.items()
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 1
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for file in files:
        inside = load_file(tmp_path / "out" / file)
        assert {name for name, f in index["weight_map"].items() if f == file} == inside.keys()
        assert len(inside) == 1 or sum(t.nbytes for t in inside.values()) <= size


def test_a_shard_may_have_all_the_bytes_it_is_allowed(tmp_path, monkeypatch):
    tensors = {name: torch.zeros(4) for name in "abcde"}
    monkeypatch.setattr(weights_files, "SHARD_BYTES", 32)  # two tensors
    weights_files.save_weights(tensors, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_tied_model_says_so(tmp_path, capsys):
    """As long as less than this share of training is behind the step. The last `extension` steps
    are not counted there: the schedules have ended."""
    for extension, last_tied in ((0, 10), (4, 8), (19, 1)):
        c, model = small(tied=0.5, run=dict(steps=20, extension=extension))
        for step in {1, last_tied, last_tied + 1, 20}:
            run = make_run(tmp_path / f"run{step}-{extension}", c, model, step)
            out = tmp_path / f"out{step}-{extension}"
            assert main(capsys, run, out)[0] == 0
            config = json.loads((out / "config.json").read_text())
            assert config["tie_word_embeddings"] is (step <= last_tied), (extension, step)
    # Steps that were added at the end bring no stage back
    c, model = small(tied=0.5, run=dict(steps=80, earlier=((20, 20, "replan"),)))
    for step, tied in ((10, True), (11, False), (30, False)):
        run = make_run(tmp_path / f"longer{step}", c, model, step)
        assert main(capsys, run, tmp_path / f"added{step}")[0] == 0
        config = json.loads((tmp_path / f"added{step}/config.json").read_text())
        assert config["tie_word_embeddings"] is tied, step


def test_no_pickle_and_no_path_of_this_machine(tmp_path, capsys):
    c, model = small(run={n: str(tmp_path / n) for n in ("cache_dir", "run_dir", "text")})
    assert main(capsys, make_run(tmp_path / "run", c, model), tmp_path / "out")[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1 and modes == {stat.S_IMODE((tmp_path / "run/log.txt").stat().st_mode)}
    assert stat.S_IMODE((tmp_path / "run/model.safetensors").stat().st_mode) in modes


@pytest.mark.slow
def test_two_processes_read_a_half_each(tmp_path, finished, capsys):
    """Into DTensors, as torchtitan has them."""
    assert main(capsys, finished, tmp_path / "out")[0] == 0
    (tmp_path / "read.py").write_text("""
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import Shard, init_device_mesh, zeros
dist.init_process_group("gloo")
mesh, reader = init_device_mesh("cpu", (2,)), HuggingFaceStorageReader(sys.argv[1])
found = reader.read_metadata().state_dict_metadata
state = {
    name: zeros(*about.size, device_mesh=mesh, placements=[Shard(0)])
    for name, about in found.items()
}
dcp.load(state, storage_reader=reader)
for name, t in load_file(sys.argv[1] + "/model.safetensors").items():
    assert torch.equal(state[name].full_tensor(), t), name
dist.destroy_process_group()
""")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            tmp_path / "read.py",
            tmp_path / "out",
        ],
        check=True,
        timeout=300,
    )


# --- what is refused


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    c, model = small()
    masters = {name: p.detach() for name, p in model.named_parameters() if p.numel()}
    return make_run(tmp_path_factory.mktemp("finished") / "run", c, model, checkpoint=masters)


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_unfinished_runs_and_other_folders(copy, tmp_path, capsys):
    to = tmp_path / "out"
    (copy / "model.safetensors").unlink()
    refused(
        main(capsys, copy, to),
        to,
        "has no model.safetensors",
        "its last checkpoint is --step 7",
    )
    refused(
        main(capsys, tmp_path / "nowhere", to),
        to,
        "expected a finished run or a checkpoint",
    )
    refused(main(capsys, copy / "log.txt", to), to, "expected a finished run or a checkpoint")


def test_damaged_weights(copy, tmp_path, capsys):
    to = tmp_path / "out"
    for file, source in (
        (copy / "model.safetensors", copy),
        (copy / "checkpoints/step-000007/state.safetensors", copy / "checkpoints/step-000007"),
    ):
        whole = file.read_bytes()
        for damaged in (whole[:-9], b"", b"\x80\x04pickle" * 99):
            file.write_bytes(damaged)
            refused(main(capsys, source, to), to, source)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the size is right
    refused(main(capsys, source, to), to, "SHA-256")


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("config.json", "{}", "run's configuration"),
        ("config.json", "[", "not JSON"),
        ("config.json", '{"config": []}', "run's configuration"),
        ("config.json", '{"config": {"n_layer": 3}}', "not the weights and the configuration"),
        ("result.json", "nonsense", "not JSON"),
    ],
)
def test_broken_descriptions(copy, tmp_path, capsys, name, text, said):
    (copy / name).write_text(text)
    refused(main(capsys, copy, tmp_path / "out"), tmp_path / "out", copy, said)


def test_weights_of_another_configuration(copy, tmp_path, capsys):
    """Rather none than matrices under wrong names."""
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"n_layer": 3', '"n_layer": 4'))
    refused(
        main(capsys, copy, tmp_path / "out"),
        tmp_path / "out",
        "attn_bank has 12 matrices, expected 16",
    )
    save_file({"w": torch.zeros(3)}, copy / "model.safetensors")
    refused(main(capsys, copy, tmp_path / "out"), tmp_path / "out", "KeyError('embed')")


def test_a_target_that_is_taken_or_cannot_be_made(finished, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    status, _, err = main(capsys, finished, tmp_path / "there")
    assert status == 2 and "is there already" in err and not any((tmp_path / "there").iterdir())
    (tmp_path / "file").write_text("x")
    status, _, err = main(capsys, finished, tmp_path / "file/out")
    assert status == 2 and "cannot be written" in err and (tmp_path / "file").read_text() == "x"


def test_a_disk_without_room(finished, tmp_path, capsys, monkeypatch):
    to = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        status, out, err = main(capsys, finished, to)
        assert status == 2 and "0.00 GB are free" in err and not to.exists()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, out, err = main(capsys, finished, to)
    assert (
        status == 2
        and "No space left on device; nothing is left there" in err
        and not os.listdir(tmp_path)
    )


# --- the tokenizer


def test_the_runs_own_tokenizer_is_found(tmp_path, capsys):
    """In the run's folder, though the prepared text is gone; of a checkpoint in its run's."""
    path = write_text(tmp_path / "text.txt", 5000)
    c = tiny(path, tmp_path, steps=2, eval_every=2, tokenizer="bpe:300", checkpoint_every="2")
    tg.train(c)
    shutil.rmtree(tmp_path / "cache")
    run = tmp_path / "run"
    ours = load_tokenizer(run)
    about = json.loads((run / "data.json").read_text())
    assert "text.txt: 1 file, " in (run / "log.txt").read_text()
    assert (about["n_vocab"], about["eot"]) == (ours.n_vocab, ours.eot)
    for source in run, run / "checkpoints/step-000002":
        to = tmp_path / f"out-{source.name}"
        status, out, err = main(capsys, source, to)
        assert (status, err) == (0, "") and sorted(os.listdir(to)) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        theirs = HF.from_file(str(to / "tokenizer.json"))
        text = path.read_text()
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode([text])[0].tolist()
        config = json.loads((to / "config.json").read_text())
        n = theirs.get_vocab_size()
        assert config["n_vocab"] == n <= config["vocab_size"] and config["bos_token_id"] == n - 1


def test_a_run_without_a_tokenizer(copy, tmp_path, capsys):
    """From before runs kept it: said, and another run's can be named."""
    assert "name one with --tokenizer" in main(capsys, copy, tmp_path / "out")[2]
    (tmp_path / "theirs.json").write_text(make_tokenizer("bytes", None).to_json())
    given = tmp_path / "out2", "--tokenizer", tmp_path / "theirs.json"
    assert main(capsys, copy, *given)[::2] == (0, "")
    assert (tmp_path / "out2/tokenizer.json").exists()
    (tmp_path / "text.txt").write_text("some text")
    for file in (tmp_path / "nowhere.json", tmp_path / "text.txt"):
        to = tmp_path / "out3"
        refused(main(capsys, copy, to, "--tokenizer", file), to, file)


# --- the page


def test_the_page(tmp_path, capsys, monkeypatch):
    """docs/torchtitan.md: its first command and its Python run as printed, and it lists the
    names that are written."""
    page = (ROOT / "docs/torchtitan.md").read_text()
    command = re.search(r"^\./run\.sh export (.*)$", page, re.MULTILINE)[1]
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    c, model = everything()
    make_run(tmp_path / "runs/my-run", c, model)
    monkeypatch.chdir(tmp_path)
    assert export_main(shlex.split(command, comments=True)) == 0
    exec(python, {})
    assert f"{sum(p.numel() for p in model.parameters()):,} elements" in capsys.readouterr().out
    listed = set(re.findall(r"^\| `([\w.{}]+)`", page, re.MULTILINE))
    out = unstack({name: p.detach() for name, p in model.named_parameters()}, c.model)
    assert {re.sub(r"\.\d+\.", ".{i}.", name) for name in out} <= listed


# --- torchtitan itself


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, dict(qk_norm=True, tied_embeddings=False)], ids=str)
def test_torchtitans_own_model_computes_the_same(tmp_path, capsys, fields):
    """Its loader, its adapter, its model: by the Python that STOPWATCH_TORCHTITAN names."""
    python = os.environ.get("STOPWATCH_TORCHTITAN")
    if not python:
        pytest.skip("STOPWATCH_TORCHTITAN names no Python")
    run = llama_run(tmp_path / "run", qwen2(500), **fields)
    assert main(capsys, run, tmp_path / "out")[0] == 0
    Ours(run, tmp_path).reference(tmp_path / "reference.json", n_tokens=1, n_prompts=1)
    program = Path(__file__).with_name("in_torchtitan.py")
    done = subprocess.run(
        [python, program, tmp_path / "out", tmp_path / "reference.json"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["difference"] < 1e-4
