"""records/read.py against anything: nothing but InputError comes out, in time that grows with the
input's size only.

A few hundred inputs in the suite, more than 100,000 with -m slow.
"""

import json
import re
import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_read import (
    LLMC_C,
    LLMC_CUDA,
    LLMC_MAIN,
    LLMC_PY,
    MODDED_2024,
    MODDED_2026,
    NANOCHAT,
    NANOGPT,
    RULE,
    TRACK_3,
    our_run,
    reads_or_says_why,
    write,
)

from records.logs import read_log

SECONDS = 2.0  # of the processor, for one small input; a backtracking pattern takes minutes
PUMPED = 0.25  # for one line of 8K characters
FEW, MANY = 60, 11_000  # examples of each of the kinds of inputs below


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """{dialect: one small log of it}, as bytes"""
    ours = our_run(
        tmp_path_factory.mktemp("ours") / "run", probe=dict(matmul=dict(bfloat16=2e12), copy=1e10)
    )
    files = {
        name: (ours / name).read_bytes()
        for name in ("log.txt", "metrics.jsonl", "config.json", "result.json")
    }
    texts = dict(
        modded_2024=MODDED_2024,
        modded_2026=MODDED_2026,
        track_3=TRACK_3,
        llmc_main=LLMC_MAIN,
        llmc_cuda=LLMC_CUDA,
        llmc_py=LLMC_PY,
        llmc_c=LLMC_C,
        nanogpt=NANOGPT,
        nanochat=NANOCHAT,
    )
    return {name: text.encode() for name, text in texts.items()} | dict(
        ours=files["log.txt"]
    ), files


def read_in_time(path):
    start = time.process_time()
    reads_or_says_why(path)
    assert time.process_time() - start < SECONDS


def fuzz(test):
    """The test with few examples, and with many for -m slow."""

    def some(n):
        return settings(
            max_examples=n,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        )

    @pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
    def run(tmp_path, logs, examples):
        counted = []

        @some(examples)
        @given(st.data())
        def each(data):
            counted.append(1)
            test(tmp_path, logs, data)

        each()
        assert len(counted) >= examples * 0.95, "fewer inputs than meant"
        print(f"{len(counted):,} inputs")

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# Pieces that mean something to a reader, so that what is made of them gets far
WORDS = st.sampled_from(
    [
        b"step:",
        b"/",
        b" val_loss:",
        b" train_loss:",
        b" train_time:",
        b"ms",
        b"s",
        b" step_avg:",
        b"nan",
        b"inf",
        b"-",
        b".",
        b":",
        b"e999",
        b"9" * 20,
        b"0",
        b"1",
        b"250",
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"|",
        b" ",
        b"    ",
        b"s:",
        b" tel:",
        b" trl:",
        b"val loss ",
        b"step ",
        b" | loss ",
        b"iter ",
        b": loss ",
        b", time ",
        b"Step 00250 | Validation bpb: ",
        b"(5.00%) | loss: ",
        b" | dt: ",
        b" | total time: ",
        b"{",
        b"}",
        b'"config": ',
        b"[" * 999,
        RULE.encode() + b"\n",
        b"error: ",
        b"resumed from step 10\n",
        " ²٣५ \u2028\x85".encode(),
        b"Running on x with world_size ",
        b"|   0  NVIDIA H100  On  |",
    ]
)
HOW = st.sampled_from("cut insert replace flip repeat swap".split())
WHERE = st.floats(0, 1)
EDITS = st.lists(
    st.tuples(HOW, WHERE, WHERE, WORDS | st.binary(max_size=12)), min_size=1, max_size=6
)


def edit(text, edits):
    """Some bytes of a log changed; places are shares of its length."""
    for how, a, b, piece in edits:
        a, b = sorted((int(a * len(text)), int(b * len(text))))
        text = {
            "cut": lambda: text[:a] + text[b:],
            "insert": lambda: text[:a] + piece + text[a:],
            "replace": lambda: text[:a] + piece + text[a + len(piece) :],
            "flip": lambda: (
                text[:a] + bytes(byte ^ 1 << b % 8 for byte in text[a : a + 1]) + text[a + 1 :]
            ),
            "repeat": lambda: text[:b] + text[a:b][:2000] + text[b:],
            "swap": lambda: text[b:] + text[a:b] + text[:a],
        }[how]()[:20_000]
    return text


@fuzz
def test_any_bytes(tmp_path, logs, data):
    read_in_time(write(tmp_path / "a.txt", data.draw(st.binary(max_size=300))))


@fuzz
def test_any_words(tmp_path, logs, data):
    read_in_time(write(tmp_path / "a.txt", b"".join(data.draw(st.lists(WORDS, max_size=60)))))


@fuzz
def test_a_log_that_ends_anywhere(tmp_path, logs, data):
    """Torn by a kill, or its first part lost."""
    text = data.draw(st.sampled_from(sorted(logs[0].values())))
    ends = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    read_in_time(
        write(
            tmp_path / "a.txt", text[: ends[1]] if data.draw(st.booleans()) else text[slice(*ends)]
        )
    )


@fuzz
def test_a_log_with_changes(tmp_path, logs, data):
    text = data.draw(st.sampled_from(sorted(logs[0].values())))
    read_in_time(write(tmp_path / "a.txt", edit(text, data.draw(EDITS))))


@fuzz
def test_two_logs_in_one(tmp_path, logs, data):
    """Lines of two dialects, and of one twice, taking turns."""
    a, b = (
        data.draw(st.sampled_from(sorted(logs[0].values()))).splitlines(keepends=True)
        for _ in range(2)
    )
    turns = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    lines = []
    while a or b:
        for i, n in enumerate(turns):
            source = (a, b)[i % 2] or a or b
            lines += source[:n]
            del source[:n]
    read_in_time(
        write(
            tmp_path / "a.txt",
            edit(b"".join(lines), data.draw(EDITS))
            if data.draw(st.booleans())
            else b"".join(lines),
        )
    )


@fuzz
def test_a_run_folder_with_changes(tmp_path, logs, data):
    """Each of its files as it was, missing, torn or changed."""
    for name, text in logs[1].items():
        how = data.draw(st.sampled_from("whole whole missing torn changed".split()))
        (tmp_path / name).unlink(missing_ok=True)
        if how != "missing":
            write(
                tmp_path / name,
                {
                    "whole": lambda: text,
                    "torn": lambda: text[: data.draw(st.integers(0, len(text)))],
                    "changed": lambda: edit(text, data.draw(EDITS)),
                }[how](),
            )
    read_in_time(tmp_path)


@fuzz
def test_a_json_file_of_a_run_with_other_values(tmp_path, logs, data):
    """Valid JSON with anything in place of one of its numbers, strings, lists."""
    name = data.draw(st.sampled_from(["metrics.jsonl", "config.json", "result.json"]))
    value = data.draw(
        st.floats().map(json.dumps)
        | st.sampled_from(
            [
                "null",
                "true",
                "-1",
                "1e999",
                "NaN",
                "-Infinity",
                "[]",
                "{}",
                "[[1]]",
                '"x"',
                "0",
                '"\\ud800"',
                "9" * 400,
                "1.5",
                '{"a": []}',
            ]
        )
    )
    for other, text in logs[1].items():
        write(tmp_path / other, text)
    text = logs[1][name].decode()
    values = list(re.finditer(r'(?<=: )("[^"]*"|[\d.]+|\[[^]]*\]|null|true|\{)', text))
    m = values[data.draw(st.integers(0, len(values) - 1))]
    write(tmp_path / name, text[: m.start()] + value + text[m.end() :])
    read_in_time(tmp_path)


@fuzz
def test_any_text_of_digits_and_signs(tmp_path, logs, data):
    """Numbers in every place of a whole line."""
    number = st.text("0123456789.e+-", max_size=30) | st.sampled_from(
        ["nan", "inf", "1e999", "-1", "9" * 400, ""]
    )
    lines = [line for text in logs[0].values() for line in text.decode().splitlines() if line]
    line = data.draw(st.sampled_from(lines))
    parts = []
    for part in line.replace(",", " , ").split(" "):
        parts.append(data.draw(number) if part[:1].isdigit() and data.draw(st.booleans()) else part)
    read_in_time(write(tmp_path / "a.txt", "\n".join([" ".join(parts), line, " ".join(parts)])))


@fuzz
def test_encodings(tmp_path, logs, data):
    text = edit(data.draw(st.sampled_from(sorted(logs[0].values()))), data.draw(EDITS)).decode(
        errors="replace"
    )
    encoding = data.draw(
        st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])
    )
    raw = text.encode(encoding, "replace")
    read_in_time(write(tmp_path / "a.txt", raw[: data.draw(st.integers(0, len(raw)))]))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "result.json", "log.txt"])
def test_json_nested_too_deep(tmp_path, logs, name):
    for other, text in logs[1].items():
        write(tmp_path / other, text)
    deep = b"[" * 8000
    write(
        tmp_path / name, b"\n".join([RULE.encode(), b"{", deep, RULE.encode(), deep, logs[1][name]])
    )
    read_in_time(tmp_path)


# --- patterns that could backtrack

PUMPS = {
    "step": (
        "step:1/2",
        [" a:b", " val_loss:1", " a:b:", " train_time:1ms", " x:" + "y" * 9, " train_time:1"],
    ),
    "llm.c": ("step 1/2 | loss 1 ", ["1", "1 ", "1.1", ". ", "ms", "1e1", "-1", " 1 m"]),
    "llm.c table": ("| device ", [" ", "| x ", "x |", "  |x"]),
    "nvidia-smi": ("|   0  A", [" ", " On", " On  ", "\t", " Off x"]),
    "nvidia-smi digits": ("|", [" ", "1 ", " 1"]),
    "Running": (
        "Running ",
        ["on ", " ", "on x ", "on x with world_size", " with", "on device_name=", "on \t"],
    ),
    "our machine": (
        "a: ",
        [" parameters, x, attention ", ", 1 x ", "1, 1 x 1, ", ", 1 TFLOP/s", "1", " parameters, "],
    ),
    "our machine's name": ("", ["a:", "a: ", ": "]),
    "our machine, late": ("a: 1 parameters, b, attention c", [", 1 x ", ", 1 x 1, 1 T", "1 x 1 "]),
    "nanochat": (
        "step 1/2 (1%) | loss: 1 |",
        [" | dt: 1ms |", "| dt: 1ms |", " | total time: 1", "|", "| dt: 1ms | total time: "],
    ),
    "nanochat tokens": ("Tokens / micro-batch: ", ["1", "1,", "1 ", ",", "= 1"]),
    "nanochat GPU": ("GPU: A", [" ", " | Peak", "|"]),
    "nanoGPT": ("iter 1: loss 1, time ", ["1", "1.", "e1"]),
    "error": ("error: ", ["error: ", " "]),
    "numbers": ("val loss ", ["1", "-", "1.1", "1e1"]),
}


@pytest.mark.parametrize("kind", PUMPS)
def test_long_lines_take_no_longer_than_their_length(tmp_path, logs, kind):
    """Lines as a pattern likes them, again and again, and one thing at the end that it does not."""
    start, pumps = PUMPS[kind]
    slowest = 0.0
    for a in pumps:
        for b in ["", *pumps]:
            for c in ["", *pumps]:
                line = (
                    start
                    + "".join(pump * (8000 // 3 // max(1, len(pump))) for pump in (a, b, c))
                    + "\0!"
                )
                path = write(tmp_path / "a.txt", RULE + "\n" + line + "\n" + MODDED_2026)
                before = time.process_time()
                read_log(path)
                slowest = max(slowest, time.process_time() - before)
                assert slowest < PUMPED, (
                    f"{slowest:.2f} s for {line[:60]!r}, pumps {a!r} {b!r} {c!r}"
                )


MODDED = "step:{%s}/9999999 %s_loss:1.0 train_time:%sms step_avg:1.00ms\n"


@pytest.mark.parametrize(
    "late, early",
    [
        (MODDED % ("n", "train", "{n}"), MODDED % ("m", "val", "0")),
        (MODDED % ("n", "train", "9000000"), MODDED % ("n", "val", "0")),
        ("s:{n} trl:1.0\n", "s:{m} tel:1.0\n"),
        ("s:{n} trl:1.0\n", MODDED % ("n", "val", "1")),
        ("iter {n}: loss 1.0, time 1.0ms, mfu 1%\n", "step {m}: train loss 1.0, val loss 1.0\n"),
    ],
)
def test_many_lines_that_go_back(tmp_path, late, early):
    """Resumed again and again, or with a clock that begins anew at every line: time grows with
    the number of lines."""

    def seconds(n):
        lines = [late.format(n=step) for step in range(2, n)]
        lines += [
            (late, early)[i % 2].format(n=n + i // 2, m=n // 2 + i // 2) for i in range(n // 2)
        ]
        path = write(tmp_path / "a.txt", "".join(lines))
        before = time.process_time()
        reads_or_says_why(path)
        return time.process_time() - before

    def fastest(n):
        return min(seconds(n) for _ in range(2))

    # Four times as many take four times as long, were it not for noise; squared, sixteen
    assert fastest(10_000) < 12 * max(fastest(2_500), 0.05)
