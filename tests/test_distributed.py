"""Any number of processes trains on the same tokens and gets the same losses."""

import json
import subprocess
import sys

import pytest

from helpers import ROOT, options, run_trainer, tiny, train_losses, write_text


@pytest.mark.parametrize("fields", [dict(), dict(micro_tokens=32, n_layer=3, stage_lr=(1.0, 1.5),
                                                  batch_tokens=(160, 320), max_doc_len=(16, 32), long_docs="drop")],
                         ids=["one batch", "stages, accumulation, nothing divides"])
def test_losses_of_1_2_and_3_processes_agree(tmp_path, fields):
    text = write_text(tmp_path / "words.txt")
    if fields:  # many documents, so that cutting them leaves something
        text.write_text(text.read_text().replace(".\n", "<|endoftext|>"))
    losses, tokens = {}, set()
    for n in (1, 2, 3):
        c = tiny(text, tmp_path, run_dir=str(tmp_path / f"run{n}"), **fields)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        done = run_trainer(*options(c), launcher=launcher)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)  # one line, from the first rank only
        assert result["world_size"] == n
        tokens.add(result["tokens"])
        losses[n] = train_losses(tmp_path / f"run{n}") + [result["val_loss"]]
        assert len(losses[n]) == 21
    assert len(tokens) == 1
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert losses[3] == pytest.approx(losses[1], rel=1e-4)


def test_bad_input_ends_every_process(tmp_path):
    c = tiny(tmp_path / "missing.txt", tmp_path)
    done = run_trainer(*options(c), launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    assert done.returncode != 0
    assert done.stderr.count("missing.txt: no such file or folder") == 1
    assert done.stdout == ""


def test_launching_several_processes_keeps_the_exit_status(tmp_path):
    """What --gpus N does: torchrun itself would turn every failure into status 1."""
    text = write_text(tmp_path / "words.txt")
    for target, status in ((9.0, 0), (0.1, 3)):
        c = tiny(text, tmp_path, run_dir=str(tmp_path / f"run{status}"), steps=4, target=target)
        program = f"import sys, train_gpt; sys.exit(train_gpt.launch({options(c)!r}, 2))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == status, done.stderr
        assert json.loads(done.stdout)["world_size"] == 2
        assert "Traceback" not in done.stderr
