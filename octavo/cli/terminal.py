"""What commands that start an engine share: log lines, and the time since the process began."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger("octavo")


class _StderrHandler(logging.Handler):
    """Writes to what is standard error at the moment, as progress bars replace it while they are drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def log_to_stderr(level: int, dropped: Sequence[str] = ()) -> None:
    """Shows Octavo's log lines from `level` on, and one about the flags that were `dropped`."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
    if dropped:
        logger.log(max(level, logging.INFO), "%s", "; ".join(dropped))


def seconds_since_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Seconds since this process was created; where the system does not tell, the processor time it has used."""
    try:
        # Fields are counted from the end of the command's name, which may hold spaces; the 22nd is the start.
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()
