"""Jinja for chat templates: a sandbox in which everything that a template makes is paid for.

Templates come with a model or from a client, what they print from anyone. Jinja's own sandbox keeps a template from the
interpreter; this one also bounds its time and memory wherever they go, not only between two pieces of output:

- every loop turn, macro body, filter and call spends from the render's `Meter`, which raises beyond its budget or time;
- every value that a filter, call, operator, literal or slice makes is paid by its size, and where the result can be
  much larger than what goes in (`center`, `replace`, `%`, ...) an upper bound of it is paid first.

So no single step is long, and their number is bounded. Owns no convention of chat templates: template.py does.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context

MAX_OUTPUT_CHARS = 64 * 2**20
MAX_UNITS = 2**18
"""Most units of one value: an item or 64 characters each, shared parts counted as often as they occur."""
MAX_INT_BITS = 4096


@dataclass(frozen=True)
class Limits:
    """What one rendering may take."""

    seconds: float
    chars: int
    """Characters and items made, intermediate values included."""


OWN = Limits(10.0, 2**30)
"""For the template that the operator serves."""
FOREIGN = Limits(0.25, 2**23)
"""For a template that came with a request."""


class Exhausted(jinja2.TemplateError):
    """A template went beyond its limits."""


class Meter:
    """What one rendering has left."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._left = limits.chars
        self._deadline = time.monotonic() + limits.seconds

    def spend(self, amount: int) -> None:
        """Raises Exhausted when the budget or the time is used up."""
        self._left -= amount
        if self._left < 0:
            raise Exhausted(f"it makes more than {self._limits.chars} characters")
        if time.monotonic() > self._deadline:
            raise Exhausted(f"it runs for more than {self._limits.seconds} s")

    def admit(self, bound: int) -> None:
        """Refuses what may grow to `bound` characters, before it does."""
        if bound > self._left:
            raise Exhausted(f"a value of it may have {bound} characters")
        self.spend(0)

    def paid(self, value: Any) -> Any:
        """`value` once its size is paid."""
        if isinstance(value, str):
            self.spend(len(value) + 1)
        elif isinstance(value, _CONTAINERS):
            self.spend(units(value))
        elif isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise Exhausted("a number of it is too large")
        else:
            self.spend(1)
        return value


_METER: ContextVar[Meter] = ContextVar("octavo_template_meter")
_CONTAINERS = (Mapping, list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


def units(value: Any) -> int:
    """Size of `value` with all that it holds. Raises Exhausted beyond MAX_UNITS."""
    stack, total = [value], 0
    while stack:
        item = stack.pop()
        total += 1
        if isinstance(item, str):
            total += len(item) >> 6
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, _CONTAINERS):
            stack.extend(item)
        if total + len(stack) > MAX_UNITS:
            raise Exhausted("a value of it is too large or nested in itself too often")
    return total


def render(template: jinja2.Template, variables: Mapping[str, Any], limits: Limits) -> str:
    """The template's output. Raises Exhausted, and whatever else a template may raise."""
    token = _METER.set(Meter(limits))
    try:
        parts: list[str] = []
        size = 0
        for part in template.generate(variables):
            size += len(part)
            if size > MAX_OUTPUT_CHARS:
                raise Exhausted(f"its output exceeds {MAX_OUTPUT_CHARS} characters")
            parts.append(part)
        return "".join(parts)
    finally:
        _METER.reset(token)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """Blocks are trimmed as in transformers."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            finalize=_printed,
        )
        self.filters = {name: _guarded(name, FILTERS[name]) for name in FILTERS.keys() - _LEFT_OUT}
        self.filters |= {name: _guarded(name, function) for name, function in _OWN_FILTERS.items()}
        self.filters[_TICK] = _tick
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = _guarded(name, function)

    def compiled(self, tree: nodes.Template) -> jinja2.Template:
        """`tree`, which changes, as a template that pays for what it does."""
        _instrument(tree)
        return self.from_string(tree)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = _listed(args) if obj.__name__ == "join" else args
            _admit(meter, obj.__name__, owner, args, kwargs)
        result = meter.paid(super().call(context, obj, *args, **kwargs))
        if isinstance(owner, list):
            meter.paid(owner)  # it may have grown
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        if operator == "%" and isinstance(left, str):
            meter.admit(_printf_bound(left, right if isinstance(right, tuple) else (right,)))
        elif operator in "**":
            _admit_product(meter, operator, left, right)
        return meter.paid(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _METER.get().admit(_format_bound(value.__self__, args, kwargs))
            return wrapped(*args, **kwargs)

        return checked

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Neither methods of numbers nor bytes, which make large values; of what changes a value, a list's append."""
        if isinstance(obj, list) and attr == "append":
            return True
        if isinstance(obj, int | float | complex | bytes) or attr == "encode":
            return False
        return super().is_safe_attribute(obj, attr, value)


def _admit_product(meter: Meter, operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INT_BITS:
            raise Exhausted(f"the result of {operator} is too large")
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Sequence) and isinstance(times, int):
            meter.admit((len(value) if isinstance(value, str) else units(value)) * times)


@pass_context
def _printed(context: Context, value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    _METER.get().spend(len(text))
    return text


def _tick(cost: int) -> None:
    _METER.get().spend(cost)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays. A mark on `function` for a leading context or environment holds for the result."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.spend(1)
        lead, (value, *rest) = args[:skipped], args[skipped:]
        if name in _SIZED:
            (value,) = _listed((value,))
        _admit(meter, name, value, tuple(rest), kwargs)
        return meter.paid(function(*lead, value, *rest, **kwargs))

    return paying


_SIZED = frozenset({"join", "list", "batch", "slice", "sum", "sort", "unique", "groupby"})


def _listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with an iterator at the front made a list, so that its length can be seen."""
    if not args or isinstance(args[0], str | Sequence | Mapping) or not isinstance(args[0], Iterable):
        return args
    return [*args[0]], *args[1:]


# Upper bounds of results, in characters, from (value, arguments by position or name).


def _admit(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    bound = _BOUNDS.get(name)
    if bound is not None:
        meter.admit(bound(value, args, kwargs))


Bound = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], int]


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str) else 64 * units(value)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, *names: str, default: Any) -> Any:
    if at < len(args):
        return args[at]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _width_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    width = _given(args, kwargs, 0, "width", "linecount", "slices", default=80)
    return int(width) if isinstance(width, int) else 0


def _indent_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    _lines_bound(value, (), {})
    width = _given(args, kwargs, 0, "width", default=4)
    one = len(width) if isinstance(width, str) else int(width)
    return (len(str(value).splitlines()) + 1) * one


def _tabs_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return str(value).count("\t") * int(_given(args, kwargs, 0, "tabsize", default=8))


def _replace_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    text, old = str(value), str(_given(args, kwargs, 0, "old", default=""))
    return len(text) + (text.count(old) if old else len(text) + 1) * _size(_given(args, kwargs, 1, "new", default=""))


def _join_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Of the filter, whose value are the parts, and of the method, whose value is the separator."""
    parts, separator = value, _given(args, kwargs, 0, "d", default="")
    if isinstance(value, str) and not isinstance(separator, str):
        parts, separator = separator, value
    return len(parts) * _size(separator) if hasattr(parts, "__len__") else 0


def _split_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """0, but refuses what makes too many items."""
    separator = _given(args, kwargs, 0, "sep", default=None)
    if isinstance(value, str) and len(value) > MAX_UNITS:
        items = value.count(separator) if isinstance(separator, str) and separator else len(value) // 2
        if items > MAX_UNITS:
            raise Exhausted("a list of it is too long")
    return 0


def _lines_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """0, but refuses what makes too many items."""
    if sum(map(str(value).count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")) > MAX_UNITS:
        raise Exhausted("a list of it is too long")
    return 0


def _search_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Of work, not of size: backward searches and strips compare every pair at worst."""
    return len(str(value)) * len(str(_given(args, kwargs, 0, "chars", "sep", default="") or "")) >> 5


def _rsplit_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return _split_bound(value, args, kwargs) + _search_bound(value, args, kwargs)


def _translate_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    table = _given(args, kwargs, 0, default={})
    return len(str(value)) * max(map(_size, table.values()), default=1) if isinstance(table, Mapping) else 0


def _json_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    indent = _given(args, kwargs, 1, "indent", default=0) or 0
    separators = _given(args, kwargs, 2, "separators", default=("", "")) or ("", "")
    one = len(indent) if isinstance(indent, str) else int(indent)
    return units(value) * (one * _depth(value) + sum(map(len, separators)))


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, Mapping | list | tuple)
            for child in (item.values() if isinstance(item, Mapping) else item)
        ]
    return depth


def _printf_filter_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return _printf_bound(str(value), args or (kwargs,))


def _number_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """`round` computes 10 ** precision."""
    precision = _given(args, kwargs, 0, "precision", default=0)
    if not isinstance(precision, int) or abs(precision) > 300:
        raise Exhausted("the precision of round is too large")
    return 0


def _sum_bound(value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if not isinstance(_given(args, kwargs, 1, "start", default=0), int | float):
        raise Exhausted("sum adds numbers only")
    return 0


_BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "batch", "slice"), _width_bound),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip", "trim"), _search_bound),
    "indent": _indent_bound,
    "expandtabs": _tabs_bound,
    "replace": _replace_bound,
    "join": _join_bound,
    **dict.fromkeys(("split", "list"), _split_bound),
    "splitlines": _lines_bound,
    "rsplit": _rsplit_bound,
    "translate": _translate_bound,
    "tojson": _json_bound,
    "format": _printf_filter_bound,
    "round": _number_bound,
    "sum": _sum_bound,
}

_PRINTF = re.compile(r"%(?:\([^)]*\))?[^%A-Za-z]*")
_BRACES = re.compile(r"\{[^{}]*\}?")


def _printf_bound(form: str, values: tuple[Any, ...]) -> int:
    return _spec_bound(form, _PRINTF.findall(form), "*", values)


def _format_bound(form: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    bare = form.replace("{{", "").replace("}}", "")
    return _spec_bound(form, _BRACES.findall(bare), "", (*args, *kwargs.values()), nested=bare)


def _spec_bound(form: str, specs: list[str], taken: str, values: tuple[Any, ...], nested: str = "") -> int:
    """From the widths that stand in the fields; those that come from values are refused."""
    if re.search(r"\{[^{}]*\{", nested) or (taken and any(taken in spec for spec in specs)):
        raise Exhausted("a width in it comes from a value")
    widths = sum(min(int(digits[:12]), 2**40) for spec in specs for digits in re.findall(r"\d+", spec))
    return len(form) + widths + len(specs) * max(map(_size, values), default=0)


_LEFT_OUT = {"pprint", "random", "filesizeformat", "striptags", "urlize", "wordwrap", "xmlattr"}
"""Of no use to a prompt."""

# Nodes of the syntax tree that pay. Names with a space cannot be written in a template.

_TICK, _CONCAT, _SLICE, _MADE = "a tick", "a concatenation", "a slice", "a literal"


def _concatenated(parts: Sequence[Any]) -> str:
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    _METER.get().admit(sum(map(len, texts)))
    return "".join(texts)


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    return value[start:stop:step]


_OWN_FILTERS: dict[str, Callable[..., Any]] = {_CONCAT: _concatenated, _SLICE: _sliced, _MADE: lambda value: value}


def _instrument(node: nodes.Node) -> None:
    """Makes loops and macros tick, and concatenations, slices and literals pay."""
    for field, value in [*node.iter_fields()]:
        if isinstance(value, nodes.Node):
            _instrument(value)
            setattr(node, field, _paying(value))
        elif isinstance(value, list):
            for child in value:
                if isinstance(child, nodes.Node):
                    _instrument(child)
            value[:] = [_paying(child) if isinstance(child, nodes.Node) else child for child in value]
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        printed = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        tick = nodes.ExprStmt(_filter(nodes.Const(1 + printed), _TICK))
        node.body.insert(0, tick.set_lineno(node.lineno))


def _paying(node: nodes.Node) -> nodes.Node:
    line = node.lineno
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes), _CONCAT).set_lineno(line)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return _filter(node.node, _SLICE, bounds).set_lineno(line)
    if not isinstance(node, nodes.List | nodes.Dict | nodes.Tuple) or getattr(node, "ctx", "load") != "load":
        return node
    if all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()):
        return node
    return _filter(node, _MADE).set_lineno(line)


def _filter(value: nodes.Expr, name: str, args: Sequence[nodes.Expr] = ()) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None)
