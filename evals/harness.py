"""lm-eval's tasks with a run's model: ./run.sh eval --harness ARGS...

lm-eval finds models by what has been registered before its command line runs; it looks for no
plugins. So this program registers the model `stopwatch` and hands over. Everything behind --harness
is lm-eval's own: tasks come from the Hub, or from local files by its --include_path.

Numbers are those of lm-eval's hf backend on the exported folder: the same tokens, cut in the same
way, with end-of-text first, which the exported tokenizer adds (tests/evals/test_harness.py).
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from base import InputError
from inference.engine import Engine, Request
from inference.sampling import Sampling
from runtime.saved import load_run, newest_run

from .scoring import Scorer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    raise InputError(
        f"--harness needs lm-eval ({e}); install it with .venv/bin/python -m pip install -r "
        "requirements-harness.txt"
    ) from None

TOKENS = 256  # of an answer, where a task does not say


@register_model("stopwatch")
class StopwatchLM(TemplateLM):
    """A run's model for lm-eval.

    run: its folder, the newest without; template: as everywhere; max_length: tokens that it may
    look back at. Other arguments that lm-eval gives are of no use here.
    """

    def __init__(self, run=None, template=None, max_length=None, device=None, **others):
        super().__init__()
        if not device or not torch.cuda.is_available():  # lm-eval's own default is cuda:0
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = Path(run) if run else newest_run()
        self.saved = load_run(folder, device, template)
        if max_length:
            most = min(int(max_length), self.saved.max_len)
            self.saved = self.saved._replace(max_len=most)
        self.scorer = Scorer(self.saved)
        self.text_tokenizer = self.saved.tokenizer
        self._device = torch.device(device)

    @property
    def eot_token_id(self):
        return self.text_tokenizer.eot

    @property
    def max_length(self):
        return self.saved.max_len

    @property
    def tokenizer_name(self):
        return str(self.saved.folder)

    def tok_encode(self, string, add_special_tokens=None, **others):
        ids = self.text_tokenizer.encode([string])[0].tolist()
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **others):
        """[(log probability, whether every token is the likeliest one)] of ((texts), tokens of the
        context, of the continuation)."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = self.scorer.continuations(pairs, greedy=True)
        answers = [(scored.log_prob, scored.is_greedy) for scored in found]
        for (texts, *_), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[log probability] of whole texts, in windows that overlap by one token."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, delay=2):
            [text] = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            total = sum(scored.log_prob for scored in self.scorer.continuations(pairs))
            answers.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return answers

    def generate_until(self, requests, disable_tqdm=False):
        """[text] that follows each context, up to what is to end it."""
        saved = self.saved
        engine = Engine(saved.model, saved.stage, saved.tokenizer, saved.max_len)
        completions = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            most = int(options.get("max_gen_toks", TOKENS))
            temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
            ids = self.tok_encode(context)[-max(1, self.max_length - most) :]
            completions.append(
                engine.begin(
                    Request(
                        tuple(ids),
                        most,
                        Sampling(temperature=float(temperature)),
                        stop=tuple(text for text in until if text),
                    )
                )
            )
        for _ in engine.run(completions):
            pass
        for request, completion in zip(requests, completions):
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [completion.text for completion in completions]


def main(argv):
    """lm-eval's command line with the newest run as its model, unless argv names another one.
    Returns the exit status."""
    from lm_eval.__main__ import cli_evaluate

    command = argv[0] if argv and not argv[0].startswith("-") else "run"
    argv = argv[1:] if argv and not argv[0].startswith("-") else argv
    if command == "run" and not {"--model", "-M", "--help", "-h"} & set(argv):
        argv = ["--model", "stopwatch", *argv]
    before = sys.argv
    sys.argv = ["lm-eval", command, *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
