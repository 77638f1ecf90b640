"""The ASGI application: routes, the key check and errors. Start reading here.

key check -> route -> body -> fields (parse) -> prompts (ids) -> backend.generate -> wire -> client
                              └──────── in a thread when large ────────┘
"""

from __future__ import annotations

import hmac
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.core.errors import OctavoError
from octavo.server.backend import Backend, ServerSettings
from octavo.server.chat import chat_completions
from octavo.server.completions import completions
from octavo.server.context import Context, context_of
from octavo.server.errors import HTTPError, answer_error, error_response
from octavo.server.openapi import describe
from octavo.server.tokenization import detokenize, tokenize
from octavo.server.wire import ModelCard, ModelList, Version, encode

OPEN_ROUTES = frozenset({"/health"})
"""Paths that ask for no key."""


def create_app(llm: Backend, settings: ServerSettings) -> Starlette:
    """The application over a running backend, which stays the caller's to shut down."""
    app = Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", model, methods=["GET"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            Route("/version", show_version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
        ],
        middleware=[Middleware(KeyCheck, keys=settings.api_keys)] if settings.api_keys else [],
        exception_handlers={
            HTTPException: answer_error,
            ClientDisconnect: answer_error,
            OctavoError: answer_error,
            Exception: answer_error,
        },
    )
    app.router.redirect_slashes = False
    app.state.context = Context(llm, settings, _version())
    return app


def _version() -> str:
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "unknown"


def _json(body: object) -> Response:
    return Response(encode(body), media_type="application/json")


def _card(context: Context, name: str) -> ModelCard:
    root = context.settings.served_model_names[0]
    return ModelCard(id=name, created=context.created, root=root, max_model_len=context.max_model_len)


async def models(request: Request) -> Response:
    context = context_of(request)
    return _json(ModelList([_card(context, name) for name in context.settings.served_model_names]))


async def model(request: Request) -> Response:
    context = context_of(request)
    return _json(_card(context, context.model_name(request.path_params["model"])))


async def health(request: Request) -> Response:
    """200 with an empty body while the engine serves, else 503."""
    await context_of(request).backend.check_health()
    return Response()


async def show_version(request: Request) -> Response:
    return _json(Version(context_of(request).version))


async def metrics(request: Request) -> Response:
    return Response(context_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


async def openapi(request: Request) -> Response:
    return _json(describe(context_of(request).version))


class KeyCheck:
    """Refuses requests without one of `keys` as bearer token, unknown paths included."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_ROUTES or self._allows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = HTTPError(
            401,
            "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _allows(self, headers: Headers) -> bool:
        """Compares with every key in constant time."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        token = given.strip().encode("latin-1", "replace")
        matches = [hmac.compare_digest(token, key) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)
