"""The polar factors U V^T of a batch of matrices G = U S V^T, by five matrix polynomials.

    X <- G / (1.02 |G|_F);   five times: A = X X^T,  X <- a X + (b A + c A A) X

FLOPs for m x n, m <= n: 5 (4 m^2 n + 2 m^3); symmetric products at half price save
5 (m^2 n + m^3). There are only products, so bf16 is enough. Singular values above 1e-3 of the norm
end between 0.85 and 1.15, which is all Muon needs; smaller ones grow up to a thousandfold.

It is plain PyTorch, on a CPU with 1 to 2% of its time for the norm. With the kernels for symmetric
products it has 3 launches a step and nothing else: the norm is the root of the first A's trace, and
the division rides on the first polynomial, so that neither takes a pass over G.

Source: Polar Express (Amsel, Persson, Musco, Gower, arXiv:2505.16932), used inside Muon (Jordan et
al., 2024).
"""

import torch

from .symmetric_matmul import (
    EPS,
    SAFETY,
    as_batch,
    normalised_polynomial,
    symmetric_matmul,
    symmetric_matmul_reference,
)

# a, b, c of each step: optimal for 5 steps on singular values in [1e-3, 1], loosened for the
# rounding of bf16 (safety 2e-2, cushion 2)
COEFFICIENTS = [
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
]


def polar_express(G, steps=5):
    """G: (..., m, n), any float dtype -> approximate polar factor, same shape and dtype.

    All-zero matrices stay zero.
    """
    # The products are of the smaller side: A = X^T X and X <- a X + X (b A + c A A) for a tall one
    tall = G.size(-2) > G.size(-1)
    X = as_batch(G)  # (batch, m, n)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * SAFETY + EPS)
    for a, b, c in COEFFICIENTS[:steps]:
        A = symmetric_matmul_reference(X.mT if tall else X)  # (batch, m, m), m the smaller side
        B = symmetric_matmul_reference(A, A, alpha=c, beta=b)
        # The sum rides on the product, so that torch.compile finds nothing to fuse: on 2 CPU cores,
        # at (16, 256, 256) and (8, 1024, 256) in bf16, this takes 0.85 of the compiled time of the
        # form written out
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X.view(G.shape)


def polar_express_by_kernels(G, steps=5):
    """The same by symmetric_matmul's kernel, which does half the work on a GPU: 3 launches a step
    and no copy of X.

    G: fp32 or bf16; steps: at least 1. Matrices of |G|_F above 1e9 become zero, where otherwise
    they have a direction up to 1e19.
    """
    tall = G.size(-2) > G.size(-1)
    X = as_batch(G)
    for i, (a, b, c) in enumerate(COEFFICIENTS[:steps]):
        A = symmetric_matmul(X.mT if tall else X)
        # a I is added before that sum is rounded. In bf16, of random matrices, results and singular
        # values are as exact as above
        if i == 0:
            B = normalised_polynomial(A, a, b, c)
        else:
            B = symmetric_matmul(A, A, alpha=c, beta=b, diagonal=a)
        X = torch.bmm(X, B) if tall else torch.bmm(B, X)
    return X.view(G.shape)
