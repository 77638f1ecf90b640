"""RMSNorm, alone and fused with the residual stream."""

from __future__ import annotations

from torch import Tensor

from octavo.layers.build import Build, OneTensor
from octavo.layers.linear import Linear


class RMSNorm(OneTensor):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, of size `size`."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__(build.empty(size))
        self._kernels, self._comm, self.eps = build.kernels, build.comm, eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps)


class AddNorm(RMSNorm):
    """Reduces a block's partial sums over ranks, adds them to the residual stream and normalises it."""

    def add(self, partial: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """partial, residual [T, size] -> (normalised stream, stream); without a residual `partial` is the stream."""
        if residual is None:
            return self(partial), partial
        if (joined := self._comm.add_norm(partial, residual, self.weight, self.eps)) is not None:
            return joined
        return self._kernels.add_rms_norm(self._comm.all_reduce(partial), residual, self.weight, self.eps)

    def into(
        self, linear: Linear, partial: Tensor, residual: Tensor | None, *, gated: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(linear(normalised stream), stream); without a residual `partial` is the stream. gated: then SwiGLU."""
        if residual is None:
            return linear.after_norm(partial, None, (self.weight, self.eps), gated=gated)
        if (joined := self._comm.add_norm(partial, residual, self.weight, self.eps)) is not None:
            h, stream = joined
            return linear.gated(h) if gated else linear(h), stream
        return linear.after_norm(self._comm.all_reduce(partial), residual, (self.weight, self.eps), gated=gated)


class Join:
    """The end of a stage that is not the last: partial sums are reduced and added to the stream, nothing else."""

    def __init__(self, build: Build) -> None:
        self._comm = build.comm

    def __call__(self, partial: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return partial
        return self._comm.all_reduce(partial) + residual
