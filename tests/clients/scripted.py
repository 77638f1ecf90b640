"""A model that says what it was told to, behind the real HTTP app: for flows whose text matters.

It speaks hermes tool calls and `<think>` reasoning, as its chat template shows. One token is one byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from octavo.core.params import SamplingParams
from octavo.frontend.inputs import Prompt
from octavo.frontend.outputs import RequestOutput
from octavo.text import ChatTemplate
from tests.frontend.tiny import byte_tokenizer
from tests.server.echo import EchoBackend

TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools> Call with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}
{%- for message in messages %}<{{ message.role }}>
{{- message.content or "" }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- endif %}{% endif %}"""


class ScriptedBackend(EchoBackend):
    """Each answer is the next of `say`'s texts."""

    def __init__(self) -> None:
        super().__init__(max_model_len=1 << 16)
        self.chat_template = ChatTemplate(TEMPLATE, byte_tokenizer())
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self._replies: deque[str] = deque()

    def say(self, *replies: str) -> None:
        """What the next answers are; what earlier tests left unsaid is dropped."""
        self._replies = deque(replies)

    @property
    def prompt(self) -> str:
        """The last one."""
        return self.prompts[-1]

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput]:
        request, _ = self.inputs.process(prompt, params, request_id, arrival=0.0)  # refuses what any engine would
        self.prompts.append(bytes(token for token in request.prompt_token_ids if token < 256).decode())
        self.params.append(params)
        reply = self._replies.popleft().encode()
        async with aclosing(super().generate([*reply], params, request_id, **options)) as outputs:
            async for output in outputs:
                yield output


def call(name: str, arguments: str) -> str:
    """A tool call as a hermes model writes it; `arguments` are JSON."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def chosen(name: str, arguments: str) -> str:
    """A tool call as required and named choices make a model write it."""
    return f'[{{"name": "{name}", "parameters": {arguments}}}]'
