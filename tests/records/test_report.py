"""./run.sh report: one page with what is in a run's folder."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from records import report

CONFIG = dict(
    track="laptop",
    target=1.5,
    target_metric="val_bpb",
    seed=3,
    template="gpt",
    n_layer=2,
    n_embd=64,
    steps=20,
    batch_tokens=[1000],
    muon_lr=0.03,
    sample_prompts=["def ", "<b>"],
    tokenizer="bpe:512",
)
RESULT = dict(
    target_metric="val_bpb",
    target=1.5,
    reached=True,
    val_loss=3.2109,
    val_bpb=1.4567,
    steps=20,
    best_step=20,
    tokens=20_000,
    tokens_per_s=4000,
    train_time_s=5.0,
    params=123_456,
    data="novel",
    process_s=10.0,
    imports_s=1.0,
    train_s=5.0,
    energy_kwh=0.0123,
)


STEP = "step:1/20 train_loss:5.8750 train_time:250ms step_avg:250.00ms\n"


def write_run(folder, config=CONFIG, result=RESULT, evaluation=None, log=STEP):
    folder.mkdir(parents=True)
    header = dict(config=config, environment=dict(device="A <CPU>", date="2026-01-02T03:04:05"))
    header["command"] = "./run.sh --text 'my <novel>.txt'"
    (folder / "config.json").write_text(json.dumps(header))
    rows = []
    for step in range(1, 21):
        rows.append(dict(step=step, train_loss=6 - step / 8, train_time=step / 4, lr=1 - step / 40))
        rows[-1]["grad_norm"] = 2 / step
    rows += [dict(step=10, val_loss=4.0, val_bpb=2.0, train_time=2.5)]
    rows += [dict(step=20, val_loss=3.2109, val_bpb=1.4567, train_time=5.0)]
    rows.sort(key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    if evaluation:
        (folder / "eval.json").write_text(json.dumps(dict(results=evaluation)))
    (folder / "log.txt").write_text(log)
    return folder


LOG = (
    STEP
    + """--- a sample after step 10
def f(x):
    return "<i>&"
---
step:11/20 train_loss:4.6250 train_time:2750ms step_avg:250.00ms
--- a sample after step 20
<b>old</b>
---
"""
)
ROW = dict(task="order", metric="acc", value=0.75, stderr=0.02, n=100, unit="items", chance=0.25)


def made(capsys, *argv):
    """The page, which is well-formed."""
    assert report.main([*map(str, argv)]) == 0
    path = capsys.readouterr().out.strip()
    page = open(path, encoding="utf-8").read()
    ET.fromstring(re.sub(r"<meta[^>]*>", "", page.removeprefix("<!doctype html>\n")))
    return page


def test_the_page_tells_what_the_folder_knows(tmp_path, capsys):
    folder = write_run(tmp_path / "a", evaluation=[ROW], log=LOG)
    page = made(capsys, folder)
    assert page == (folder / "report.html").read_text()
    for said in (
        "1.4567", "target reached", "123k", "0.0123", "kWh", "A &lt;CPU&gt;", "2 layers", "10.0 s",
        "0.7500 ± 0.0200", "after step 10", "after step 20", "bpe:512", "2026-01-02",
        "./run.sh --text &#x27;my &lt;novel&gt;.txt&#x27;",
    ):  # fmt: skip
        assert said in page, said
    for title in ("Loss", "Validation", "Learning rate", "Gradient norm", "Speed"):
        assert f"<title>{title}</title>" in page
    assert page.index("after step 20") < page.index("after step 10")


def test_nothing_of_it_is_markup_of_the_models(tmp_path, capsys):
    page = made(capsys, write_run(tmp_path / "<img src=x>", log=LOG))
    assert "<b>old" not in page and "<i>&" not in page and "<img" not in page
    assert '<span class="prompt">&lt;b&gt;</span>old&lt;/b&gt;' in page
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_two_runs_stand_beside_each_other(tmp_path, capsys):
    a = write_run(tmp_path / "a", evaluation=[ROW])
    other = dict(RESULT, val_bpb=1.4, reached=None)
    b = write_run(tmp_path / "b", CONFIG | dict(muon_lr=0.07), other, [ROW | dict(value=0.5)])
    out = tmp_path / "both.html"
    page = made(capsys, a, b, "--out", out)
    assert out.exists() and not (a / "report.html").exists()
    assert "1.4567" in page and "1.4000" in page
    differing = page.split("Options that differ")[1].split("All options")[0]
    assert re.findall(r"<code>(\w+)</code>", differing) == ["muon_lr"]
    assert '<span class="bad">-0.2500</span>' in page
    assert page.count('class="line c0"') >= 3 and page.count('class="line c1"') >= 3


def test_differences_are_good_or_bad_beyond_two_errors():
    def classes(metric, difference, error=0.1):
        rows = dict(value=1.0, stderr=error), dict(value=1.0 + difference, stderr=error)
        return re.findall('class="(.*?)"', report.change(metric, *rows))

    assert classes("acc", 0.28) == classes("acc", -0.28) == [] == classes("acc", -1, None)
    assert classes("exact", -0.29) == ["bad"] and classes("acc_norm by tokens", 0.29) == ["good"]
    assert classes("bits per byte", -0.29) == ["good"] and classes("bits per byte", 1) == ["bad"]


def test_a_run_that_is_not_done_has_a_page_as_well(tmp_path, capsys):
    page = made(capsys, write_run(tmp_path / "a", CONFIG | dict(target=1.0, steps=40), result=None))
    assert "not finished" in page and "Evaluation" not in page and "Samples" not in page


def test_speed_is_tokens_between_steps(tmp_path):
    story = report.read_story(write_run(tmp_path / "a"))
    assert {round(speed) for _, speed in report.speeds(story)} == {4000}


def test_a_resumed_run_is_drawn_once(tmp_path):
    folder = write_run(tmp_path / "a")
    again = [dict(step=s, train_loss=1.0, train_time=9.0 + s) for s in range(15, 18)]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in again)
        file.write('{"step": 18, "train_')  # killed
    story = report.read_story(folder)
    found = report.points(story, "train_loss")
    assert [step for step, _ in found] == [*range(1, 18)]
    assert [loss for _, loss in found[-3:]] == [1.0] * 3


def test_the_range_leaves_out_the_first_losses():
    line = report.Series("a", [(x, 11.0 if x < 20 else 4.0 - x / 1000) for x in range(1000)])
    low, high = report.within([line])
    assert high < 4.01 and math.isclose(low, 4.0 - 0.999)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["nowhere"], "nowhere: expected the folder of a run"),
        (["a"] * 7, "7 runs: expected 6 or fewer"),
    ],
)
def test_what_does_not_work_is_one_line(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    assert report.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert report.main(["a", "--out", "no/such/folder/a.html"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_newest_run_is_taken(tmp_path, capsys, monkeypatch):
    import os

    monkeypatch.setattr(report, "runs_folder", lambda: tmp_path / "runs")
    assert report.main([]) == 2 and "no run yet" in capsys.readouterr().err
    for i, name in enumerate(("a", "b/seed1", "c")):
        folder = write_run(tmp_path / "runs" / name)
        os.utime(folder / "metrics.jsonl", (1000 + i % 2, 1000 + i % 2))
    assert report.main([]) == 0
    assert capsys.readouterr().out.strip().endswith("b/seed1/report.html")
