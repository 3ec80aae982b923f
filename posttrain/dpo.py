"""./run.sh dpo: preference tuning, from pairs of answers of which one is preferred.

The loop is train_gpt.py's with a loss over pairs: DPO, and KTO or SimPO by --preference. Formulas
and sources are in runtime/preferences.py, the recipe is tracks/dpo.py.
"""

from .command import make_parser, teach

DESCRIPTION = """\
Teach a run's model which of two answers is better: direct preference optimization on pairs, lines
of {"prompt": [messages], "chosen": "...", "rejected": "..."}. The model that it begins with is the
reference, whose log probabilities are computed once. The options of ./run.sh train work here as
well, and --preference kto or simpo for those losses. A loss that stays at ln 2 = 0.693 has learned
nothing: raise --stage-lr, or look whether the pairs differ in what you mean."""

EXAMPLES = """\
examples:
  ./run.sh dpo --from runs/taught --data pairs.jsonl
  ./run.sh dpo --from runs/taught --data pairs.jsonl --beta 0.3 --steps 60
  ./run.sh dpo --from runs/taught --data pairs.jsonl --preference simpo --beta 2"""


def main(argv=None):
    """Parse, teach, print the result. Returns the exit status."""
    return teach("dpo", "dpo", make_parser("dpo", DESCRIPTION, EXAMPLES), argv)
