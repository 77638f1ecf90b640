"""What steps say about sequences that go on, and when."""

from __future__ import annotations

from itertools import groupby

from octavo.core.params import SamplingParams
from octavo.core.request import Request
from octavo.scheduler.riders import SOON
from tests.support.drive import Driver
from tests.support.echo import naive


def add(driver: Driver, id: str, prompt: list[int], tokens: int, **params: object) -> None:
    given = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True).replace(**params)
    driver.scheduler.add(Request(id, prompt, given, 0.0, whole=True))


def test_most_steps_change_no_row() -> None:
    driver = Driver(windows=[None], num_blocks=400, max_len=200, overlap=1)
    for i in range(4):
        add(driver, str(i), [i] * (2 + 3 * i), 150)
    driver.run()
    steady = [plan for plan in driver.plans if plan.num_decode == 4]
    changed = [plan.step for plan in steady[1:] if plan.blocks]  # newcomers may need something at once
    assert len(steady) > 100
    assert len(changed) > 5
    assert {step % SOON for step in changed} == {changed[0] % SOON}
    assert max(len(list(rows)) for _, rows in groupby(plan.rows.tolist() for plan in steady)) > 100


def test_nobody_gives_way_to_those_that_have_room() -> None:
    driver = Driver(windows=[None], num_blocks=1 + 4 * 6, budget=32, max_len=32, overlap=1)
    for i in range(4):
        add(driver, str(i), [i] * (1 + 2 * i), 24 - 2 * i)  # 24 computed tokens each, in all that the pool holds
    driver.run()
    assert driver.scheduler.stats.preemptions == 0


def test_a_stop_token_ends_a_sequence_that_is_told_only_then() -> None:
    driver = Driver(windows=[None], num_blocks=60, max_len=60, vocab=40, overlap=1)
    wanted = naive([7, 3, 9], 30, [None], 0, 40)
    stop = wanted[9]
    add(driver, "long", [7, 3, 9], 30)
    add(driver, "stops", [7, 3, 9], 30, stop_token_ids=[stop])
    told = {delta.request_id: delta for delta in driver.run()}
    assert told["long"].token_ids == wanted
    assert told["stops"].token_ids == wanted[: wanted.index(stop) + 1]
    assert (told["stops"].finish_reason, told["stops"].stop_reason) == ("stop", stop)
