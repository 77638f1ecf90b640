"""The functions that layers compute with, as one Protocol; a backend is a module that has them all.

`reference` implements every function in plain torch, for every device and dtype. A faster backend is a module that
starts from the reference's names and overrides some, so a missing override is slow, never wrong. Chosen once at load
and handed to layers. Owns no state and no memory: functions return new tensors, and write only where they say so.
Nothing is meant to be differentiated: the kernels record no gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from octavo.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class Kernels(Protocol):
    """Functions over T tokens. Half types (bfloat16, float16) compute in float32 inside and round at the end."""

    # The batch of a step: see reference_batch.

    def prepare_decode(
        self,
        rows: Tensor,
        last_token: Tensor,
        num_computed: Tensor,
        tables: Tensor,
        block_size: int,
        *,
        tokens: Tensor,
        positions: Tensor,
        next_positions: Tensor,
        seq_lens: Tensor,
        slots: Tensor,
    ) -> None:
        """Lays out a step of one token a row: see `reference_batch.prepare_decode`."""

    def apply_diffs(
        self, tables: Tensor, places: Tensor, blocks: Tensor, num_computed: Tensor, rows: Tensor, values: Tensor
    ) -> None:
        """What changed of the rows' state: see `reference_batch.apply_diffs`."""

    def slots(self, table: Tensor, row_of: Tensor, positions: Tensor, block_size: int) -> Tensor:
        """[T] int64: block * block_size + offset of each token's KV."""

    def verify(self, sampled: Tensor, drafts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """How many sampled tokens of each drafted row are kept, and the last of them."""

    # Layers: see reference.

    def embedding(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens [T] int64, table [V, hidden] -> [T, hidden]."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in], weight [out, in], bias [out] -> [T, out]."""

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu_mul(linear(x)) [T, out / 2]: the matrix stacks gate and up."""

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        gated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """s = x + residual (or x); returns (linear(rms_norm(s)), s). `gated`: gated_linear of it."""

    def add_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor) -> bool:
        """stream [T, out] += linear(x), in place, where that saves time; False, with nothing done, elsewhere."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """s = x + residual; returns (rms_norm(s), s)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2m] -> silu(first half) * second half [T, m] (SwiGLU, arXiv:2002.05202)."""

    def rotation(self, positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions x frequencies, each [T, 1, 2 * pairs] in inv_freq's dtype, times `scale`.

        positions [T] int64; inv_freq [pairs], or [T, pairs] where frequencies depend on the position. The second half
        repeats the first, with the first half of the sines negated: x * cos + halves-swapped(x) * sin rotates each
        pair (x[i], x[i + pairs]).
        """

    def rope_norm_write_kv(
        self,
        qkv: Tensor,
        num_heads: int,
        rotation: tuple[Tensor, Tensor],
        norms: tuple[Tensor, Tensor, float] | None,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """Splits qkv, normalises q and k per head, rotates them, writes k and v; returns q [T, heads, dim].

        qkv [T, (heads + 2 * kv_heads) * dim] holds q, k, v side by side; norms = (q weight [dim], k weight [dim], eps)
        or None. Caches are [num_blocks, block_size, kv_heads, dim]; token t goes to slots[t] (int64) = block *
        block_size + offset and nothing else is touched. Dimensions beyond the rotation's width pass unrotated.
        """

    # Sampling: see reference_sampling.

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
    ) -> Tensor:
        """One token id per row of logits [S, V], int64 [S]."""

    def sample_rows(
        self,
        logits: Tensor,
        rows: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
        *,
        filtered: bool = True,
        last_token: Tensor | None = None,
    ) -> Tensor:
        """`sample` with the parameters of `rows` [S] in tables [R+1]; optionally writes last_token[rows] [R+1] too.

        With filtered=False no row has top_k, top_p or min_p.
        """

    def apply_penalties(
        self,
        logits: Tensor,
        at: Tensor,
        slots: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        presence: Tensor,
        frequency: Tensor,
        repetition: Tensor,
    ) -> None:
        """Penalises tokens already used, in place, in rows `at` of logits."""

    def apply_masks(self, logits: Tensor, at: Tensor, bits: Tensor) -> None:
        """Leaves the tokens that each line's bits allow, in place, in rows `at` of logits."""

    def top_logprobs(self, logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, log-probabilities, ranks) of the chosen token and the k best of each row."""


def load(device_kind: str) -> Kernels:
    """The kernel backend for "cpu" or "cuda"; ConfigError for anything else."""
    if device_kind not in ("cpu", "cuda"):
        raise ConfigError(f"no kernels for device {device_kind!r}; use cpu or cuda")
    if device_kind == "cuda":
        from octavo.kernels import cuda

        return cuda
    from octavo.kernels import reference

    if device_kind == "cpu":
        from octavo.kernels.cpu import build

        if build.available() is None:
            from octavo.kernels import cpu

            return cpu
    return reference
