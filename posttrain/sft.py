"""./run.sh sft: supervised fine-tuning, which teaches a run's model to answer as conversations do.

It is training on other tokens: the loop is train_gpt.py's, which begins with the run's weights and
vocabulary, and counts only what the assistant says in the loss (data/conversations.py). So
everything that training has is here as well: resuming, seeds, validation, best weights, several
GPUs. tracks/sft.py has the recipe.
"""

from .command import make_parser, teach

DESCRIPTION = """\
Teach a run's model to answer: fine-tune it on conversations, lines of
{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. Only what
the assistant says counts in the loss. The options of ./run.sh train work here as well; the result
is a run of its own. A part of the conversations is held out to validate on, and the best weights
are kept."""

EXAMPLES = """\
examples:
  ./run.sh sft --from runs/base --data conversations.jsonl
  ./run.sh sft --from runs/base --data a.jsonl b.jsonl --steps 300 --stage-lr 0.2
  ./run.sh chat                                       # with the newest run's model"""


def main(argv=None):
    """Parse, teach, print the result. Returns the exit status."""
    return teach("sft", "sft", make_parser("sft", DESCRIPTION, EXAMPLES), argv)
