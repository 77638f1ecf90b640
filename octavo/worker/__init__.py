"""Executes plans on one device: row state, batch preparation, forward, sampling.

Owns the device: weights, KV tensors, row state. Does not decide anything (`scheduler`) or talk to anybody (`engine`).
Start reading at worker.py, then rows.py.
"""

from octavo.worker.worker import Forward, Step, Worker

__all__ = ["Forward", "Step", "Worker"]
