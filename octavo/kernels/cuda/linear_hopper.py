"""Matrix products on Hopper's asynchronous units: bulk copies, `wgmma`, and SwiGLU before anything is written.

y = x W^T + b, or silu(g) * u for the halves g, u of that, with the sums in float32. One warp brings pieces of 64
columns of both operands to a ring of shared-memory stages; GROUPS groups of four warps own ROWS rows of a tile each and
share its COLUMNS. With many rows of x, those are the tile's rows and the matrix's its columns; with few (SWAPPED), the
other way round, so that the matrix is read once. Programs stay for the whole product: while groups write a tile, the
copying warp fetches the next one's pieces. Tiles are taken in bands of so many tiles of x's rows, which share what the
L2 cache holds.

GATED: the matrix stacks gate and up. A bulk copy takes 8 rows of gate, 8 of up, 8 of gate and so on, so that a thread
has both factors of each element of y in registers.

Owns no choice of launches (`linear_config`); knows nothing of norms.
"""

from __future__ import annotations

from functools import cache
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
from octavo.kernels.cuda.launch import cdiv, pdl
from octavo.kernels.cuda.linear_config import HOPPER_PIECE, HopperConfig

PIECE = gl.constexpr(HOPPER_PIECE)
_REGISTERS = {1: 128, 2: 168}
"""Groups -> registers a thread of the whole program, which the groups and the copying warp divide among them."""


@device()
def _place(turn: gl.tensor, plan: gl.tensor) -> Any:
    """The tile of a turn: which of x's rows, which of W's."""
    _turns, _blocks, x_tiles, w_tiles, band = plan
    tile = turn * gl.num_programs(0) + gl.program_id(0)
    width = band * w_tiles
    above = tile // width * band
    height = gl.minimum(x_tiles - above, band)
    within = tile % width
    return above + within % height, within // height


@device()
def _bring(
    desc: gl.tensor,
    row: gl.tensor,
    piece: gl.tensor,
    filled: gl.tensor,
    smem: gl.tensor,
    stage: gl.tensor,
    COUNT: gl.constexpr,
    SIZE: gl.constexpr,
    GATED: gl.constexpr,
) -> None:
    """COUNT boxes of SIZE rows each into a stage; the rows of a gated matrix are those of both halves."""
    if GATED:
        boxes = smem._reinterpret(desc.dtype, [smem.shape[0], SIZE // 16, 2, 8, PIECE], desc.layout)
        for box in gl.static_range(COUNT):
            tma.async_copy_global_to_shared(
                desc, [row // 16 + box * (SIZE // 16), 0, 0, piece * PIECE], filled, boxes.index(stage * COUNT + box)
            )
    else:
        for box in gl.static_range(COUNT):
            tma.async_copy_global_to_shared(
                desc, [row + box * SIZE, piece * PIECE], filled, smem.index(stage * COUNT + box)
            )


@device()
def _copy(
    a_desc: gl.tensor,
    b_desc: gl.tensor,
    a_smem: gl.tensor,
    b_smem: gl.tensor,
    bars: gl.tensor,
    plan: gl.tensor,
    SWAPPED: gl.constexpr,
    GATED: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """Fills stage after stage, each once all groups have left it; asks for the matrix before it waits for x."""
    A_GATED: gl.constexpr = GATED and SWAPPED
    B_GATED: gl.constexpr = GATED and not SWAPPED
    NBYTES: gl.constexpr = GROUPS * a_desc.block_type.nbytes + b_desc.block_type.nbytes
    full, empty = bars
    turns, blocks = plan[0], plan[1]
    x_tile, w_tile = _place(0, plan)
    a_row = (w_tile if SWAPPED else x_tile) * (GROUPS * ROWS)
    b_row = (x_tile if SWAPPED else w_tile) * COLUMNS
    done = gl.minimum(blocks, STAGES)
    for i in range(done):
        mbarrier.expect(full.index(i), NBYTES)
        if SWAPPED:
            _bring(a_desc, a_row, i, full.index(i), a_smem, i, GROUPS, ROWS, A_GATED)
        else:
            _bring(b_desc, b_row, i, full.index(i), b_smem, i, 1, COLUMNS, B_GATED)
    if PDL:
        gdc_wait()
    for i in range(done):
        if SWAPPED:
            _bring(b_desc, b_row, i, full.index(i), b_smem, i, 1, COLUMNS, B_GATED)
        else:
            _bring(a_desc, a_row, i, full.index(i), a_smem, i, GROUPS, ROWS, A_GATED)
    early = done
    for turn in range(turns):
        x_tile, w_tile = _place(turn, plan)
        a_row = (w_tile if SWAPPED else x_tile) * (GROUPS * ROWS)
        b_row = (x_tile if SWAPPED else w_tile) * COLUMNS
        for piece in range(gl.where(turn == 0, early, 0), blocks):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), NBYTES)
            _bring(a_desc, a_row, piece, full.index(stage), a_smem, stage, GROUPS, ROWS, A_GATED)
            _bring(b_desc, b_row, piece, full.index(stage), b_smem, stage, 1, COLUMNS, B_GATED)
            done += 1


@device()
def _columns(acc: gl.tensor, COUNT: gl.constexpr) -> Any:
    """A tuple of COUNT pieces of equally many columns."""
    pieces = (acc,)
    if COUNT > 1:
        left, right = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute((0, 2, 1)).split()
        pieces = _columns(left, COUNT // 2) + _columns(right, COUNT // 2)
    return pieces


@device()
def _halves(value: gl.tensor, SWAPPED: gl.constexpr) -> Any:
    """Gate and up of a piece of a tile: of its rows where those are the matrix's, else of its columns."""
    height: gl.constexpr = value.shape[0]
    width: gl.constexpr = value.shape[1]
    if SWAPPED:
        gate, up = value.reshape([height // 16, 2, 8, width]).permute((0, 2, 3, 1)).split()
    else:
        gate, up = value.reshape([height, width // 16, 2, 8]).permute((0, 1, 3, 2)).split()
    half: gl.constexpr = [height // 2, width] if SWAPPED else [height, width // 2]
    return gate.reshape(half), up.reshape(half)


@device()
def _offset(value: gl.tensor, bias: gl.tensor, first: gl.tensor, size: gl.tensor, SWAPPED: gl.constexpr) -> Any:
    """value plus the bias of its outputs first, first + 1, ... that are below size."""
    layout: gl.constexpr = value.type.layout
    if SWAPPED:
        at = first + gl.arange(0, value.shape[0], gl.SliceLayout(1, layout))
    else:
        at = first + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    offset = gl.load(bias + at, mask=at < size, other=0.0).to(gl.float32)
    return value + (offset[:, None] if SWAPPED else offset[None, :])


@device()
def _write(
    acc: gl.tensor,
    y_desc: gl.tensor,
    bias: gl.tensor,
    size: gl.tensor,
    x_row: gl.tensor,
    output: gl.tensor,
    smem: gl.tensor,
    OWN: gl.constexpr,
    SWAPPED: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CHUNKS: gl.constexpr,
    BUFFERS: gl.constexpr,
) -> None:
    """A group's part of a tile to y[x_row.., output..], of `size` outputs, CHUNKS pieces one by one through smem."""
    # A buffer is free when at most so many later copies from other buffers are under way.
    PENDING: gl.constexpr = BUFFERS - 1 if CHUNKS % BUFFERS == 0 else 0
    chunks = _columns(acc, CHUNKS)
    for i in gl.static_range(CHUNKS):
        value = chunks[i]
        at = output if SWAPPED else output + i * y_desc.block_type.shape[1]
        if GATED:
            gate, value = _halves(value, SWAPPED)
            if HAS_BIAS:
                gate = _offset(gate, bias, at, size, SWAPPED)
                value = _offset(value, bias + size, at, size, SWAPPED)
            value = gate / (1.0 + gl.exp(-gate)) * value
        else:
            if HAS_BIAS:
                value = _offset(value, bias, at, size, SWAPPED)
        buffer = smem.index(OWN * BUFFERS + i % BUFFERS)
        tma.store_wait(pendings=PENDING)
        barrier()
        if SWAPPED:
            buffer.permute((1, 0)).store(value.to(y_desc.dtype))
        else:
            buffer.store(value.to(y_desc.dtype))
        fence_async_shared()
        barrier()
        row = x_row + i * y_desc.block_type.shape[0] if SWAPPED else x_row
        tma.async_copy_shared_to_global(y_desc, [row, at], buffer)


@device()
def _consume(
    y_desc: gl.tensor,
    bias: gl.tensor,
    size: gl.tensor,
    a_smem: gl.tensor,
    b_smem: gl.tensor,
    y_smem: gl.tensor,
    bars: gl.tensor,
    plan: gl.tensor,
    OWN: gl.constexpr,
    SWAPPED: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
    BUFFERS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """The OWN-th ROWS rows of each of the program's tiles."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    # Outputs of a row and column of the tile.
    A_OUT: gl.constexpr = ROWS // 2 if GATED and SWAPPED else ROWS
    B_OUT: gl.constexpr = COLUMNS // 2 if GATED and not SWAPPED else COLUMNS
    full, empty = bars
    turns, blocks = plan[0], plan[1]
    if PDL:
        gdc_wait()
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    done = 0
    for turn in range(turns):
        x_tile, w_tile = _place(turn, plan)
        for piece in range(blocks):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            acc = warpgroup_mma(
                a_smem.index(stage * GROUPS + OWN), b_smem.index(stage).permute((1, 0)), acc,
                use_acc=piece > 0, is_async=True,
            )  # fmt: skip
            acc = warpgroup_mma_wait(1, deps=[acc])
            barrier()
            mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1, pred=piece > 0)
            done += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1)
        if SWAPPED:
            x_row, output = x_tile * COLUMNS, (w_tile * GROUPS + OWN) * A_OUT
        else:
            x_row, output = (x_tile * GROUPS + OWN) * ROWS, w_tile * B_OUT
        _write(acc, y_desc, bias, size, x_row, output, y_smem, OWN, SWAPPED, GATED, HAS_BIAS, CHUNKS, BUFFERS)
    tma.store_wait(pendings=0)


@device("size", "blocks", "x_tiles", "w_tiles", "band")
def _product(
    a_desc: gl.tensor,
    b_desc: gl.tensor,
    y_desc: gl.tensor,
    bias: gl.tensor,
    size: gl.tensor,
    blocks: gl.tensor,
    x_tiles: gl.tensor,
    w_tiles: gl.tensor,
    band: gl.tensor,
    SWAPPED: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
    BUFFERS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """`size`: outputs of y; `blocks`: pieces of a tile."""
    DTYPE: gl.constexpr = y_desc.dtype
    A_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PIECE], DTYPE)
    B_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, PIECE], DTYPE)
    Y_SHAPE: gl.constexpr = y_desc.block_type.shape
    a_smem = gl.allocate_shared_memory(DTYPE, [STAGES * GROUPS, ROWS, PIECE], A_LAYOUT)
    b_smem = gl.allocate_shared_memory(DTYPE, [STAGES, COLUMNS, PIECE], B_LAYOUT)
    y_smem = gl.allocate_shared_memory(DTYPE, [GROUPS * BUFFERS, Y_SHAPE[0], Y_SHAPE[1]], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    if PDL:
        gdc_launch_dependents()

    turns = gl.cdiv(x_tiles * w_tiles - gl.program_id(0), gl.num_programs(0))
    plan = (turns, blocks, x_tiles, w_tiles, band)
    bars = (full, empty)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        y_desc, bias, size, a_smem, b_smem, y_smem, bars, plan,
                        0, SWAPPED, GATED, HAS_BIAS, GROUPS, ROWS, COLUMNS, STAGES, CHUNKS, BUFFERS, PDL,
                    ),
                ),
                (
                    _copy,
                    (a_desc, b_desc, a_smem, b_smem, bars, plan, SWAPPED, GATED, GROUPS, ROWS, COLUMNS, STAGES, PDL),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        y_desc, bias, size, a_smem, b_smem, y_smem, bars, plan,
                        0, SWAPPED, GATED, HAS_BIAS, GROUPS, ROWS, COLUMNS, STAGES, CHUNKS, BUFFERS, PDL,
                    ),
                ),
                (
                    _consume,
                    (
                        y_desc, bias, size, a_smem, b_smem, y_smem, bars, plan,
                        1, SWAPPED, GATED, HAS_BIAS, GROUPS, ROWS, COLUMNS, STAGES, CHUNKS, BUFFERS, PDL,
                    ),
                ),
                (
                    _copy,
                    (a_desc, b_desc, a_smem, b_smem, bars, plan, SWAPPED, GATED, GROUPS, ROWS, COLUMNS, STAGES, PDL),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def covers(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> bool:
    """Whether `hopper_linear` takes these operands: half types in rows of whole 16 bytes. Does not ask which GPU."""
    n, k = weight.shape
    return (
        x.dim() == 2
        and x.shape[0] > 0
        and x.dtype in TYPES
        and weight.dtype == x.dtype
        and x.shape[1] == k
        and (bias is None or (bias.dtype == x.dtype and bias.shape == (n,) and bias.is_contiguous()))
        and x.is_contiguous()
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and weight.is_contiguous()
        and k % 8 == 0
        and n % (16 if gated else 8) == 0
    )


def hopper_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False, config: HopperConfig
) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N], or with `gated` silu_mul of that, [T, N / 2].

    All contiguous, of one half type; see `covers`. With dependent launch, the matrix is read while the kernel before
    may still run, so that one must not write it.
    """
    m, k = x.shape
    n = weight.shape[0]
    size = n // 2 if gated else n
    y = x.new_empty((m, size))
    x_rows, w_rows = config.tile()
    x_tiles, w_tiles, blocks = cdiv(m, x_rows), cdiv(n, w_rows), cdiv(k, HOPPER_PIECE)
    dependent = pdl()
    extra: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    x_desc = _describe(x, config.columns if config.swapped else config.rows)
    w_desc = _describe_matrix(weight, config.rows if config.swapped else config.columns, gated)
    box = config.box(gated)
    _product[(min(x_tiles * w_tiles, _processors(x.device)),)](
        w_desc if config.swapped else x_desc,
        x_desc if config.swapped else w_desc,
        _describe(y, *box),
        y if bias is None else bias,
        size,
        blocks,
        x_tiles,
        w_tiles,
        config.band,
        config.swapped,
        gated,
        bias is not None,
        config.groups,
        config.rows,
        config.columns,
        config.stages,
        x_rows // box[0] if config.swapped else w_rows // box[1] // (2 if gated else 1),
        config.buffers,
        dependent,
        num_warps=4,
        maxnreg=_REGISTERS[config.groups],
        **extra,
    )
    return y


def _describe(rows: Tensor, height: int, width: int = HOPPER_PIECE) -> Any:
    """The descriptor of a matrix for bulk copies of [height, width] elements."""
    block = [height, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, TYPES[rows.dtype])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block, layout)


def _describe_matrix(weight: Tensor, rows: int, gated: bool) -> Any:
    """The same for `rows` rows of weights, by turns 8 of either half if gated."""
    if not gated:
        return _describe(weight, rows)
    n, k = weight.shape
    block = [rows // 16, 2, 8, HOPPER_PIECE]
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return TensorDescriptor(weight, [n // 16, 2, 8, k], [8 * k, n // 2 * k, k, 1], block, layout)


@cache
def _processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
