"""Plans on the wire."""

from __future__ import annotations

import numpy as np

from octavo.core.params import SamplingParams
from octavo.core.plan import decode_plan, encode_plan
from octavo.core.request import Request
from tests.support.drive import Driver


def test_a_plan_survives_the_wire() -> None:
    driver = Driver(windows=[None, 6], num_blocks=60)
    driver.scheduler.add(Request("a", [1, 2, 3], SamplingParams(n=2, max_tokens=3, bad_words=["x"]), 0.0))
    plan = driver.scheduler.schedule(1.0)
    assert plan is not None
    plan.tokens = np.array([70000, 2, 3], np.int32)
    again = decode_plan(encode_plan(plan))
    for name in plan.__struct_fields__:
        before, after = getattr(plan, name), getattr(again, name)
        assert np.array_equal(before, after) if isinstance(before, np.ndarray) else before == after, name


def test_steady_decode_of_256_rows_is_small() -> None:
    driver = Driver(windows=[None], num_blocks=8192, block_size=16, budget=4096, max_seqs=256, max_len=512)
    for i in range(256):
        prompt = [i % 50] * (1 + i % 40)
        driver.scheduler.add(Request(str(i), prompt, SamplingParams(max_tokens=100, ignore_eos=True), 0.0))
    while len(driver.plans) < 80:
        driver.turn()
    sizes = [len(encode_plan(plan)) for plan in driver.plans[-64:]]
    assert all(plan.num_decode == 256 for plan in driver.plans[-64:])
    assert sum(sizes) / len(sizes) < 1024
    assert max(sizes) < 4096
