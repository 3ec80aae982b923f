"""models/counts.py beside loops over the definition in float64, and as part of a model."""

import math
import types

import numpy as np
import pytest
import torch
from helpers import of_each_length, padded_left, tiny, train_losses, write_text

import train_gpt as tg
from base import InputError
from data import ShardWriter
from models import counts, gpt
from runtime import finish
from runtime.saved import TABLES, load_run
from runtime.steps import val_stage

EOT = 0
N = 4


def documents(tokens):
    """[(first, end)] of a stream in which each begins with EOT."""
    starts = [*np.flatnonzero(np.asarray(tokens) == EOT).tolist(), len(tokens)]
    return list(zip(starts, starts[1:]))


def followers(tokens, n, context):
    """{(token that followed the context, the first place of the document)} by a loop over a
    text."""
    found = set()
    for first, end in documents(tokens):
        for t in range(first, min(end, len(tokens) - 1)):
            begin = t + 1 - (n - 1)
            if begin >= first and tokens[begin : t + 1] == context:
                found.add((tokens[t + 1], first))
    return found


def counted(found, target):
    """(seen, hits, kinds) of followers()."""
    tokens = [token for token, _ in found]
    return len(tokens), tokens.count(target), len(set(tokens))


@pytest.fixture(scope="module")
def text():
    """60 tokens of 4 kinds in documents of about 12."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, 60)
    tokens[[0, 11, 25, 26, 43]] = EOT
    return tokens.tolist()


@pytest.fixture(scope="module")
def shards(text, tmp_path_factory):
    with ShardWriter(tmp_path_factory.mktemp("counts"), "train") as writer:
        writer.write(np.asarray(text))
    return writer.paths


@pytest.fixture(scope="module")
def table(shards):
    return counts.Counts.of_text(shards, EOT, N)


@pytest.fixture(scope="module")
def rows(text):
    """(inputs, targets, starts): the text's own documents, whole, packed into two rows."""
    order = [2, 0, 1]  # 1, 11 and 14 tokens, then the rest
    rows = []
    found = documents(text)
    for of_row in (order, [3]):
        inputs, targets, starts = [], [], []
        for which in of_row:
            first, end = found[which]
            inputs += text[first:end]
            targets += [*text[first + 1 : end], text[end]]
            starts += [True] + [False] * (end - first - 1)
        rows.append((inputs[:17], targets[:17], starts[:17]))
    return [torch.tensor(x) for x in zip(*rows)]


@pytest.mark.parametrize("leave_out", [False, True])
def test_counts_are_those_of_the_definition(text, table, rows, leave_out):
    inputs, targets, starts = rows
    found = torch.stack(table.of_targets(inputs, targets, starts, leave_out), dim=-1)
    some_hit = 0
    for row in range(2):
        for t in range(17):
            begin = starts[row, : t + 1].nonzero()[-1].item()
            later = starts[row, t + 1 :].nonzero()
            end = t + 1 + later[0].item() if len(later) else 17
            of_row = inputs[row, begin:end].tolist(), targets[row, begin:end].tolist()
            for n in range(1, N + 1):
                wanted = (0, 0, 0)
                if t + 1 - begin >= n - 1:
                    context = inputs[row, t + 2 - n : t + 1].tolist()
                    there = followers(text, n, context)
                    if leave_out:  # what followed it in the row's document, there
                        own = [first for first, _ in documents(text) if is_at(text, first, of_row)]
                        there -= {
                            (of_row[1][i], own[0])
                            for i in range(max(0, n - 2), end - begin)
                            if of_row[0][i + 2 - n : i + 1] == context
                        }
                    wanted = counted(there, targets[row, t].item())
                assert found[row, t, n - 1].tolist() == list(wanted), (row, t, n)
                some_hit += n > 2 and wanted[1] > 0
    assert some_hit > 3


def is_at(text, first, of_row):
    """Whether a document that begins there is the row's."""
    inputs, targets = of_row
    n = len(inputs)
    return text[first : first + n] == inputs and text[first + 1 : first + n + 1] == targets


def test_long_documents_count_by_pieces(monkeypatch, text, shards):
    monkeypatch.setattr(counts, "PIECE", 5)
    table = counts.Counts.of_text(shards, EOT, 1)
    pieces = set()
    for first, end in documents(text):
        for t in range(first, min(end, len(text) - 1)):
            pieces.add((first, (t - first) // 5, text[t + 1]))
    assert table.lengths[0].seen.tolist() == [len(pieces)]
    assert len(pieces) > len(followers(text, 1, []))


def test_what_follows_has_every_tokens_counts(text, table):
    """Those of a whole vocabulary are of_targets() with each token as the target, whatever stands
    beside them."""
    texts = [torch.tensor(text[:length]) for length in (1, 2, 3, 9)]
    texts.append(torch.tensor([EOT, 4, 4, 4]))  # contexts that were never there
    followers = counts.Followers(table, padded_left(texts))
    found = of_each_length(followers, len(texts), 5)
    for row, tokens in enumerate(texts):
        starts = tokens[None] == EOT
        for token in range(5):
            targets = torch.cat([tokens[1:], torch.tensor([token])])
            counted = table.of_targets(tokens[None], targets[None], starts, False)
            told, there, probs = (x[0, -1] for x in counts.predictions(*counted))
            torch.testing.assert_close(found[row, token], probs)
            assert torch.equal(followers.told[row], told)
            assert torch.equal(followers.there[row], there)
    assert followers.there[3].all() and not followers.there[4, 1:].any()


@pytest.mark.parametrize("leave_out", [False, True])
def test_targets_that_do_not_count_have_followed_all_the_same(table, rows, leave_out):
    """As those of a question before its answer."""
    inputs, targets, starts = rows
    masked = targets.clone()
    masked[:, 2:9] = -100
    wanted = table.of_targets(inputs, targets, starts, leave_out)
    found = table.of_targets(inputs, masked, starts, leave_out)
    for x, y in zip(wanted, found):
        assert torch.equal(x[masked >= 0], y[masked >= 0])


def test_no_context_reaches_into_another_document(table):
    """Nothing is kept that no look-up finds."""
    for shorter, longer in zip(table.lengths[1:], table.lengths[2:]):
        ends = shorter.follower == EOT
        assert ends.any() and not longer.kinds[ends].any()


def test_nothing_depends_on_what_comes_later(table, rows):
    inputs, targets, starts = rows
    whole = table.of_targets(inputs, targets, starts, False)
    half = table.of_targets(inputs[:, :9], targets[:, :9], starts[:, :9], False)
    for x, y in zip(whole, half):
        assert torch.equal(x[:, :9], y)


def test_smoothed_probabilities_by_hand_and_in_all(text, table):
    """They sum to one, and are the formula's in float64."""
    tokens = torch.tensor(text[:6]).expand(5, -1)
    targets = torch.cat([tokens[:, 1:], torch.arange(5)[:, None]], dim=1)
    counted = table.of_targets(tokens, targets, tokens == EOT, False)
    seen, hits, kinds = (x[:, -1] for x in counted)
    found = counts.probabilities(seen, hits, kinds)
    torch.testing.assert_close(found.sum(0), torch.ones(N))
    for token in range(5):
        p = 0.0
        for i in range(N):
            h, s, k = (float(x[token, i]) for x in (hits, seen, kinds))
            if i == 0:
                p = h / s
            else:
                p = (max(h - 0.75, 0) + 0.75 * k * p) / s
            assert found[token, i].item() == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize("most", [9, 1 << 50, 1 << 62])
def test_numbers_in_order_are_a_stable_sort(most):
    numbers = np.random.default_rng(0).integers(0, most, 3000)
    numbers[1000:2000] = numbers[:1000]
    ordered, order = counts.in_order(numbers)
    assert (order == np.argsort(numbers, kind="stable")).all()
    assert (ordered == numbers[order]).all()


def test_a_text_that_is_not_all_counted(shards, text):
    """Only its first tokens are, and leaving out more than was counted leaves nothing."""
    table = counts.Counts.of_text(shards, EOT, 2, most=20)
    assert table.lengths[0].seen.tolist() == [len(followers(text[:21], 1, []))]
    inputs = torch.tensor([text[:30]])
    targets = torch.tensor([text[1:31]])
    for x in table.of_targets(inputs, targets, inputs == EOT, True):
        assert (x >= 0).all()


def test_of_a_document_that_was_not_counted_nothing_is_left_out(tmp_path):
    """It has something new, which one that was counted cannot have."""
    first = [EOT, 5, 6, 7, 5, 6, 7]
    second = [EOT, 5, 6, 7, 8, 5, 6]
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(np.array([*first, *second, EOT]))
    inputs = torch.tensor([[*first, *second]])
    targets = torch.tensor([[*first[1:], EOT, *second[1:], EOT]])
    starts = inputs == EOT

    def found(most, leave_out):
        table = counts.Counts.of_text(writer.paths, EOT, 2, most=most)
        assert table.in_part == (most == 7)
        return torch.stack(table.of_targets(inputs, targets, starts, leave_out))[:, 0].split(7, 1)

    both = found(7, True)
    assert torch.equal(both[1], found(7, False)[1]) and not torch.equal(both[0], found(7, False)[0])
    # What is left of a first document that is all there is
    assert both[0].sum() == 0 and found(14, True)[0].sum() > 0


def test_tables_make_the_same_counts(table, rows):
    again = counts.Counts(N, table.tables())
    again.own = True
    for x, y in zip(table.of_targets(*rows, True), again.of_targets(*rows, True)):
        assert torch.equal(x, y)
    nothing = counts.Counts(N).of_targets(*rows, False)
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize(
    "name, change",
    [
        ("first.0", lambda x: x[:-1]),
        ("first.1", lambda x: x + 1),
        ("first.2", lambda x: torch.cat([x[:1], x[1:-1].flip(0), x[-1:]])),
        ("first.1", lambda x: x.long()),
        ("follower.1", lambda x: x[:-1]),
        ("count.2", lambda x: x[:, None]),
        ("count.2", lambda x: None),
    ],
)
def test_tables_that_are_not_whole_are_refused(table, name, change):
    tables = table.tables()
    assert counts.Counts.of_tables(N, tables).known
    tables[name] = change(tables[name])
    with pytest.raises(InputError, match=f"counts of {int(name[-1]) + 1} tokens .* not whole"):
        counts.Counts.of_tables(N, tables)


# --- in a model


def gpt_config(**fields):
    return gpt.Config(n_layer=1, n_embd=16, n_head=2, value_embed_layers=(), **fields)


@pytest.fixture(scope="module", params=[dict(counts=3), dict(counts=3, copies=2)])
def model(request, table):
    """Of 64 tokens, so that the head has no padding, with gates that differ."""
    model = gpt.Model(gpt_config(**request.param), 64, 64)
    model.init_weights(0)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.lm_head, model.mix_gates, model.mix_counts:
            p.copy_(torch.randn(p.shape, generator=g))
    assert model.wants_tables()
    model.take_tables(table.tables())
    assert not model.wants_tables()
    return model


@torch.no_grad()
def test_the_loss_is_that_of_the_distributions(model, rows):
    inputs, targets, starts = rows
    cu_seqlens = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([34])]).int()
    stage = model.c.val_stage(model.c.stage(0.0, 17), 17)
    log_prob = model.logits(inputs, cu_seqlens, stage)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 17))
    of_targets = log_prob.gather(-1, targets[..., None])[..., 0]
    loss = model(inputs, targets, cu_seqlens, stage)
    torch.testing.assert_close(loss, -of_targets.sum(), rtol=1e-5, atol=1e-4)
    found = model.log_probs(inputs, targets, cu_seqlens, stage)
    torch.testing.assert_close(found, of_targets, rtol=1e-5, atol=1e-4)
    # In training the rows' own documents are left out, but not when another text is learned
    training = stage._replace(leave_out=True)
    assert model.c.stage(0.0, 17).leave_out
    assert torch.equal(model(inputs, targets, cu_seqlens, training), loss)
    model.counts.own = True
    apart = model(inputs, targets, cu_seqlens, training)
    model.counts.own = False
    assert abs(apart.item() - loss.item()) > 1


def test_the_training_text_is_measured_without_its_own_documents(monkeypatch):
    """train_bpb says what was learned by heart, not what is looked up."""
    config = tg.configure(counts=4, train_eval=100)
    split = types.SimpleNamespace(batches=[types.SimpleNamespace(inputs=torch.zeros(1, 8))])
    asked = []

    def measure(forward, stage, split, world):
        asked.append(stage)
        return dict(val_bpb=1.0)

    monkeypatch.setattr(finish, "of_training_text", lambda *args: split)
    setup = types.SimpleNamespace(
        config=config,
        data=types.SimpleNamespace(val_bytes=1),
        val=split,
        world=tg.World(),
        forward=None,
        measure=measure,
        stages=tg.stages_of(config),
    )
    assert finish.train_bpb(setup, 3) == 1.0
    validation = val_stage(setup, 3)
    assert asked == [validation._replace(leave_out=True)] != [validation]


def test_the_heads_own_loss_has_a_share_in_the_gradient(model, rows):
    inputs, targets, starts = rows
    cu_seqlens = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([34])]).int()
    stage = model.c.val_stage(model.c.stage(0.0, 17), 17)
    learned = [model.lm_head, model.mix_gates, model.embed]
    found = torch.autograd.grad(model(inputs, targets, cu_seqlens, stage), learned)

    x = model.hidden(inputs, cu_seqlens, stage)
    own = torch.log_softmax((x @ model.lm_head.T).float(), -1)
    own = own.gather(-1, targets[..., None]).sum()
    mixture = model.log_probs(inputs, targets, cu_seqlens, stage).sum()
    for a, b, c in zip(
        found,
        torch.autograd.grad(-mixture, learned),
        torch.autograd.grad(-gpt.ALONE * own, learned, allow_unused=True),
    ):
        torch.testing.assert_close(a, b if c is None else b + c, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_with_a_cache_is_the_same(model, text):
    """Token by token, for two rows of different lengths."""
    stage = model.c.val_stage(model.c.stage(0.0, 64), 64)
    texts = [torch.tensor(text[:11]), torch.tensor(text[26:33])]
    cache = model.new_cache(2)
    first = torch.zeros(2, 5, dtype=torch.int64)
    first[0] = texts[0][:5]
    first[1, :3] = texts[1][:3]
    found = [model.decode(first, [5, 3], cache, stage)]
    for i in range(4):
        new = torch.stack([texts[0][5 + i], texts[1][3 + i]])[:, None]
        found.append(model.decode(new, [1, 1], cache, stage))
    for row, (tokens, n) in enumerate(zip(texts, (5, 3))):
        for i, logits in enumerate(found):
            so_far = tokens[None, : n + i]
            cu_seqlens = torch.tensor([0, n + i], dtype=torch.int32)
            wanted = model.logits(so_far, cu_seqlens, stage, last_only=True)[0, 0]
            torch.testing.assert_close(logits[row], wanted, rtol=1e-4, atol=1e-4)


def test_a_run_keeps_its_counts_and_goes_on_with_them(tmp_path):
    """A text that repeats itself is predicted from the first steps on. The folder has what it takes
    to say so, and a stopped run goes on as if it had not been."""
    text = write_text(tmp_path / "text", 20000)
    fields = dict(steps=6, adam_lr=0.02)
    alone = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "alone"), **fields))
    fields |= dict(counts=3, checkpoint_every="3")
    whole = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "whole"), **fields))
    assert whole["val_loss"] < alone["val_loss"] - 0.3
    half = fields | dict(max_time="0.000001s")
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "parts"), **half))
    (tmp_path / "parts" / "result.json").unlink()
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "parts"), resume="auto", **fields))
    assert train_losses(tmp_path / "parts") == train_losses(tmp_path / "whole")

    saved = load_run(tmp_path / "whole")
    assert saved.model.counts.known and math.isfinite(saved.model.counts.lengths[2].seen.sum())
    (tmp_path / "whole" / TABLES).unlink()
    with pytest.raises(InputError, match=TABLES):
        load_run(tmp_path / "whole")


def test_several_targets_are_refused():
    with pytest.raises(InputError, match="counts"):
        gpt.Config(counts=2, mtp=(2, 1))
