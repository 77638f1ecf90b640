from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest

from octavo.server import create_app
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS, Live


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    server = Live()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
async def http(backend: EchoBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app without a server."""
    transport = httpx.ASGITransport(create_app(backend, SETTINGS), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        yield client


@pytest.fixture(scope="session")
def web(live: Live) -> Iterator[httpx.Client]:
    """A plain client of the live server."""
    with httpx.Client(base_url=live.url, timeout=10) as client:
        yield client
