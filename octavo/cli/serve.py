"""`octavo serve`: binds the port, starts the engine, serves until Ctrl-C. The work is `frontend`'s and `server`'s.

The engine's process comes before all else that takes long, and gets its configuration early: importing torch and
compiling kernels take longest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from octavo.cli.terminal import log_to_stderr, seconds_since_start
from octavo.config.args import EngineArgs, ServerArgs
from octavo.config.flags import parse_given
from octavo.core.errors import ConfigError
from octavo.frontend.launch import EngineProcess
from octavo.server.listen import bind

if TYPE_CHECKING:
    from octavo.frontend import AsyncLLM
    from octavo.server.backend import Backend

KEY_VARIABLE = "OCTAVO_API_KEY"


def run(namespace: argparse.Namespace) -> int:
    engine, server, dropped = parse_given(namespace)
    if not server.api_key and os.environ.get(KEY_VARIABLE):
        server = msgspec.structs.replace(server, api_key=(os.environ[KEY_VARIABLE],))
    template = None if server.chat_template is None else read_template(server.chat_template)
    log_to_stderr(logging.INFO, dropped)

    with bind(server.host, server.port) as sock:
        process = EngineProcess()
        try:
            _serve(sock, process, engine, server, template)
        finally:
            process.close()
    return 0


def _serve(
    sock: socket.socket, process: EngineProcess, engine: EngineArgs, server: ServerArgs, template: str | None
) -> None:
    from octavo.frontend.startup import resolve_config

    process.configure(resolve_config(engine))

    from octavo.formats.locate import DEFAULT_MODEL
    from octavo.server.backend import ServerSettings
    from octavo.server.run import serve

    names = server.served_model_name or (engine.model or DEFAULT_MODEL,)
    serve(
        sock,
        lambda: _start(process, engine, template),
        ServerSettings(
            served_model_names=names,
            api_keys=server.api_key,
            trust_request_chat_template=server.trust_request_chat_template,
            tool_call_parser=server.tool_call_parser,
            reasoning_parser=server.reasoning_parser,
        ),
        on_ready=lambda backend, url: print(ready_lines(backend, url, names[0], server), flush=True),
        log_level=server.uvicorn_log_level,
    )


async def _start(process: EngineProcess, engine: EngineArgs, template: str | None) -> AsyncLLM:
    from octavo.frontend import AsyncLLM
    from octavo.frontend.progress import loading_bars
    from octavo.text import ChatTemplate

    with loading_bars() as progress:
        llm = await AsyncLLM.start(engine, progress=progress, process=process)
    if template is not None:
        if llm.tokenizer is None:
            await llm.shutdown()
            raise ConfigError("--chat-template needs a tokenizer: leave out --skip-tokenizer-init")
        try:
            llm.chat_template = ChatTemplate(template, llm.tokenizer)
        except BaseException:
            await llm.shutdown()
            raise
    return llm


def read_template(given: str) -> str:
    """The chat template that `--chat-template` means: the file's content, or the text itself. Raises ConfigError."""
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template is {given!r}, neither a readable file ({error}) nor a template (it has no braces)"
        ) from None


def ready_lines(backend: Backend, url: str, model: str, server: ServerArgs) -> str:
    """One line that says where the server is and since when, and one with a command to try it."""
    ready = f"Octavo serves {model} at {url} (ready {seconds_since_start():.1f} s after its start)"
    return f"{ready}\n{curl(backend, url, server)}"


def curl(backend: Backend, url: str, server: ServerArgs) -> str:
    """A request that works as it stands in a shell; a key is taken from the environment, not shown."""
    body: dict[str, object] = {"max_tokens": 64, "temperature": 0}
    if backend.chat_template is not None:
        route, ask = "chat/completions", "What is the capital of France?"
        body |= {"messages": [{"role": "user", "content": ask}]}
    else:
        route = "completions"
        body |= {"prompt": [1, 2, 3] if backend.tokenizer is None else "The capital of France is"}
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if server.api_key else ""
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
