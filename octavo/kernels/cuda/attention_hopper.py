"""Causal attention of long rows on dense keys and values, for Hopper's asynchronous units (arXiv:2407.08608).

Three groups of warps share a block of queries: one warp brings blocks of keys and values to shared memory by bulk
copies, two groups of four warps own 64 query rows each (the query heads of a KV head, packed). A group starts the
product of its queries with the next keys before it takes the exponentials of the current scores, and the other group's
products run meanwhile, so that tensor cores wait little for the softmax. Causal with any number of cached tokens:
query i of a row sees keys 0..cached + i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.cuda.launch import cdiv

LOG2E = 1.4426950408889634
ROWS = gl.constexpr(64)  # query rows of a group of warps


def _device(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """A Gluon function, compiled once for all values of the arguments named in `varying`."""
    return lambda function: gluon.jit(function, do_not_specialize=list(varying))


@_device()
def _produce(
    descriptors: gl.tensor,
    buffers: gl.tensor,
    bars: gl.tensor,
    base: gl.tensor,
    column: gl.tensor,
    blocks: gl.tensor,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Fills slot after slot with the keys and values of blocks 0.., each once both groups have left it."""
    k_desc, v_desc = descriptors
    k_smem, v_smem = buffers
    k_full, k_empty, v_full, v_empty = bars
    for j in range(blocks):
        slot = j % STAGES
        left = (j // STAGES & 1) ^ 1
        mbarrier.wait(k_empty.index(slot), left)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [base + j * BLOCK_N, column], k_full.index(slot), k_smem.index(slot))
        mbarrier.wait(v_empty.index(slot), left)
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [base + j * BLOCK_N, column], v_full.index(slot), v_smem.index(slot))


@_device()
def _softmax(
    scores: gl.tensor,
    top: gl.tensor,
    total: gl.tensor,
    scale: gl.tensor,
) -> Any:
    """Weights 2^(s - m) of a block, and what the sums so far are multiplied with."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    kept = gl.exp2(top - new_top)
    weight = gl.exp2(scores * scale - new_top[:, None])
    return weight, new_top, total * kept + gl.sum(weight, 1), kept


@_device()
def _walk(
    query: gl.tensor,
    buffers: gl.tensor,
    bars: gl.tensor,
    top: gl.tensor,
    total: gl.tensor,
    acc: gl.tensor,
    weight: gl.tensor,
    position: gl.tensor,
    scale: gl.tensor,
    begin: gl.tensor,
    end: gl.tensor,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
    MASKED: gl.constexpr,
) -> Any:
    """Blocks begin..end, given the weights of the block before, whose values are still to be added."""
    k_smem, v_smem = buffers
    k_full, k_empty, v_full, v_empty = bars
    for j in range(begin, end):
        slot, before = j % STAGES, (j - 1) % STAGES
        zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        mbarrier.wait(k_full.index(slot), j // STAGES & 1)
        scores = warpgroup_mma(query, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (j - 1) // STAGES & 1)
        acc = warpgroup_mma(weight, v_smem.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(slot), count=1)
        if MASKED:
            at = j * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
            scores = gl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        next_weight, top, total, kept = _softmax(scores, top, total, scale)
        acc, _ = warpgroup_mma_wait(0, deps=[acc, weight])  # until here the product reads the weights' registers
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, OUT))[:, None]
        weight = gl.convert_layout(next_weight.to(query.dtype), gl.DotOperandLayout(0, OUT, 2))
    return top, total, acc, weight


@_device()
def _consume(
    q: gl.tensor,
    out: gl.tensor,
    q_smem: gl.tensor,
    buffers: gl.tensor,
    bars: gl.tensor,
    row: gl.tensor,
    first_token: gl.tensor,
    q_len: gl.tensor,
    cached: gl.tensor,
    head: gl.tensor,
    kv_heads: gl.tensor,
    blocks: gl.tensor,
    full: gl.tensor,
    scale: gl.tensor,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """64 query rows: tokens from first_token on of the row whose tokens begin at `row`; `full` blocks need no mask."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    tokens: gl.constexpr = ROWS // GROUP
    k_smem, v_smem = buffers
    k_full, k_empty, v_full, _ = bars

    m_at = gl.arange(0, ROWS, gl.SliceLayout(1, PLAIN))
    token = first_token + m_at // GROUP
    real = (token < q_len) & (m_at < tokens * GROUP)
    at = ((row + token).to(gl.int64) * (kv_heads * GROUP) + head * GROUP + m_at % GROUP) * DIM
    at = at[:, None] + gl.arange(0, DIM, gl.SliceLayout(0, PLAIN))[None, :]
    q_smem.store(gl.load(q + at, mask=real[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    position = cached + gl.minimum(first_token + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)) // GROUP, q_len - 1)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q_smem, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    gl.thread_barrier()
    mbarrier.arrive(k_empty.index(0), count=1)
    n_at = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    scores = gl.where(n_at[None, :] <= position[:, None], scores, float("-inf"))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    weight, top, total, _ = _softmax(scores, top, total, scale)
    weight = gl.convert_layout(weight.to(q.dtype.element_ty), gl.DotOperandLayout(0, OUT, 2))
    acc = gl.zeros([ROWS, DIM], gl.float32, OUT)

    top, total, acc, weight = _walk(
        q_smem, buffers, bars, top, total, acc, weight, position, scale, 1, full, BLOCK_N, STAGES, SCORES, OUT, False
    )
    top, total, acc, weight = _walk(
        q_smem, buffers, bars, top, total, acc, weight, position, scale, gl.maximum(full, 1), blocks,
        BLOCK_N, STAGES, SCORES, OUT, True,
    )  # fmt: skip
    last = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(last), (blocks - 1) // STAGES & 1)
    acc = warpgroup_mma(weight, v_smem.index(last), acc, is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, weight])
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    gl.store(out + at, gl.convert_layout(acc.to(out.dtype.element_ty), PLAIN), mask=real[:, None])


@_device("token", "q_len", "cached", "length")
def _hopper(
    q: gl.tensor,
    out: gl.tensor,
    k_desc: gl.tensor,
    v_desc: gl.tensor,
    token: gl.tensor,
    q_len: gl.tensor,
    cached: gl.tensor,
    length: gl.tensor,
    scale: gl.tensor,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    head, kv_heads = gl.program_id(0), gl.num_programs(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # the longest walks first
    piece = gl.program_id(2)
    tokens: gl.constexpr = ROWS // GROUP
    first = tile * 2 * tokens
    row = token + piece * q_len
    blocks = gl.cdiv(gl.minimum(cached + first + 2 * tokens, cached + q_len), BLOCK_N)
    full = (cached + first + 1) // BLOCK_N

    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], q.dtype.element_ty)
    q_smem = gl.allocate_shared_memory(q.dtype.element_ty, [2, ROWS, DIM], SHARED)
    k_smem = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES, BLOCK_N, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES, BLOCK_N, DIM], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    buffers = (k_smem, v_smem)
    bars = (k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q, out, q_smem.index(0), buffers, bars, row, first, q_len, cached, head, kv_heads, blocks, full,
                    scale, GROUP, DIM, BLOCK_N, STAGES,
                ),
            ),
            (
                _consume,
                (
                    q, out, q_smem.index(1), buffers, bars, row, first + tokens, q_len, cached, head, kv_heads, blocks,
                    full, scale, GROUP, DIM, BLOCK_N, STAGES,
                ),
            ),
            (
                _produce,
                ((k_desc, v_desc), buffers, bars, piece * length, head * DIM, blocks, BLOCK_N, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    token: int,
    q_len: int,
    cached: int,
    scale: float,
    *,
    block_n: int = 128,
    stages: int = 2,
) -> None:
    """Rows of q_len tokens each from `token` on of q [T, heads, dim], into the same tokens of out; both contiguous.

    k and v [count, length, kv_heads, dim]: the first cached + q_len keys and values of each of `count` neighbouring
    rows; what follows them must be finite.
    """
    count, length, kv_heads, dim = k.shape
    assert q.is_contiguous()
    assert out.is_contiguous()
    group = q.shape[1] // kv_heads
    assert group <= 64
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    block = [block_n, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(x.view(count * length, kv_heads * dim), block, layout) for x in (k, v)
    )
    extra: dict[str, Any] = {"num_warps": 4, "maxnreg": 168}
    _hopper[(kv_heads, cdiv(q_len, 2 * (64 // group)), count)](
        q, out, k_desc, v_desc, token, q_len, cached, length, scale * LOG2E, group, dim, block_n, stages, **extra
    )
