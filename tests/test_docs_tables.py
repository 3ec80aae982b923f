"""What the documents say of tracks, results and files is so."""

import re
import shlex

import pytest
from helpers import ROOT

import train_gpt as tg
from records.metrics import METRICS, Evaluation, measure
from runtime.options import flat
from tracks import load_track, track_names

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OFF = dict(value_embed_layers=())  # where the default is not off


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def rows(page, heading):
    """Cells of the rows of the table whose first line begins so."""
    lines = page[page.index(f"| {heading} ") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def config_of(track):
    fields = load_track(track)
    if fields["data"] == "text":
        fields["text"] = "some.txt"
    return flat(tg.configure(**fields))


def test_the_recipe_says_which_track_has_which_part():
    head, _, *parts = rows(read("docs/recipe.md"), "part")
    defaults = flat(tg.configure()) | OFF
    assert len(parts) >= 20
    for column, track in enumerate(head[2:], 2):
        config = config_of(track.strip("`"))
        for part in parts:
            options = shlex.split(part[1].strip("`"))
            # The last option is the one that the part cannot do without
            name = [word for word in options if word.startswith("--")][-1]
            field = name.removeprefix("--").replace("-", "_")
            has = config[field] != defaults[field]
            if field == "batch_tokens":
                has = len(config[field]) > 1
            if field == "ngram_rows":
                has = config["n_gram"] > 1
            assert part[column] == ("✓" if has else ""), f"{track}, {part[0]}"


def test_the_options_of_the_recipe_are_valid():
    for part in rows(read("docs/recipe.md"), "part")[2:]:
        options = shlex.split(part[1].strip("`"))
        # Values are checked against a model that has the layers they name
        sizes = ["--track", "laptop-deep", "--value-embed-layers", "0", "--copies", "0"]
        tg.parse_args(sizes + options)


def test_every_track_is_listed_with_its_model_and_target():
    _, _, *listed = rows(read("docs/tracks.md"), "`--track`")
    assert sorted(row[0].strip("`") for row in listed) == track_names()
    named = re.findall(
        r"`([a-z0-9][a-z0-9-]+)`", read("README.md").split("## Tracks")[1].split("## ")[0]
    )
    assert set(named) <= set(track_names())
    for name, _, _, model, target in listed:
        config = config_of(name.strip("`"))
        if not model.startswith("the same"):
            size = f"{config['n_layer']} × {config['n_embd']}"
            assert model.startswith(size), name
        if target != "the same":
            wanted = "none" if config["target"] is None else str(config["target"])
            assert target.startswith(wanted), name


def test_the_example_of_a_track_is_valid():
    names = {}
    exec(re.search(r"```python\n(.*?)```", read("docs/tracks.md"), re.DOTALL)[1], names)
    assert tg.configure(**names["TRACK"]).goal.target == 1.45


def test_every_metric_is_among_the_keys_of_a_result():
    page = read("docs/results.md")
    keys = [row[0].strip("`") for row in rows(page, "key")[2:]]
    of_text = {name for name, metric in METRICS.items() if metric.of == "text"}
    assert set(measure(Evaluation(1.0, 1, 1))) == of_text <= set(keys)
    for name in METRICS.keys() - of_text:
        assert f"`{name}`" in read("docs/teaching.md")
    example = page.split("```")[1]
    assert re.findall(r'"(\w+)":', example) == keys_in_order(keys, example)


def keys_in_order(keys, example):
    """The keys as the example has them; raises ValueError where it lacks one."""
    return sorted(keys, key=lambda key: example.index(f'"{key}":'))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z]+/)+\w+\.py)(?:::\w+)?`", text)
    made_up = ("NAME", "counting", "mine/")  # names of one's choice
    for name in named:
        if not any(word in name for word in made_up):
            assert (ROOT / name).is_file(), name


def test_no_line_of_the_readme_calls_python():
    text = read("README.md")
    assert "python -m" not in text
    assert len(text.splitlines()) <= 140
