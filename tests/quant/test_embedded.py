"""The embedded model with its weights as they are in the file, against the same weights as floats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.config.resolve import weight_bytes
from octavo.formats import locate, read_facts
from octavo.kernels.cpu import quant_linear
from tools.teacher_forced import Forced

if quant_linear.available() is not None:
    pytest.skip("no C compiler here", allow_module_level=True)

PROMPT = json.loads((Path(__file__).parents[1] / "fixtures" / "smollm2-greedy.json").read_text())["prompts"][3]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def native() -> Forced:
    return Forced(read_facts(locate(None)), torch.float32, "native")


def test_predictions_are_close_to_those_of_float_weights(native: Forced) -> None:
    tokens, first = PROMPT["prompt_ids"] + PROMPT["tokens"][:-1], len(PROMPT["prompt_ids"]) - 1
    got, targets = native.log_probs(tokens, first), torch.tensor(PROMPT["tokens"])
    assert (got.argmax(1) == targets).float().mean() > 0.9
    wanted = Forced(native.facts, torch.float32, "none").log_probs(tokens, first)
    assert (wanted.exp() * (wanted - got)).sum(1).mean() < 0.01


def test_weights_stay_quantized(native: Forced) -> None:
    held = dict(native.model.tensors())
    planned = weight_bytes(native.facts, "native", "float32") * native.facts.num_parameters
    assert sum(tensor.nbytes for tensor in held.values()) == pytest.approx(planned, rel=0.005)
    assert {tensor.dtype for name, tensor in held.items() if "norm" not in name} == {torch.uint8}
    assert held["blocks.0.attn.qkv.weight"].shape[0] == 960 // 16
