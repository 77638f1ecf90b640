"""POST /tokenize and /detokenize, in vLLM's forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from octavo.core.errors import InvalidRequest
from octavo.server.context import Context, context_of
from octavo.server.exchange import offload, read_body
from octavo.server.fields import ChatRequest, DetokenizeRequest, TokenizeRequest
from octavo.server.prompts import chat_prompt, template_of
from octavo.server.table import parse
from octavo.server.tools import request_tools
from octavo.server.wire import Detokenized, Tokenized, encode

if TYPE_CHECKING:
    from octavo.text import Tokenizer


_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools")


async def tokenize(request: Request) -> Response:
    context = context_of(request)
    body = await read_body(request, context.settings.max_body_bytes)
    result = await offload(lambda data: _tokenize(context, data), body)
    return Response(encode(result), media_type="application/json")


async def detokenize(request: Request) -> Response:
    context = context_of(request)
    body = await read_body(request, context.settings.max_body_bytes)
    result = await offload(lambda data: _detokenize(context, data), body)
    return Response(encode(result), media_type="application/json")


def _tokenizer(context: Context) -> Tokenizer:
    if context.backend.tokenizer is None:
        raise InvalidRequest("this server runs without a tokenizer (skip_tokenizer_init): it knows token ids only")
    return context.backend.tokenizer


def _tokenize(context: Context, body: bytes) -> Tokenized:
    """A prompt has its special tokens added unless told otherwise; messages have them from the template."""
    request = parse(TokenizeRequest, body)
    context.model_name(request.model)
    tokenizer = _tokenizer(context)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give one of prompt and messages", "prompt")
    if request.messages is not None:
        tools = request_tools(ChatRequest(messages=request.messages, tools=request.tools))
        ids = chat_prompt(
            context,
            template_of(context, request.chat_template),
            request.messages,
            tools=None if tools is None else tools.told,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            template_kwargs=request.chat_template_kwargs,
        ).ids
    else:
        for name in _CHAT_ONLY:
            if getattr(request, name) is not None:
                raise InvalidRequest(f"{name} goes with messages, not with prompt", name)
        ids = context.inputs.tokenize(request.prompt or "", add_special_tokens=request.add_special_tokens is not False)
    spelled = [tokenizer.token_text(token) for token in ids] if request.return_token_strs else None
    return Tokenized(len(ids), context.max_model_len, ids, spelled)


def _detokenize(context: Context, body: bytes) -> Detokenized:
    request = parse(DetokenizeRequest, body)
    context.model_name(request.model)
    vocab_size = context.backend.facts.vocab_size
    for token in (min(request.tokens, default=0), max(request.tokens, default=0)):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"tokens: id {token} is outside the vocabulary [0, {vocab_size})", "tokens")
    text = _tokenizer(context).decode(request.tokens, skip_special_tokens=False, from_start=True)
    return Detokenized(text)
