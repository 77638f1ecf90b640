"""Hostile templates: each ends soon, with little memory, and by a refusal."""

from __future__ import annotations

import time
import tracemalloc

import jinja2
import pytest

from octavo.core.errors import InvalidRequest
from octavo.text import ChatTemplate, Tokenizer, sandbox

GROW = "{% set n = namespace(x=START) %}{% for i in range(100) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"


def growing(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


LONG_LOOPS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}"
    "{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}",
    "{% for i in range(100000) %}{{ range(100000) | map('upper') | list | length }}{% endfor %}",
]
LARGE_VALUES = [
    growing("'ab'", "n.x + n.x"),
    growing("'ab'", "n.x ~ n.x"),
    growing("['ab']", "n.x + n.x"),
    growing("'ab'", "n.x | replace('a', 'aa')"),
    growing("'ab'", "n.x.replace('a', 'aa')"),
    growing("['ab']", "[n.x, n.x]"),
    growing("{'a': 1}", "{'a': n.x, 'b': n.x}"),
    growing("{'a': 1}", "dict(a=n.x.items(), b=n.x.items())"),
    growing("('a',)", "(n.x, n.x)"),
    growing("9", "n.x * n.x"),
    "{% set n = namespace(x='ab') %}{% for i in range(100) %}{% set x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(100) %}{% set l = [] %}{% if l.append(n.x) or l.append(n.x) %}"
    "{% endif %}{% set n.x = l %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[]) %}{% set s = 'x' * 10000000 %}{% for i in range(100000) %}"
    "{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}" + "y" * 10_000 + "{% endfor %}{% endset %}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'x'.ljust(width) }}",
    "{{ 'x'.zfill(width) }}",
    "{{ 'a\nb' | indent(10 ** 9) }}",
    "{{ 'a\nb' | indent('x' * 1000000) | indent('x' * 10000000) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%*d' | format(10 ** 9, 1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ '{0}{0}{0}{0}'.format('x' * 10000000) }}",
    "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}",
    "{{ range(100000) | join('x' * 1000000) }}",
    "{{ ('x' * 1000000).join(range(1000) | map('string')) }}",
    "{{ ('x' * 1000000).join('y' * 100000) }}",
    "{{ ('\t' * 10000000).expandtabs(1000) }}",
    "{{ 'ab'.translate({97: 'x' * 20000000, 98: 'y' * 20000000}) }}",
    "{{ (' ' * 20000000).split(' ') | length }}",
    "{{ ('\n' * 20000000).splitlines() | length }}",
    "{{ ('a' * 20000000) | list | length }}",
    "{{ ('a' * 5000000).rfind('b' + 'a' * 2000000) }}",
    "{{ ('a' * 5000000).strip('b' * 2000000) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "{{ [[1] * 700] * 700 | sum(start=[]) }}",
    "{{ [[[[1]]]] | tojson(indent=10 ** 8) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 10 ** 8 * ['x'] }}",
    "{{ {}.fromkeys(range(100000), 'x' * 100000) }}",
    "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "{{ [1] | slice(10 ** 9) | list }}",
]

LONG_TO_COMPILE = ["{{a}}" * 6500, "{{ a.b|trim|upper }}" * 1600, "{% set a=b %}" * 2500, "{{ [{}] }}" * 3200]


@pytest.mark.parametrize("source", LONG_TO_COMPILE)
def test_what_takes_long_to_compile(smollm: Tokenizer, source: str) -> None:
    with pytest.raises(InvalidRequest, match="more than 5000 names, operators and literals") as caught:
        ChatTemplate.foreign(source, smollm)
    assert caught.value.param == "chat_template"
    assert ChatTemplate.foreign("{{ a }}\n" + "text " * 6000, smollm).render([]).endswith("text ")


@pytest.mark.parametrize("source", LARGE_VALUES)
def test_large_values(smollm: Tokenizer, source: str) -> None:
    """None of them takes the memory that it asks for, and none needs the whole time limit."""
    template = ChatTemplate.foreign(source, smollm)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=r"characters|too |comes from|numbers only|runs for") as caught:
            template.render([], width=10**9)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.param == "chat_template"
    assert peak < 400 * 2**20


@pytest.mark.parametrize("source", LONG_LOOPS)
def test_long_loops(smollm: Tokenizer, source: str) -> None:
    """The limit holds inside one expression and where nothing is printed."""
    limits = sandbox.Limits(0.05, 2**40)
    template = ChatTemplate(source, smollm, limits=limits)
    start = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"runs for more than 0\.05 s"):
        template.render([])
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.pop() }}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ (5).to_bytes(10 ** 9, 'big') }}", "unsafe"),
        ("{{ 'x'.encode() }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ lipsum(n=10 ** 6) }}", "undefined"),
        ("{% include 'x' %}", "no loader"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", "RecursionError"),
        ("{% for _ in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% for _ in range(99) %}{{ 'x' * 1000000 }}{% endfor %}", "its output exceeds"),
    ],
)
def test_a_template_that_fails(smollm: Tokenizer, source: str, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        ChatTemplate(source, smollm).render([{"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ ['a', 'b'] | join(', ') }} {{ ', '.join(['a', 'b']) }} {{ 'abc' | join('-') }}", "a, b a, b a-b-c"),
        ("{{ ['a', 'b'] | map('upper') | join }} {{ '+'.join(['a', 'b'] | map('upper')) }}", "AB A+B"),
        ("{{ '%s=%d' % ('a', 3) }} {{ '%s' | format('x') }} {{ '{} {a}'.format(1, a=2) }}", "a=3 x 1 2"),
        ("{{ 'a' ~ 1 ~ none }} {{ [1, 2, 3][::-1] }} {{ (1, 2) + (3,) }} {{ 7 % 3 }}", "a1None [3, 2, 1] (1, 2, 3) 1"),
        ("{% for a, b in {'x': 1} | items %}{{ a }}{{ b }}{% endfor %}", "x1"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}", "12"),
        ("{% macro f(a, b=[1]) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call f(0) %}c{% endcall %}", "0[1]c"),
        ("{% set l = [] %}{% if l.append(1) %}{% endif %}{{ l }}", "[1]"),
        ("{{ 'x' * 3 }} {{ 2 ** 10 }} {{ 2.5 | round }} {{ [1, 2] | sum }} {{ 'a b' | indent(2, true) }}", None),
        (
            "{{ {'b': 1, 'a': '<é>'} | tojson }} {{ {'a': 1} | tojson(indent=2) }}",
            '{"b": 1, "a": "<é>"} {\n  "a": 1\n}',
        ),
    ],
)
def test_what_templates_do(source: str, expected: str | None) -> None:
    """The same as in a plain environment of jinja's."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    plain = None if "append" in source else _compile_jinja_template(source).render()
    environment = sandbox.Environment()
    from octavo.text.template import _tojson

    environment.add_filter("tojson", _tojson)
    text = sandbox.render(environment.compiled(environment.parse(source)), {}, sandbox.FOREIGN)
    assert text == (plain if expected is None else expected)
    assert plain in (None, text)


def test_limits_end_with_a_rendering() -> None:
    """Each rendering has its own budget, and none is left behind."""
    environment = sandbox.Environment()
    template = environment.compiled(environment.parse("{{ 'x' * 600 }}"))
    limits = sandbox.Limits(10.0, 2000)
    for _ in range(5):
        assert len(sandbox.render(template, {}, limits)) == 600
    with pytest.raises(sandbox.Exhausted, match="more than 1000"):
        sandbox.render(template, {}, sandbox.Limits(10.0, 1000))
    with pytest.raises(LookupError):
        template.render()
    assert issubclass(sandbox.Exhausted, jinja2.TemplateError)
