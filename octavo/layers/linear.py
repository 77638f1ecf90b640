"""Linear = Layout x Scheme: the layout says what of the matrix is here, the scheme how it is stored and multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from octavo.layers.build import Build, Slot, floats
from octavo.parallel import Layout, Slice
from octavo.quant import Stored


class Linear:
    """x [T, in here] -> [T, out here]: the parts of `layout`, stacked in order.

    With a layout of partial sums the result still has to be reduced over ranks (`AddNorm` does), and rank 0 alone adds
    the bias.
    """

    def __init__(self, in_features: int, layout: Layout, build: Build, *, bias: bool = False) -> None:
        self._kernels, self._scheme = build.kernels, build.scheme
        self._shapes = {part: (out, in_features) for part, out in layout.parts.items()}
        rank, size = build.comm.rank, build.comm.size
        self._alone = size == 1
        self._reads = {part: layout.read(part, in_features, rank, size) for part in layout.parts}
        self._offsets: dict[str, int] = {}
        out = 0
        for part, read in self._reads.items():
            self._offsets[part] = out
            out += read.out[1] - read.out[0]
        start, stop = next(iter(self._reads.values())).in_
        self._params = self._scheme.create(out, stop - start, build.dtype, build.device)
        self._has_bias = bias
        self._bias = build.empty(out) if bias and not (layout.partial and rank) else None

    def __call__(self, x: Tensor) -> Tensor:
        return self._scheme.apply(self._kernels, x, self._params, self._bias)

    def gated(self, x: Tensor) -> Tensor:
        """SwiGLU of the two parts: silu(first) * second."""
        return self._scheme.apply_gated(self._kernels, x, self._params, self._bias)

    def onto(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        """(partial sums, stream), or (stream, None) with the sums added to it, which is overwritten then.

        The second where no rank has other sums to add, and one pass over the stream is saved.
        """
        if self._alone and self._scheme.apply_onto(self._kernels, x, self._params, self._bias, stream):
            return stream, None
        return self(x), stream

    def after_norm(
        self, x: Tensor, residual: Tensor | None, norm: tuple[Tensor, float], *, gated: bool
    ) -> tuple[Tensor, Tensor]:
        """(self(rms_norm(s)), s) of s = x + residual (or x), norm = (weight, eps); gated: SwiGLU of the two parts."""
        return self._scheme.apply_after_norm(self._kernels, x, residual, norm, self._params, self._bias, gated)

    def gather(self, index: Tensor) -> Tensor:
        """Rows index [T] int64 of the matrix, as an embedding has it: [T, in here]."""
        return self._scheme.gather(self._kernels, index, self._params)

    def slots(self) -> Mapping[tuple[str, str], Slot]:
        slots: dict[tuple[str, str], Slot] = {}
        for part, (out, in_) in self._shapes.items():
            for key, granularity in self._scheme.granularity.items():
                shape = (out // granularity[0], in_ // granularity[1])
                slots[part, key] = Slot(shape, partial(self._load, part, key))
            if self._has_bias:
                slots[part, "bias"] = Slot((out,), partial(self._load_bias, part))
        return slots

    def tensors(self) -> Mapping[str, Tensor]:
        return self._params if self._bias is None else self._params | {"bias": self._bias}

    def finish(self) -> None:
        self._scheme.finish(self._params)

    def _slot(self, part: str) -> Slice:
        (first, last), (start, stop) = self._reads[part].out, self._reads[part].in_
        offset = self._offsets[part]
        return Slice((offset, offset + last - first), (0, stop - start))

    def _load(self, part: str, key: str, tensor: Stored) -> None:
        granularity = self._scheme.granularity[key]
        cut = tensor[self._reads[part].index(granularity)]
        self._scheme.load(self._params, key, self._slot(part).index(granularity), cut)

    def _load_bias(self, part: str, tensor: Stored) -> None:
        if self._bias is not None:
            self._bias[slice(*self._slot(part).out)].copy_(floats(tensor[(slice(*self._reads[part].out),)]))
