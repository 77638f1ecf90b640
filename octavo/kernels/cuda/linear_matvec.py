"""Products of 1 to 4 rows with a matrix by FMA, bound by reading the matrix once.

y[m, n] = f(sum_k h[m, k] W[n, k] + b[n]), where h is x, or RMSNorm(s) = s * g * r(s) with s = x + residual and
r(s) = 1 / sqrt(mean_k s^2 + eps). Because r does not depend on k, y = r * sum_k s g W: the sum of squares is taken in
the same pass as the product, so that every program normalises the whole row for the price of reading it. f is the
identity, or with GATED the SwiGLU of a matrix that stacks gate and up: silu(y_gate) * y_up.

A program owns BLOCK_N rows of W (GATED: half of them gate rows, half the matching up rows) and walks K in pieces of
BLOCK_K. The first STAGES pieces are loaded into registers before it waits for the kernel that computes x, on which
weights do not depend. Products go into BLOCK_N x BLOCK_K partial sums, which are added up once at the end, in a fixed
order.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, unreachable"

from __future__ import annotations

import triton.language as tl

from octavo.kernels.cuda.launch import kernel


@kernel()
def weight_rows(i: tl.tensor, size: tl.tensor, GATED: tl.constexpr) -> tl.tensor:
    """Matrix rows of a program's row numbers i: themselves, or gate 0, up 0, gate 1, ...; beyond the end, the last."""
    row = i // 2 + (i % 2) * (size // 2) if GATED else i
    return tl.minimum(row, size - 1).to(tl.int64)


@kernel()
def silu_of_pairs(values: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """values [SIZE] = gate 0, up 0, gate 1, ... -> silu(gate) * up [SIZE / 2]."""
    gate, up = tl.split(tl.reshape(values, (SIZE // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


@kernel("num_rows")
def matvec(
    x: tl.tensor,
    residual: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    stream: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    TRIGGER: tl.constexpr,
) -> None:
    """x, residual, stream [num_rows, K], norm [K], weight [size, K], bias [size] -> y [num_rows, size or size / 2]."""
    PIECES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    if PDL and TRIGGER == 0:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    i = program * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = weight_rows(i, size, GATED)
    k = tl.arange(0, BLOCK_K)[None, :]
    at = weight + rows[:, None] * K + k
    tiles = ()
    for piece in tl.static_range(min(STAGES, PIECES)):
        tiles = tiles + (_load(at, k, piece, K, BLOCK_K, EVEN, "evict_first"),)
    if BIAS:
        offset = tl.load(bias + rows).to(tl.float32)
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
        squares = squares + (tl.zeros((1, BLOCK_K // 8), tl.float32),)
    if PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGER == 1:
            tl.extra.cuda.gdc_launch_dependents()
    for piece in tl.static_range(PIECES):
        if piece + STAGES < PIECES:
            tiles = tiles + (_load(at, k, piece + STAGES, K, BLOCK_K, EVEN, "evict_first"),)
        tile = tiles[piece].to(tl.float32)
        if NORM:
            gain = _load(norm + k, k, piece, K, BLOCK_K, EVEN, "").to(tl.float32)
        new_sums = ()
        new_squares = ()
        for m in tl.static_range(ROWS):
            row = tl.minimum(num_rows - 1, m) * K  # absent rows repeat the last
            h = _load(x + row + k, k, piece, K, BLOCK_K, EVEN, "")
            if RESIDUAL:
                h += _load(residual + row + k, k, piece, K, BLOCK_K, EVEN, "")
                mine = piece % tl.num_programs(0) == program
                tl.store(stream + row + piece * BLOCK_K + k, h, mask=piece * BLOCK_K + k < tl.where(mine, K, 0))
            h = h.to(tl.float32)
            if NORM:
                new_squares = new_squares + (squares[m] + tl.sum(tl.reshape(h * h, (1, BLOCK_K // 8, 8)), 2),)
                h *= gain
            new_sums = new_sums + (sums[m] + tile * h,)
        sums = new_sums
        if NORM:
            squares = new_squares
    if PDL and TRIGGER == 2:
        tl.extra.cuda.gdc_launch_dependents()
    for m in tl.static_range(ROWS):
        if num_rows > m:
            total = tl.sum(sums[m], 1)
            if NORM:
                total *= tl.rsqrt(tl.sum(squares[m]) / K + eps)
            if BIAS:
                total += offset
            if GATED:
                total = silu_of_pairs(total, BLOCK_N)
                column = program * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
                width = size // 2
            else:
                column = i
                width = size
            tl.store(y + m * width + column, total.to(y.dtype.element_ty), mask=column < width)


@kernel()
def _load(
    at: tl.tensor,
    k: tl.tensor,
    piece: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    POLICY: tl.constexpr,
) -> tl.tensor:
    """Piece number `piece` along k, zero beyond K."""
    if EVEN:
        return tl.load(at + piece * BLOCK_K, eviction_policy=POLICY)
    return tl.load(at + piece * BLOCK_K, mask=k + piece * BLOCK_K < K, other=0, eviction_policy=POLICY)
