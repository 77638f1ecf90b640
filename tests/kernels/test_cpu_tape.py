"""Tapes: what they record they repeat on the memory of the moment, and what they cannot record they refuse."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from octavo.kernels import cpu
from octavo.kernels.cpu import build, native
from octavo.kernels.cpu.tape import Tapes, Unrecordable

pytestmark = pytest.mark.skipif(build.available() is not None, reason="needs a C compiler")


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Work:
    """A chain of kernels over `x` with temporaries, scratch memory and views."""

    def __init__(self, tokens: int = 5, size: int = 96, depth: int = 4) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(tokens, size)
        self.norm = torch.rand(size)
        self.up = [torch.randn(4 * size, size) / 8 for _ in range(depth)]
        self.down = [torch.randn(size, 2 * size) / 8 for _ in range(depth)]
        self.head = torch.randn(17, 64)

    def __call__(self) -> Tensor:
        x = self.x
        for up, down in zip(self.up, self.down, strict=True):
            gated, x = cpu.norm_linear(x, None, self.norm, 1e-5, up, None, gated=True)
            x = cpu.add_rms_norm(cpu.linear(gated.view(gated.shape), down, None), x, self.norm, 1e-5)[1]
        return cpu.linear(x[:, :64], self.head, None)


def test_a_replay_repeats_the_calls_on_what_memory_holds_then() -> None:
    work, tapes = Work(), Tapes()
    replay, result = tapes.record(work)
    for _ in range(20):
        work.x.normal_()
        replay()
        assert torch.equal(result, work())


def test_recording_computes_nothing() -> None:
    last_token, logits = torch.zeros(3, dtype=torch.int64), torch.eye(3)
    neutral, rows = torch.zeros(3), torch.arange(3)
    off = (neutral, torch.zeros(3, dtype=torch.int32), neutral + 1, neutral, last_token + 1, rows)

    def work() -> Tensor:
        return cpu.sample_rows(logits, rows, *off, last_token=last_token)

    replay, tokens = Tapes().record(work)
    assert last_token.tolist() == [0, 0, 0]
    replay()
    assert last_token.tolist() == tokens.tolist() == [0, 1, 2]


def test_tapes_of_one_pool_share_its_memory_and_keep_their_results_apart_from_others() -> None:
    tapes, works = Tapes(), [Work(tokens) for tokens in (6, 5, 7)]
    records = [tapes.record(work) for work in works]
    for (replay, result), work in [*zip(records, works, strict=True)] * 2:
        replay()
        assert torch.equal(result, work())
    rows = sum(work.x.shape[0] for work in works)
    assert tapes.nbytes < 3 * rows * 4 * (96 + 192 + 96 + 96 + 96)


COMPUTING: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: x + 1,
    "in place": lambda x: x.add_(1),
    "conversion": lambda x: x.double(),
    "copy": lambda x: x.T.contiguous(),
    "copying reshape": lambda x: x.T.reshape(-1),
    "filled memory": lambda x: torch.zeros(3),
    "indexing": lambda x: x[torch.tensor([0])],
    "assignment": lambda x: x.__setitem__(0, 1.0),
    "reading a value": lambda x: bool(x[0, 0] > 0),
    "another kernel": lambda x: torch.nn.functional.linear(x, x),
    "data from elsewhere": lambda x: torch.tensor([1, 2]),
    "transposed memory": lambda x: torch.empty_like(x.T),
}


@pytest.mark.parametrize("computes", COMPUTING.values(), ids=COMPUTING)
def test_what_computes_without_a_kernel_is_refused_and_nothing_is_done(computes: Callable[[Tensor], object]) -> None:
    x, work = torch.randn(4, 8), Work()
    before = x.clone()

    def both() -> Tensor:
        y = work()
        computes(x)
        return y

    with torch.inference_mode(), pytest.raises(Unrecordable, match="computes, and is no kernel"):
        Tapes().record(both)
    assert torch.equal(x, before)
    assert torch.equal(cpu.linear(x, x, None), cpu.linear(before, before, None)), "kernels run again after a failure"


def test_views_are_no_work() -> None:
    x = torch.randn(4, 6)

    def work() -> Tensor:
        a, b = torch.split(x, 2)
        views = (
            x[1:],
            x.view(-1),
            x.T,
            x.flatten(),
            x.reshape(3, 8),
            x.unsqueeze(0),
            *x.unbind(),
            x.contiguous(),
            x.float(),
        )
        assert all(view.untyped_storage().data_ptr() == x.data_ptr() for view in (a, b, *views))
        return cpu.linear(a, b, None)

    with torch.inference_mode():
        replay, result = Tapes().record(work)
        replay()
        assert torch.equal(result, cpu.linear(x[:2], x[2:], None))


def test_scratch_memory_grows_within_a_step() -> None:
    x, wide = torch.randn(130, 64), torch.randn(40_000, 64)
    small, norm = torch.randn(8, 64), torch.ones(64)

    def work() -> Tensor:
        first = cpu.norm_linear(x[:1], None, norm, 1e-5, small, None, gated=True)[0]
        many = cpu.norm_linear(x, None, norm, 1e-5, wide, None, gated=True)[0]
        return cpu.linear(many[:, :4], first, None)

    replay, result = Tapes().record(work)
    replay()
    assert torch.equal(result, work())


def test_threads_of_their_own_do_not_record() -> None:
    x = torch.randn(2, 64)
    wanted, found = cpu.linear(x, x, None), []
    with native.recording() as calls:
        thread = threading.Thread(target=lambda: found.append(cpu.linear(x, x, None)))
        thread.start()
        thread.join()
        assert len(calls) == 0
    assert torch.equal(found[0], wanted)
