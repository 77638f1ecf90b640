"""Causal attention of rows with several query tokens over the paged cache, on Hopper's asynchronous units
(arXiv:2407.08608).

An item is the query heads of one KV head for 2 * (64 // GROUP) consecutive tokens of a row; items come from the list of
`attention_prefill.tiles`, the longest walk first. A program takes every (number of programs)-th item, to and fro, so
that each gets about the same work. One warp brings pages of keys to shared memory by bulk copies, one the values, and
two groups of four warps own 64 query rows each. A group starts the product of its queries with the next keys before it
takes the exponentials of the current scores, and the other group's products run meanwhile, so that tensor cores wait
little for the softmax. The copying warps run ahead into the next item, and a group reads its next queries before it
writes its results.

A page is copied as tiles of [PAGE, 64], laid so that a block's tiles are one [BLOCK_N, DIM] matrix in the 128-byte
swizzled layout that `wgmma` reads. Pages that no query of the item sees are taken from outside the cache, which copies
zeros; the end of a row's last page may hold anything, even NaN, so its values are overwritten with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.cuda.hopper import TYPES, barrier, device
from octavo.kernels.cuda.launch import LOG2E

ROWS = gl.constexpr(64)  # query rows of a group of warps
BLOCK_N, STAGES = 128, 2


@device()
def _item(
    turn: gl.tensor,
    total: gl.tensor,
    kv_heads: gl.tensor,
    items: gl.tensor,
    q_start: gl.tensor,
    seq_lens: gl.tensor,
) -> Any:
    """This program's item of a turn: row, head, first token, where the row's tokens begin, their count, the cached.

    The count is 0 for turns behind the last.
    """
    own, width = gl.program_id(0), gl.num_programs(0)
    at = turn * width + gl.where(turn % 2 == 0, own, width - 1 - own)
    real = at < total
    item = items + 2 * (at // kv_heads)
    row = gl.load(item, mask=real, other=0)
    first = gl.load(item + 1, mask=real, other=0)
    begin = gl.load(q_start + row)
    count = gl.load(q_start + row + 1) - begin
    cached = gl.load(seq_lens + row) - count
    return row, at % kv_heads, first, begin, gl.where(real, count, 0), cached


@device()
def _copy(
    cache: gl.tensor,
    smem: gl.tensor,
    filled: gl.tensor,
    left: gl.tensor,
    listed: gl.tensor,
    turns: gl.tensor,
    table: gl.tensor,
    rows: gl.tensor,
    table_stride: gl.tensor,
    ZEROED: gl.constexpr,
    TOKENS: gl.constexpr,
    DIM: gl.constexpr,
    PAGE: gl.constexpr,
    HAS_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Fills slot after slot with the blocks of each item, each once both groups have left it.

    ZEROED: what lies in a page behind the row's last token becomes zeros.
    """
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    PAGES: gl.constexpr = BLOCK_N // PAGE
    TILES: gl.constexpr = PAGES * DIM // 64
    tiles = smem._reinterpret(cache.dtype, [STAGES * TILES, PAGE, 64], cache.layout)
    total, kv_heads, items, q_start, seq_lens = listed
    done, zeroed = 0, 0
    for turn in range(turns):
        row, head, first, _begin, count, cached = _item(turn, total, kv_heads, items, q_start, seq_lens)
        line = gl.load(rows + row).to(gl.int64) if HAS_ROWS else row.to(gl.int64)
        pages = table + line * table_stride
        end = cached + gl.minimum(first + TOKENS, count)
        blocks = gl.cdiv(end, BLOCK_N)
        # The last page reaches beyond the row's tokens.
        ragged = (end % PAGE != 0) & (gl.cdiv(end, PAGE) * PAGE > cached + count)
        for j in range(blocks):
            slot = (done + j) % STAGES
            mbarrier.wait(left.index(slot), ((done + j) // STAGES & 1) ^ 1)
            signal = filled.index(slot)
            if ZEROED:
                signal = filled.index(gl.where(ragged & (j == blocks - 1), STAGES, slot))
            mbarrier.expect(signal, TILES * cache.block_type.nbytes)
            for page in gl.static_range(PAGES):
                at = j * PAGES + page
                block = gl.load(pages + at, mask=at * PAGE < end, other=-1)
                for part in gl.static_range(DIM // 64):
                    tma.async_copy_global_to_shared(
                        cache, [block * PAGE, head * DIM + part * 64], signal,
                        tiles.index(slot * TILES + part * PAGES + page),
                    )  # fmt: skip
        done += blocks
        if ZEROED and ragged:
            slot, last = (done - 1) % STAGES, end % BLOCK_N
            mbarrier.wait(filled.index(STAGES), zeroed & 1)
            zeroed += 1
            pieces = smem._reinterpret(cache.dtype, [STAGES * BLOCK_N * DIM // 1024, 16, 64], cache.layout)
            for at in range(last // 16, (last // PAGE + 1) * (PAGE // 16)):
                real = at * 16 + gl.arange(0, 16, gl.SliceLayout(1, PLAIN)) < last
                for part in gl.static_range(DIM // 64):
                    piece = pieces.index((slot * (DIM // 64) + part) * (BLOCK_N // 16) + at)
                    value = piece.load(PLAIN)
                    piece.store(gl.where(real[:, None], value, gl.zeros_like(value)))
            fence_async_shared()
            barrier()
            mbarrier.arrive(filled.index(slot), count=1)


@device()
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


@device()
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
    done: gl.tensor,
    begin: gl.tensor,
    end: gl.tensor,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
    MASKED: gl.constexpr,
) -> Any:
    """Blocks begin..end, given the weights of the block before, whose values are still to be added.

    `done` blocks went through the slots before this item's.
    """
    k_smem, v_smem = buffers
    k_full, k_empty, v_full, v_empty = bars
    for j in range(begin, end):
        at, before = done + j, done + j - 1
        zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        keys, values = at % STAGES, before % STAGES
        mbarrier.wait(k_full.index(keys), at // STAGES & 1)
        scores = warpgroup_mma(query, k_smem.index(keys).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(values), before // STAGES & 1)
        acc = warpgroup_mma(weight, v_smem.index(values), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        barrier()
        mbarrier.arrive(k_empty.index(keys), count=1)
        if MASKED:
            n_at = j * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
            scores = gl.where(n_at[None, :] <= position[:, None], scores, float("-inf"))
        next_weight, top, total, kept = _softmax(scores, top, total, scale)
        acc, _weight = warpgroup_mma_wait(0, deps=[acc, weight])  # until here the product reads the weights' registers
        barrier()
        mbarrier.arrive(v_empty.index(values), count=1)
        acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, OUT))[:, None]
        weight = gl.convert_layout(next_weight.to(query.dtype), gl.DotOperandLayout(0, OUT, 2))
    return top, total, acc, weight


@device()
def _rows_at(
    head: gl.tensor,
    first: gl.tensor,
    begin: gl.tensor,
    count: gl.tensor,
    stride: gl.tensor,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    PLAIN: gl.constexpr,
) -> Any:
    """Where a group's 64 query rows lie in a tensor of `stride` elements a token, and which of them exist."""
    m_at = gl.arange(0, ROWS, gl.SliceLayout(1, PLAIN))
    token = first + m_at // GROUP
    real = (token < count) & (m_at < ROWS // GROUP * GROUP)
    at = (begin + token).to(gl.int64) * stride + (head * GROUP + m_at % GROUP) * DIM
    return at[:, None] + gl.arange(0, DIM, gl.SliceLayout(0, PLAIN))[None, :], real[:, None]


@device()
def _consume(
    q: gl.tensor,
    out: gl.tensor,
    q_smem: gl.tensor,
    buffers: gl.tensor,
    bars: gl.tensor,
    listed: gl.tensor,
    turns: gl.tensor,
    q_stride: gl.tensor,
    scale: gl.tensor,
    SKIPPED: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """64 query rows of each item: its tokens from the SKIPPED-th on."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    TOKENS: gl.constexpr = 2 * (ROWS // GROUP)
    k_smem, v_smem = buffers
    k_full, k_empty, v_full, v_empty = bars
    total, kv_heads, items, q_start, seq_lens = listed
    done = 0
    _row, head, first, begin, count, cached = _item(0, total, kv_heads, items, q_start, seq_lens)
    at, real = _rows_at(head, first + SKIPPED, begin, count, q_stride, GROUP, DIM, PLAIN)
    query = gl.load(q + at, mask=real, other=0.0)
    for turn in range(turns):
        _row, next_head, next_first, next_begin, next_count, next_cached = _item(
            turn + 1, total, kv_heads, items, q_start, seq_lens
        )
        q_smem.store(query)
        fence_async_shared()
        barrier()
        blocks = gl.cdiv(cached + gl.minimum(first + TOKENS, count), BLOCK_N)
        full = (cached + first + 1) // BLOCK_N  # blocks that every query of the item sees whole
        token = first + SKIPPED + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)) // GROUP
        position = cached + gl.minimum(token, count - 1)

        slot = done % STAGES
        zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        mbarrier.wait(k_full.index(slot), done // STAGES & 1)
        scores = warpgroup_mma(q_smem, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        barrier()
        mbarrier.arrive(k_empty.index(slot), count=1)
        n_at = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        scores = gl.where(n_at[None, :] <= position[:, None], scores, float("-inf"))
        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        sums = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        weight, top, sums, _kept = _softmax(scores, top, sums, scale)
        weight = gl.convert_layout(weight.to(q.dtype.element_ty), gl.DotOperandLayout(0, OUT, 2))
        acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
        top, sums, acc, weight = _walk(
            q_smem, buffers, bars, top, sums, acc, weight, position, scale, done, 1, full,
            BLOCK_N, STAGES, SCORES, OUT, False,
        )  # fmt: skip
        top, sums, acc, weight = _walk(
            q_smem, buffers, bars, top, sums, acc, weight, position, scale, done, gl.maximum(full, 1), blocks,
            BLOCK_N, STAGES, SCORES, OUT, True,
        )  # fmt: skip
        done += blocks
        slot = (done - 1) % STAGES
        mbarrier.wait(v_full.index(slot), (done - 1) // STAGES & 1)
        acc = warpgroup_mma(weight, v_smem.index(slot), acc, is_async=True)
        at, real = _rows_at(next_head, next_first + SKIPPED, next_begin, next_count, q_stride, GROUP, DIM, PLAIN)
        query = gl.load(q + at, mask=real, other=0.0)
        acc, _weight = warpgroup_mma_wait(0, deps=[acc, weight])
        barrier()
        mbarrier.arrive(v_empty.index(slot), count=1)
        acc = acc / gl.convert_layout(sums, gl.SliceLayout(1, OUT))[:, None]
        at, real = _rows_at(head, first + SKIPPED, begin, count, kv_heads * GROUP * DIM, GROUP, DIM, PLAIN)
        gl.store(out + at, gl.convert_layout(acc.to(out.dtype.element_ty), PLAIN), mask=real)
        head, first, begin, count, cached = next_head, next_first, next_begin, next_count, next_cached


@device("total", "kv_heads", "table_stride")
def _hopper(
    q: gl.tensor,
    out: gl.tensor,
    k_desc: gl.tensor,
    v_desc: gl.tensor,
    table: gl.tensor,
    rows: gl.tensor,
    q_start: gl.tensor,
    seq_lens: gl.tensor,
    items: gl.tensor,
    total: gl.tensor,
    kv_heads: gl.tensor,
    table_stride: gl.tensor,
    q_stride: gl.tensor,
    scale: gl.tensor,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    PAGE: gl.constexpr,
    HAS_ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    TOKENS: gl.constexpr = ROWS // GROUP
    DTYPE: gl.constexpr = q.dtype.element_ty
    QUERIES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], DTYPE)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], DTYPE)
    q_smem = gl.allocate_shared_memory(DTYPE, [2, ROWS, DIM], QUERIES)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, DIM], KEYS)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, DIM], KEYS)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # One more, for values that are not ready when they have arrived.
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_empty.index(slot), count=2)
    mbarrier.init(v_full.index(STAGES), count=1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    own, width = gl.program_id(0), gl.num_programs(0)
    turns = gl.cdiv(total, width)  # the last one may have nothing for this program
    turns -= ((turns - 1) * width + gl.where(turns % 2 == 1, own, width - 1 - own) >= total).to(gl.int32)
    buffers = (k_smem, v_smem)
    bars = (k_full, k_empty, v_full, v_empty)
    listed = (total, kv_heads, items, q_start, seq_lens)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q, out, q_smem.index(0), buffers, bars, listed, turns, q_stride, scale,
                    0, GROUP, DIM, BLOCK_N, STAGES,
                ),
            ),
            (
                _consume,
                (
                    q, out, q_smem.index(1), buffers, bars, listed, turns, q_stride, scale,
                    TOKENS, GROUP, DIM, BLOCK_N, STAGES,
                ),
            ),
            (
                _copy,
                (
                    k_desc, k_smem, k_full, k_empty, listed, turns, table, rows, table_stride,
                    False, 2 * TOKENS, DIM, PAGE, HAS_ROWS, BLOCK_N, STAGES,
                ),
            ),
            (
                _copy,
                (
                    v_desc, v_smem, v_full, v_empty, listed, turns, table, rows, table_stride,
                    True, 2 * TOKENS, DIM, PAGE, HAS_ROWS, BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def fits(dtype: torch.dtype, group: int, dim: int, page: int) -> bool:
    """Whether the kernel takes `group` query heads of `dim` dimensions to a KV head and blocks of `page` tokens."""
    return dtype in TYPES and group <= 64 and dim in (64, 128) and page <= BLOCK_N


class Hopper:
    """The kernel for the heads of one model on one device; keeps descriptors of the caches that it has met."""

    def __init__(self, heads: int, kv_heads: int, device: torch.device) -> None:
        self.programs: int = torch.cuda.get_device_properties(device).multi_processor_count
        """How many run at a time."""
        self._kv_heads, self._group = kv_heads, heads // kv_heads
        self.tokens = 2 * (64 // self._group)
        """Query tokens of an item."""
        self._described: dict[int, Any] = {}

    def prefill(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        table: Tensor,
        rows: Tensor | None,
        q_start: Tensor,
        seq_lens: Tensor,
        items: Tensor,
        out: Tensor,
        *,
        scale: float,
        pdl: bool = False,
    ) -> Tensor:
        """As `attention_prefill.prefill`, without windows; caches are contiguous, `items` made for `tokens` tokens."""
        assert out.is_contiguous()
        extra: dict[str, Any] = {"launch_pdl": True} if pdl else {}
        total = items.shape[0] * self._kv_heads
        _hopper[(min(total, self.programs),)](
            q,
            out,
            self._describe(k_cache),
            self._describe(v_cache),
            table,
            table if rows is None else rows,
            q_start,
            seq_lens,
            items,
            total,
            self._kv_heads,
            table.stride(0),
            q.stride(0),
            scale * LOG2E,
            self._group,
            q.shape[2],
            k_cache.shape[1],
            rows is not None,
            BLOCK_N,
            STAGES,
            pdl,
            num_warps=4,
            maxnreg=168,
            **extra,
        )
        return out

    def _describe(self, cache: Tensor) -> Any:
        """The descriptor of a cache [blocks, page, kv_heads, dim] for bulk copies of [page, 64] elements."""
        found = self._described.get(cache.data_ptr())
        if found is None:
            blocks, page, kv_heads, dim = cache.shape
            block = [page, 64]
            layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[cache.dtype])
            found = TensorDescriptor.from_tensor(cache.view(blocks * page, kv_heads * dim), block, layout)
            self._described[cache.data_ptr()] = found
        return found
