"""The record's code on a CPU: what its CUDA-only calls mean, which checkouts are refused, and a
made-up checkout trained beside ours. MODDED_NANOGPT names a real one for the slow tests."""

import json
import math
import os
import subprocess
import textwrap
import types

import numpy as np
import pytest
import torch
from parity_at_small import SHAPE, made_up_source

from base import InputError
from benchmarks import __main__ as door
from benchmarks import parity, subject
from benchmarks.parity import record, stand_ins, task
from data import ShardWriter, read_shard

# --- what CUDA-only calls mean


def plain_attention(q, k, v, starts, window, scale):
    """Token by token."""
    y = torch.zeros_like(q)
    for t in range(len(q)):
        first = max(max(s for s in starts if s <= t), t - window)
        scores = torch.einsum("hd,khd->hk", q[t], k[first : t + 1]) * scale
        y[t] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[first : t + 1])
    return y


@pytest.mark.parametrize("window", [0, 3, 7, 100])
def test_attention_sees_its_document_and_window(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 48, 2, 8).unbind(0)
    starts = [0, 5, 6, 31]
    seqlens = torch.tensor([*starts, 48, 48, 48], dtype=torch.int32)
    y = stand_ins.attention_of_documents(
        q,
        k,
        v,
        cu_seqlens_q=seqlens,
        cu_seqlens_k=seqlens,
        max_seqlen_q=48,
        max_seqlen_k=48,
        causal=True,
        softmax_scale=0.3,
        window_size=(window, 0),
    )
    torch.testing.assert_close(y, plain_attention(q, k, v, starts, window, 0.3))


def test_attention_that_is_not_causal_is_refused():
    with pytest.raises(InputError, match="not causal"):
        stand_ins.attention_of_documents(
            None,
            None,
            None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=1,
            max_seqlen_k=1,
            causal=False,
            softmax_scale=1.0,
            window_size=(1, 0),
        )


def test_products_of_the_optimizer():
    torch.manual_seed(0)
    X = torch.randn(3, 4, 6)
    A = torch.empty(3, 4, 4)
    stand_ins.symmetric(X, out=A)
    torch.testing.assert_close(A, torch.stack([x @ x.T for x in X]))
    columns = torch.empty(3, 6, 6)
    stand_ins.symmetric_of_columns(X, out=columns)
    torch.testing.assert_close(columns, torch.stack([x.T @ x for x in X]))
    B = torch.empty_like(A)
    stand_ins.quadratic(A, alpha=2.0, beta=-3.0, out=B)
    torch.testing.assert_close(B, torch.stack([-3.0 * a + 2.0 * a @ a for a in A]))
    src, dst = torch.randn(2, 3), torch.ones(3, 2)
    stand_ins.transpose_add(src, dst)
    torch.testing.assert_close(dst, 1 + src.T)
    stand_ins.transpose_copy(src, dst)
    torch.testing.assert_close(dst, src.T)


def test_updates_of_float32_are_those_of_shorter_floats_with_their_lost_bits():
    """The record keeps the upper 16 bits as bfloat16 and the others beside: by its layout."""
    torch.manual_seed(0)
    w = torch.randn(5, 7)
    update = torch.randn(5, 7)
    expected = w.clone()
    for i in range(5):
        for j in range(7):
            decay = 0.5 * w[i, j] if w[i, j] * update[i, j] >= 0 else 0.0
            expected[i, j] = w[i, j] - 0.1 * (update[i, j] + decay)
    decay, lr = torch.tensor(0.5), torch.tensor(0.1)
    stand_ins.cautious_update(w.view(torch.uint16), None, update, decay, lr)
    torch.testing.assert_close(w, expected)


def test_relu_squared():
    torch.manual_seed(0)
    x, up, down = torch.randn(1, 3, 4), torch.randn(6, 4), torch.randn(6, 4)
    y = stand_ins.ReLUSquared.apply(x, up, down, "scales", None)
    torch.testing.assert_close(y, (x @ up.T).clamp(min=0) ** 2 @ down)


def kernel(x, head, targets, weights, prefixes, prefix_weight):
    """Losses and gradient of the logits, number by number, as the record's kernel has them."""
    logits = (x @ head).double()
    N, V = logits.shape
    losses, grads = torch.zeros(N), torch.zeros(N, V)
    for i in range(N):
        s = torch.sigmoid((logits[i] + 5) / 7.5)
        z = 23 * s
        log_sum = z.logsumexp(0)
        p = (z - log_sum).exp()
        wanted = [(targets[i + k], w) for k, w in enumerate(weights) if i + k < N]
        total = sum(weights)
        if prefixes is not None and prefixes[i] >= 0:
            wanted.append((prefixes[i], prefix_weight))
            total = total + prefix_weight
        grad = total * p
        for target, w in wanted:
            losses[i] += w * (log_sum - z[target])
            grad[target] -= w
        grads[i] = grad * 23 / 7.5 * s * (1 - s)
    return losses, grads


@pytest.mark.parametrize("with_prefix", [False, True])
def test_the_loss_and_its_gradient_are_the_kernels(with_prefix):
    torch.manual_seed(0)
    x = torch.randn(6, 4, requires_grad=True)
    head = torch.randn(4, 9, requires_grad=True)
    targets = torch.tensor([1, 2, 2, 8, 0, 3])
    weights = torch.tensor([1.0, 0.5, 0.25])
    more = (torch.tensor([2, -1, 2, 0, -1, 7]), torch.tensor([0.25])) if with_prefix else ()
    scales = (1.0, 1.0, 1.0, 0.125)  # of 8-bit floats, and the gradient's
    loss = stand_ins.CrossEntropy.apply(x, targets, weights, *more, head, *scales)
    prefixes, weight = more or (None, [None])
    losses, grads = kernel(x, head, targets, weights, prefixes, weight[0])
    torch.testing.assert_close(loss, losses)
    (loss.sum() * 0.125).backward()
    torch.testing.assert_close(x.grad, 0.125 * grads @ head.detach().T)
    torch.testing.assert_close(head.grad, 0.125 * x.detach().T @ grads)


def test_a_loss_with_other_arguments_is_refused():
    with pytest.raises(InputError, match="takes 6 arguments"):
        stand_ins.CrossEntropy.apply(None, None, None, 1, 2, 3)


def test_mix_of_attention_maps():
    torch.manual_seed(0)
    T, H, D = 20, 3, 4
    q, k, v, y = torch.randn(4, T, H, D).unbind(0)
    w1, w2 = torch.randn(2, 1, T, H).unbind(0)
    seqlens = torch.tensor([0, 9, 20, 20], dtype=torch.int32)
    found = stand_ins.mix_of_maps(
        y,
        q[None],
        k[None],
        v[None],
        (w1, w2),
        None,
        scaling=0.5,
        window=16,
        seq_lens=seqlens,
        shrink=4,
    )
    expected = y.clone()
    for t in range(T):
        first = max(0 if t < 9 else 9, t - 3)  # four keys with its own
        scores = torch.einsum("hd,khd->hk", q[t], k[first : t + 1]) * 0.5
        mixed = w1[0, t] @ scores.softmax(-1)
        for h in range(H):
            expected[t, h] += w2[0, t, h] * (mixed @ v[first : t + 1, h])
    torch.testing.assert_close(found, expected)


def test_cuda_is_the_cpu_and_short_floats_are_float32():
    with stand_ins.InFloat32():
        x = torch.ones(4, device="cuda:0", dtype=torch.bfloat16)
        assert (x.device.type, x.dtype) == ("cpu", torch.float32)
        assert x.to(torch.float8_e4m3fn).dtype == x.bfloat16().dtype == torch.float32
        assert x.to(device=torch.device("cuda", 0), dtype=torch.int64).dtype == torch.int64
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
        x = torch.arange(6.0)
        x[1:] = x[:-1]  # read before it is written
        assert x.tolist() == [0, 0, 1, 2, 3, 4]
    assert torch.ones(1).bfloat16().dtype == torch.bfloat16


def test_what_has_no_meaning_here_is_refused_by_name():
    found = stand_ins.modules([b"a"])
    with pytest.raises(InputError, match=r"torch\.cuda\.graph"):
        found["torch"].cuda.graph()
    with pytest.raises(InputError, match=r"triton_kernels\.other"):
        exec(
            "from triton_kernels import other",
            dict(__builtins__=dict(__import__=stand_ins.importer(found, __import__))),
        )


# --- checkouts

# Made up: a model of two embeddings with attention and an MLP in between. It uses what parity
# gives a meaning to, by the names that it knows
SCRIPT = """
    import glob
    import math
    import os
    import sys
    from dataclasses import dataclass
    with open(sys.argv[0]) as f:
        code = f.read()
    import torch
    import triton
    import tiktoken
    torch.empty(1, device=f"cuda:{os.environ['LOCAL_RANK']}", requires_grad=True).backward()
    import torch._dynamo as dynamo
    import torch.distributed as dist
    import torch.nn.functional as F
    from kernels import get_kernel
    from torch import nn
    from triton_kernels import XXT, FusedLinearReLUSquareFunction, FusedSoftcappedCrossEntropy

    dynamo.config.recompile_limit = 64
    world_size = int(os.environ["WORLD_SIZE"])
    grad_accum_steps = 8 // world_size
    grad_scale = 1 / grad_accum_steps
    assert torch.cuda.is_available()
    device = torch.device("cuda", 0)
    dist.init_process_group(backend="nccl", device_id=device)
    flash = get_kernel("flash", version=1).flash_attn_interface

    class NorMuonAndAdam:
        def __init__(self, params):
            self.params = list(params)
            self.lr = torch.tensor(0.02)

        @staticmethod
        @torch.compile(dynamic=False)
        def _cautious_wd_and_update_inplace(p, mantissa, grad, wd, lr):
            raise NotImplementedError

        @torch.no_grad()
        def step(self, momentum):
            for p in self.params:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim == 2 and p.shape[0] <= p.shape[1]:
                    A = torch.empty(len(g), len(g))
                    XXT(g, out=A)
                    g = g / (A.trace() + 1e-12).sqrt() * 10
                else:
                    g = g / (g.norm() + 1e-12) * 10
                self._cautious_wd_and_update_inplace(
                    p.view(torch.uint16), None, g, torch.tensor(0.01), self.lr)
                p.grad = None

    class Yarn(nn.Module):
        def __init__(self, head_dim):
            super().__init__()
            self.reset()

        def reset(self):
            self.attn_scale = 0.1

    @dataclass(slots=True)
    class Hyperparameters:
        train_files: str = "train"
        val_files: str = "val"
        val_tokens: int = 10485760
        val_batch_size: int = 2097152
        num_scheduled_iterations: int = 1270
        num_extension_iterations: int = 15
        val_loss_every: int = 250
        save_checkpoint: bool = False
        run_evals: bool = False
        bigram_vocab_size: int = 50304 * 5

    args = Hyperparameters()
    BOS_ID = 50256
    TRAIN_MAX_NUM_DOCS = {16384: 64}

    class GPT(nn.Module):
        def __init__(self, vocab_size, num_layers, num_heads, head_dim, model_dim, max_seq_len):
            super().__init__()
            self.heads = num_heads
            self.embed = nn.Embedding(vocab_size, model_dim)
            self.bigrams = nn.Embedding(args.bigram_vocab_size, model_dim)
            self.qkv = nn.Parameter(torch.randn(3 * model_dim, model_dim) * model_dim ** -0.5)
            self.up = nn.Parameter(torch.randn(4 * model_dim, model_dim) * model_dim ** -0.5)
            self.down = nn.Parameter(torch.zeros(4 * model_dim, model_dim))
            self.head = nn.Parameter(torch.zeros(model_dim, vocab_size, dtype=torch.bfloat16))
            self.yarn = Yarn(head_dim)
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
            self.register_buffer("prefix", torch.tensor(
                [ranks.get(b[:-1], -1) for b in ranks] + [-1]))

        def forward(self, inputs, targets, seqlens, stage, window):
            x = self.embed(inputs)
            x = x + self.bigrams((inputs * 31 + inputs.roll(1)) % args.bigram_vocab_size)
            qkv = F.linear(F.rms_norm(x, (x.size(-1),)), self.qkv)
            q, k, v = qkv.view(len(x), 3 * self.heads, -1).chunk(3, dim=-2)
            k = F.rms_norm(k, (k.size(-1),))
            k[1:] = k[:-1]
            y = flash.flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=seqlens, cu_seqlens_k=seqlens, max_seqlen_q=len(x),
                max_seqlen_k=len(x), causal=True, softmax_scale=self.yarn.attn_scale,
                window_size=(window, 0))
            x = x + y.flatten(1)
            x = x + FusedLinearReLUSquareFunction.apply(
                F.rms_norm(x, (x.size(-1),)), self.up, self.down)
            x = F.rms_norm(x, (x.size(-1),))
            if self.training:
                weights = torch.tensor([1.0, 0.5], device=device)
                return FusedSoftcappedCrossEntropy.apply(
                    x, targets, weights, self.prefix[targets], torch.tensor([0.25]), self.head,
                    1.0, 1.0, 1.0, grad_scale)
            logits = 23 * torch.sigmoid((x @ self.head + 5) / 7.5)
            return F.cross_entropy(logits, targets, reduction="none")

    def rows(pattern, tokens):
        found = []
        for file in sorted(glob.glob(pattern)):
            found.append(torch.from_file(file, False, os.path.getsize(file) // 2,
                                         dtype=torch.uint16)[512:].long())
        found = torch.cat(found)
        for at in range(0, len(found) - tokens - 1, tokens):
            inputs = found[at : at + tokens]
            starts = (inputs == BOS_ID).nonzero()[:, 0].tolist()
            seqlens = torch.full((TRAIN_MAX_NUM_DOCS.get(tokens, 1),), tokens, dtype=torch.int32)
            seqlens[0] = 0
            seqlens[1 : 1 + len(starts)] = torch.tensor(starts, dtype=torch.int32)
            yield (inputs.to(device="cuda", non_blocking=True),
                   found[at + 1 : at + tokens + 1].cuda(), seqlens)

    @dataclass
    class Stage:
        batch_size: int
        train_max_seq_len: int
        window: int = 1

    TRAINING_STAGES = [Stage(131072, 896), Stage(262144, 2048)]

    def get_muon_momentum(step, muon_warmup_steps=300, muon_cooldown_steps=50):
        return min(1.0, step / muon_warmup_steps)

    class TrainingManager:
        def __init__(self, model):
            self.block_size = 128
            self.optimizer = NorMuonAndAdam(model.parameters())

    def print0(text, console=False):
        if console:
            print(text)

    def nvidia_smi():
        import subprocess
        return subprocess.run(["no-such-program"])
    nvidia_smi()

    model: nn.Module = GPT(vocab_size=50257, num_layers=11, num_heads=6, head_dim=128,
                           model_dim=768, max_seq_len=4).cuda()
    for param in model.parameters():
        dist.broadcast(param.detach(), 0)
    model = torch.compile(model, dynamic=False)
    training_manager = TrainingManager(model)
    warmup_steps = [0, 1]
    for step in warmup_steps:
        raise RuntimeError("compiling takes long")
    train_steps = args.num_scheduled_iterations + args.num_extension_iterations
    stage = TRAINING_STAGES[0]
    loader = rows(args.train_files, stage.batch_size // grad_accum_steps)
    momenta = []
    for step in range(train_steps + 1):
        if step % args.val_loss_every == 0 or step == train_steps:
            model.eval()
            val_loss = 0
            val = rows(args.val_files, args.val_batch_size // grad_accum_steps)
            val_steps = grad_accum_steps * args.val_tokens // args.val_batch_size
            with torch.no_grad():
                for _ in range(val_steps):
                    val_loss += model(*next(val), stage, training_manager.block_size).mean()
            val_loss /= val_steps
            dist.reduce(val_loss, 0, op=dist.ReduceOp.AVG)
            print0(f"step:{step}/{train_steps} val_loss:{val_loss:.1f}", console=True)
            model.train()
        if step == train_steps:
            break
        for _ in range(grad_accum_steps):
            loss = model(*next(loader), stage, training_manager.block_size).sum() * grad_scale
            loss.backward()
        gradient = model.head.grad.clone()
        training_manager.optimizer.step(get_muon_momentum(step))
        momenta.append(get_muon_momentum(step))
    dist.destroy_process_group()
"""


def commit(folder, script=SCRIPT, kernels="# made up\n", name="first"):
    """A git repository with these files; returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt.py").write_text(textwrap.dedent(script))
    if kernels is not None:
        (folder / "triton_kernels.py").write_text(kernels)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", name], check=True)
    return folder


@pytest.fixture
def tokens(tmp_path):
    """Folder of shards in which each token follows from the one before."""
    folder = tmp_path / "tokens"
    for name, size in ("train_0", 60_000), ("train_1", 40), ("val", 2048):
        with ShardWriter(folder, name) as writer:
            stream = np.arange(size) * 5 % 61
            stream[::97] = SHAPE.eot
            writer.write(stream)
    return folder


BYTES = [bytes([i]) for i in range(62)] + [bytes([0, 1])]


def test_a_made_up_checkout_learns(tmp_path, tokens):
    checkout = record.Checkout.read(commit(tmp_path / "made-up"), oldest="HEAD")
    before = dict(os.environ), os.getcwd()
    runs = []
    for seed in 0, 0, 1:
        folder = tmp_path / f"run-{len(runs)}"
        folder.mkdir()
        runs.append(record.train(checkout, SHAPE, tokens, BYTES, seed, folder))
    assert (dict(os.environ), os.getcwd()) == before
    assert [step for step, _ in runs[0]] == [0, 5, 10, 12]
    losses = [loss for _, loss in runs[0]]
    assert losses[0] == pytest.approx(math.log(64), abs=1e-3)  # all of its digits
    assert losses[-1] < 3.6
    assert runs[0] == runs[1] != runs[2]


def names_after(checkout, shape, tokens, folder, until=None):
    folder.mkdir()
    run = record.Run(checkout, shape, tokens, BYTES)
    torch.manual_seed(0)
    with record.surroundings(checkout.sources, folder):
        run.execute(until=until)
    return run.names


def test_what_the_smaller_shape_changes(tmp_path, tokens):
    checkout = record.Checkout.read(commit(tmp_path / "made-up"), oldest="HEAD")
    names = names_after(checkout, SHAPE, tokens, tmp_path / "run")
    assert names["grad_accum_steps"] == names["grad_scale"] == 1
    assert names["BOS_ID"] == 63
    assert [(s.batch_size, s.train_max_seq_len) for s in names["TRAINING_STAGES"]] == [
        (2048, 112),
        (4096, 256),
    ]
    args = names["args"]
    assert (args.num_scheduled_iterations, args.num_extension_iterations) == (11, 1)
    assert args.bigram_vocab_size == 5 * 64
    assert names["training_manager"].block_size == 16
    assert names["model"].embed.weight.shape == (64, 24)
    assert names["model"].head.dtype == torch.float32
    assert names["model"].yarn.attn_scale == pytest.approx(0.1 * math.sqrt(128 / 4))
    assert names["momenta"][:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])  # 300 steps of 1,285
    assert names["nvidia_smi"]() == ""
    assert names["torch"] is not torch and torch.compile is not names["torch"].compile


def test_one_process_adds_up_what_ranks_would_average(tmp_path, tokens):
    """Four rows of a step one after the other, each with a quarter of its gradient."""
    checkout = record.Checkout.read(commit(tmp_path / "made-up"), oldest="HEAD")
    shape = SHAPE._replace(rows=4, steps=1, eval_every=1)
    names = names_after(checkout, shape, tokens, tmp_path / "run")
    assert names["grad_accum_steps"] == 4
    start = names_after(checkout, shape, tokens, tmp_path / "again", until="momenta")
    model, stage = start["model"], start["stage"]
    assert stage.batch_size == 4 * 2048
    by_rank = []
    with stand_ins.InFloat32():
        for _ in range(4):
            # A rank by itself: the sum over its row
            loss = model(*next(start["loader"]), stage, 16).sum()
            by_rank.append(torch.autograd.grad(loss, model.head)[0])
    torch.testing.assert_close(names["gradient"], sum(by_rank) / 4)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("BOS_ID = 50256", "EOT = 50256", "no BOS_ID"),
        ("class Yarn", "class Rotary", "no Yarn"),
        ("args = Hyper", "args = args = 1\n    args = Hyper", "3 statements for args"),
        ("in warmup_steps", "in range(3)", "no warm-up"),
        ("import glob", "import glob glob", "line 2 is not Python"),
    ],
)
def test_a_checkout_that_lacks_a_name_is_refused_before_work(tmp_path, old, new, said):
    assert old in SCRIPT
    folder = commit(tmp_path / "other", SCRIPT.replace(old, new))
    with pytest.raises(InputError, match=said):
        record.Checkout.read(folder, oldest="HEAD")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("BOS_ID = 50256", "BOS_ID = 0", "BOS_ID is 0, expected 50256"),
        ("= 8 // world", "= 4 // world", "grad_accum_steps of one process is 4"),
        ("head_dim=128", "head_dim=96", "head_dim is 96"),
        ("self.block_size = 128", "self.block_size = 64", "block_size is 64"),
        ("muon_warmup_steps=300", "muon_warmup_steps=200", "muon_warmup_steps .* is 200"),
        ("        run_evals: bool = False\n", "", "Hyperparameters have no run_evals"),
        ("def _cautious_wd_and", "def cautious_wd_and", "has no _cautious_wd"),
        ("import triton\n", "from triton_kernels import new_kernel\n", "triton_kernels.new_kernel"),
        ("nvidia_smi()\n\n", "nvidia_smi()\n    1 / 0\n\n", "line 1[0-9][0-9]: ZeroDivisionError"),
        ("if step == train_steps:", "if True:", "without a validation at step 12"),
    ],
)
def test_another_version_is_refused_by_name(tmp_path, tokens, old, new, said):
    assert old in SCRIPT
    folder = commit(tmp_path / "other", SCRIPT.replace(old, new))
    checkout = record.Checkout.read(folder, oldest="HEAD")
    with pytest.raises(InputError, match=said):
        record.train(checkout, SHAPE, tokens, BYTES, 0, tmp_path)


def test_folders_and_commits_that_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        record.Checkout.read(tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="no git repository"):
        record.Checkout.read(tmp_path / "plain")
    folder = commit(tmp_path / "other")
    with pytest.raises(InputError, match="commit .* is not known; give a checkout of .*2c702746"):
        record.Checkout.read(folder)
    with pytest.raises(InputError, match="--commit abc: not in"):
        record.Checkout.read(folder, "abc", oldest="HEAD")
    bare = commit(tmp_path / "bare", kernels=None)
    with pytest.raises(InputError, match="has no triton_kernels.py"):
        record.Checkout.read(bare, oldest="HEAD")


def test_the_committed_text_runs_not_the_folders(tmp_path):
    folder = commit(tmp_path / "other")
    commit(folder, SCRIPT + "    more = 1\n", name="second")
    (folder / "train_gpt.py").write_text("broken (")
    assert "more = 1" in record.Checkout.read(folder, oldest="HEAD").sources["train_gpt.py"]
    first = record.Checkout.read(folder, "HEAD~1", oldest="HEAD~1")
    assert "more = 1" not in first.sources["train_gpt.py"]


# --- tokens and our side


def test_documents_are_as_long_as_pages_but_shorter():
    text = np.arange(200_000) % 1000
    found = task.pieces(text, 8, 0)
    lengths = [len(x) for x in found]
    assert np.mean(lengths) == pytest.approx(690 / 8, rel=0.05)
    assert np.median(lengths) == pytest.approx(403 / 8, rel=0.05)
    assert min(lengths) >= task.LEAST_DOCUMENT - 1
    assert sum(lengths) > 199_990
    assert any((np.diff(x) % 1000 != 1).any() for x in found) is False  # pieces of the text
    starts = [int(x[0]) for x in found]
    assert starts != sorted(starts)
    assert len(task.pieces(text, 8, 1)[0]) != len(found[0])


def test_both_sides_get_the_tokens_in_one_order(tmp_path):
    """Rows as our loader packs them begin with the documents that the shards begin with."""
    source = made_up_source(tmp_path / "source", every=500)
    tokens = task.Tokens.__new__(task.Tokens)
    vars(tokens).update(folder=tmp_path / "made", source=source, shrink=8, n_vocab=64, eot=63)
    passes = tokens.write(needed=12_000, longest=112, val_tokens=1024)
    assert passes == 3  # a third of the tokens is behind the end of what is kept
    files = sorted((tmp_path / "made").glob("train_*.bin"))
    assert len(files) == 2  # the record asks for a second one
    stream = np.concatenate([read_shard(path) for path in files])
    assert (stream == 63).sum() >= 12_000 * task.SPARE / 112
    with pytest.raises(InputError, match="tokens to validate on"):
        tokens.write(needed=100, longest=112, val_tokens=4096)

    c = task.scaled(subject.parse(["--track", "gpt2-small"]), SHAPE)
    data = task.open_ours(c, tokens)
    [row] = data.train.rows(1)
    first = np.concatenate([x[start : start + length] for x, start, length in row])
    starts = np.flatnonzero(stream == 63)
    expected = np.concatenate(
        [stream[a:b][:112] for a, b in zip(starts, [*starts[1:], len(stream)])]
    )
    assert (first == expected[: len(first)]).all()
    [micro] = data.train.micro_batches(1)
    borders = set(micro.cu_seqlens.tolist())
    assert set(np.flatnonzero(first == 63).tolist()) <= borders  # each document has its own
    assert len(data.val.targets) == SHAPE.val_tokens


def test_our_side_is_the_track_scaled_by_the_same_rule():
    track = subject.parse(["--track", "gpt2-small"])
    c = task.scaled(track, SHAPE)
    assert c.batch_tokens == (2048, 4096, 6144)
    assert (c.row_len, c.val_row_len) == (2048, 512)
    assert c.max_doc_len == (112, 256, 256)
    assert c.short_window == tuple(w // 8 for w in track.short_window)
    assert c.long_window == tuple(w // 8 for w in track.long_window)
    assert c.val_windows == tuple(w // 8 for w in track.val_windows)
    assert c.ngram_rows == 377_280 * 64 // 50304
    assert (c.n_embd, c.n_head, c.n_layer) == (24, 6, 11)
    assert (c.dtype, c.fp8, c.steps, c.extension) == ("float32", "off", 12, 1)
    assert c.target is None
    changed = {name for name in c.fields if c.fields[name] != track.fields[name]}
    for name in "muon_lr adam_lr weight_decay mtp tied stage_lr softcap paired_layers".split():
        assert name not in changed
    with pytest.raises(InputError, match="--track laptop: expected 6 heads and a width of 768"):
        task.scaled(subject.parse(["--track", "laptop"]), SHAPE)


# --- the benchmark


def test_differences_are_of_unpaired_runs():
    ours, theirs = [3.0, 3.1, 3.2], [3.4, 3.3, 3.5, 3.6]
    found = parity.difference(ours, theirs)
    from scipy import stats

    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(3.1 - 3.45)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert parity.difference([1.0], [2.0, 3.0]) == dict(mean=-1.5, low=None, high=None)
    assert parity.difference([1.0, 1.0], [1.0, 1.0]) == dict(mean=0.0, low=0.0, high=0.0)


def a_run(side, seed, loss):
    return dict(side=side, seed=seed, curve=[[0, 8.0], [6, loss + 1], [12, loss]], seconds=1.0)


@pytest.fixture
def trained(monkeypatch, tmp_path, tokens):
    """parity.run() without training: runs come from a list, in this process."""
    made = []

    class Pool:
        def __init__(self, *args, **more):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def shutdown(self, **more):
            pass

        def submit(self, function, job):
            future = parity.concurrent.futures.Future()
            made.append(job)
            loss = 5.0 + 0.01 * job["seed"] + 0.5 * (job["side"] == "record")
            future.set_result(a_run(job["side"], job["seed"], loss))
            return future

    class Tokens:
        n_vocab, eot, cache = 64, 63, tmp_path
        source = types.SimpleNamespace(fingerprint="f")

        def __init__(self, *args):
            pass

        def write_for(self, c, val_tokens):
            return 24_576, 1

    monkeypatch.setattr(parity.concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(task, "Tokens", Tokens)
    read = record.Checkout.read
    monkeypatch.setattr(
        record.Checkout, "read", lambda folder, commit=None: read(folder, commit, oldest="HEAD")
    )
    return made


def test_the_result_and_going_on(tmp_path, trained, capsys):
    folder = commit(tmp_path / "made-up")
    file = tmp_path / "parity.json"
    command = ["parity", "--modded", str(folder), "--quick", "--json", str(file)]
    assert door.main([*command, "--seeds", "2", "--table", str(tmp_path / "t.md")]) == 0
    result = json.loads(file.read_text())
    assert result["ours"] == [5.0, 5.01]
    assert result["record"] == [5.5, 5.51]
    assert result["ours_mean"] == pytest.approx(5.005)
    assert result["difference"]["mean"] == pytest.approx(-0.5)
    assert result["difference"]["low"] < -0.5 < result["difference"]["high"]
    assert result["at_or_below"] is True
    assert len(result["commit"]) == 40
    assert result["steps"] == parity.QUICK.steps
    assert result["settings"]["shape"]["width"] == parity.QUICK.width
    assert result["curves"]["record"] == [[6, pytest.approx(6.505)], [12, pytest.approx(5.505)]]
    shown = (tmp_path / "t.md").read_text()
    assert "| 12 | 5.0050 | 5.5050 | -0.5000 |" in shown
    assert "ours is at or below the record" in shown
    assert len(trained) == 4

    assert door.main([*command, "--seeds", "3"]) == 0  # only what is missing
    assert {(job["side"], job["seed"]) for job in trained[4:]} == {("ours", 2), ("record", 2)}
    assert len(json.loads(file.read_text())["ours"]) == 3
    capsys.readouterr()
    assert door.main([*command, "--width", "48"]) == 2
    assert "give another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--width", "100"], "--width 100: expected a multiple of 24"),
        (["--steps", "3"], "--steps 3: expected 6 or more"),
        (["--rows", "9"], "--rows 9: expected 1 to 8"),
        (["--batch-tokens", "2048"], "--batch-tokens: has no meaning in parity"),
        (["--commit", "abc"], "--commit abc: not in"),
        (["--track", "laptop"], "--track laptop: expected 6 heads"),
    ],
)
def test_bad_options(tmp_path, trained, capsys, options, said):
    folder = commit(tmp_path / "made-up")
    assert door.main(["parity", "--modded", str(folder), *options]) == 2
    assert said in capsys.readouterr().err
    assert not trained


def test_other_options_change_our_side_only(tmp_path, trained):
    folder = commit(tmp_path / "made-up")
    parity.run(folder, quick=True, seeds=1, trainer_options=["--no-smear", "--muon-lr", "0.01"])
    config = trained[0]["config"]
    assert (config.smear, config.muon_lr) == (False, 0.01)


# --- the real one


def real():
    folder = os.environ.get("MODDED_NANOGPT")
    if not folder:
        pytest.skip("MODDED_NANOGPT names no checkout of modded-nanogpt")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Tokens of the standard library."""
    from base.places import cache_folder

    folder = tmp_path_factory.mktemp("text")
    tokens = task.Tokens(folder, cache_folder() / "data", 8)
    tokens.write(60_000, 112, 8192)
    return tokens


TINY = dict(width=24, shrink=8, rows=1, steps=6, extension=1, eval_every=6)
TINY |= dict(val_tokens=4096, val_row_len=4096)


@pytest.mark.slow
@pytest.mark.parametrize("commit", [record.OLDEST, "748d4ef1", record.NEWEST])
@pytest.mark.parametrize("dc", [False, True])
def test_the_records_code_learns(tmp_path, text, commit, dc):
    checkout = record.Checkout.read(real(), commit)
    shape = record.Shape(n_vocab=text.n_vocab, eot=text.eot, **TINY)
    points = record.train(checkout, shape, text.folder, text.bytes, 0, tmp_path, dc)
    assert [step for step, _ in points] == [0, 6]
    assert points[0][1] == pytest.approx(math.log(4096), abs=2e-3)
    assert points[1][1] < points[0][1] - 0.1


@pytest.mark.slow
def test_an_older_commit_is_refused():
    folder = real()
    with pytest.raises(InputError, match="is not known"):
        record.Checkout.read(folder, f"{record.OLDEST}~1")


@pytest.mark.slow
@pytest.mark.parametrize("commit", [record.OLDEST, record.NEWEST])
def test_eight_ranks_of_the_record_have_the_gradient_of_one_process(tmp_path, text, commit):
    """Ranks as its own loader deals out rows to them, averaged as its collectives do."""
    checkout = record.Checkout.read(real(), commit)
    shape = record.Shape(n_vocab=text.n_vocab, eot=text.eot, **TINY)._replace(rows=8)
    run = record.Run(checkout, shape, text.folder, text.bytes)
    torch.manual_seed(0)
    with record.surroundings(checkout.sources, tmp_path):
        run.execute(until="training_manager")
        names = run.names
        model = names["model"]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))  # no gate at zero
        manager = names["training_manager"]
        manager.advance_schedule(0)
        stage = names["TRAINING_STAGES"][0]
        generator = names["distributed_data_generator"]
        files = names["args"].train_files

        def gradients(batches, factor):
            model.zero_grad()
            for batch in batches:
                loss = model(*batch[:4], manager.get_forward_args()).sum() * factor
                loss.backward()
            return {
                name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }

        loader = generator(files, stage.batch_size, stage.train_max_seq_len, grad_accum_steps=8)
        alone = [next(loader) for _ in range(8)]
        of_one = gradients(alone, names["grad_scale"])
        assert names["grad_scale"] == 1 / 8

        dist = names["dist"]
        dist.get_world_size = lambda: 8
        ranks = []
        for rank in range(8):
            dist.get_rank = lambda rank=rank: rank
            ranks.append(next(generator(files, stage.batch_size, stage.train_max_seq_len)))
        for mine, theirs in zip(alone, ranks):
            assert torch.equal(mine[0], theirs[0])  # the same documents
        of_eight = gradients(ranks, 1.0)
    assert len(of_one) > 10
    for name, grad in of_one.items():
        torch.testing.assert_close(grad, of_eight[name] / 8, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("commit", [record.OLDEST, record.NEWEST])
def test_the_records_orthogonalisation_is_that_of_its_formula(tmp_path, text, commit):
    """Its own function on our symmetric products beside plain matrix products."""
    checkout = record.Checkout.read(real(), commit)
    shape = record.Shape(n_vocab=text.n_vocab, eot=text.eot, **TINY)
    run = record.Run(checkout, shape, text.folder, text.bytes)
    with record.surroundings(checkout.sources, tmp_path):
        run.execute(until="NorMuonAndAdam")
        torch.manual_seed(0)
        for tall in False, True:
            g = torch.randn(2, 48, 24) if tall else torch.randn(2, 24, 48)
            expected = []
            for x in g:
                m = 0.05 * x  # momentum from zero, then Nesterov's step
                x = torch.lerp(x, m, 0.95)
                x = x / (x.norm() * 1.02 + 1e-6)
                for a, b, c in run.names["polar_express_coeffs"]:
                    s = x @ x.T
                    x = a * x + (b * s + c * s @ s) @ x
                expected.append(x)
            found = run.names["polar_express"](
                g.clone(), torch.zeros_like(g), torch.tensor(0.95), split_baddbmm=tall
            )
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_both_sides_learn_by_the_door(tmp_path):
    file = tmp_path / "parity.json"
    command = ["parity", "--modded", real(), "--quick", "--seeds", "1", "--steps", "6"]
    assert door.main([*command, "--width", "24", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert len(result["ours"]) == len(result["record"]) == 1
    for side in parity.SIDES:
        assert result[side][0] < math.log(4096)
        assert result["curves"][side][-1][0] == 6
