"""The Hopper kernels compile for compute capability 9.0, which needs no GPU.

A process of its own compiles them, because Triton's interpreter, which other tests use, is chosen when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.skipif(VERSION >= (3, 9), reason="no PyTorch that Octavo allows comes with Triton 3.9 or later")
def test_kernels_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["_product", "_product", "_hopper"]


class Driver:
    """Stands for a Hopper GPU's."""

    launcher_cls = staticmethod(lambda *_args, **_options: None)
    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232_448})

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_all() -> None:
    """Prints the names of the kernels that became machine code."""
    from triton.runtime import driver

    from octavo.kernels.cuda import attention_hopper, launch, linear_hopper
    from octavo.kernels.cuda.linear_config import HopperConfig

    def compiling(kernel: Any) -> None:
        run = kernel.run

        def compiled(*args: Any, **options: Any) -> None:
            if "wgmma.mma_async" in run(*args, **{**options, "warmup": True}).asm["ptx"]:
                print(kernel.__name__)

        kernel.run = compiled

    driver.set_active(Driver())
    vars(launch)["_allowed"] = True
    vars(torch.cuda)["get_device_properties"] = lambda _: SimpleNamespace(multi_processor_count=132)
    compiling(linear_hopper._product)
    compiling(attention_hopper._hopper)
    x, weight = (torch.zeros(rows, 64, dtype=torch.bfloat16) for rows in (64, 256))
    for config in (HopperConfig(True, 1, 64, 64, 4), HopperConfig(False, 2, 64, 64, 4)):
        linear_hopper.hopper_linear(x, weight, weight[:, 0].contiguous(), gated=config.swapped, config=config)
    q, cache = (torch.zeros(*shape, 64, dtype=torch.bfloat16) for shape in ((100, 8), (20, 16, 2)))
    table, starts, items = (torch.zeros(shape, dtype=torch.int32) for shape in ((4, 8), (5,), (3, 2)))
    kernel = attention_hopper.Hopper(8, 2, q.device)
    lens, out = starts[:4], torch.zeros_like(q)
    kernel.prefill(q, cache, cache.clone(), table, lens, starts, lens, items, out, scale=0.1, pdl=True)


if __name__ == "__main__":
    compile_all()
