"""The `octavo` command. Owns what a person types and sees; the engine is started through `frontend`.

Start with `entry.py`. Nothing here imports torch, and each command's module is imported when it runs, so that help,
a refused flag or a busy port answer at once.
"""

from octavo.cli.entry import main

__all__ = ["main"]
