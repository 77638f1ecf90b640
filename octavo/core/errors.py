"""Errors that a user can cause or must act on.

Every message names the offending value and the remedy. `assert` elsewhere in Octavo is for invariants of our own
only; whatever bad input can reach raises one of these.
"""


class OctavoError(Exception):
    """Base of every error that Octavo raises on purpose."""


class InvalidRequest(OctavoError, ValueError):
    """A request that cannot be served as asked (HTTP 400); `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(OctavoError, ValueError):
    """Flags or arguments that contradict each other, the model or the machine."""


class UnsupportedModel(ConfigError):
    """A model, checkpoint or tokenizer that this version does not implement; the message names the value."""


class EngineDead(OctavoError, RuntimeError):
    """The engine stopped and cannot serve; the message carries its last words."""
