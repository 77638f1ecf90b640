"""Two live servers for the whole session: of the embedded model, and of a model that says what it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from openai import AsyncOpenAI, OpenAI

from octavo.cli import own
from octavo.config.args import EngineArgs
from tests.clients.scripted import ScriptedBackend


@dataclass
class Address:
    """What a client is configured with."""

    url: str
    key: str
    model: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def real() -> Iterator[Address]:
    with own.own_server(EngineArgs(max_model_len=2048, max_num_seqs=8, quantization="native")) as (url, key):
        yield Address(url, key, MODEL)


@pytest.fixture(scope="session")
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture(scope="session")
def scripted(backend: ScriptedBackend) -> Iterator[Address]:
    async def start(args: EngineArgs) -> ScriptedBackend:
        return backend

    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own, "start_engine", start)
            url, key = stack.enter_context(own.own_server(EngineArgs()))
        yield Address(url, key, MODEL)


def client_of(address: Address, key: str | None = None) -> OpenAI:
    return OpenAI(base_url=address.base_url, api_key=key or address.key, max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def client(scripted: Address) -> Iterator[OpenAI]:
    with client_of(scripted) as client:
        yield client


@pytest.fixture(scope="session")
def model(real: Address) -> Iterator[OpenAI]:
    """A client of the embedded model."""
    with client_of(real) as client:
        yield client


@pytest.fixture
async def aclient(scripted: Address) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=scripted.base_url, api_key=scripted.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def name(scripted: Address) -> str:
    return scripted.model
