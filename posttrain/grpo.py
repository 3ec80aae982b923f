"""./run.sh grpo: reinforcement learning from what a model's own answers are worth.

The loop is here, over the kit that training has: session, checkpoints, optimizer, log. The loss and
its sources are in runtime/policy.py, rewards in rewards.py, the recipe in tracks/grpo.py.

A step is a pure function of (weights, data, seed, step): answers are drawn with seeds of their own,
so that a run that was stopped goes on to the same weights, bit for bit.
"""

import copy
import dataclasses
import functools
import time

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from base import InputError, whole_file
from base.places import cache_folder
from data.questions import Answer, answer_batch, rows_of
from inference.engine import Engine, Request
from inference.sampling import Sampling
from kernels.decoding import Decoding
from kernels.drawing import Drawing
from records.metrics import Evaluation, measure
from runtime import machine
from runtime.finish import keep_best
from runtime.policy import advantages, token_weights
from runtime.saved import fill, weights_of
from runtime.steps import is_compiled, val_stage
from train_gpt import lr_at, muon_momentum

from .command import make_parser, teach
from .rewards import Reward

DESCRIPTION = """\
Teach a run's model by what its own answers are worth: group relative policy optimization. It writes
several answers to each question, and those that are better than the others to the same question
become likelier. Questions are lines of {"messages": [...]} that end with the user's turn, with what
the reward needs beside it, such as "answer". --reward says what an answer is worth: exact, number,
regex, regex:PATTERN, python (tests), or FILE.py:FUNCTION of (answer, question). The options of
./run.sh train work here as well. A tenth of the questions is held out to validate on."""

EXAMPLES = """\
examples:
  ./run.sh grpo --from runs/taught --data sums.jsonl --reward number
  ./run.sh grpo --from runs/taught --data sums.jsonl --reward mine.py:reward --answers 16
  ./run.sh grpo --from runs/taught --data sums.jsonl --advantage mean --average constant"""

PROMPT_TOKENS = 8192  # that are read at one time
SHOWN = 3  # answers after a validation


def main(argv=None):
    """Parse, teach, print the result. Returns the exit status."""
    return teach("grpo", "grpo", make_parser("grpo", DESCRIPTION, EXAMPLES), argv, open_loop)


def open_loop(config, data):
    """The loop for these questions. Raises InputError for a reward that does not fit them."""
    reward = Reward(config.policy, [*data.train.of, *data.val.of])
    return functools.partial(learn, reward)


# --------------------------------------------------------------------------------------------------
# The loop


def learn(reward, setup, session):
    """Learn from where the session is to the target or the last step. Raises Interrupted when a
    signal ended the run, InputError for a reward that failed, with the work saved."""
    config, world, policy = setup.config, setup.world, setup.config.policy
    model, optimizer, guard = setup.model, setup.optimizer, setup.guard
    model.enter(config.schedule.progress(max(session.at.step, 1)))
    reference = open_reference(setup, session) if policy.kl else None

    # The engine has the model's own weights: what the optimizer changes, it answers with
    stage = val_stage(setup, 1)
    tokenizer = setup.data.dataset.tokenizer
    row_len = config.data.row_len
    answering = as_it_answers(setup, session)
    compiled = Drawing.build(cache_folder())
    about = dict(places=policy.places, part=PROMPT_TOKENS, drawing=compiled)
    engine = Engine(answering, stage, tokenizer, row_len, **about)
    session.start()
    if session.at.validated < 0 or session.missed_validation():
        validate(setup, session, engine, reward)  # how good it is before it begins, too

    for step in session.steps():
        # Answers to this step's questions, and what is to be learned from them
        if (step - 1) % policy.reuse == 0:
            begin = time.perf_counter()
            try:
                answers, about = roll_out(setup, step, engine, reward)
            except InputError:
                session.save(wait=True)
                raise
            about["rollout_s"] = time.perf_counter() - begin
            batches = batches_of(setup, answers, reference, stage)

        # Forward and backward; gradients add up in the parameters
        loss = torch.zeros((), device=world.device)
        if hasattr(model, "before_step"):
            model.before_step()
        for batch in batches:
            share = setup.forward(*batch, stage=stage)
            share.backward()
            loss += share.detach()
        about |= dict(zip(("kl", "clipped"), counted(setup)))

        # The update counts if loss and gradients, summed over ranks, are finite
        momentum = muon_momentum(config.schedule.annealing(step))
        ok = guard.judge(step, loss, optimizer.gradients(momentum), session.votes())
        lr = lr_at(config, step)
        optimizer.step(lr, momentum, ok)
        model.after_step()
        flops = about["tokens"] * model.flops_per_token(stage)
        kept = {name: x for name, x in about.items() if name != "tokens"}
        session.after_step(step, about["tokens"], flops, lr, **kept)

        # While the same answers are used again, nothing is saved that could not go on from there
        if step % policy.reuse and step < config.schedule.steps:
            continue
        if session.validation_is_due():
            validate(setup, session, engine, reward)
        if session.is_over():
            break
        if session.checkpoint_is_due():
            session.save()
    session.end()
    reward.close()


def as_it_answers(setup, session):
    """The model as the engine has it: with the same parameters and buffers and, on a CPU, with the
    ops of kernels/decoding.py, where its own are in C as well."""
    model = setup.model
    ops = getattr(model, "ops", None)
    if getattr(ops, "fused", None) is None:
        return model
    # Where run.sh has put it when it installed
    compile_once = functools.partial(Decoding.build, cache_folder(), session.log.say)
    compiled = machine.first_rank_first(setup.world, compile_once)
    if compiled is None:
        return model
    answering = copy.copy(model)
    answering.ops = compiled.ops(ops)
    return answering


def roll_out(setup, step, engine, reward):
    """(this rank's Answers of a step, {name: number} about those of all ranks)."""
    world, policy = setup.world, setup.config.policy
    questions, written = write(setup, step, engine)
    rewards = [reward(c.text, question) for c, question in zip(written, questions)]

    # What each is worth beside the others to the same question, and which ones teach something
    by_question = torch.tensor(rewards, dtype=torch.float64).view(-1, policy.answers)
    gains = advantages(by_question, policy.advantage)
    alike = (by_question == by_question[:, :1]).all(1, keepdim=True).expand_as(gains)
    cut = [c.finish_reason == "length" for c in written]
    kept = []
    for was_cut, is_alike in zip(cut, alike.flatten().tolist()):
        kept.append(not (policy.drop_cut and was_cut or policy.drop_alike and is_alike))

    # Means are over the answers of all ranks
    lengths = [len(c.written) for c in written]
    sums = dict(
        answers=len(written),
        reward=sum(rewards),
        tokens=sum(lengths),
        logprobs=sum(drawn.logprob for c in written for drawn in c.drawn),
        cut=sum(cut),
        alike=int(alike.sum()),
        kept=sum(kept),
        kept_tokens=sum(n for n, keep in zip(lengths, kept) if keep),
        read=sum(len(c.tokens) for c, keep in zip(written, kept) if keep),
    )
    sums = over_ranks(sums, world)
    weights = token_weights(lengths, policy, sums["kept"], sums["kept_tokens"])
    answers = []
    for c, gain, weight, keep in zip(written, gains.flatten().tolist(), weights, kept):
        if keep:
            drawn = [d.logprob for d in c.drawn]
            answers.append(Answer(c.tokens, c.n_prompt, drawn, gain, weight))
    n = sums["answers"]
    about = dict(
        reward=sums["reward"] / n,
        answer_tokens=sums["tokens"] / n,
        cut=sums["cut"] / n,
        alike=sums["alike"] / n,  # their questions teach nothing
        entropy=-sums["logprobs"] / sums["tokens"],  # of a token, by those that were drawn
        tokens=int(sums["read"]),
    )
    return answers, about


def write(setup, step, engine):
    """([Question of each answer, ...], [its Completion, done, ...]): this rank's of a step."""
    policy, train = setup.config.policy, setup.data.train
    n = policy.answers
    there = train.questions(step)
    seeds = grouped(train.seeds(step, n * len(there)), n)
    requests = []
    questions = []
    for i in range(setup.world.rank, len(there), setup.world.size):
        for seed in seeds[i]:
            # Drawn as the model itself has it, as the loss takes it for granted; alternatives: the
            # probabilities are kept
            request = Request(there[i].prompt, policy.answer_tokens, Sampling(), seed)
            requests.append(dataclasses.replace(request, alternatives=0))
            questions.append(there[i])
    engine.clear()  # of what it has made of weights before the last update
    return questions, engine.generate(requests)


def over_ranks(sums, world):
    """{name: number} added up over all ranks."""
    if world.size == 1:
        return sums
    there = torch.tensor(list(sums.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(there)
    return dict(zip(sums, there.tolist()))


def grouped(items, n):
    """Lists of n items in a row."""
    return [items[i : i + n] for i in range(0, len(items), n)]


@torch.no_grad()
def batches_of(setup, answers, reference, stage):
    """Answers as AnswerBatches on the device, with what the reference says of them; one or more."""
    row_len = setup.config.data.row_len
    at_once = max(setup.micro_rows.values())
    rows = rows_of(answers, row_len) or [[]]
    if is_compiled(setup):  # for batches of one shape
        rows += [[]] * (-len(rows) % at_once)
    batches = []
    for some in grouped(rows, at_once):
        batch = answer_batch(some, row_len)
        batch = batch._make(t.to(setup.world.device) for t in batch)
        if reference is not None:
            said = reference(batch.inputs, batch.targets, batch.cu_seqlens, stage)
            batch = batch._replace(reference=said)
        batches.append(batch)
    return batches


def counted(setup):
    """(mean k3, share of tokens that the clip held back) of the passes since the last call, over
    all ranks."""
    sums = setup.forward.take()
    if setup.world.size > 1:
        dist.all_reduce(sums)
    kl, clipped, tokens = sums.tolist()
    return kl / max(1, tokens), clipped / max(1, tokens)


def open_reference(setup, session):
    """log_probs() of the model that the run began with, whose weights its folder keeps. Raises
    InputError where a run that goes on lacks them."""
    path = session.log.folder / "reference.safetensors"
    model = copy.deepcopy(setup.model).requires_grad_(False)
    log_probs = functools.partial(model.log_probs, n_vocab=model.n_vocab)
    if session.at.step == 0:
        if setup.world.rank == 0:
            with whole_file(path) as temp:
                save_file(weights_of(model), temp)
        return log_probs
    if not path.exists():
        raise InputError(
            f"{path}: is gone: expected the weights that this run began with; begin anew with "
            "another --run-dir, or go on with --kl 0"
        )
    fill(model, load_file(path))
    return log_probs


# --------------------------------------------------------------------------------------------------
# Validation


def validate(setup, session, engine, reward):
    """Record what the likeliest answers to the held-out questions are worth; keep the best
    weights."""
    with session.clock_stopped("validation_s"):
        metrics, written = evaluate(setup, engine, reward)
        session.record(metrics)
        for completion, question, worth in written[:SHOWN]:
            asked = question.fields["messages"][-1]["content"]
            session.log.say(
                f"--- a sample after step {session.at.step}\n{asked}\n{completion.text}\n"
                f"(reward {worth:g})\n---",
                quiet=True,
            )
        keep_best(setup, session)


def evaluate(setup, engine, reward):
    """(metrics by name, this rank's [(Completion, Question, reward), ...])."""
    policy, world = setup.config.policy, setup.world
    questions = setup.data.val.of[: policy.val_questions or None]
    own = questions[world.rank :: world.size]
    requests = [Request(q.prompt, policy.answer_tokens, Sampling(temperature=0)) for q in own]
    written = [(c, q, reward(c.text, q)) for c, q in zip(engine.generate(requests), own)]
    sums = dict(
        reward=sum(worth for _, _, worth in written),
        cut=sum(c.finish_reason == "length" for c, _, _ in written),
        tokens=sum(len(c.written) for c, _, _ in written),
    )
    sums = over_ranks(sums, world)
    lacking = len(questions) - sums["reward"]  # of a reward of 1 each: the loss of a validation
    metrics = measure(Evaluation(lacking, len(questions), None, answers=tuple(sums.values())))
    return metrics, written
