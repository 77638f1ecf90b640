"""Configuration: what the user typed (`args`), what the machine has (`device`), what follows (`resolve`).

Owns every default and every decision between them; one frozen `EngineConfig` comes out. Torch-free.
Start with `resolve.py`.
"""

from octavo.config.args import EngineArgs, ServerArgs
from octavo.config.compat import HARMLESS, engine_args_from_kwargs
from octavo.config.device import detect_device
from octavo.config.engine import Decision, EngineConfig
from octavo.config.resolve import resolve

__all__ = [
    "HARMLESS",
    "Decision",
    "EngineArgs",
    "EngineConfig",
    "ServerArgs",
    "detect_device",
    "engine_args_from_kwargs",
    "resolve",
]
