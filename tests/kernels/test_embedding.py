"""kernels/embedding.py: rows by index; a gradient summed in fp32, the same bits however many
threads there are."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, DTYPES, draw

from kernels.embedding import embedding, embedding_gradient, few_rows_gradient

CPU = torch.device("cpu")


def indices(*shape, rows, seed=0):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def gradient(index, table, dy):
    table = table.detach().clone().requires_grad_()
    y = embedding(index, table)
    return y.detach(), torch.autograd.grad(y, table, dy)[0]


def exact(index, dy, rows):
    """The gradient in float64, occurrence by occurrence."""
    sums = torch.zeros(rows, dy.size(-1), dtype=torch.float64)
    for i, row in zip(index.flatten().tolist(), dy.reshape(-1, dy.size(-1)).double()):
        sums[i] += row
    return sums


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape, rows, C",
    [((7,), 5, 3), ((2, 24), 70, 8), ((3, 2, 5), 1, 1), ((4, 33), 1000, 65), ((1,), 3, 4)],
)
def test_rows_and_their_gradient(shape, rows, C, dtype):
    index, table, dy = (
        indices(*shape, rows=rows),
        draw(rows, C, dtype=dtype),
        draw(*shape, C, dtype=dtype, seed=1),
    )
    y, grad = gradient(index.to(DEVICE), table, dy)
    assert torch.equal(y, table[index])
    expected = exact(index, dy.cpu(), rows)
    assert grad.shape == table.shape and grad.dtype == dtype
    # one rounding, of a sum in fp32; on CUDA PyTorch's own op, which rounds in between as well
    roundings = 1 if DEVICE.type == "cpu" else 4
    torch.testing.assert_close(
        grad.cpu().double(), expected, rtol=roundings * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape, rows, C",
    [((7,), 50, 3), ((2, 24), 70, 8), ((3, 2, 5), 1, 1), ((0,), 4, 2), ((1,), 3, 4)],
)
def test_gradient_of_few_rows(shape, rows, C, dtype):
    """With as many indices that occur twice, and more often, as chance has it; in fp32 the sums."""
    index, dy = indices(*shape, rows=rows), draw(*shape, C, dtype=dtype, seed=1)
    grad = few_rows_gradient(index.to(DEVICE), dy, rows).cpu()
    assert grad.shape == (rows, C) and grad.dtype == dtype
    expected = exact(index, dy.cpu(), rows)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected, rtol=eps, atol=1e-6)
    assert not grad[[r for r in range(rows) if r not in index]].any()


def test_gradient_of_few_rows_in_any_order_of_writes(monkeypatch):
    """On a GPU nobody knows which of several writes to a place comes last."""
    put = torch.Tensor.index_put

    def shuffled(x, indices, values, accumulate=False):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(x.dim()))
        return put(x, (indices[0][order],), values[order], accumulate)

    monkeypatch.setattr(torch.Tensor, "index_put", shuffled)
    index, dy = indices(200, rows=30), draw(200, 8).cpu()
    grad = few_rows_gradient(index, dy, 400)
    torch.testing.assert_close(grad.double(), exact(index, dy, 400), rtol=1e-5, atol=1e-5)


def test_few_rows_are_summed_in_fp32_too():
    ones = torch.ones(3000, 5, dtype=torch.bfloat16)
    grad = few_rows_gradient(torch.full((3000,), 2), ones, 10_000)
    assert grad[2].tolist() == [torch.tensor(3000.0).bfloat16().item()] * 5
    assert grad.count_nonzero() == 5


@settings(deadline=None, max_examples=100, database=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 60), st.integers(0, 10**6))
def test_any_sizes(rows, C, n, seed):
    index, dy = indices(n, rows=rows, seed=seed), draw(n, C, seed=seed).cpu()
    _, grad = gradient(index, torch.zeros(rows, C), dy)
    torch.testing.assert_close(grad.double(), exact(index, dy, rows), rtol=1e-5, atol=1e-5)
    assert not grad[[r for r in range(rows) if r not in index]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_occurs_often_is_summed_in_fp32(dtype):
    """In bf16 a sum of ones ends at 256."""
    _, grad = gradient(
        torch.full((3000,), 2), torch.zeros(4, 5, dtype=dtype), torch.ones(3000, 5, dtype=dtype)
    )
    assert (
        grad[2].tolist() == [torch.tensor(3000.0).to(dtype).item()] * 5
        and grad.count_nonzero() == 5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_each_time_and_with_any_number_of_threads(dtype):
    """What resuming bit for bit stands on."""
    before = torch.get_num_threads()
    index, dy = indices(20_000, rows=300), draw(20_000, 48, dtype=dtype).cpu()
    results = []
    try:
        for threads in (1, 2, 3, 8, 2, 1):
            torch.set_num_threads(threads)
            results.append(gradient(index, torch.zeros(300, 48, dtype=dtype), dy)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_gradcheck():
    table = draw(6, 4, dtype=torch.float64).cpu().requires_grad_()
    index = indices(3, 5, rows=6)
    assert torch.autograd.gradcheck(lambda t: embedding(index, t), table)


def test_gradients_of_any_strides():
    index, table = indices(4, 6, rows=9), draw(9, 8).cpu().requires_grad_()
    embedding(index, table).sum().backward()  # expanded
    assert torch.equal(
        table.grad, torch.bincount(index.flatten(), minlength=9)[:, None].expand(9, 8).float()
    )
    dy = draw(8, 6, 4).cpu().permute(2, 1, 0)
    torch.testing.assert_close(
        gradient(index, table, dy)[1].double(), exact(index, dy, 9), rtol=1e-6, atol=1e-6
    )
    column = indices(6, 4, rows=9).T
    assert torch.equal(
        gradient(column, table, dy)[1], gradient(column.contiguous(), table, dy.contiguous())[1]
    )


def test_nothing_looked_up_and_nothing_to_learn():
    y, grad = gradient(torch.empty(2, 0, dtype=torch.int64), torch.ones(3, 4), torch.empty(2, 0, 4))
    assert y.shape == (2, 0, 4) and grad.shape == (3, 4) and not grad.any()
    assert not embedding(torch.tensor([1]), torch.ones(3, 4)).requires_grad


@pytest.mark.parametrize("bad", [-1, 5])
def test_indices_out_of_range_are_an_error(bad):
    with pytest.raises(IndexError, match="index out of range"):
        embedding(torch.tensor([0, bad]), torch.ones(5, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_op_is_registered_as_it_should_be(dtype):
    for n in (0, 7):
        torch.library.opcheck(
            embedding_gradient, (indices(n, rows=4), draw(n, 3, dtype=dtype).cpu(), 4)
        )


def test_compiled_into_one_graph_it_is_the_same():
    index, dy = indices(3, 50, rows=20), draw(3, 50, 8).cpu()

    def loss(table, index, dy):
        return (embedding(index, table) * dy).sum() + embedding(index // 2, table).square().sum()

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        table = draw(20, 8, seed=3).cpu().requires_grad_()
        value = f(table, index, dy)
        results.append((value.detach(), *torch.autograd.grad(value, table)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.slow
@pytest.mark.compiles
def test_gradient_of_few_rows_compiled():
    """By Inductor, whose kernels must not read what another place still has to write."""
    index, dy = indices(3, 50, rows=20) * 17, draw(3, 50, 8).cpu()
    compiled = torch.compile(few_rows_gradient, fullgraph=True, dynamic=False)
    expected = exact(index, dy, 400)
    torch.testing.assert_close(compiled(index, dy, 400).double(), expected, rtol=1e-5, atol=1e-5)


def test_elsewhere_it_is_pytorchs(monkeypatch):
    """On a GPU, or on no device at all."""
    called = []
    monkeypatch.setattr(
        F, "embedding", lambda index, table: called.append(1) or table.new_empty(*index.shape, 2)
    )
    with torch.device("meta"):
        y = embedding(torch.zeros(3, dtype=torch.int64), torch.empty(5, 2, requires_grad=True))
    assert called and y.grad_fn is None and y.shape == (3, 2)
