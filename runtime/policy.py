"""The loss over answers that a model has drawn itself, from what they are worth: GRPO, Dr. GRPO and
DAPO.

    advantage   A = (r - mean r) / (std r + 1e-4) over the answers to one question, std unbiased;
                without the division in Dr. GRPO
    ratio       rho = exp(log pi - log pi_old) of a token, pi_old: that it was drawn with
    KL          k3 = exp(log ref - log pi) - (log ref - log pi) - 1, at least 0, whose mean over the
                policy's own tokens is KL(pi || ref)
    token       l = -min(rho A, clip(rho, 1 - low, 1 + high) A) + kl k3
    loss        sum of weight * l over all tokens of all answers, weights by --average:
                tokens    1 / tokens of all answers (DAPO)
                answers   1 / (answers * tokens of its answer) (GRPO)
                constant  1 / (answers * tokens that an answer may have) (Dr. GRPO)

Sources: Shao et al., arXiv:2402.03300 (GRPO); Liu et al., arXiv:2503.20783 (Dr. GRPO); Yu et al.,
arXiv:2503.14476 (DAPO); Schulman, joschu.net/blog/kl-approx.html (k3).
"""

import dataclasses
import functools

import torch

from base.options import COUNT, POSITIVE, RATE, Options, option
from data.loader import IGNORE

EPS = 1e-4  # beside the standard deviation of rewards


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Options):
    """What is learned from answers that the model writes, of ./run.sh grpo."""

    reward: str = option(
        "",
        "what an answer is worth: exact, number, regex, regex:PATTERN, python, or FILE.py:FUNCTION",
        group="reinforcement learning",
    )
    questions: int = option(64, "questions of a step", POSITIVE)
    answers: int = option(
        8, "answers to each of them", (lambda n: n >= 2, "2 or more, which are compared")
    )
    answer_tokens: int = option(64, "tokens of an answer; what is longer is cut", POSITIVE)
    kl: float = option(
        0.02, "how much the distance to the model that it began with counts; 0 is not at all", RATE
    )
    clip_low: float = option(
        0.2, "a token's probability that fell by more than this part teaches nothing more", RATE
    )
    clip_high: float = option(0.2, "the same of one that rose; DAPO has 0.28", RATE)
    advantage: str = option(
        "std",
        "an answer's reward less the mean of those to its question; std: over their deviation, "
        "mean: as it is, as Dr. GRPO has it",
        ("std", "mean"),
    )
    average: str = option(
        "tokens",
        "the loss is a mean over all tokens (DAPO), over answers and the tokens of each (GRPO), or "
        "over answers as if all were as long as they may be (Dr. GRPO)",
        ("tokens", "answers", "constant"),
    )
    drop_cut: bool = option(
        False, "answers that were cut teach nothing, as in DAPO; else what their reward says"
    )
    drop_alike: bool = option(
        False,
        "answers to a question that are all worth the same are left out, as in DAPO: their "
        "advantage is zero, and steps take less time the more the model knows",
    )
    reuse: int = option(1, "steps that learn from the same answers", POSITIVE)
    places: int = option(512, "answers that are written together at most", POSITIVE)
    val_questions: int = option(256, "to validate on at most; 0 is all", COUNT)
    reward_seconds: float = option(10.0, "that a reward may take for an answer", POSITIVE)
    reward_memory: int = option(1024, "megabytes that it may take", POSITIVE)


def advantages(rewards, kind="std"):
    """(questions, answers) rewards -> the same of advantages; zeros where all are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    # Of equal rewards the mean may differ in its last bit, which is no difference
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    if kind == "std":
        centred = centred / (rewards.std(1, keepdim=True) + EPS)
    return centred.masked_fill(equal, 0.0)


def token_weights(lengths, config, n_answers, n_tokens):
    """[weight of each token of an answer, ...]; lengths: of this rank's answers, n_answers,
    n_tokens: of all ranks."""
    if config.average == "tokens":
        return [1 / max(1, n_tokens)] * len(lengths)
    if config.average == "answers":
        return [1 / (max(1, n_answers) * max(1, n)) for n in lengths]
    return [1 / (max(1, n_answers) * config.answer_tokens)] * len(lengths)


def token_losses(log_probs, old, reference, advantage, config):
    """(losses, k3, whether the clip holds them back) of tokens; all of one shape."""
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    held = gain < ratio * advantage
    if config.kl == 0:
        return -gain, torch.zeros_like(gain), held
    gap = reference - log_probs
    k3 = gap.exp() - gap - 1
    return config.kl * k3 - gain, k3, held


class PolicyLoss:
    """A model with a loss over its answers, called as a template is with next tokens: forward()."""

    def __init__(self, model, config, compiled=False):
        self.config = config
        # Among the tokens that answers are drawn from
        self.log_probs = functools.partial(model.log_probs, n_vocab=model.n_vocab)
        self.counted = None  # of k3, tokens that the clip holds back, tokens: sums since take()
        if compiled:
            self.log_probs = torch.compile(self.log_probs, fullgraph=True, dynamic=False)

    def __call__(
        self,
        inputs,
        targets,
        cu_seqlens,
        old,
        reference,
        advantage,
        weight,
        stage,
        target_weights=None,
    ):
        """Weighted sum over the answers' tokens of a data.questions.AnswerBatch, 0-d."""
        log_probs = self.log_probs(inputs, targets, cu_seqlens, stage)
        losses, k3, held = token_losses(log_probs, old, reference, advantage, self.config)
        own = (targets != IGNORE) & (weight > 0)
        with torch.no_grad():
            sums = torch.stack([k3[own].sum(), held[own].sum(), own.sum()]).double()
            self.counted = sums if self.counted is None else self.counted + sums
        return (weight * losses).where(own, 0).sum()

    def take(self):
        """(sum of k3, tokens that the clip held back, tokens) since the last call, float64."""
        counted = self.counted
        self.counted = None
        return counted
