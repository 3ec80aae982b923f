"""./run.sh orpo: preference tuning without a reference model, from a base model or a taught one.

The loop is train_gpt.py's with a loss over pairs, runtime/preferences.py. tracks/orpo.py has the
recipe.
"""

from .command import make_parser, teach

DESCRIPTION = """\
Teach a run's model to give the preferred one of two answers: odds ratio preference optimization on
pairs, lines of {"prompt": [messages], "chosen": "...", "rejected": "..."}. It learns the chosen
answers as fine-tuning does, and to tell them from the others, without a reference model. The
options of ./run.sh train work here as well."""

EXAMPLES = """\
examples:
  ./run.sh orpo --from runs/base --data pairs.jsonl
  ./run.sh orpo --from runs/base --data pairs.jsonl --beta 0.5"""


def main(argv=None):
    """Parse, teach, print the result. Returns the exit status."""
    return teach("orpo", "orpo", make_parser("orpo", DESCRIPTION, EXAMPLES), argv)
