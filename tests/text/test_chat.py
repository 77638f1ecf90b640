"""Chat templates against transformers' rendering, and what the sandbox refuses."""

from __future__ import annotations

from typing import Any, cast

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.text import ChatTemplate, Tokenizer, chat, load_tokenizer, normalise_messages

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{% set ns = namespace(system='') %}
{% if tools is not none and tools %}
    {% set ns.system = 'Tools:\\n' %}
    {% for tool in tools %}
        {% set ns.system = ns.system + (tool | tojson(indent=2)) + '\\n' %}
    {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {% continue %}
    {% endif %}
    {% if message.tool_calls is defined %}
        {% generation %}{{ message.tool_calls[0].function.arguments | tojson }}{% endgeneration %}
    {% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{{- ns.system }}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'exact'."},
    {"role": "user", "content": "  Grüße, 世界! "},
    {"role": "assistant", "content": "Hi {{ bos_token }} there  "},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "<é>"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & c", "parameters": {"b": 1, "a": [2]}}}]


@pytest.fixture(scope="module")
def reference(byte_level_json: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    build: Any = PreTrainedTokenizerFast
    return cast(PreTrainedTokenizerFast, build(tokenizer_object=byte_level_json, bos_token="<s>", eos_token="</s>"))


@pytest.fixture(scope="module")
def named(byte_level_json: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("named")
    byte_level_json.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")
    return load_tokenizer(directory)


@pytest.mark.parametrize("template", ["embedded", CHATML, LLAMA3])
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (MESSAGES[:2], {"add_generation_prompt": True}),
        (MESSAGES[1:2], {"add_generation_prompt": True}),
        (MESSAGES, {"add_generation_prompt": False}),
        (MESSAGES, {"add_generation_prompt": False, "continue_final_message": True}),
        ([*MESSAGES, {"role": "tool", "content": "42", "tool_calls": [CALL]}], {"add_generation_prompt": True}),
        (MESSAGES[:2], {"add_generation_prompt": True, "tools": TOOLS}),
    ],
)
def test_equals_transformers(
    template: str,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    smollm: Tokenizer,
    named: Tokenizer,
    reference: PreTrainedTokenizerFast,
) -> None:
    source = smollm.chat_template if template == "embedded" else template
    assert source is not None
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    assert ChatTemplate(source, named).render(messages, **options) == expected


def test_chat_prompt_of_the_embedded_model(smollm: Tokenizer) -> None:
    assert smollm.chat_template is not None
    text = ChatTemplate(smollm.chat_template, smollm).render([{"role": "user", "content": "Hi"}])
    ids = smollm.encode(text, add_special_tokens=False)
    assert [i for i in ids if smollm.is_special(i)] == [1, 2, 1, 2, 1]
    assert smollm.decode(ids, skip_special_tokens=False) == text


def test_arguments_reach_the_template(named: Tokenizer) -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ bos_token }} {{ strftime_now('%Y') | length }}", named)
    assert template.render([], enable_thinking=False, bos_token="B") == "False B 4"


def test_continuing_a_message(named: Tokenizer) -> None:
    def render(source: str, content: object) -> str:
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "<octavo-continues-here>"},
            {"role": "assistant", "content": content},
        ]
        return ChatTemplate(source, named).render(messages, add_generation_prompt=False, continue_final_message=True)

    kept = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert render(kept, "The answer ") == "[<octavo-continues-here>][The answer "
    assert render(kept, "") == "[<octavo-continues-here>]["
    assert render("{{ messages[1].content | trim }}.", "The answer ") == "The answer"
    for source, content in ((kept, None), ("{{ messages[0].role }}", "lost")):
        with pytest.raises(InvalidRequest) as caught:
            render(source, content)
        assert caught.value.param == "messages"


def test_continuing_excludes_a_generation_prompt(named: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="exclude each other"):
        ChatTemplate(CHATML, named).render(MESSAGES, continue_final_message=True)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% if x %}"])
def test_template_that_does_not_compile(named: Tokenizer, source: str) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplate(source, named)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' * 10 ** 10 }}", "too large"),
        ("{{ 10 ** 8 * ['x'] }}", "too large"),
        ("{{ 9 ** (9 ** 9) }}", "too large"),
        ("{% for _ in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% for _ in range(99) %}{{ 'x' * 1000000 }}{% endfor %}", "its output exceeds"),
    ],
)
def test_template_that_fails(named: Tokenizer, source: str, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        ChatTemplate(source, named).render([{"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages"


def test_template_that_takes_too_long(named: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDER_SECONDS", 0.0)
    with pytest.raises(InvalidRequest, match="runs for more than"):
        ChatTemplate(CHATML, named).render(MESSAGES)


def test_messages_are_made_plain() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no json"}}, {"id": "1"}]},
    ]
    plain = normalise_messages(messages)
    assert [message["content"] for message in plain] == ["a\nb\nc", "", ""]
    assert plain[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
    assert plain[2]["tool_calls"] == messages[2]["tool_calls"]
    assert messages[1]["content"] is None


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"messages\[0\] .*'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part without text"),
        ({"role": "user", "content": 7}, "content must be text"),
        ({"content": "x"}, "with a role"),
        ("text", "with a role"),
        ({"role": "assistant", "tool_calls": "f()"}, "tool_calls must be"),
    ],
)
def test_messages_that_are_refused(message: Any, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        normalise_messages([message])
    assert caught.value.param == "messages"
