"""Plans of a pipeline take turns."""

from __future__ import annotations

from itertools import pairwise

import pytest

from octavo.core.params import SamplingParams
from octavo.core.request import Request
from tests.support.drive import Driver


@pytest.mark.parametrize("overlap", [0, 1])
def test_plans_that_follow_each_other_have_different_rows(overlap: int) -> None:
    driver = Driver(windows=[None], num_blocks=100, max_len=40, overlap=overlap, stages=2)
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
    for i in range(4):
        driver.scheduler.add(Request(str(i), [i, 1, 2], params, 0.0))
    driver.run()
    steady = [plan.rows.tolist() for plan in driver.plans if plan.num_decode == len(plan.rows)]
    assert len(steady) > 30
    assert all(set(one).isdisjoint(other) for one, other in pairwise(steady))
    assert {len(rows) for rows in steady} == {2}
