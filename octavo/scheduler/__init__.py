"""Decides what every step computes.

Owns sequences, rows, admission, fairness and preemption. Does not own blocks (`cache`), tensors (`worker`), time or IO.
Start reading at scheduler.py; step.py builds the plan, seams.py is where features attach.
"""

from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.seams import Constraint, Proposer

__all__ = ["Constraint", "Proposer", "Scheduler"]
