"""Server: the OpenAI-compatible HTTP API over a backend.

Owns routes, request fields and their validation, response shapes, errors, the API key, Prometheus metrics, and the
HTTP server's life from bound port to shutdown. Does not own prompts' limits, detokenizing or results (`frontend`), nor
flags (`config`, `cli`); importing it leaves torch unimported. Start reading at `app`, then `generation`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.server.app import create_app
    from octavo.server.backend import Backend, ServerSettings
    from octavo.server.listen import bind, url_of
    from octavo.server.run import serve

_HOME_OF = {
    "Backend": "backend",
    "ServerSettings": "backend",
    "bind": "listen",
    "create_app": "app",
    "serve": "run",
    "url_of": "listen",
}

__all__ = ["Backend", "ServerSettings", "bind", "create_app", "serve", "url_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
