"""Whatever the scheduler does, every sequence gets exactly the tokens of a computation without cache."""

from __future__ import annotations

from itertools import product

import pytest

from octavo.core.params import SamplingParams
from octavo.core.request import Delta, Request
from tests.support.drive import Driver
from tests.support.echo import naive, salt_of

WINDOWS: dict[str, list[int | None]] = {"full": [None], "window": [6], "mixed": [None, 6, 6]}
BUDGETS = (4, 16)
COMBINATIONS = list(product(WINDOWS, BUDGETS, ("tight", "ample"), (True, False), (0, 1), (0, 3), (1, 2)))


def requests(n: int) -> list[Request]:
    shared = [7, 3, 9, 1, 4, 4, 8, 2, 6]
    prompts = [shared + [i, i + 1] * (1 + i % 3) for i in range(6)] + [[5], shared[:8], shared[:4], [*shared, 0, 1]]
    return [
        Request(
            str(i),
            prompt,
            SamplingParams(n=n, temperature=float(i % 2), seed=i, max_tokens=5 + 3 * (i % 4), ignore_eos=i % 3 == 0),
            0.0,
            whole=i % 3 != 1,
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(("kind", "budget", "pool", "prefix", "overlap", "draft", "n"), COMBINATIONS)
def test_tokens_equal_a_naive_computation(
    kind: str, budget: int, pool: str, prefix: bool, overlap: int, draft: int, n: int
) -> None:
    windows = WINDOWS[kind]
    eos = (11,)
    driver = Driver(
        windows=windows,
        num_blocks=1 + (9 if pool == "tight" else 60) * len(windows),
        budget=budget,
        max_len=32,
        overlap=overlap,
        prefix_caching=prefix,
        max_draft=draft,
        vocab=20,
        eos=eos,
    )
    wanted = {}
    for request in requests(n):
        driver.scheduler.add(request)
        params = request.params
        assert params.max_tokens is not None
        assert params.seed is not None
        for index in range(n):
            salt = salt_of(params, params.seed + index)
            tokens = naive(request.prompt_token_ids, params.max_tokens, windows, salt, 20)
            if not params.ignore_eos and eos[0] in tokens:
                tokens = tokens[: tokens.index(eos[0]) + 1]
            wanted[request.id, index] = tokens
    got: dict[tuple[str, int], list[int]] = {key: [] for key in wanted}
    ended = []
    for delta in driver.run():
        got[delta.request_id, delta.index] += delta.token_ids
        if delta.finish_reason is not None:
            ended.append((delta.request_id, delta.index))
    assert got == wanted
    assert sorted(ended) == sorted(wanted)
    stats = driver.scheduler.snapshot()
    assert (stats.preemptions > 0) == (pool == "tight") or kind != "full"
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0
    assert max(plan.num_tokens for plan in driver.plans) <= budget


def test_a_whole_request_that_is_ended_tells_what_it_has() -> None:
    driver = Driver(windows=[None], num_blocks=40, vocab=20)
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    driver.scheduler.add(Request("r", [7, 3, 9], params, 0.0, whole=True))
    for _ in range(8):
        assert driver.turn() == []
    for index in (1, 0):
        (delta,) = driver.scheduler.finish("r", index)
        assert (delta.index, delta.finish_reason, delta.scheduled_at) == (index, "abort", 1.0)
        assert len(delta.token_ids) >= 7
        assert delta.token_ids == naive([7, 3, 9], len(delta.token_ids), [None], 3 + index, 20)
    assert driver.scheduler.finish("r") == []
    assert not driver.scheduler.has_work()


@pytest.mark.parametrize("ended", ["length", "abort"])
def test_generated_blocks_are_found_whatever_ended_their_sequence(ended: str) -> None:
    driver = Driver(windows=[None], num_blocks=60, max_len=100, vocab=40, overlap=1)
    most = 40 if ended == "length" else 80
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=most, ignore_eos=True)
    driver.scheduler.add(Request("first", [7, 3, 9], params, 0.0))
    tokens: list[int] = []
    while len(tokens) < 40:
        tokens += [token for delta in driver.turn() for token in delta.token_ids]
    driver.scheduler.finish("first")
    driver.run()
    driver.scheduler.add(Request("next", [7, 3, 9, *tokens, 1], SamplingParams(max_tokens=1), 0.0))
    (delta,) = driver.run()
    assert delta.cached_tokens == 40  # of 43, in blocks of 4


def test_what_a_failed_step_was_to_write_is_not_found() -> None:
    driver = Driver(windows=[None], num_blocks=60, vocab=40)
    tokens = naive([7, 3, 9], 5, [None], 3, 40)
    assert tokens[-1] not in tokens[:-1]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, ignore_eos=True, stop_token_ids=[tokens[-1]])
    scheduler = driver.scheduler
    scheduler.add(Request("first", [7, 3, 9], params, 0.0))
    ahead = None
    while (plan := scheduler.schedule()) is not None:  # the last one is to write the token that ended the sequence
        launched = driver.worker.execute(plan)
        deltas: list[Delta] = [] if ahead is None else scheduler.commit(ahead)
        ahead = launched
        if any(delta.finish_reason == "stop" for delta in deltas):
            break
    assert scheduler.fail("no luck") == []
    scheduler.check()
    scheduler.add(Request("next", [7, 3, 9, *tokens, 1], SamplingParams(max_tokens=1), 0.0))
    (delta,) = driver.run()
    assert delta.cached_tokens == 0
