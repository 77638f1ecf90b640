"""Every error that a client can see, in the one JSON form of OpenAI's API.

Owns the mapping from exceptions to HTTP statuses. Bodies stay under 16 KiB whatever the client sent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from octavo.core.errors import EngineDead, InvalidRequest, OctavoError

logger = logging.getLogger(__name__)

_MAX_MESSAGE_CHARS = 2000
_MAX_PARAM_CHARS = 200
CLIENT_CLOSED = 499
"""Status, seen by nobody, of a request whose client has gone (nginx's number)."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


class HTTPError(OctavoError):
    """A refusal with its status; `type` follows from the status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


class GenerationFailed(OctavoError):
    """The engine ended a request with an error of its own making."""


def rename(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """`error` under the names that the route's client knows."""
    if error.param is None or error.param not in names:
        return error
    new = names[error.param]
    text = str(error)
    return InvalidRequest(new + text.removeprefix(error.param) if text.startswith(error.param) else text, new)


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorInfo


def http_error(error: BaseException) -> HTTPError:
    """`error` as a client may see it: what is not meant for clients says only that something failed."""
    match error:
        case HTTPError():
            return error
        case HTTPException():
            return HTTPError(error.status_code, _explain(error), headers=error.headers)
        case InvalidRequest():
            return HTTPError(400, str(error), param=error.param)
        case EngineDead():
            return HTTPError(503, f"the engine has stopped: {error}", code="engine_dead")
        case GenerationFailed():
            return HTTPError(500, str(error), code="generation_failed")
        case _:
            return HTTPError(500, "internal error: the server's log has the details")


def _explain(error: HTTPException) -> str:
    """For refusals of the router's own."""
    if error.status_code == 404:
        return "there is no such path"
    if error.status_code == 405:
        return f"the method is not allowed here, only {(error.headers or {}).get('Allow', '')}"
    return error.detail


def encode_error(error: HTTPError) -> bytes:
    """The JSON body of `error`."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    param = None if error.param is None else _clean(error.param, _MAX_PARAM_CHARS)
    return msgspec.json.encode(ErrorBody(ErrorInfo(_clean(str(error), _MAX_MESSAGE_CHARS), kind, param, error.code)))


def _clean(text: str, limit: int) -> str:
    """`text` cut to `limit` characters, without surrogates, which JSON cannot carry."""
    short = text if len(text) <= limit else text[: limit - 4] + " ..."
    return short.encode("utf-8", "replace").decode()


def error_response(error: HTTPError) -> Response:
    return Response(encode_error(error), error.status, error.headers, "application/json")


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything that a route raises."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)
    return error_response(http_error(error))
