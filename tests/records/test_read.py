"""The reader of training logs: every dialect, every era, and what goes wrong in real files."""

import codecs
import json
import math
import os
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base import InputError
from records.logs import read_log
from records.read import is_run_folder, read_runs
from records.runs import Point, Run, tokens_at
from records.source import source_of
from runtime.log import Log
from tracks import load_track

RULE = "=" * 100

# What each program prints, in its own words; numbers are made up
SMI = """\
+---------------------------------------------------------------------------------------+
| NVIDIA-SMI 535.129.03             Driver Version: 535.129.03   CUDA Version: 12.6     |
|   0  NVIDIA H100 80GB HBM3          On  | 00000000:65:02.0 Off |                    0 |
| N/A   36C    P0              74W / 700W |      7MiB / 81559MiB |      0%      Default |
|   1  NVIDIA H100 80GB HBM3          On  |   00000000:67:02.0 Off |                  0 |
"""
MODDED_2024 = f"""\
{RULE}
print0(f"step:{{step}}/{{args.num_iterations}} val_loss:{{val_loss:.4f}} train_time:{{t:.0f}}ms \
step_avg:{{t:.2f}}ms")
{RULE}
Running pytorch 2.6.0.dev20241203+cu124 compiled for CUDA 12.4
{SMI}{RULE}
step:0/20 val_loss:10.8258 train_time:285ms step_avg:nanms
step:1/20 train_loss:10.8000 train_time:23000ms step_avg:nanms
step:10/20 train_loss:8.0000 train_time:24900ms step_avg:nanms
step:10/20 val_loss:7.5000 train_time:24950ms step_avg:nanms
step:11/20 train_loss:7.4000 train_time:140ms step_avg:nanms
step:15/20 val_loss:6.0000 train_time:700ms step_avg:140.00ms
step:20/20 train_loss:5.1000 train_time:1400ms step_avg:140.00ms
step:20/20 val_loss:5.0000 train_time:1410ms step_avg:141.00ms
peak memory allocated: 30220 MiB reserved: 38672 MiB
"""
MODDED_2026 = f"""\
{SMI}{RULE}
step:0/250 val_loss:10.8294 train_time:0ms step_avg:0.04ms
step:1/250 train_time:93ms step_avg:93.32ms
step:125/250 val_loss:5.1 train_time:4000ms step_avg:32.00ms
step:249/250 train_time:8100ms step_avg:32.53ms
step:250/250 val_loss:4.4321 train_time:8200ms step_avg:32.80ms
"""
TRACK_3 = """\
Running PyTorch 2.9.0+cu130 compiled for CUDA 13.0 on NVIDIA GH200 120GB with world_size 4
step:125/250 val_loss:4.58616 train_time:21.243s step_avg:169.94ms
step:200/250 train_time:31.5s step_avg:150.00ms
step:250/250 val_loss:4.44701 val_avg_loss:4.44701 val_ema_loss:4.44702 train_time:42.5s \
step_avg:169.94ms ema_beta:0
"""
LLMC_MAIN = """\
s:0 tel:11.0092
s:0 trl:11.0091 lr:0.000002 norm:15.37
s:1 trl:10.9598 lr:0.000004 norm:15.12
s:2 eval:0.2500
s:2 tel:9.5000
"""
LLMC_CUDA = """\
| device                | NVIDIA A100-SXM4-80GB                              |
| total batch size      | 524288                                             |
| num_processes         | 8                                                  |
val loss 11.009200
step    1/3 | loss 11.009100 (+nanz)| norm 15.3700 (+nanz)| lr 8.57e-07 | 900.00 ms | 18.0% bf16 \
MFU | 582542 tok/s
step    2/3 | loss 10.959800 (+nanz)| norm 15.1200 (+nanz)| lr 1.71e-06 | 300.00 ms | 55.4% bf16 \
MFU | 1747626 tok/s
evaluating HellaSwag: 10/79\revaluating HellaSwag: 20/79\rval loss 10.200000
step    3/3 | loss 10.100000 (-0.50z)| norm 9.0000 (+0.10z)| lr 2.57e-06 | 310.00 ms | 54.0% \
bf16 MFU | 1700000 tok/s
val loss 9.900000
total average iteration time: 305.000000 ms
"""
LLMC_PY = """\
total desired batch size: 1024
val loss 4.5
step    1/2 | train loss 4.600000 | norm 1.0000 | lr 1.00e-04 | (100.00 ms | 10240 tok/s)
step    2/2 | train loss 4.200000 | norm 1.0000 | lr 1.00e-04 | (50.00 ms | 20480 tok/s)
val loss 4.100000381469727
"""
LLMC_C = """\
val loss 5.325413
step 0: train loss 5.356185 (took 1452.121000 ms)
step 1: train loss 4.300645 (took 1288.673000 ms)
val loss 4.291698
"""
NANOGPT = """\
Overriding config with config/train_shakespeare_char.py:
max_iters = 5000
Overriding: max_iters = 4
tokens per iteration will be: 768
step 0: train loss 4.1676, val loss 4.1649
iter 0: loss 4.1887, time 30000.00ms, mfu -100.00%
iter 1: loss 4.1000, time 40.00ms, mfu -100.00%
step 2: train loss 3.9000, val loss 3.8000
saving checkpoint to out-shakespeare-char
iter 2: loss 3.7000, time 5000.00ms, mfu 0.02%
iter 3: loss 3.6000, time 50.00ms, mfu 0.02%
step 4: train loss 3.5000, val loss 3.4000
iter 4: loss 3.3000, time 5000.00ms, mfu 0.02%
"""
NANOCHAT = "\n".join(
    [
        "GPU: NVIDIA H100 80GB HBM3 | Peak FLOPS (BF16): 9.89e+14",
        "Tokens / micro-batch / rank: 16 x 2048 = 32,768",
        "Tokens / micro-batch: 262,144",
        "Total batch size 524,288 => gradient accumulation steps: 2",
        "Step 00000 | Validation bpb: 3.200000",
        *(
            f"step {i:05d}/00014 ({100 * i / 14:.2f}%) | loss: {9 - i / 2:.6f} | lrm: 1.00 | "
            f"dt: {9000 if i < 2 else 500}.00ms | tok/sec: 1,000,000 | bf16_mfu: 50.00 | "
            f"epoch: 1 pq: 0 rg: {i} | total time: {max(0, i - 10) * 0.5 / 60:.2f}m | eta: 1.0m"
            for i in range(14)
        ),
        "Step 00014 | Validation bpb: 0.987600",
        "Total training time: 0.03m",
    ]
)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(tmp_path, text, name="a.txt"):
    """The only run in a log of this text."""
    (run,) = read_log(write(tmp_path / name, text))
    return run


# --- dialects


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            MODDED_2024,
            dict(
                dialect="modded-nanogpt",
                steps=20,
                total_steps=20,
                finished=True,
                time_s=1.41,
                final_loss=5.0,
                hardware="NVIDIA H100 80GB HBM3",
                world_size=2,
                tokens=None,
            ),
        ),
        (
            MODDED_2026,
            dict(
                dialect="modded-nanogpt",
                steps=250,
                finished=True,
                time_s=8.2,
                final_loss=4.4321,
                hardware="NVIDIA H100 80GB HBM3",
                world_size=2,
                target=None,
            ),
        ),
        (
            TRACK_3,
            dict(
                dialect="modded-nanogpt",
                steps=250,
                finished=True,
                time_s=42.5,
                final_loss=4.44701,
                hardware="NVIDIA GH200 120GB",
                world_size=4,
            ),
        ),
        (
            LLMC_MAIN,
            dict(
                dialect="llm.c",
                steps=2,
                total_steps=None,
                finished=None,
                time_s=None,
                final_loss=9.5,
            ),
        ),
        (
            LLMC_CUDA,
            dict(
                dialect="llm.c",
                steps=3,
                total_steps=3,
                finished=True,
                time_s=0.61,
                final_loss=9.9,
                hardware="NVIDIA A100-SXM4-80GB",
                world_size=8,
                tokens=3 * 524288,
            ),
        ),
        (
            LLMC_PY,
            dict(
                dialect="llm.c",
                steps=2,
                finished=True,
                time_s=0.05,
                final_loss=4.100000381469727,
                tokens=2048,
            ),
        ),
        (
            LLMC_C,
            dict(dialect="llm.c", steps=2, finished=None, time_s=1.288673, final_loss=4.291698),
        ),
        (
            NANOGPT,
            dict(
                dialect="nanoGPT",
                steps=4,
                total_steps=4,
                finished=True,
                final_loss=3.4,
                tokens=4 * 768,
            ),
        ),
        (
            NANOCHAT,
            dict(
                dialect="nanochat",
                steps=14,
                finished=True,
                final_loss=0.9876,
                metric="val_bpb",
                world_size=8,
                hardware="NVIDIA H100 80GB HBM3",
                tokens=14 * 524288,
                time_s=1.5,
            ),
        ),
    ],
    ids=(
        "modded-2024 modded-2026 track-3 llm.c-main llm.c-cuda llm.c-py llm.c-c nanoGPT nanochat"
    ).split(),
)
def test_dialects(tmp_path, text, expected):
    run = read(tmp_path, text)
    assert {name: getattr(run, name) for name in expected} == pytest.approx(expected)
    assert not run.stopped_early


def test_modded_points(tmp_path):
    run = read(tmp_path, MODDED_2026)
    assert run.val == [
        Point(0, None, 0.0, 10.8294),
        Point(125, None, 4.0, 5.1),
        Point(250, None, 8.2, 4.4321),
    ]
    assert run.train == [
        Point(1, None, 0.093, None),
        Point(249, None, 8.1, None),
    ]  # no training loss since 2024


def test_clock_that_restarts_is_flagged_and_not_mixed(tmp_path):
    run = read(tmp_path, MODDED_2024)
    assert [(p.step, p.seconds) for p in run.val] == [(0, None), (10, None), (15, 0.7), (20, 1.41)]
    assert run.notes == ["the clock begins anew at step 11: what came before is not in its times"]
    assert run.time_to(7.0) is None and run.time_to(5.5) == pytest.approx(0.7 + 0.71 / 2)


def test_llmc_console(tmp_path):
    """The first step is warm-up; a validation is printed before the step that follows it."""
    run = read(tmp_path, LLMC_CUDA)
    assert run.val == [
        Point(0, 0, 0.0, 11.0092),
        Point(2, 2 * 524288, 0.3, 10.2),
        Point(3, 3 * 524288, 0.61, 9.9),
    ]
    assert [p.loss for p in run.train] == [11.0091, 10.9598, 10.1]


def test_nanogpt_clock(tmp_path):
    """Steps with a validation in them, and the first, are not ordinary: iter 1 stands for iter
    2, iter 3 for iter 4."""
    run = read(tmp_path, NANOGPT)
    assert [p.seconds for p in run.val] == pytest.approx([0.0, 0.04, 0.04 + 0.04 + 0.05])
    assert "sum of its step times" in run.notes[0]


def test_nanogpt_that_prints_every_tenth_step(tmp_path):
    lines = [
        "step 0: train loss 4.2, val loss 4.2",
        "iter 0: loss 4.2, time 9000.00ms, mfu -100.00%",
        *(f"iter {i}: loss 3.0, time 20.00ms, mfu 1.00%" for i in range(10, 100, 10)),
        "step 100: train loss 2.5, val loss 2.6",
    ]
    run = read(tmp_path, "\n".join(lines))
    assert run.val[-1].seconds == pytest.approx(0.02 * 99)
    assert run.total_steps is None and run.finished is None


def test_nanochat_clock_is_its_own(tmp_path):
    run = read(tmp_path, NANOCHAT)
    assert run.val[0] == Point(0, 0, 0.0, 3.2)
    assert run.train[10].seconds == 0 and run.train[11].seconds == 0.5  # 11 steps are free


def test_nanochat_that_goes_on_from_a_checkpoint(tmp_path):
    line = (
        "step 00100/00200 (50.00%) | loss: 3.0 | lrm: 1.00 | dt: 500.00ms | tok/sec: 1 | "
        "total time: 2.00m"
    )
    assert read(tmp_path, line).train[0].seconds == pytest.approx(120)


def test_public_tracks_have_targets(tmp_path):
    for track, target in (
        ("track_1_short", 3.28),
        ("track_2_medium", 2.92),
        ("track_3_optimization", 3.28),
    ):
        (tmp_path / track).mkdir()
        run = read(tmp_path / track, MODDED_2026)
        assert (run.track, run.target) == (track, target)


# --- what goes wrong in real files


def test_several_runs_in_a_file(tmp_path):
    runs = read_log(write(tmp_path / "a.txt", TRACK_3 + TRACK_3.split("\n", 1)[1] + MODDED_2026))
    assert [(r.steps, r.world_size, r.final_loss) for r in runs] == [(250, 4, 4.44701)] * 2 + [
        (250, 2, 4.4321)
    ]
    assert runs[0].where == str(tmp_path / "a.txt") and runs[1].where == f"{tmp_path / 'a.txt'}:5"
    two = read_log(write(tmp_path / "b.txt", LLMC_CUDA + LLMC_CUDA))
    assert [[p.step for p in r.val] for r in two] == [[0, 2, 3]] * 2
    four = read_log(write(tmp_path / "c.txt", LLMC_MAIN + LLMC_C + NANOGPT + NANOCHAT))
    assert [r.dialect for r in four] == ["llm.c", "llm.c", "nanoGPT", "nanochat"]
    failed = read_log(
        write(tmp_path / "d.txt", 2 * "step:0/9 val_loss:10.0 train_time:0ms step_avg:nanms\n")
    )
    assert (
        len(failed) == 2 and not failed[0].stopped_early
    )  # both were ended before their first step
    same = read_log(write(tmp_path / "e.txt", MODDED_2026 + MODDED_2026))
    assert [r.world_size for r in same] == [2, 2]  # each has its table of GPUs


def test_unfinished(tmp_path):
    lines = MODDED_2026.splitlines(keepends=True)
    run = read(tmp_path, "".join(lines[:-1]))
    assert (run.finished, run.steps, run.total_steps, run.final_loss) == (False, 249, 250, 5.1)
    assert (
        not run.stopped_early
    )  # it was killed: there are training steps behind its last validation
    stopped = read(tmp_path, "".join(lines[:-2]))
    assert stopped.stopped_early


@pytest.mark.parametrize("cut", range(1, 75))
def test_truncated_last_line_is_never_misread(tmp_path, cut):
    last = "step:250/250 val_loss:4.4321 train_time:8200ms step_avg:32.80ms\n"
    assert MODDED_2026.endswith(last)
    run = read(tmp_path, MODDED_2026[:-cut] if cut < len(last) else MODDED_2026)
    assert (run.final_loss, run.time_s) in ((5.1, 4.0), (4.4321, 8.2))
    if run.final_loss == 5.1 and cut < len(last) - len("step:250/250 "):
        assert "not a whole step line" in run.notes[0]


def test_resumed_run_keeps_what_was_done_last(tmp_path):
    text = "\n".join(
        [
            "step:0/40 val_loss:10.0 train_time:0ms step_avg:1ms",
            *(f"step:{i}/40 train_loss:5.0 train_time:{i}000ms step_avg:1ms" for i in range(1, 30)),
            *(
                f"step:{i}/40 train_loss:4.0 train_time:{i}000ms step_avg:1ms"
                for i in range(21, 41)
            ),
            "step:40/40 val_loss:3.0 train_time:40000ms step_avg:1ms",
        ]
    )
    run = read(tmp_path, text)
    assert [p.step for p in run.train] == list(range(1, 41))
    assert [p.loss for p in run.train] == [5.0] * 20 + [4.0] * 20
    assert run.notes == [
        "line 31: goes on from step 21 after step 29; what came between is left out"
    ]


def test_nan_losses(tmp_path):
    run = read(tmp_path, MODDED_2026.replace("4.4321", "nan"))
    assert math.isnan(run.final_loss) and run.finished and run.time_to(4.5) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\x00\xff\xfe\x80PK\x03\x04" * 99 + b"\n" + text.encode(),
        lambda text: text.rstrip("\n"),
    ],
    ids=["CRLF", "UTF-8 BOM", "UTF-16", "binary garbage", "no last newline"],
)
def test_encodings(tmp_path, change):
    run = read(tmp_path, change(MODDED_2026))
    assert [p.loss for p in run.val] == [10.8294, 5.1, 4.4321] and run.time_s == 8.2


def test_huge_files_are_streamed(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "wb") as f:
        for _ in range(32):
            f.write(b"step:0/1 " + b"x" * 2**20)  # 32 MB without a newline
        f.write(b"\n" + MODDED_2026.encode())
    tracemalloc.start()
    (run,) = read_log(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.final_loss == 4.4321 and peak < 2**20


def test_a_step_in_the_middle_of_a_line_is_none(tmp_path):
    step = "step:250/250 val_loss:1.0 train_time:8200ms step_avg:32.80ms"
    run = read(
        tmp_path, "".join("x" * n + step + "\n" for n in (1, 8191, 8192, 8193, 16384)) + MODDED_2026
    )
    assert run.line == 1 and [p.loss for p in run.val] == [10.8294, 5.1, 4.4321]


@pytest.mark.parametrize(
    "text, where, why",
    [
        ("", ":0:", "empty"),
        ("hello\nworld", ":2:", "begins with 'hello'"),
        ("\n" * 9, ":9:", "empty"),
        (b"\x7fELF" * 50, ":1:", "begins with"),
    ],
)
def test_what_is_no_log_gets_one_line(tmp_path, text, where, why):
    path = write(tmp_path / "a.txt", text)
    with pytest.raises(InputError) as e:
        read_runs(path)
    assert (
        str(e.value).startswith(f"{path}{where}")
        and why in str(e.value)
        and "\n" not in str(e.value)
    )


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected training logs .* there is none"):
        read_runs(tmp_path)
    if os.geteuid():  # root may read everything
        path = write(tmp_path / "a.txt", MODDED_2026)
        path.chmod(0)
        with pytest.raises(InputError, match="Permission denied"):
            read_runs(path)


# --- our runs


def our_run(
    folder,
    losses=((0.5, 4.0, 1.9), (1.0, 3.0, 1.4)),
    stop=1.5,
    steps=20,
    seed=3,
    probe=None,
    finish=True,
):
    """Write a run with records.Log as the trainer does. losses: (share of the steps, val_loss,
    val_bpb)."""
    environment = dict(
        device="AMD EPYC", world_size=2, dtype="bfloat16", git_commit="abc", probe=probe
    )
    config = dict(
        track="laptop",
        target=stop,
        target_metric="val_bpb",
        steps=steps,
        seed=seed,
        batch_tokens=[100, 200],
        eval_every=steps // 2,
    )
    log = Log(folder, steps)
    with log:
        log.header(
            source_of({"train_gpt.py": b"the source"}),
            environment=environment,
            config=config,
            data="fp",
        )
        log.say(
            "laptop: 7.3M parameters, bfloat16, attention flex, 2 x AMD EPYC, "
            "0.50 TFLOP/s in matrix products"
        )
        done, step, metrics = 0, 0, {}
        for share, val_loss, val_bpb in losses:
            for step in range(done + 1, round(share * steps) + 1):
                log.step(step, steps, "train", 5 - step / 10, step / 8)
            done = step
            log.step(step, steps, "val", val_loss, step / 8, val_bpb=val_bpb)
            metrics = dict(val_loss=val_loss, val_bpb=val_bpb)
        if finish:
            log.save_weights({"w": torch.zeros(1)})
            log.finish(
                dict(
                    track="laptop",
                    target_metric="val_bpb",
                    target=stop,
                    reached=True,
                    **metrics,
                    train_time_s=step / 8,
                    steps=step,
                    tokens=1000 + 200 * (step - 10),
                    device="AMD EPYC",
                    world_size=2,
                    seed=seed,
                    data="stdlib",
                    data_fingerprint="fp",
                ),
            )
    return folder


@pytest.mark.parametrize("given", ["", "log.txt", "metrics.jsonl"])
def test_our_run_folder(tmp_path, given):
    folder = our_run(
        tmp_path / "run", probe=dict(matmul=dict(bfloat16=2e12, float32=1e12), copy=1e10)
    )
    (run,) = read_runs(folder / given)
    assert (run.path, run.name, run.dialect, run.track) == (
        str(folder),
        "run",
        "stopwatch",
        "laptop",
    )
    assert (run.metric, run.target, run.seed, run.data) == ("val_bpb", 1.5, 3, "fp")
    assert (run.steps, run.total_steps, run.finished, run.time_s) == (20, 20, True, 2.5)
    assert (run.final_loss, run.tokens, run.hardware, run.world_size) == (1.4, 3000, "AMD EPYC", 2)
    assert run.val == [Point(10, 1000, 1.25, 1.9), Point(20, 3000, 2.5, 1.4)]
    assert run.train[14] == Point(15, 2000, 15 / 8, 3.5) and len(run.train) == 20
    assert run.matmul_rate == 4e12 and run.environment["git_commit"] == "abc" and not run.notes


def test_our_log_alone_tells_nearly_the_same(tmp_path):
    folder = our_run(tmp_path / "run")
    alone = tmp_path / "somewhere.log"
    alone.write_bytes((folder / "log.txt").read_bytes())
    (run,), (whole,) = read_runs(alone), read_runs(folder)
    assert run.name == "somewhere" and run.dialect == "stopwatch"
    assert run.matmul_rate == pytest.approx(0.5e12)  # from the line that begins with the track
    for name in (
        "track",
        "seed",
        "metric",
        "target",
        "steps",
        "total_steps",
        "finished",
        "final_loss",
        "tokens",
        "hardware",
        "world_size",
        "data",
        "config",
        "environment",
        "val",
    ):
        assert getattr(run, name) == getattr(whole, name), name


@pytest.mark.parametrize("gone", ["config.json", "metrics.jsonl", "result.json", "log.txt"])
def test_our_run_folder_without_one_of_its_files(tmp_path, gone):
    folder = our_run(tmp_path / "run")
    (folder / gone).unlink()
    (run,) = read_runs(folder)
    assert (run.track, run.final_loss, run.steps, run.total_steps, run.finished) == (
        "laptop",
        1.4,
        20,
        20,
        True,
    )
    assert run.val[-1].loss == 1.4 and run.time_s == 2.5


def test_what_a_result_says_wins(tmp_path):
    """A run may have been resumed with another target, or on another machine."""
    folder = our_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    said = dict(target=1.45, device="Another CPU", world_size=3, tokens=7, train_time_s=9.5)
    write(folder / "result.json", json.dumps(result | said))
    (run,) = read_runs(folder)
    found = (run.target, run.hardware, run.world_size, run.tokens, run.time_s)
    assert found == (1.45, "Another CPU", 3, 7, 9.5)
    write(folder / "result.json", json.dumps(result | dict(target=None, device=None)))
    (run,) = read_runs(folder)
    assert (run.target, run.hardware) == (None, "AMD EPYC")


def test_early_stop_and_kill(tmp_path):
    (early,) = read_runs(our_run(tmp_path / "early", losses=[(0.5, 3.0, 1.45)]))
    assert (early.steps, early.finished, early.stopped_early) == (10, True, True)
    (killed,) = read_runs(our_run(tmp_path / "killed", losses=[(0.5, 3.0, 1.6)], finish=False))
    assert (killed.steps, killed.finished, killed.stopped_early) == (10, False, False)


def test_our_run_that_was_killed_in_a_line(tmp_path):
    folder = our_run(tmp_path / "run", finish=False)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    (run,) = read_runs(folder)
    assert run.notes == ["metrics.jsonl:22: no JSON object, skipped"] and (
        run.steps,
        run.finished,
    ) == (20, False)


def test_our_run_that_was_resumed(tmp_path):
    folder = our_run(tmp_path / "run")
    again = [dict(step=s, train_loss=9.0, train_time=s / 4) for s in (16, 17)] + [
        dict(step=17, val_loss=2, val_bpb=1)
    ]
    with open(folder / "metrics.jsonl", "a") as f:
        f.write("".join(json.dumps(row) + "\n" for row in again))
    (run,) = read_runs(folder)
    assert [p.step for p in run.train] == list(range(1, 18)) and [
        p.loss for p in run.train[-2:]
    ] == [9.0, 9.0]
    assert [(p.step, p.loss) for p in run.val] == [(10, 1.9), (17, 1.0)]


def test_our_run_that_ended_with_an_error(tmp_path):
    folder = our_run(tmp_path / "run", losses=[(0.5, 3.0, 1.6)], finish=False)
    with open(folder / "log.txt", "a") as f:
        f.write("error: step 11: the training loss is nan\n")
    (run,) = read_runs(folder)
    assert run.notes == ["it ended with: step 11: the training loss is nan"] and not run.finished


@pytest.mark.parametrize(
    "name, text, why",
    [
        ("config.json", "{\n 'a'", "config.json:2: not JSON"),
        ("result.json", "[1]", "result.json:1: expected a JSON"),
        ("result.json", '{"steps": "many"}', "result.json:1: not the result of a run"),
        ("result.json", "[" * 99999, "result.json:1: not JSON"),
        ("config.json", b"\xff\xfe\x00", ":1: not JSON"),
    ],
)
def test_our_run_with_a_broken_file(tmp_path, name, text, why):
    folder = our_run(tmp_path / "run")
    write(folder / name, text)
    with pytest.raises(InputError, match=why) as e:
        read_runs(folder)
    assert "\n" not in str(e.value)


# Tokens are counted as the trainer gives them out: it asks in every step how much of training is
# behind it. 1285 and 40 steps more are a recipe of ours.
@pytest.mark.parametrize(
    "steps, extension, batches",
    [
        (20, 0, [100, 200, 400]),  # a stage's border is in the middle of a step
        (1285, 40, [131072, 262144, 393216]),
        (7, 6, [1, 10, 100]),
        (6, 0, [1, 10, 100, 1000, 10000, 100000, 1000000]),  # more stages than steps
        (49, 0, [1, 2, 3, 4, 5, 6, 7]),  # floats do not hit every border
        (1, 0, [5]),
    ],
)
def test_tokens_at_a_step_are_the_sum_over_the_stages(steps, extension, batches):
    config = dict(batch_tokens=batches, extension=extension)
    run = Run("", "stopwatch", total_steps=steps, config=config)
    seen = 0
    for step in range(1, steps + 1):
        progress = min(1.0, (step - 1) / max(1, steps - extension))
        seen += batches[min(int(progress * len(batches)), len(batches) - 1)]
        assert tokens_at(run, step) == seen, step
    assert tokens_at(run, 0) == 0 and tokens_at(run, steps + 5) == seen


def test_tokens_at_is_what_the_trainer_counts():
    import train_gpt as tg

    c = tg.configure(**load_track("gpt2-small"))
    schedule = c.schedule
    rows = [tg.stage_at(c, step).rows for step in range(1, schedule.steps + 1)]
    config = dict(batch_tokens=list(schedule.batch_tokens), extension=schedule.extension)
    run = Run("", "stopwatch", total_steps=schedule.steps, config=config)
    end = schedule.steps - schedule.extension
    for step in (1, end // 3, end // 3 + 1, end // 2, end - 1, end, schedule.steps):
        assert tokens_at(run, step) == sum(rows[:step]) * c.data.row_len


def test_tokens_at_where_steps_were_added():
    """The first 10 of 20 planned steps, in two stages of 10, then 40 in all: the second begins
    after 20."""
    config = dict(batch_tokens=[1, 100], earlier=[[10, 20, "replan"]])
    run = Run("", "stopwatch", total_steps=40, config=config)
    assert [tokens_at(run, step) for step in (10, 20, 21)] == [10, 20, 120]
    config["earlier"] = [[20, 20, "replan"]]  # at the end of the second
    assert [tokens_at(run, step) for step in (10, 20, 40)] == [10, 1010, 3010]
    config["earlier"] = [7]
    assert tokens_at(run, 10) is None


@pytest.mark.parametrize("batches", [None, [], [1, "x"], [1.5], [0, 1], 7])
def test_tokens_that_are_not_known(batches):
    run = Run("", "stopwatch", total_steps=9, config=dict(batch_tokens=batches))
    assert tokens_at(run, 3) == (0 if batches == [] else None)


# --- folders


def test_folder_is_searched_and_says_what_it_skips(tmp_path):
    for seed in (0, 1):
        our_run(tmp_path / "record" / f"seed{seed}", seed=seed)
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs" / "b.LOG", MODDED_2026)
    write(tmp_path / "logs" / "c.stdout", TRACK_3 + TRACK_3)
    write(tmp_path / "logs" / "requirements.txt", "torch==2.10\n")
    write(tmp_path / "logs" / "notes.txt", "slow today\n")
    write(tmp_path / "logs" / "train.py", MODDED_2026)  # no log's name
    (tmp_path / "record" / "seed1" / "old").mkdir()
    write(
        tmp_path / "record" / "seed1" / "old" / "a.txt", MODDED_2026
    )  # inside a run: not a run of its own
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "a.txt", MODDED_2026)
    said = []
    runs = read_runs(tmp_path, said.append)
    assert [r.name for r in runs] == ["b", "c", "c", "seed0", "seed1"]
    assert (
        len(said) == 1
        and "notes.txt:1: not a training log" in said[0]
        and said[0].endswith("and 1 more")
    )


def test_folder_of_nothing_but_other_files(tmp_path):
    write(tmp_path / "a.txt", "hello")
    with pytest.raises(
        InputError,
        match=r"none of 1 files is one, the first because .*a\.txt:1: not a training log",
    ):
        read_runs(tmp_path)


def test_folder_of_logs_is_no_run_folder(tmp_path):
    write(tmp_path / "log.txt", MODDED_2026)
    write(tmp_path / "b.txt", TRACK_3)
    assert not is_run_folder(tmp_path) and len(read_runs(tmp_path)) == 2


# --- time_to


def test_time_to():
    run = Run(
        "",
        "",
        val=[
            Point(0, None, 0.0, 10.0),
            Point(1, None, 4.0, 6.0),
            Point(2, None, 5.0, 7.0),
            Point(3, None, 9.0, 3.0),
        ],
    )
    assert [run.time_to(x) for x in (10, 8, 6, 5, 3, 2)] == [0, 2, 4, 7, 9, None]
    assert run.time_to(11) == 0


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 12)), min_size=1, max_size=9),
    st.floats(0, 12),
)
def test_time_to_lies_between_the_validations_around_it(steps, loss):
    seconds, val = 0.0, []
    for i, (more, value) in enumerate(steps):
        seconds += more
        val.append(Point(i, None, seconds, value))
    time = Run("", "", val=val).time_to(loss)
    reached = next((i for i, p in enumerate(val) if p.loss <= loss), None)
    if reached is None:
        assert time is None
    else:
        assert val[max(reached - 1, 0)].seconds - 1e-9 <= time <= val[reached].seconds + 1e-9


# --- anything at all

DIALECTS = (
    MODDED_2024,
    MODDED_2026,
    TRACK_3,
    LLMC_MAIN,
    LLMC_CUDA,
    LLMC_PY,
    LLMC_C,
    NANOGPT,
    NANOCHAT,
)
PIECES = [line for text in DIALECTS for line in text.splitlines()]
PIECES += [RULE, "{", '"config": {"steps": 1e999, "batch_tokens": [[]]}', "}", "error: x"]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


def reads_or_says_why(path):
    try:
        runs = read_runs(path, warn=lambda line: None)
    except InputError as e:
        assert str(e) and "\n" not in str(e)
        return
    assert runs
    for run in runs:
        assert run.final_loss is None or isinstance(run.final_loss, float)
        assert [p.step for p in run.val] == sorted({p.step for p in run.val})
        assert [p.step for p in run.train] == sorted({p.step for p in run.train})
        run.stopped_early, run.matmul_rate, run.time_to(3.28), run.where
        assert run.tokens is None or run.tokens >= 0


@FUZZ
@given(
    lines=st.lists(
        st.sampled_from(PIECES)
        | st.sampled_from(PIECES).flatmap(
            lambda line: st.tuples(
                st.integers(0, len(line)), st.text("0123456789.:/ e-", max_size=4)
            ).map(lambda at: line[: at[0]] + at[1] + line[at[0] :])
        ),
        max_size=40,
    )
)
def test_any_lines(tmp_path_factory, lines):
    """Whole lines of every dialect in any order, some with something put in."""
    reads_or_says_why(write(tmp_path_factory.getbasetemp() / "lines.txt", "\n".join(lines)))


KEYS = st.sampled_from(
    "config environment data steps batch_tokens target target_metric probe matmul dtype step "
    "train_time val_loss val_bpb train_loss train_time_s seed device world_size tokens".split()
)
OBJECTS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=6), max_size=8).map(
    json.dumps
)


@FUZZ
@given(config=OBJECTS, result=OBJECTS, metrics=st.lists(OBJECTS | st.text(max_size=9), max_size=5))
def test_any_run_folder(tmp_path_factory, config, result, metrics):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    for name, text in (
        ("config.json", config),
        ("result.json", result),
        ("metrics.jsonl", "\n".join(metrics)),
    ):
        write(folder / name, text.encode("utf-8", "surrogatepass"))
    reads_or_says_why(folder)
