"""records/leaderboard.py: the page says what the records say, the same bytes every time, and is
up to date."""

import bz2
import json
import re
import shutil
from pathlib import Path

import pytest
from test_add import edit, main, make_run

import records.add
from records.leaderboard import PUBLIC, chart, count, hardware_class, load_records, render, spread
from records.source import source_of


@pytest.fixture
def home(tmp_path, capsys):
    """A folder for records; home.add(name, losses by seed, ...) adds one."""

    class Home:
        folder = tmp_path / "records"

        def add(self, name, lasts=(3.2, 3.25), **fields):
            runs = [
                make_run(tmp_path / "runs" / f"{name}{s}", s, (5.0, 4.0, last), **fields)
                for s, last in enumerate(lasts)
            ]
            status, out, err = main(capsys, "add", *runs, "--name", name, "--records", self.folder)
            assert status == 0, err
            return Path(out.strip())

        def page(self):
            status, out, err = main(capsys, "leaderboard", "--records", self.folder)
            assert (status, out) == (
                0,
                f"{self.folder / 'README.md'}\n{self.folder / 'history.svg'}\n",
            ), err
            return (self.folder / "README.md").read_text()

    Home.folder.mkdir()
    return Home()


def rows(page):
    """Cells of the tables' rows about our records."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in page.splitlines()
        if re.match(r"\| (\d+|missed) \| .* s \|", line)
    ]


# --- the page


def test_the_committed_page_is_up_to_date():
    page = records.add.RECORDS / "README.md"
    found = load_records(records.add.RECORDS)  # raises where a record is not what its logs say
    if found or page.exists():
        assert page.read_text(encoding="utf-8") == render(found), (
            "run: ./run.sh records leaderboard"
        )


def test_tables(home):
    """By track, target and machine; the fastest first, those above their target last."""
    home.add("slow", ms=200)
    home.add("fast", ms=50)
    home.add("missed", (3.2, 3.4), ms=10)
    home.add("gpu", environment=dict(device="Some CPU", threads=1))
    home.add("easier", target=3.5)
    page = home.page()
    assert [(r[0], re.sub(r"\[(.*)\].*", r"\1", r[2])) for r in rows(page)] == [
        ("1", "gpu"),
        ("1", "fast"),
        ("2", "slow"),
        ("missed", "missed"),
        ("1", "easier"),
    ]
    assert re.findall("^##.*", page, re.M) == [
        "## toy: 3.28 nats per token",
        "### 1-core CPU",
        "### 2-core CPU",
        "## toy: 3.5 nats per token",
        "### 2-core CPU",
        "## The public record, for reference",
    ]


def test_a_row(home):
    home.add("Sharper | [heads]")
    (row,) = rows(home.page())
    p = json.loads((home.folder / "toy/2026-03-04_sharper-heads/summary.json").read_text())[
        "p_value"
    ]
    assert row == [
        "1",
        "3 s",
        r"[Sharper \| \[heads\]](toy/2026-03-04_sharper-heads)",
        "2026-03-04",
        "3.225 ± 0.035",
        "2",
        f"{p:.2g}",
        "30",
        "30k",
        "0123456",
    ]
    assert (home.folder / "toy/2026-03-04_sharper-heads").is_dir()


def test_runs_that_stopped_at_the_target_say_at_which_step_they_were_tested(home, tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 0, (5.0, 3.2)), make_run(tmp_path / "b", 1, (5.0, 4.0, 3.1))]
    assert main(capsys, "add", *runs, "--name", "x", "--records", home.folder)[0] == 0
    (row,) = rows(home.page())
    assert row[6].endswith(" at step 20") and row[7:9] == ["20–30", "20k–30k"]


def test_dirty_source_is_marked(home, tmp_path, capsys):
    run = make_run(tmp_path / "r", environment=dict(git_dirty=True))
    assert (
        main(capsys, "add", run, "--name", "x", "--records", home.folder, "--allow-dirty")[0] == 0
    )
    (row,) = rows(home.page())
    assert row[5:7] == ["1", "–"] and row[9] == "0123456 + changes"


def test_no_records_yet(home):
    page = home.page()
    assert (
        "No records yet." in page
        and rows(page) == []
        and (home.folder / "history.svg").stat().st_size > 1000
    )


def test_the_same_bytes_every_time(home):
    home.add("one")
    home.add("two", ms=50)
    first = home.page(), (home.folder / "history.svg").read_bytes()
    assert (home.page(), (home.folder / "history.svg").read_bytes()) == first
    shutil.copytree(home.folder, home.folder.parent / "copy")  # nor does it matter where they are
    assert render(load_records(home.folder.parent / "copy")) == first[0]
    assert not list(home.folder.glob(".*"))


def test_what_a_killed_add_left_is_not_a_record(home):
    folder = home.add("one")
    shutil.copytree(folder, folder.with_name("2026-03-04_two.0123abcd.tmp"))
    assert len(rows(home.page())) == 1


# --- records that are not what their logs say


@pytest.mark.parametrize(
    "name, value",
    [
        ("n", 3),
        ("losses", [3.1, 3.2]),
        ("time_mean_s", 2.0),
        ("p_value", 1e-9),
        ("git_commit", "f" * 40),
        ("target", 3.3),
        ("git_dirty", True),
    ],
)
def test_an_edited_summary(home, capsys, name, value):
    file = home.add("one") / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    status, out, err = main(capsys, "leaderboard", "--records", home.folder)
    assert (
        (status, out) == (2, "")
        and str(file) in err
        and f"{name} is" in err
        and err.count("\n") == 1
    )
    assert not (home.folder / "README.md").exists()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda f: (f / "summary.json").unlink(),
        lambda f: (f / "summary.json").write_text("{"),
        lambda f: (f / "summary.json").write_text("[]"),
        lambda f: shutil.rmtree(f / "seed0"),
        lambda f: [shutil.rmtree(f / f"seed{s}") for s in range(2)],
        lambda f: (f / "seed1/log.txt").unlink(),
        lambda f: (f / "seed1/metrics.jsonl.bz2").write_bytes(b""),
        lambda f: (f / "seed1/metrics.jsonl.bz2").write_bytes(bz2.compress(b"")),
        lambda f: (f / "source.tar.bz2").unlink(),
        lambda f: (f / "source.tar.bz2").write_bytes(source_of({"a.py": b""}).archive),
        lambda f: shutil.copytree(f / "seed1", f / "seed2"),
        lambda f: edit(f / "seed1", "log.txt", '"eval_every": 10', '"eval_every": 5'),
    ],
)
def test_a_damaged_record(home, capsys, break_it):
    folder = home.add("one")
    break_it(folder)
    status, out, err = main(capsys, "leaderboard", "--records", home.folder)
    assert (status, out) == (2, "") and str(folder) in err and err.count("\n") == 1


# --- parts


@pytest.mark.parametrize(
    "device, size, threads, expected",
    [
        ("NVIDIA H100 80GB HBM3", 8, 16, "8xH100"),
        ("NVIDIA H200", 1, 16, "1xH200"),
        ("NVIDIA B200", 8, 8, "8xB200"),
        ("NVIDIA H100 PCIe", 2, 8, "2xH100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", 8, 8, "8xA100"),
        ("Tesla T4", 1, 2, "1xT4"),
        ("NVIDIA GeForce RTX 4090", 1, 8, "1xRTX 4090"),
        ("NVIDIA GH200 480GB", 1, 72, "1xGH200"),
        ("NVIDIA L40S", 4, 8, "4xL40S"),
        ("AMD Instinct MI300X", 8, 8, "8xInstinct MI300X"),
        ("AMD EPYC", 1, 2, "2-core CPU"),
        ("AMD EPYC", 4, 1, "4-core CPU"),
    ],
)
def test_hardware_class(device, size, threads, expected):
    assert hardware_class(dict(device=device, world_size=size, threads=threads)) == expected


@pytest.mark.parametrize(
    "mean, sd, expected",
    [
        (3.27851, 0.00097, "3.27851 ± 0.00097"),
        (595.21, 0.68, "595.21 ± 0.68"),
        (12.345678, None, "12.346"),
        (58.2, 0.0, "58.2"),
        (100.0, 20.0, "100 ± 20"),
    ],
)
def test_spread(mean, sd, expected):
    assert spread(mean, sd) == expected


def test_count():
    assert [count(n) for n in (500, 81920, 338_821_120)] == ["0.5k", "81.92k", "338.8M"]


def test_chart(home):
    """A line for the public record, one for each table: the best so far, and every record that
    met its target a dot."""
    home.add("slow", ms=200)
    home.add("slower", ms=300, environment=dict(date="2026-03-06T00:00:00+00:00"))
    home.add("fast", ms=50, environment=dict(date="2026-03-05T00:00:00+00:00"))
    home.add("missed", (3.4, 3.4), ms=10)
    (ax,) = chart(load_records(home.folder)).axes
    public, best, dots = ax.lines
    assert ax.get_yscale() == "log"
    assert list(public.get_ydata()) == [60 * r["minutes"] for r in PUBLIC["records"]]
    assert [round(y, 2) for y in best.get_ydata()] == [6.0, 1.5, 1.5]
    assert sorted(round(y, 2) for y in dots.get_ydata()) == [1.5, 6.0, 9.0]
    assert [t.get_text() for t in ax.texts] == [
        "modded-nanogpt, track 1\n8xH100: 1.23 min",
        "toy to 3.28\n2-core CPU: 1.5 s",
    ]


def test_public_history():
    """Complete, in order, each faster than the one before but where the rules for timing
    changed."""
    found = PUBLIC["records"]
    assert [r["number"] for r in found] == list(range(1, len(found) + 1)) and len(found) >= 89
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", r["date"]) and r["change"] for r in found)
    assert [r["date"] for r in found] == sorted(r["date"] for r in found)
    assert [b["number"] for a, b in zip(found, found[1:]) if b["minutes"] >= a["minutes"]] == [22]
    assert PUBLIC["source"].startswith("https://github.com/") and re.fullmatch(
        "[0-9a-f]{40}", PUBLIC["commit"]
    )
    assert (PUBLIC["hardware"], found[0]["minutes"], found[-1]["minutes"]) == ("8xH100", 45, 1.23)
