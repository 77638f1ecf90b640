"""What the routes of one app share: backend, settings, metrics, and the requests being worked on."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request

from octavo.frontend.inputs import InputProcessor
from octavo.server.errors import HTTPError
from octavo.server.formats import ModelFormats
from octavo.server.metrics import Metrics

if TYPE_CHECKING:
    from octavo.server.backend import Backend, ServerSettings


class Context:
    """State of an app; found by `context_of(request)`."""

    def __init__(self, backend: Backend, settings: ServerSettings, version: str) -> None:
        self.backend = backend
        self.settings = settings
        self.version = version
        self.created = int(time.time())
        self.inputs = InputProcessor(backend.config, backend.tokenizer)
        self.formats = ModelFormats(settings.tool_call_parser, settings.reasoning_parser, backend.tokenizer)
        self.metrics = Metrics(backend, settings.served_model_names[0])
        self.running: set[asyncio.Task[Any]] = set()
        """Work of open requests; cancelling one answers its request with 503."""
        identity = hashlib.sha256(msgspec.json.encode((version, backend.facts, backend.config.dtype)))
        self.fingerprint = f"fp_{identity.hexdigest()[:12]}"

    @property
    def max_model_len(self) -> int:
        return self.backend.config.scheduler.max_model_len

    def model_name(self, asked: str | None) -> str:
        """The name to answer under. Raises HTTPError 404 for a model that is not served."""
        names = self.settings.served_model_names
        if asked is None:
            return names[0]
        if asked in names:
            return asked
        raise HTTPError(
            404,
            f"the model {asked[:200]!r} is not served here; this server has {', '.join(names)}",
            param="model",
            code="model_not_found",
        )

    def drop_running(self) -> None:
        """Ends the work of every open request."""
        for task in self.running:
            task.cancel()


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context
