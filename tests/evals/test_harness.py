"""./run.sh eval --harness: lm-eval's numbers are those of its hf backend on the exported folder."""

import contextlib
import json
import random

import pytest
from helpers import write_text

import train_gpt as tg
from evals import __main__ as program
from export import __main__ as export

pytestmark = pytest.mark.slow  # lm-eval takes half a minute to import

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "greedy": """
task: greedy
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of the llama template."""
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder / "words.txt", 4000)
    options = dict(
        template="llama", text=text, tokenizer="bpe:300", cache_dir=folder / "cache",
        run_dir=folder / "run", steps=40, eval_every=40, batch_tokens=512, row_len=64,
        val_row_len=64, max_doc_len=64, val_tokens=500, dtype="float32", checkpoint_every="off",
        sample_tokens=0, adam_lr=0.02, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16,
        ffn_dim=64,
    )  # fmt: skip
    argv = ["--no-compile"]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    with contextlib.redirect_stdout(None):
        assert tg.main(argv) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    r = random.Random(0)
    words = "the a cat dog sees likes chases finds and but red small old tree".split()

    def sentence(n):
        return " ".join(r.choices(words, k=n))

    rows = []
    for _ in range(24):
        rows.append(
            dict(
                question=sentence(r.randint(2, 60)),
                choices=[sentence(r.randint(1, 5)) for _ in range(3)],
                answer=r.randrange(3),
                text=sentence(r.randint(5, 120)) + " naïve ☃.",
            )
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        file = folder / f"{name}.yaml"
        file.write_text(text.replace("FILE", str(folder / "data.jsonl")).strip() + "\n")
    return folder


def test_the_numbers_of_the_hf_backend(run, tasks, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from evals.harness import StopwatchLM

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    to = tmp_path / "exported"
    with contextlib.redirect_stdout(None):
        assert export.main(["--run", str(run), "--to", "hf", str(to)]) == 0
    theirs = HFLM(pretrained=str(to), dtype="float32", device="cpu", batch_size=1, max_length=64)
    ours = StopwatchLM(run=str(run), device="cpu")
    assert ours.max_length == theirs.max_length == 64

    found = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        found[name] = lm_eval.simple_evaluate(
            model=model,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    for task in TASKS:
        numbers = {k: v for k, v in found["theirs"]["results"][task].items() if "," in k}
        for key, value in numbers.items():
            if isinstance(value, float):
                assert found["ours"]["results"][task][key] == pytest.approx(value, rel=1e-6), key
        for a, b in zip(found["ours"]["samples"][task], found["theirs"]["samples"][task]):
            assert flat(a["resps"]) == pytest.approx(flat(b["resps"]), rel=1e-6)


def flat(answers):
    """Numbers and texts of nested lists, in order."""
    if isinstance(answers, list | tuple):
        return [x for answer in answers for x in flat(answer)]
    return [float(answers)] if not isinstance(answers, str) else [len(answers), *map(ord, answers)]


def test_the_command_registers_the_model_and_hands_over(run, tasks, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    argv = ["--harness", "--model_args", f"run={run}", "--tasks", "choice"]
    argv += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--limit", "5"]
    assert program.main(argv) == 0
    assert "|choice|" in capsys.readouterr().out.replace(" ", "")
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["model"] == "stopwatch"
