"""Losses over pairs are trl's, of the same model on the same pairs, to 1e-5.

trl's own code computes them from rows of one answer each; ours from packed rows. Seen with trl
1.16.0. What differs by design is said where it does.
"""

import collections
import json
import types

import pytest
import torch

from data.chat import read_pairs, render_pair
from data.config import DataConfig
from data.conversations import with_chat_tokens
from data.dataset import open_data
from data.tokenizers import make_tokenizer
from models import llama
from runtime.preferences import PairLoss, TeachingConfig

pytestmark = pytest.mark.slow

BETA = 0.3
GAMMA = 0.4
SFT_WEIGHT = 0.2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(a file of pairs, the Data of it)."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for i in range(40):
        chosen, rejected = f"{i} red", f"it is {i} blue " + "x" * (i % 7)
        lines.append(json.dumps(dict(prompt=f"{i}?", chosen=chosen, rejected=rejected)))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    (folder / "val.jsonl").write_text("\n".join(lines[:6]))
    fields = dict(
        row_len=192, val_row_len=192, tokenizer="bytes", val_text=str(folder / "val.jsonl")
    )
    config = DataConfig(data="preferences", conversations=(str(path),), **fields)
    rows = dict(batch_rows=lambda step: 4, max_doc_len=lambda step: 192)
    return path, open_data(config, folder / "cache", **rows)


def make(seed, n_vocab):
    """A model whose answers have clearly different probabilities."""
    config = llama.Config(n_layer=2, n_embd=32, n_head=2, head_dim=16, ffn_dim=64)
    model = llama.Model(config, n_vocab, 192)
    model.n_vocab = len(model.embed)  # logits of all rows, as the loss has them
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0 * p if "norm" in name else 0.15 * torch.randn(p.shape, generator=g))
    return model, config.val_stage(config.stage(0.0, 192), 192)


@pytest.fixture(scope="module")
def both(pairs):
    """(ours by kind, trl's batch): losses of the validation split as we have them, and tensors as
    trl's collator makes them, with what the model and the reference say."""
    path, data = pairs
    model, stage = make(0, data.dataset.n_vocab)
    reference, _ = make(1, data.dataset.n_vocab)
    tokenizer = with_chat_tokens(make_tokenizer("bytes", None))
    val = data.val.of
    with torch.no_grad():
        config = TeachingConfig(preference="dpo")
        rows = val.packed(range(len(val)))
        found = []
        for row in rows:
            *tensors, there = val.batch([row])
            sums, lengths = PairLoss(reference, config).answers(*tensors, len(there), stage)
            found.append(sums[lengths[:, 0] > 0])
        places = torch.tensor(sum(rows, [])).argsort()  # of the pairs in their order
        val.reference = torch.cat(found)[places]
        ours = {}
        for kind in ("dpo", "kto", "simpo", "orpo"):
            config = TeachingConfig(preference=kind, beta=BETA, gamma=GAMMA)
            batch = val.batch(rows)  # all in one pass
            losses, _, there = PairLoss(model, config).losses(*batch, stage)
            ours[kind] = losses[there][places]
        config = TeachingConfig(preference="dpo", beta=BETA, sft_weight=SFT_WEIGHT)
        losses, _, there = PairLoss(model, config).losses(*batch, stage)
        ours["dpo and sft"] = losses[there][places]

        # Rows of one answer each: the chosen ones, then the rejected ones
        ids, masks = [], []
        for side in (0, 1):
            for pair in read_pairs(path.with_name("val.jsonl")):
                tokens, counts = render_pair(pair, tokenizer)
                second = (tokens == tokenizer.eot).nonzero()[0][1]
                part = slice(second, None) if side else slice(0, second)
                ids.append(torch.from_numpy(tokens[part].astype("int64")))
                masks.append(torch.from_numpy(counts[part]))
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        masks = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).long()
        said = [logps(m, stage, ids, masks) for m in (model, reference)]
    return ours, types.SimpleNamespace(ids=ids, mask=masks, logps=said[0], reference=said[1])


def logps(model, stage, ids, mask):
    """(B, T - 1) log probabilities of the tokens that are masked in, 0 elsewhere: row by row."""
    found = []
    for row, counts in zip(ids, mask):
        whole = torch.tensor([0, len(row)], dtype=torch.int32)
        said = model.logits(row[None], whole, stage)[0, :-1].log_softmax(-1)
        found.append(said.gather(1, row[1:, None])[:, 0] * counts[1:])
    return torch.stack(found)


def trainer(batch, **fields):
    """What trl's methods ask of their trainer."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return types.SimpleNamespace(
        model=torch.nn.Module().eval(),
        accelerator=accelerator,
        args=None,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        label_smoothing=0.0,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def answering(log_probs):
    """A model that says this, with what trl logs beside it."""
    zeros = torch.zeros_like(log_probs)
    return lambda **_: types.SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def same(ours, theirs, factor=1.0):
    assert ours.std() > 1e-3  # they tell pairs apart
    assert ours.mean().item() == pytest.approx(factor * theirs.item(), abs=1e-5)


@pytest.mark.parametrize(
    "name, kinds", [("dpo", {"sigmoid": 1.0}), ("dpo and sft", {"sigmoid": 1.0, "sft": SFT_WEIGHT})]
)
def test_dpo(name, kinds, both):
    """The likelihood is a mean over an answer's tokens, then over answers; trl's is over all
    tokens. The chosen answers here are of one length."""
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    ours, batch = both
    chosen, rejected = batch.reference.sum(1).chunk(2)
    inputs = dict(input_ids=batch.ids, completion_mask=batch.mask, attention_mask=batch.mask)
    inputs |= dict(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    kind = dict(loss_types=list(kinds), loss_weights=list(kinds.values()))
    kind |= dict(f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False)
    self = trainer(batch, **kind)
    model = answering(batch.logps)
    same(ours[name], module.DPOTrainer._compute_loss(self, model, inputs, False))


def test_kto(both):
    """z is the mean over the same answers here; trl takes it of answers to other questions, for
    which it is handed these. A pair is two of its examples."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    ours, batch = both
    n = len(batch.ids) // 2
    inputs = dict(input_ids=batch.ids, completion_mask=batch.mask, attention_mask=batch.mask)
    inputs |= dict(label=torch.arange(2 * n) < n, ref_logps=batch.reference.sum(1))
    inputs |= dict(ref_KL_logps=batch.reference.sum(1))
    kind = dict(loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0, calculate_KL=True)
    self = trainer(batch, **kind)
    self._compute_kl_logps = lambda model, batch_: batch.logps.sum(1)
    theirs = module.KTOTrainer._compute_loss(self, answering(batch.logps), inputs, False)
    same(ours["kto"], theirs, factor=2)


def means(batch):
    return (batch.logps.sum(1) / batch.mask[:, 1:].sum(1)).chunk(2)


def test_simpo(both):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    ours, batch = both
    self = trainer(batch, loss_type="simpo", simpo_gamma=GAMMA, alpha=0.0)
    losses, *_ = module.CPOTrainer.cpo_loss(self, *means(batch))
    same(ours["simpo"], losses.mean())
    assert (ours["simpo"] - losses).abs().max() < 1e-5


def test_orpo(both):
    """The likelihood is of the chosen answer; trl's is of its question as well."""
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    ours, batch = both
    losses, *_ = module.ORPOTrainer.odds_ratio_loss(trainer(batch), *means(batch))
    theirs = -means(batch)[0] - losses
    same(ours["orpo"], theirs.mean())
    assert (ours["orpo"] - theirs).abs().max() < 1e-5
