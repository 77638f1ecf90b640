"""Log-probabilities against torch's log_softmax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from octavo.core.plan import Admit
from octavo.kernels.reference_sampling import top_logprobs
from octavo.sampling import Sampler, prompt_logprobs
from octavo.sampling import sampler as sampler_module

VOCAB, MAX_ROWS = 40, 6
MakeAdmit = Callable[..., Admit]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 5, 20, 300])
def test_top_logprobs(k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 300, dtype=dtype) * 4
    chosen = torch.randint(0, 300, (6,))
    ids, logprobs, ranks = top_logprobs(logits, chosen, k)
    exact = torch.log_softmax(logits.double(), -1)
    assert ids.shape == logprobs.shape == (6, 1 + k)
    assert logprobs.dtype == dtype
    torch.testing.assert_close(
        logprobs.double(), exact.gather(1, ids), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )
    order = exact.argsort(-1, descending=True)
    assert torch.equal(ids[:, 0], chosen)
    assert torch.equal(ids[:, 1:], order[:, :k])
    assert torch.equal(ranks, (order == chosen[:, None]).int().argmax(-1) + 1)


def test_equals_come_in_order_of_their_ids() -> None:
    logits = torch.zeros(1, 12)
    logits[0, [9, 2, 11]] = 1.0
    ids, _, ranks = top_logprobs(logits, logits.argmax(-1), 5)
    assert ids.tolist() == [[2, 2, 9, 11, 0, 1]]
    assert ranks.tolist() == [1]


def test_sampler_reports_raw_logprobs_for_the_rows_that_ask(sampler: Sampler, admit: MakeAdmit) -> None:
    sampler.add(admit(0, logprobs=3, logit_bias={7: 100.0}))
    sampler.add(admit(1))
    sampler.add(admit(2, logprobs=0, temperature=1.0))
    logits = torch.randn(4, VOCAB)
    exact = torch.log_softmax(logits.double(), -1)
    samples = sampler(logits, np.array([2, 1, 0, 2], np.int32), torch.tensor([5, 2, 2, 6]))
    found = samples.host_logprobs()
    assert set(found) == {0, 2, 3}
    assert samples.tokens[2] == 7
    best = exact[2].argsort(descending=True)
    assert found[2].token_ids == [7, *best[:3].tolist()]
    assert found[2].rank == (best == 7).int().argmax() + 1
    assert found[2].logprobs == pytest.approx(exact[2][found[2].token_ids].tolist(), abs=1e-5)
    for i in (0, 3):
        token = int(samples.tokens[i])
        assert found[i].token_ids == [token]
        assert found[i].logprobs == pytest.approx([float(exact[i, token])], abs=1e-5)


def test_no_logprobs_asked(sampler: Sampler, admit: MakeAdmit) -> None:
    sampler.add(admit(0, logprobs=2))
    sampler.remove(0)
    sampler.add(admit(1))
    assert sampler(torch.randn(1, VOCAB), np.array([1], np.int32), torch.tensor([2])).host_logprobs() == {}


def test_prompt_logprobs_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(50, 64), torch.randint(0, 64, (50,))
    whole = prompt_logprobs(logits, targets, 4)
    monkeypatch.setattr(sampler_module, "_SLICE", 64 * 7)
    sliced = prompt_logprobs(logits, targets, 4)
    assert [entry.token_ids for entry in sliced] == [entry.token_ids for entry in whole]
    exact = torch.log_softmax(logits.double(), -1)
    for i, entry in enumerate(sliced):
        assert entry.token_ids == [int(targets[i]), *exact[i].topk(4).indices.tolist()]
        assert entry.logprobs == pytest.approx(exact[i, entry.token_ids].tolist(), abs=1e-5)
        assert entry.rank == 1 + int((exact[i] > exact[i, targets[i]]).sum())


def test_prompt_logprobs_of_nothing() -> None:
    assert prompt_logprobs(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), 3) == []
