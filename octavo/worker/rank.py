"""A rank beside rank 0, wherever it runs: loads its share of the model, then does what the frames say.

Does not own the process (`worker.__main__`, `engine.ray`) or what carries the frames (`parallel`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo.config.parallel import place_of
from octavo.core.plan import Plan
from octavo.parallel import Links, Rows, connect, join_store
from octavo.worker.frames import Order, Sample, Start, decode_frame
from octavo.worker.recorder import size_class
from octavo.worker.worker import Forward, Worker


def join(start: Start, store: Any = None) -> Links:
    """Connects with the other ranks, which do so at the same time; `store` is rank 0's own."""
    config, parallel = start.config, start.config.parallel
    device = torch.device("cpu")
    if config.device.kind == "cuda":
        device = torch.device("cuda", config.device.index)
        torch.cuda.set_device(device)
    place = place_of(start.rank, parallel.tensor, parallel.pipeline)
    most = max(size_class(config.scheduler.max_num_seqs), config.scheduler.max_num_batched_tokens)
    sums = Rows(most, config.model.hidden_size, getattr(torch, config.dtype))
    return connect(place, store or join_store(*start.store), device, start.host, start.neighbours, sums)


def load(start: Start) -> Worker:
    worker = Worker(start.config, join(start))
    worker.load()
    return worker


def serve(worker: Worker, read: Callable[[], bytes]) -> None:
    """Does what the frames that `read` returns say, until one says to leave."""
    forward: Forward | None = None
    while True:
        match decode_frame(read()):
            case Plan() as plan:
                forward = worker.forward(plan)
            case Sample(masks):
                assert forward is not None
                if worker.samples:
                    worker.sample(forward, masks)
                else:
                    worker.expect(forward)
            case Order.WARM_UP:
                worker.warm_up()
            case Order.LEAVE:
                return
