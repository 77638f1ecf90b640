from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch

from octavo.core.errors import UnsupportedModel
from octavo.formats.gguf import TYPES
from octavo.weights.gguf_types import dequantize

BLOCKS = {name: (size, nbytes) for name, size, nbytes in TYPES.values()}
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("name", [*QUANTIZED, "F32", "F16", "BF16"])
def test_random_bytes_decode_exactly_as_the_reference(name: str) -> None:
    size, nbytes = BLOCKS[name]
    rows, columns = 37, 2048  # several decoding chunks of the smallest block and a part of one
    raw = np.random.default_rng(len(name)).integers(0, 256, (rows, columns // size * nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    result = dequantize(raw.tobytes(), name, (rows, columns))
    assert result.shape == (rows, columns)
    np.testing.assert_array_equal(result.float().numpy(), expected)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("byte", [0, 0x3C, 0xBC, 0x80, 0x7F])
def test_extreme_blocks(name: str, byte: int) -> None:
    size, nbytes = BLOCKS[name]
    raw = np.full((3, nbytes), byte, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantize(raw.tobytes(), name, (3, size)).numpy(), expected)


@pytest.mark.parametrize("threads", [None, 3])
def test_more_than_one_chunk(threads: int | None) -> None:
    pool = threads and ThreadPoolExecutor(threads)
    raw = np.random.default_rng(0).integers(0, 120, (9001, 34), dtype=np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(dequantize(raw.tobytes(), "Q8_0", (9001, 32), pool or None).numpy(), expected)
    if pool:
        pool.shutdown()


def test_floats_keep_their_type() -> None:
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    for name, dtype in {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}.items():
        data = values.to(dtype).view(torch.uint8).numpy().tobytes()
        result = dequantize(data, name, (2, 2))
        assert result.dtype == dtype
        assert torch.equal(result.float(), values)


def test_other_formats_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="IQ4_NL is not supported"):
        dequantize(bytes(18), "IQ4_NL", (1, 32))
