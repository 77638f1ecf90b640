"""Chat templates against transformers' rendering: what they are given, which one is taken, what they read."""

from __future__ import annotations

from typing import Any, cast

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.text import ChatTemplate, Tokenizer, load_tokenizer, normalise_messages

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
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
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


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([*MESSAGES, {"role": "tool", "content": "42", "tool_calls": [CALL]}], {}),
        (MESSAGES[:2], {"tools": TOOLS}),
    ],
)
def test_tools_equal_transformers(
    messages: list[dict[str, Any]], options: dict[str, Any], named: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    options["add_generation_prompt"] = True
    expected = reference.apply_chat_template(messages, chat_template=LLAMA3, tokenize=False, **options)
    assert ChatTemplate(LLAMA3, named).render(messages, **options) == expected


def test_chat_prompt_of_the_embedded_model(smollm: Tokenizer) -> None:
    assert smollm.chat_template is not None
    text = ChatTemplate(smollm.chat_template, smollm).render([{"role": "user", "content": "Hi"}])
    ids = smollm.encode(text, add_special_tokens=False)
    assert [i for i in ids if i in smollm.special_ids] == [1, 2, 1, 2, 1]
    assert smollm.decode(ids, skip_special_tokens=False) == text


def test_arguments_reach_the_template(named: Tokenizer) -> None:
    source = "{{ enable_thinking }} {{ bos_token }} {{ strftime_now('%Y') | length }} {{ documents[0].title }}"
    template = ChatTemplate(source, named)
    assert template.render([], enable_thinking=False, documents=[{"title": "D"}]) == "False <s> 4 D"
    assert (template.uses("enable_thinking"), template.uses("reasoning_effort")) == (True, False)


@pytest.mark.parametrize("name", ["bos_token", "raise_exception", "conversation", "range", "chat_template"])
def test_names_that_are_not_a_clients(named: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        ChatTemplate("x", named).render([], **{name: "y"})
    assert caught.value.param == "chat_template_kwargs"


def test_a_template_for_tools(named: Tokenizer) -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }}", "rag": "{% broken"}, named)
    assert (template.render([]), template.render([], tools=TOOLS), template.render([], tools=[])) == (
        "plain",
        "1",
        "plain",
    )
    assert template.uses("tools")
    assert template.source == "{{ tools | length }}"
    with pytest.raises(ConfigError, match="only rag"):
        ChatTemplate({"rag": "x"}, named)


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{{ messages[0].content }}", PARTS, "a\nb"),
        ("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", PARTS, "[a][b]"),
        ("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", "ab", "[ab]"),
        (
            "{% for m in messages %}{% set content = m['content'] %}{% if content is string %}{{ content }}{% else %}"
            "{% for part in content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}",
            "ab",
            "ab",
        ),
        (
            "{% macro show(what) %}{% for part in what %}[{{ part['text'] }}]{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            PARTS,
            "[a][b]",
        ),
        ("{% for m in messages %}{% for c in m.content | list %}.{% endfor %}{% endfor %}", "abc", "."),
    ],
)
def test_content_in_the_form_that_a_template_reads(
    named: Tokenizer, source: str, content: object, expected: str
) -> None:
    messages = normalise_messages([{"role": "user", "content": content}])
    assert ChatTemplate(source, named).render(messages) == expected


def test_a_role_that_a_template_may_know(named: Tokenizer) -> None:
    roles = "{% for m in messages %}{{ m.role }}{% endfor %}"
    developer = [{"role": "developer", "content": "x"}]
    assert ChatTemplate(roles, named).render(developer) == "system"
    assert ChatTemplate(roles + "{% if x == 'developer' %}{% endif %}", named).render(developer) == "developer"


def test_a_template_of_a_request(named: Tokenizer) -> None:
    assert ChatTemplate.foreign("{{ messages[0].content }}", named).render(MESSAGES) == MESSAGES[0]["content"]
    for source in ("{% if %}", "x" * 40_000, "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"):
        with pytest.raises(InvalidRequest) as caught:
            ChatTemplate.foreign(source, named)
        assert caught.value.param == "chat_template"
    with pytest.raises(InvalidRequest, match="no such message") as caught:
        ChatTemplate.foreign("{{ raise_exception('no such message') }}", named).render([])
    assert caught.value.param == "chat_template"


def test_errors_are_short(named: Tokenizer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate("{{ raise_exception(messages[0].content) }}", named).render([{"content": "x" * 10**6}])
    assert len(str(caught.value)) < 1000


def test_a_bos_token_is_not_doubled(spm: Tokenizer) -> None:
    template = ChatTemplate("{{ bos_token }}ab", spm)
    plain = ChatTemplate("ab", spm)
    assert template.encode(template.rendered([]), add_special_tokens=True) == spm.encode("ab")
    assert template.encode(template.rendered([])) == spm.encode("ab")
    assert plain.encode(plain.rendered([]), add_special_tokens=True) == spm.encode("ab")
    assert plain.encode(plain.rendered([])) == spm.encode("ab", add_special_tokens=False)


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
    parts = "{% for m in messages %}{% for part in m.content %}({{ part.text }}){% endfor %}{% endfor %}"
    assert render(parts, [{"type": "text", "text": text} for text in "ab"]).endswith("(a)(b")
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


def test_what_is_nested_too_deeply(named: Tokenizer) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    for source in ("x", "{{ tools | tojson }}"):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            ChatTemplate(source, named).render(MESSAGES, tools=[{"function": {"parameters": deep}}])
