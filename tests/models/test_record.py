"""The model beside the public record's own, from a user's checkout: it begins alike, and with the
same weights it computes the same.

STOPWATCH_MODDED names a checkout of github.com/KellerJordan/modded-nanogpt that has commit f411b3d3
(record #89); without it these tests are skipped. The record runs on a CPU in float32 and smaller,
without DC, by benchmarks/parity.
"""

import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch

import train_gpt as tg
from kernels import choose_ops
from models import gpt, mudd

record = pytest.importorskip("benchmarks.parity.record")

pytestmark = pytest.mark.slow

COMMIT = "f411b3d3"
VOCABULARY = 256
WIDTH = 192
HEADS = 6
TOKENS = 64  # of one document
# Rows of the record's matrices: of the last layer, behind it, and of gates by layer
LAST = (
    "values_x0 values_late values_x mix_x0 mix_late mix_x value_gate value_gate stream attn x0 "
    "ngrams mlp_stream mlp"
).split()
BEHIND = "x0 late last value early".split()
BEFORE = [("xsa", 1)] * 6 + [("xsa", 3)] * 6 + [("out", 3)] * 6
LATER = [("xsa", 4)] * 6 + [("xsa", 7)] * 6 + [("out", 10)] * 6
for layer in range(10):
    if layer != 6:
        (BEFORE if layer < 4 else LATER).extend([("x0", layer), ("ngrams", layer)])
LATER.append(("skip", 6))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """model: the record's, as it begins; first: its parameters then; windows and scale of attention
    in its first stage, and what its forward pass takes for a stage."""
    if "STOPWATCH_MODDED" not in os.environ:
        pytest.skip("STOPWATCH_MODDED names no checkout of the record")
    checkout = record.Checkout.read(os.environ["STOPWATCH_MODDED"], COMMIT)
    shape = record.Shape(
        width=WIDTH,
        n_vocab=VOCABULARY,
        eot=0,
        shrink=16,
        rows=1,
        steps=20,
        extension=1,
        eval_every=10,
        val_tokens=1024,
        val_row_len=256,
    )
    folder = tmp_path_factory.mktemp("record")
    run = record.Run(checkout, shape, folder, [bytes([i]) for i in range(VOCABULARY)])
    torch.manual_seed(0)
    with record.surroundings(checkout.sources, folder):
        run.execute(before="initial_state")
        model = run.names["model"].eval()
        manager = run.names["training_manager"]
        manager.advance_schedule(0)
        stage = manager.get_forward_args()
        first = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.bigram_sign_table.fill_(1)
        yield SimpleNamespace(
            model=model,
            first=first,
            stage=stage,
            windows=(int(stage.ws_short), int(stage.ws_long)),
            scale=model.yarn.attn_scale,
        )


def our_model(rows):
    """gpt2-small's, as narrow, without signs, of which the record has others."""
    options = f"--track gpt2-small --n-embd {WIDTH} --ngram-rows {rows} --no-ngram-signs"
    c = tg.parse_args(options.split()).model
    return gpt.Model(c, VOCABULARY, 256, torch.float32, choose_ops("cpu"))


def stacked(parts, names, w, b):
    """Rows of the record's w (n, HIDDEN) and b (n,) for our parts, in our order."""
    rows = []
    for part in parts:
        places = [i for i, name in enumerate(names) if name in ((part.name, part.layer), part.name)]
        assert len(places) == part.size
        rows += places
    return torch.cat([w[rows], b[rows][:, None]], dim=1)


def translated(R, c):
    """{our name: tensor} of the record's parameters. Its rotary pairs are neighbours, ours half a
    head apart."""
    D = WIDTH // HEADS
    turning = torch.arange(D // 2).view(-1, 2).T  # of each pair, by frequency
    still = turning + D // 2
    dims = torch.cat([turning[0], still[0], turning[1], still[1]])
    qk = R["qk_bank"].view(10, 2, HEADS, D, WIDTH)[:, :, :, dims].reshape(10, 2, WIDTH, WIDTH)
    vo = R["vo_bank"].view(10, 2, WIDTH, WIDTH)
    last, behind = mudd.last_parts(c), mudd.behind_parts(c)
    before, later = mudd.gate_parts(c)
    mixes = R["mudd_w2"], R["mudd_b2"]
    gates = R["mudd_gate_w2"], R["mudd_gate_b2"]
    return dict(
        embed=R["embed.weight"],
        lm_head=R["lm_head.weight"].T,
        value_embeds=R["value_embeds"].view(5, -1, WIDTH),
        ngram_embeds=R["bigram_embed.weight"][None],
        attn_bank=torch.cat([qk, vo], dim=1).flatten(0, 1),
        mlp_bank=R["mlp_bank"].flatten(0, 1)[:22],
        value_gates=R["ve_gate_bank"][:4],
        smear_gate=R["smear_gate.weight"],
        qkvo_scales=R["scalars"][:22].view(11, 2)[c.attn_layers],
        scalars=torch.stack([*R["scalars"][22:24], torch.tensor(-0.5)]),
        residual_lambdas=R["resid_lambdas"],
        post_lambdas=R["post_lambdas"],
        mudd_in=R["mudd_w1"],
        mudd_out=torch.cat(
            [
                stacked(last, LAST, *(x[0] for x in mixes)),
                stacked(behind, BEHIND, *(x[1] for x in mixes)),
            ]
        ),
        mudd_gate_in=R["mudd_gate_w1"],
        mudd_gate_out=torch.cat(
            [
                stacked(before, BEFORE, *(x[0] for x in gates)),
                stacked(later, LATER, *(x[1] for x in gates)),
            ]
        ),
        mudd_gate_scale=R["_mudd_gate_scale"].expand(2, 1),
    )


def test_it_begins_like_the_record(theirs):
    """Numbers are the same, random ones as large; all else is at zero in both."""
    ours = our_model(len(theirs.first["bigram_embed.weight"]))
    ours.init_weights(0)
    expected = translated(theirs.first, ours.c)
    params = {name: p.detach() for name, p in ours.named_parameters() if p.numel()}
    assert params.keys() == expected.keys()
    drawn = {"lm_head", "value_embeds", "attn_bank", "mlp_bank", "mudd_in", "mudd_gate_in"}
    for name, p in params.items():
        assert p.shape == expected[name].shape, name
        if name in drawn:
            assert p.std().item() == pytest.approx(expected[name].std().item(), rel=0.02), name
        elif name != "embed":  # which is the head until it is untied
            torch.testing.assert_close(p, expected[name], msg=name)


@pytest.mark.parametrize("pairs", [False, True])
@torch.no_grad()
def test_it_computes_what_the_record_does(theirs, pairs):
    """Losses of one document, with random weights everywhere."""
    model = theirs.model
    ours = our_model(len(theirs.first["bigram_embed.weight"]))
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        size = 0.03 if "bank" in name else 0.1
        p.copy_(theirs.first[name] + size * torch.randn(p.shape, generator=g))
    R = {name: p.detach() for name, p in model.named_parameters()}
    for name, x in translated(R, ours.c).items():
        ours.get_parameter(name).copy_(x)
    c = ours.c
    if pairs:
        ours.ops = with_the_records_turns(ours.ops)
    else:
        c = ours.c = dataclasses.replace(c, paired_layers=())
    model.paired_head_layers = list(c.paired_layers)

    tokens = torch.randint(1, VOCABULARY, (TOKENS + 1,), generator=g)
    inputs, targets = tokens[:-1], tokens[1:]
    before = torch.cat([torch.zeros(1, dtype=torch.int64), inputs[:-1]])
    rows = (inputs * (VOCABULARY | 1) + before) % c.ngram_rows
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32)
    expected = model(inputs, targets, cu_seqlens, rows, theirs.stage)

    stage = c.val_stage(c.stage(0.99, TOKENS), TOKENS)
    stage = stage._replace(windows=c.windows(*theirs.windows), attn_scale=theirs.scale)
    stage = stage._replace(by_buffers=False)
    found = -ours.log_probs(inputs[None], targets[None], cu_seqlens, stage)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def with_the_records_turns(ops):
    """In the record's pairs, heads h and h + 3, the second head is at the later position if h is
    even, at the earlier one if it is odd. Ours has it later everywhere."""
    plain = ops.qk_norm_rope

    def qk_norm_rope(qkv, cos, sin):
        found = plain(qkv, cos, sin)
        if qkv.size(1) == TOKENS:
            return found
        turned = torch.arange(len(cos)).view(-1, 2).flip(1).flatten()
        odd = torch.arange(HEADS // 2)[:, None] % 2 == 1  # (H / 2, 1)
        others = plain(qkv, cos[turned], sin[turned])
        return [torch.where(odd, b, a) for a, b in zip(found, others)]

    return ops.replace(qk_norm_rope=qk_norm_rope)
