"""Every transform against a recount from plain token lists, through admissions, removals and preemptions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.core.plan import Admit
from octavo.kernels import reference
from octavo.sampling import Sampler

VOCAB, MAX_ROWS, EOS = 40, 6, (3, 4)
INF = float("inf")
MakeAdmit = Callable[..., Admit]
Run = Callable[..., Tensor]


def naive(logits: list[float], admit: Admit, prompt: list[int], output: list[int]) -> list[float]:
    """The logits that are sampled from, from token lists alone."""
    params, out = admit.params, list(logits)
    if params.allowed_token_ids:
        out = [x if i in params.allowed_token_ids else -INF for i, x in enumerate(out)]
    for *prefix, last in admit.bad_word_ids:
        if len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
            out[last] = -INF
    if len(output) < params.min_tokens:
        for token in {*EOS, *(params.stop_token_ids or ())}:
            out[token] = -INF
    for token, amount in (params.logit_bias or {}).items():
        out[token] += amount
    for token in {*prompt, *output}:
        out[token] *= params.repetition_penalty if out[token] <= 0 else 1 / params.repetition_penalty
    for token in set(output):
        out[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return out


def random_request(rng: random.Random) -> dict[str, Any]:
    wishes: dict[str, Any] = {}
    if rng.random() < 0.4:
        wishes["presence_penalty"] = rng.choice([-2.0, 0.5, 1.25])
    if rng.random() < 0.4:
        wishes["frequency_penalty"] = rng.choice([-0.5, 0.25, 2.0])
    if rng.random() < 0.4:
        wishes["repetition_penalty"] = rng.choice([0.5, 1.25, 2.0])
    if rng.random() < 0.3:
        wishes["logit_bias"] = {rng.randrange(VOCAB): rng.uniform(-100, 100) for _ in range(rng.randint(1, 6))}
    if rng.random() < 0.3:
        wishes["allowed_token_ids"] = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
    if rng.random() < 0.4:
        wishes["min_tokens"] = rng.randint(1, 6)
        wishes["stop_token_ids"] = rng.sample(range(VOCAB), rng.randint(0, 3)) or None
    if rng.random() < 0.5:
        words = [[rng.randrange(6) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 12))]
        wishes["bad_word_ids"] = words
    return wishes


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_life(seed: int, dtype: torch.dtype, sampler: Sampler, admit: MakeAdmit) -> None:
    """Rows come, sample, are preempted and come back elsewhere; the logits always match the recount."""
    rng = random.Random(seed)
    running: dict[int, tuple[Admit, list[int], list[int]]] = {}
    waiting: list[tuple[dict[str, Any], list[int], list[int]]] = []
    wishes_of: dict[int, dict[str, Any]] = {}
    for _ in range(40):
        if len(running) < MAX_ROWS and rng.random() < 0.5:
            row = rng.choice([row for row in range(MAX_ROWS) if row not in running])
            fresh: tuple[dict[str, Any], list[int], list[int]]
            fresh = (random_request(rng), [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))], [])
            wishes, prompt, output = waiting.pop() if waiting and rng.random() < 0.7 else fresh
            admission = admit(row, prompt=prompt, output=output, max_tokens=None, **wishes)
            sampler.add(admission)
            running[row], wishes_of[row] = (admission, prompt, list(output)), wishes
        if running and rng.random() < 0.25:
            row = rng.choice(list(running))
            sampler.remove(row)
            _, prompt, output = running.pop(row)
            if rng.random() < 0.7:
                waiting.append((wishes_of[row], prompt, output))
        rows = rng.sample(list(running), rng.randint(0, len(running)))
        if rng.random() < 0.3:
            rows.append(MAX_ROWS)
        positions = [len(running[row][1]) + len(running[row][2]) if row in running else 0 for row in rows]
        logits = torch.randn(len(rows), VOCAB, dtype=dtype) * 3
        expected = [
            naive(x.tolist(), *running[r]) if r in running else x.tolist() for r, x in zip(rows, logits, strict=True)
        ]
        samples = sampler(logits, np.array(rows, np.int32), torch.tensor(positions, dtype=torch.int64))
        wanted = torch.tensor(expected, dtype=dtype).reshape(len(rows), VOCAB)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-5)
        assert samples.tokens.tolist() == logits.argmax(-1).tolist()
        tokens = torch.tensor([rng.randrange(6) if rng.random() < 0.7 else rng.randrange(VOCAB) for _ in rows])
        sampler.observe(np.array(rows, np.int32), tokens.to(torch.int64))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in running:
                running[row][2].append(token)
    for row in list(running):
        sampler.remove(row)
    assert not any(len(transform) for transform in sampler._transforms)


def test_no_transform_changes_nothing_and_takes_one_argmax(
    sampler: Sampler, admit: MakeAdmit, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.add(admit(0))
    sampler.add(admit(1))
    monkeypatch.setattr(reference, "sample", None)
    for transform in sampler._transforms:
        monkeypatch.setattr(type(transform), "apply", None)
        monkeypatch.setattr(type(transform), "observe", None)
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    samples = sampler(logits, np.array([1, 0], np.int32), torch.tensor([2, 2]))
    sampler.observe(np.array([1, 0], np.int32), samples.tokens)
    assert torch.equal(logits, before)
    assert torch.equal(samples.tokens, before.argmax(-1))


def test_removal_frees_memory(sampler: Sampler, admit: MakeAdmit) -> None:
    for row in range(3):
        sampler.add(admit(row, presence_penalty=1.0, bad_word_ids=[[1, 2, 3]], logit_bias={1: 1.0}))
    bad_words, penalties = sampler._transforms[1], sampler._transforms[4]
    assert penalties._counts.shape[0] >= 3  # type: ignore[attr-defined]
    for row in range(3):
        sampler.remove(row)
    assert penalties._counts.numel() == penalties._in_prompt.numel() == 0  # type: ignore[attr-defined]
    assert bad_words._recent.numel() == 0  # type: ignore[attr-defined]
    assert all(len(transform) == 0 for transform in sampler._transforms)


def test_a_row_admitted_again_forgets_its_last_request(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    sampler.add(admit(0, repetition_penalty=2.0, logit_bias={5: 50.0}, min_tokens=9, allowed_token_ids=[1]))
    sampler.observe(np.array([0], np.int32), torch.tensor([7]))
    sampler.add(admit(0))
    logits = torch.randn(1, VOCAB)
    assert torch.equal(run(logits, [0]), logits)


def test_what_was_packed_for_the_same_rows_is_renewed(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    """Rows 0 and 1 sample again and again while row 0 changes hands."""

    def biased() -> list[list[float]]:
        return run(torch.zeros(2, VOCAB), [0, 1])[:, :3].tolist()

    sampler.add(admit(0, logit_bias={0: 1.0}))
    sampler.add(admit(1, logit_bias={1: 2.0}))
    assert biased() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    sampler.remove(0)
    assert biased() == [[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    sampler.add(admit(0, logit_bias={2: 3.0}))
    assert biased() == [[0.0, 0.0, 3.0], [0.0, 2.0, 0.0]]


def test_presence_frequency_and_repetition_by_hand(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    sampler.add(admit(2, prompt=[8, 9], presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0))
    for token in (10, 10, 9):
        sampler.observe(np.array([2], np.int32), torch.tensor([token]))
    logits = torch.full((1, VOCAB), 4.0)
    logits[0, 8] = -4.0
    changed = run(logits, [2])[0]
    assert changed[[8, 9, 10, 11]].tolist() == [-8.0, 2.0 - 0.5 - 0.25, 2.0 - 0.5 - 0.5, 4.0]


def test_penalties_use_what_was_generated_before_a_preemption(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    sampler.add(admit(0, prompt=[5], output=[6, 6], frequency_penalty=1.0))
    changed = run(torch.zeros(1, VOCAB), [0])[0]
    assert changed[[5, 6]].tolist() == [0.0, -2.0]


def test_min_tokens_follows_the_position_of_each_draft(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    sampler.add(admit(0, prompt=[1] * 5, min_tokens=2, stop_token_ids=[11]))
    changed = run(torch.zeros(4, VOCAB), [0, 0, 0, 0], [5, 6, 7, 8])
    assert [row[[3, 4, 11, 12]].tolist() for row in changed] == [[-INF, -INF, -INF, 0.0]] * 2 + [[0.0] * 4] * 2


def test_min_tokens_counts_what_was_generated_before_a_preemption(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    sampler.add(admit(0, prompt=[1, 2], output=[7], min_tokens=2))
    assert [row[3].item() for row in run(torch.zeros(2, VOCAB), [0, 0], [3, 4])] == [-INF, 0.0]
    sampler.add(admit(0, prompt=[1, 2], output=[7, 7], min_tokens=2))
    assert len(sampler._transforms[2]) == 0


def test_stop_ids_outside_the_vocabulary_are_no_matter(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    sampler.add(admit(0, min_tokens=2, stop_token_ids=[VOCAB, 10**6, 5]))
    assert torch.nonzero(run(torch.zeros(1, VOCAB), [0])[0] == -INF)[:, 0].tolist() == [3, 4, 5]


def test_bad_words_match_generated_tokens_only(sampler: Sampler, admit: MakeAdmit, run: Run) -> None:
    words = [[5], [6, 7], [8, 9, 10]]
    sampler.add(admit(0, prompt=[1, 6], bad_word_ids=words))
    sampler.add(admit(1, prompt=[1], output=[8], bad_word_ids=words))

    def banned() -> list[list[int]]:
        changed = run(torch.zeros(2, VOCAB), [0, 1])
        return [torch.nonzero(row == -INF)[:, 0].tolist() for row in changed]

    assert banned() == [[5], [5]]
    sampler.observe(np.array([1, 0], np.int32), torch.tensor([9, 6]))
    assert banned() == [[5, 7], [5, 10]]
    sampler.observe(np.array([0], np.int32), torch.tensor([1]))
    assert banned() == [[5], [5, 10]]


def test_allowed_tokens_with_sampling_and_filters(sampler: Sampler, admit: MakeAdmit) -> None:
    sampler.add(admit(0, temperature=5.0, allowed_token_ids=[4, 9], top_p=0.999))
    sampler.add(admit(1, temperature=5.0, allowed_token_ids=[6, 7], top_k=30))
    sampler.add(admit(2, temperature=5.0, allowed_token_ids=[8]))
    rows = np.repeat(np.arange(3, dtype=np.int32), 50)
    tokens = sampler(torch.randn(150, VOCAB), rows, torch.arange(150)).tokens.reshape(3, 50)
    assert [set(row.tolist()) for row in tokens] == [{4, 9}, {6, 7}, {8}]


def test_rows_sample_with_their_own_parameters(sampler: Sampler, admit: MakeAdmit) -> None:
    given: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.5, "top_k": 4, "seed": 2**63 + 3},
        {"temperature": 2.0, "top_p": 0.5, "min_p": 0.1, "seed": -9},
        {},
    ]
    for row, params in enumerate(given):
        sampler.add(admit(row, **{k: v for k, v in params.items() if k != "seed"}, seed=params.get("seed", 0)))
    rows = np.array([3, 1, 0, 2, 1, MAX_ROWS], np.int32)
    positions = torch.tensor([4, 5, 6, 7, 6, 0])
    logits = torch.randn(6, VOCAB)
    got = sampler(logits.clone(), rows, positions).tokens
    order = [given[row] if row < MAX_ROWS else {} for row in rows]
    wanted = reference.sample(
        logits,
        torch.tensor([float(p.get("temperature", 0.0)) for p in order]),
        torch.tensor([int(p.get("top_k", 0)) for p in order], dtype=torch.int32),
        torch.tensor([float(p.get("top_p", 1.0)) for p in order]),
        torch.tensor([float(p.get("min_p", 0.0)) for p in order]),
        torch.tensor([(int(p.get("seed", 0)) + 2**63) % 2**64 - 2**63 for p in order]),
        positions,
    )
    assert torch.equal(got, wanted)


def test_a_row_at_many_positions_draws_as_one_at_a_time(sampler: Sampler, admit: MakeAdmit) -> None:
    sampler.add(admit(0, temperature=1.0, top_p=0.95))
    sampler.add(admit(1, temperature=1.0))
    logits = torch.randn(8, VOCAB)
    rows = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
    positions = torch.tensor([2, 3, 4, 5, 9, 10, 11, 12])
    together = sampler(logits.clone(), rows, positions).tokens
    for i in range(8):
        alone = sampler(logits[i : i + 1].clone(), rows[i : i + 1], positions[i : i + 1]).tokens
        assert alone.item() == together[i]
