"""Layers' functions over the C kernels: products, norms, activation, rotary positions.

Tensors that these do not take (other dtypes, other layouts) go to the reference. At one token the time of a function is
mostly this Python, unless the step is recorded (`tape`), hence checks in one line each.
"""

from __future__ import annotations

from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.cpu.native import HALF, Functions, Gate, Linear, Norm, Rope, dense, functions, run

LARGE = 160
"""Tokens from which torch's product of float32 is at least as fast; of bfloat16 only where the processor has it."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in] float32 or bfloat16, of which bias [out] has the dtype too -> [T, out] of x's."""
    native = functions()
    if not _multiplies(native, x, weight):
        return reference.linear(x, weight, bias)
    (tokens, size), out = x.shape, weight.shape[0]
    y = x.new_empty((tokens, out))
    product = Linear(
        x.data_ptr(),
        None,
        None,
        None,
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.stride(0) if tokens > 1 else size,
        tokens,
        size,
        out,
        0.0,
        HALF[x.dtype],
        HALF[weight.dtype],
        False,
    )
    run(native.linear, product, tokens * size * out)
    return y


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in] that stacks gate and up -> silu(gate) * up [T, out / 2]."""
    return silu_mul(linear(x, weight, bias))


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """One call; between norm, product and activation nothing is rounded to bfloat16 unless the product wants it."""
    native, kind = functions(), x.dtype
    alike = norm_weight.dtype == kind and (residual is None or (residual.dtype == kind and residual.is_contiguous()))
    if not alike or not x.is_contiguous() or not _multiplies(native, x, weight):
        h, s = (rms_norm(x, norm_weight, eps), x) if residual is None else add_rms_norm(x, residual, norm_weight, eps)
        return (gated_linear if gated else linear)(h, weight, bias), s
    (tokens, size), out = x.shape, weight.shape[0]
    y = x.new_empty((tokens, out // 2 if gated else out))
    total = x if residual is None else x.new_empty((tokens, size))
    product = Linear(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        total.data_ptr(),
        norm_weight.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        size,
        tokens,
        size,
        out,
        eps,
        HALF[kind],
        HALF[weight.dtype],
        gated,
    )
    run(native.linear, product, tokens * size * out)
    return y, total


def _multiplies(native: Functions, x: Tensor, weight: Tensor) -> bool:
    """Whether the C product takes these, and is the faster one."""
    half_x, half_w = HALF.get(x.dtype), HALF.get(weight.dtype)
    if half_x is None or half_w is None or not weight.is_contiguous() or not weight.is_cpu or x.stride(1) != 1:
        return False
    return x.shape[0] < LARGE or half_x != half_w or (half_w and not native.multiplies_bf16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not dense(x) or x.dtype != weight.dtype:
        return reference.rms_norm(x, weight, eps)
    y, size = x.new_empty(x.shape), weight.shape[0]
    rows, half = x.numel() // size, HALF[x.dtype]
    norm = Norm(x.data_ptr(), None, None, weight.data_ptr(), y.data_ptr(), rows, size, eps, half)
    run(functions().rms_norm, norm, 2 * x.numel())
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not dense(x) or not residual.is_contiguous() or not x.dtype == residual.dtype == weight.dtype:
        return reference.add_rms_norm(x, residual, weight, eps)
    y, total, size = x.new_empty(x.shape), x.new_empty(x.shape), weight.shape[0]
    norm = Norm(
        x.data_ptr(),
        residual.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // size,
        size,
        eps,
        HALF[x.dtype],
    )
    run(functions().rms_norm, norm, 2 * x.numel())
    return y, total


def silu_mul(gate_up: Tensor) -> Tensor:
    if not dense(gate_up):
        return reference.silu_mul(gate_up)
    size = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], size))
    gate = Gate(gate_up.data_ptr(), y.data_ptr(), y.numel() // size, size, HALF[gate_up.dtype])
    run(functions().silu_mul, gate, 4 * y.numel())
    return y


def rope_norm_write_kv(
    qkv: Tensor,
    num_heads: int,
    rotation: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor, float] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    cos, sin = rotation
    taken = dense(qkv) and dense(k_cache) and dense(v_cache) and dense(cos) and dense(sin) and slots.is_contiguous()
    if norms is not None:
        taken = taken and norms[0].dtype == norms[1].dtype == qkv.dtype
    if not taken or k_cache.dtype != v_cache.dtype or HALF[cos.dtype]:
        return reference.rope_norm_write_kv(qkv, num_heads, rotation, norms, k_cache, v_cache, slots)
    kv_heads, dim = k_cache.shape[2:]
    tokens, width = qkv.shape
    q = qkv.new_empty((tokens, num_heads, dim))
    rope = Rope(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        None if norms is None else norms[0].data_ptr(),
        None if norms is None else norms[1].data_ptr(),
        slots.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        tokens,
        width,
        num_heads,
        kv_heads,
        dim,
        cos.shape[-1],
        0.0 if norms is None else norms[2],
        HALF[qkv.dtype],
        HALF[k_cache.dtype],
    )
    run(functions().rope_norm_write_kv, rope, 2 * qkv.numel())
    return q
