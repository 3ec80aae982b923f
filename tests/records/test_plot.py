"""records/plot.py: what is drawn is what the logs say, every line named at its end, the same
bytes every time."""

import math
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from test_add import main, make_run

from base import InputError
from records.plot import COLORS, draw, duration, group, spread
from records.read import read_runs
from records.runs import Point, Run


def figure_of(*paths):
    return draw([(path, r) for path in paths for r in read_runs(path)])


def curves(ax):
    """{label: (xs, ys)} of the lines that are named at their end; by colour, the first of it
    being the mean."""
    by_color = {}
    for line in ax.lines:
        by_color.setdefault(line.get_color(), line.get_data())
    return {label: tuple(map(list, by_color[color])) for _, _, label, color in ax.ends}


def public_log(path, losses):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            f"step:{100 * i}/{100 * (len(losses) - 1)} val_loss:{loss} train_time:{6000 * i}ms "
            f"step_avg:60.00ms\n"
            for i, loss in enumerate(losses)
        )
    )
    return path


# --- what is drawn


def test_one_run(tmp_path):
    figure = figure_of(make_run(tmp_path / "first try", losses=(5.0, 4.0, 3.2)))
    time, tokens = figure.axes
    assert curves(time) == {"first try": ([1.0, 2.0, 3.0], [5.0, 4.0, 3.2])}
    assert curves(tokens) == {"first try": ([10000, 20000, 30000], [5.0, 4.0, 3.2])}
    assert "(s)" in time.get_xlabel() and "nats per token" in time.get_ylabel()
    for ax in figure.axes:
        texts = [t.get_text() for t in ax.texts]
        assert (
            "target 3.28" in texts and "first try" in texts and not ax.collections
        )  # one run has no band
        assert any(list(line.get_ydata()) == [3.28, 3.28] for line in ax.lines)


def test_seeds_are_one_line_with_a_band(tmp_path):
    runs = [
        make_run(tmp_path / f"a{s}", s, (5.0, 4.0, 3.2 + s / 10), ms=100 * (s + 1))
        for s in range(3)
    ]
    time, _ = figure_of(*runs).axes
    assert list(curves(time)) == ["a0 (n=3)"]
    xs, ys = curves(time)["a0 (n=3)"]
    assert np.allclose(xs, [2, 4, 6], atol=1e-3) and np.allclose(ys, [5.0, 4.0, 3.3])
    (band,) = time.collections
    corners = {(round(x, 2), round(y, 2)) for x, y in band.get_paths()[0].vertices}
    assert {(6.0, 3.2), (6.0, 3.4)} <= corners


def test_other_settings_and_other_machines_are_other_lines(tmp_path):
    base = make_run(tmp_path / "base", muon_lr=0.1)
    others = [
        make_run(tmp_path / "lr", 1, muon_lr=0.2),
        make_run(tmp_path / "long", 1, steps=40, muon_lr=0.1),
        make_run(tmp_path / "torch", 1, muon_lr=0.1, environment=dict(torch="3")),
    ]
    assert sorted(curves(figure_of(base, *others).axes[0])) == ["base", "long", "lr", "torch"]
    colors = [color for *_, color in figure_of(base, *others).axes[0].ends]
    assert len(set(colors)) == 4


def test_a_record_has_its_folders_name(tmp_path, capsys):
    for name, seeds in (("one", [0]), ("two", [0, 1])):  # the same settings: still two records
        main(
            capsys,
            "add",
            *(make_run(tmp_path / f"{name}{s}", s) for s in seeds),
            "--name",
            name,
            "--records",
            tmp_path / "records",
        )
    assert sorted(curves(figure_of(tmp_path / "records").axes[0])) == [
        "2026-03-04_one",
        "2026-03-04_two (n=2)",
    ]


def test_a_seed_that_went_on_longer_is_still_seen(tmp_path):
    make_run(tmp_path / "runs/seed0", 0, (5.0, 3.2))
    make_run(tmp_path / "runs/seed1", 1, (5.0, 4.0, 3.0))
    time = figure_of(tmp_path / "runs").axes[0]
    assert np.allclose(curves(time)["runs (n=2)"][1], [5.0, 3.6])
    assert any(
        np.allclose(line.get_data(), [[2.0, 3.0], [4.0, 3.0]], atol=1e-3) for line in time.lines
    )


def test_public_logs(tmp_path):
    """No configuration, no tokens: files of one folder are repetitions, and the panel says what
    is missing."""
    for i in range(3):
        public_log(tmp_path / f"theirs/{i}.txt", [10.8, 4.0, 3.5, 3.28 + i / 100])
    figure = figure_of(tmp_path / "theirs", make_run(tmp_path / "ours"))
    assert sorted(curves(figure.axes[0])) == ["ours", "theirs (n=3)"]
    assert list(curves(figure.axes[1])) == ["ours"]
    alone = figure_of(tmp_path / "theirs").axes[1]
    assert [t.get_text() for t in alone.texts] == ["no tokens in these logs"]


def test_the_end_of_training_fills_the_picture(tmp_path):
    figure = figure_of(public_log(tmp_path / "x.txt", [10.8] + [3.9 - i / 20 for i in range(10)]))
    low, high = figure.axes[0].get_ylim()
    assert low < 3.45 and 3.85 < high < 4.2


def test_long_runs_are_in_minutes(tmp_path):
    time = figure_of(make_run(tmp_path / "r", ms=12000)).axes[0]
    assert "(min)" in time.get_xlabel() and np.allclose(curves(time)["r"][0], [2, 4, 6])


def test_losses_that_are_no_numbers_are_left_out():
    points = [Point(i, i, float(i), loss) for i, loss in enumerate((math.inf, 4.0, math.nan, 3.0))]
    figure = draw([("x", Run("x", "modded-nanogpt", name="x", val=points))])
    assert curves(figure.axes[0])["x"] == ([1.0, 3.0], [4.0, 3.0])


def test_losses_without_a_clock_and_tokens_cannot_be_drawn():
    with pytest.raises(InputError, match="with their time or tokens"):
        draw([("x", Run("x", "nanoGPT", name="x", val=[Point(1, None, None, 4.0)]))])


# --- labels


def test_labels_at_the_same_height_do_not_overlap(tmp_path):
    runs = [
        make_run(tmp_path / f"run{i}", losses=(5.0, 4.0, 3.2 + 1e-4 * i), muon_lr=i)
        for i in range(9)
    ]
    figure = figure_of(*runs)
    figure.savefig(tmp_path / "x.png")
    for ax in figure.axes:
        boxes = [Text.get_window_extent(t) for t in ax.texts if t.get_text().startswith("run")]
        assert len(boxes) == 9
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(box.x0 > ax.get_window_extent().x1 for box in boxes)
        assert (
            len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 10
        )  # with the target's


def test_names_that_are_the_same_come_with_their_folder(tmp_path):
    runs = [make_run(tmp_path / f"{letter}/run", muon_lr=i) for i, letter in enumerate("ab")]
    assert sorted(line.label for line in group([(p, r) for p in runs for r in read_runs(p)])) == [
        "a/run",
        "b/run",
    ]


@given(st.lists(st.floats(-0.5, 1.5), max_size=12), st.floats(0.01, 0.08))
def test_spread(heights, gap):
    placed = spread(sorted(heights, reverse=True), gap)
    assert len(placed) == len(heights)
    assert all(a - b >= gap - 1e-9 for a, b in zip(placed, placed[1:]))
    assert all(-1e-9 <= p <= 1 + 1e-9 for p in placed)


def test_spread_moves_nothing_that_has_room():
    assert spread([0.9, 0.5, 0.1], 0.1) == [0.9, 0.5, 0.1]


def luminance(color):
    return sum(
        w * int(color[i : i + 2], 16) / 255 for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))
    )


def test_colours_are_distinct_and_dark_enough_for_white():
    assert len(set(COLORS)) == len(COLORS) and max(map(luminance, COLORS)) < 0.75


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (1.5, "1.5 s"), (60, "1 min"), (73.8, "1.23 min"), (5400, "1.5 h")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


# --- the command


@pytest.mark.parametrize(
    "output, files",
    [
        ("x.png", ["x.png"]),
        ("x.svg", ["x.svg"]),
        ("x", ["x.png", "x.svg"]),
        ("lr-0.02", ["lr-0.02.png", "lr-0.02.svg"]),
    ],
)
def test_files(tmp_path, capsys, output, files):
    run = make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    for _ in range(2):  # over the old ones
        assert main(capsys, "plot", run, "-o", tmp_path / "out" / output) == (
            0,
            "".join(f"{tmp_path / 'out' / file}\n" for file in files),
            "",
        )
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    for file in files:
        content = (tmp_path / "out" / file).read_bytes()
        if file.endswith(".png"):
            assert content.startswith(b"\x89PNG\r\n")
        else:
            texts = [e.text for e in ET.fromstring(content).iter() if e.tag.endswith("}text")]
            assert "target 3.28" in texts and "run" in texts


def test_the_same_bytes_every_time(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    first, second = (tmp_path / f"{i}.svg" for i in range(2))
    for file in (first, second):
        assert main(capsys, "plot", run, "-o", file)[0] == 0
    assert first.read_bytes() == second.read_bytes() and not re.search(
        rb"20\d\d-\d\d-\d\d", first.read_bytes()
    )


@pytest.mark.parametrize(
    "output, said",
    [
        ("x.pdf", "expected a name ending in .png or .svg"),
        ("no/such/x.png", "cannot be written: No such file or directory"),
    ],
)
def test_refused_outputs(tmp_path, capsys, output, said):
    status, out, err = main(capsys, "plot", make_run(tmp_path / "run"), "-o", tmp_path / output)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*x.*"))


def test_an_interrupted_plot_leaves_the_old_picture(tmp_path, capsys, monkeypatch):
    run, file = make_run(tmp_path / "run"), tmp_path / "x.svg"
    file.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert "No space left on device" in main(capsys, "plot", run, "-o", file)[2]
    assert file.read_text() == "old" and not list(tmp_path.glob(".*"))


def test_refused_runs(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for other, said in (
        (tmp_path / "none", "no such file"),
        (make_run(tmp_path / "bits", target_metric="val_bpb"), "val_loss in"),
    ):
        status, out, err = main(capsys, "plot", run, other, "-o", tmp_path / "x.svg")
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 5.0, "train_time": 1.0}\n')
    (run / "result.json").unlink()
    assert "with a validation loss" in main(capsys, "plot", run, "-o", tmp_path / "x.svg")[2]
    assert not (tmp_path / "x.svg").exists()
