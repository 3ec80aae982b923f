"""Questions to learn from by answering them: lines of {"messages": [...]} that end with the user's
turn, with fields beside them that say what a right answer is.

{"messages": [{"role": "user", "content": "12 + 7"}], "answer": "19"}
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from base import InputError, to_json, write_text

from .chat import check_turns, object_of, of_lines, prompt_of, read_messages
from .conversations import WHOLE, digests_of, is_held_out, locate, prepared, with_chat_tokens
from .dataset import Dataset
from .loader import IGNORE, best_fit, pack
from .shapes import question_of_line
from .shards import ShardWriter, read_shard
from .tokenizers import make_tokenizer

EXAMPLE = '{"messages": [{"role": "user", "content": "12 + 7"}], "answer": "19"}'
LAYOUT = 1  # change it when what is written below changes, so old caches are not read


class Question(NamedTuple):
    """A question and what its line says of it."""

    where: str  # file and line
    prompt: tuple  # token ids up to where the answer begins
    fields: dict  # all of the line, messages included


def read_questions(path, left_out=None):
    """Yield (where, messages, fields) of each line of a .jsonl or .parquet file. Raises InputError,
    which names the line; left_out: as of_lines()."""
    return of_lines(path, question, left_out)


def question(line, where):
    """(where, [Message, ...], the line's object). Raises InputError."""
    fields = question_of_line(object_of(line, where, set(), EXAMPLE), where)
    try:
        messages = read_messages(fields["messages"])
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    check_turns(messages, where)
    if messages[-1].role == "assistant":
        raise InputError(
            f"{where}: expected the user's message last, which the model answers, found the "
            "assistant's; a known answer is a field of its own, as in " + EXAMPLE
        )
    return where, messages, fields


# --------------------------------------------------------------------------------------------------
# Preparing


def open_questions(config, cache):
    """The Dataset of a DataConfig's --conversations, prepared under `cache` if that has not been
    done before. Raises InputError."""
    if not config.conversations:
        raise InputError(f"--data {config.data}: expected --conversations with .jsonl files")
    train = locate(config.conversations, cache)
    val = locate([config.val_text] if config.val_text else [], cache)

    def texts():
        for path, left_out in paths_of(train + val):
            for _, messages, _ in read_questions(path, left_out):
                yield from (message.text for message in messages)

    tokenizer = with_chat_tokens(make_tokenizer(config.encoder, texts))
    digests = digests_of(train + val)
    key = [LAYOUT, config.data, len(train), *digests, tokenizer.to_json()]
    fingerprint = hashlib.sha256(to_json(key).encode()).hexdigest()
    folder = Path(cache) / f"{config.data}-{fingerprint[:16]}"
    said = prepared(folder, functools.partial(write_splits, train, val, tokenizer))
    return Dataset(
        name=", ".join(one.name for one in train),
        train=[folder / "train_000000.bin"],
        val=[folder / "val_000000.bin"],
        n_vocab=tokenizer.n_vocab,
        eot=tokenizer.eot,
        fingerprint=fingerprint,
        folder=folder,
        load_tokenizer=lambda: tokenizer,
        notes=[f"{said['train']:,} questions to learn from, {said['val']:,} to validate on"],
        about=said,
        rows="questions",
    )


def paths_of(given):
    """(path, a list for what is left out or None) of all files, as of_lines() takes them."""
    return [(path, [] if one.from_hub else None) for one in given for path in one.paths]


def write_splits(train, val, tokenizer, folder):
    """Write prompts as shards, and lines of [where, tokens of the prompt, fields]; returns {split:
    how many questions}."""
    lines = dict(train=[], val=[])
    shards = dict(shard_tokens=WHOLE, dtype=tokenizer.dtype)
    with (
        ShardWriter(folder, "train", **shards) as train_tokens,
        ShardWriter(folder, "val", **shards) as val_tokens,
        tqdm(desc="reading questions", unit="", delay=2, disable=None) as bar,
    ):
        writers = dict(train=train_tokens, val=val_tokens)
        held_out = [path for one in val for path in one.paths]
        for path, left_out in paths_of(train + val):
            for where, messages, fields in read_questions(path, left_out):
                split = "val" if path in held_out else "train"
                if not val and is_held_out(messages):
                    split = "val"
                prompt = prompt_of(messages, tokenizer)
                writers[split].write(np.asarray(prompt, dtype=tokenizer.dtype))
                lines[split].append(to_json([where, len(prompt), fields]))
                bar.update()
    for split, files, what in (("train", train, "train"), ("val", val or train, "validate")):
        if not lines[split]:
            names = ", ".join(one.name for one in files)
            raise InputError(f"{names}: no question to {what} on; expected more of them")
        write_text(folder / f"{split}.jsonl", "\n".join(lines[split]))
    return {split: len(found) for split, found in lines.items()}


def load_questions(shard, n_vocab):
    """[Question, ...] of a split, by its shard."""
    tokens = read_shard(shard, n_vocab)
    name = shard.name.split("_")[0]
    found = []
    at = 0
    for line in shard.with_name(f"{name}.jsonl").read_text(encoding="utf-8").split("\n"):
        where, n, fields = json.loads(line)
        found.append(Question(where, tuple(tokens[at : at + n].tolist()), fields))
        at += n
    return found


def check_lengths(questions, most):
    """Raises InputError for a question that leaves no room for an answer; most: its tokens."""
    for q in questions:
        if len(q.prompt) > most:
            raise InputError(
                f"{q.where}: the question has {len(q.prompt)} tokens: expected {most} or fewer, so "
                "that an answer fits into the row; raise --row-len and --val-row-len, or lower "
                "--answer-tokens"
            )


# --------------------------------------------------------------------------------------------------
# Loading


class QuestionLoader:
    """Questions for training: those of a step are a pure function of (data, seed, step). Every
    epoch has another order."""

    def __init__(self, questions, per_step, row_len, seed=0):
        """per_step: questions of a step; row_len: tokens in a row of answers."""
        self.of = questions
        self.per_step = per_step
        self.row_len = row_len
        self.n_tokens = sum(len(q.prompt) for q in questions)
        self.reseed(seed)

    def reseed(self, seed):
        """Begin anew in another order."""
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(self.of))
        )

    def questions(self, step):
        """Those of `step`, numbered from 1."""
        if step < 1:
            raise ValueError(f"step {step}: steps are numbered from 1")
        begin = (step - 1) * self.per_step
        found = []
        for place in range(begin, begin + self.per_step):
            epoch, i = divmod(place, len(self.of))
            found.append(self.of[self._order(epoch)[i]])
        return found

    def seeds(self, step, n):
        """n seeds for the answers of `step`."""
        return np.random.default_rng((self.seed, step, n)).integers(2**62, size=n).tolist()

    def n_targets(self, step, tokens):
        """The loss of answers is weighted already."""
        return 1

    def padding(self, step, micro_rows):
        """A batch of padding alone."""
        return answer_batch([[] for _ in range(micro_rows)], self.row_len)


class QuestionValLoader:
    """The questions to validate on, in their order."""

    def __init__(self, questions):
        self.of = questions
        self.n_targets = len(questions)

    def micro_batches(self, rank=0, world_size=1, micro_rows=1, n_rows=None):
        """No batches: the model has to write the answers first."""
        return iter(())


# --------------------------------------------------------------------------------------------------
# Answers, as rows to learn from


class Answer(NamedTuple):
    """An answer to a question, and what is to be learned from it."""

    tokens: list  # ids, the question's before its own
    n_prompt: int  # how many are the question's
    logprobs: list  # log probabilities of its own tokens when they were drawn
    advantage: float  # how much better it is than others to the same question
    weight: float  # of each of its tokens in the loss


class AnswerBatch(NamedTuple):
    """B rows of T tokens that hold whole answers behind their questions.

    inputs, targets, cu_seqlens: as of a MicroBatch, targets are the answers' tokens; old,
    reference, advantage, weight: (B, T) fp32, of each target its log probability when it was drawn
    and by the model that training began with, and its answer's advantage and weight; 0 elsewhere.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor


def rows_of(answers, row_len):
    """Rows of whole answers, each a list of Answers."""
    lengths = [len(answer.tokens) - 1 for answer in answers]  # the last one is only a target
    rows = best_fit(lengths, row_len, documents_in(row_len))
    return [[answers[i] for i in row] for row in rows]


def documents_in(row_len):
    """Answers that a row has borders for."""
    return max(8, row_len // 8)


def answer_batch(rows, row_len):
    """An AnswerBatch of rows, lists of Answers, empty ones for padding."""
    segments = []
    numbers = torch.zeros(4, len(rows), row_len)
    old, _, advantage, weight = numbers
    for r, row in enumerate(rows):
        segments.append([])
        at = 0
        for answer in row:
            tokens = np.asarray(answer.tokens)
            length = len(tokens) - 1
            counts = np.arange(len(tokens)) >= answer.n_prompt
            segments[-1].append((tokens, 0, length, counts))
            own = slice(at + answer.n_prompt - 1, at + length)
            old[r, own] = torch.tensor(answer.logprobs, dtype=torch.float32)
            advantage[r, own] = answer.advantage
            weight[r, own] = answer.weight
            at += length
    packed = pack(segments, row_len, documents_in(row_len), row_len)
    assert packed.targets.ne(IGNORE).sum() == sum(len(a.logprobs) for row in rows for a in row)
    return AnswerBatch(*packed, *numbers)
