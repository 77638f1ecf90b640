"""Tables of request fields: a class is its table, and `parse` makes one of a JSON object.

A field is honoured (plain type), `Inert` (accepted because it changes no result) or `Unbuilt` (refused unless its value
asks for nothing); any other name is refused. So nothing that a client asks for is silently ignored. `field_table` gives
the same table to the OpenAPI description, the documentation and the tests. Which fields there are is `fields`'.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Raw

from octavo.core.errors import InvalidRequest
from octavo.core.params import BOUNDS

MAX_FIELD_BYTES = 2**20
"""Most JSON bytes of one field; fields that carry the prompt are bounded by the body alone."""

MAX_ITEMS = 2**16
"""Most objects of a list of a form, such as messages."""

MAX_DEPTH = 100
"""Deepest nesting of a field that may hold anything: templates and grammars go through it recursively."""

Kind = type[msgspec.Struct]
Bounds = tuple[float, float, bool]


@dataclass(frozen=True)
class Inert:
    """Marks a field that is accepted and changes no result."""


@dataclass(frozen=True, eq=False)
class Unbuilt:
    """Marks a field that is refused unless null or one of `neutral`, the values that ask for nothing.

    `instead` is the remedy. Compared by identity: typing caches Annotated by equality, where (0,) is (False,).
    """

    neutral: tuple[Any, ...] = ()
    instead: str = "leave it out"


@dataclass(frozen=True)
class Bulky:
    """Marks a field that carries the prompt, hence may be large."""


@dataclass(frozen=True)
class BoundedAs:
    """Marks a number that has the bounds of the sampling parameter `name`; without it, those of its own name."""

    name: str


@dataclass(frozen=True)
class Form:
    """Says what a field's Raw, or each Raw of its list, has the form of."""

    kind: Kind


@dataclass(frozen=True, eq=False)
class Spelled:
    """Says in words and in JSON Schema what a Raw may be that has no one form; `kinds` are those that it refers to."""

    text: str
    schema: Mapping[str, Any]
    kinds: tuple[Kind, ...] = ()


Use = Literal["honoured", "inert", "unbuilt"]


@dataclass(frozen=True)
class Field:
    """A row of the table: a request field, its type, its bounds and what becomes of it."""

    name: str
    type: Any
    use: Use
    required: bool
    neutral: tuple[Any, ...]
    instead: str
    bulky: bool
    free: bool
    """It may hold any JSON."""
    bounds: Bounds | None
    form: Kind | None
    spelled: Spelled | None
    decoder: msgspec.json.Decoder[Any] = dataclasses.field(compare=False)

    @property
    def forms(self) -> tuple[Kind, ...]:
        """The classes that parts of the value have the form of."""
        if self.spelled is not None:
            return self.spelled.kinds
        return () if self.form is None else (self.form,)


@cache
def field_table(kind: Kind) -> dict[str, Field]:
    """The fields of request class `kind` by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {info.name: _field(info.name, hints[info.name], info.required) for info in msgspec.structs.fields(kind)}


def _field(name: str, hint: Any, required: bool) -> Field:
    plain, marks = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    unbuilt = next((mark for mark in marks if isinstance(mark, Unbuilt)), None)
    form = next((mark.kind for mark in marks if isinstance(mark, Form)), None)
    bounds = next((BOUNDS[mark.name] for mark in marks if isinstance(mark, BoundedAs)), BOUNDS.get(name))
    if not {int, float} & {plain, *get_args(plain)}:
        bounds = None
    return Field(
        name=name,
        type=plain,
        use="unbuilt" if unbuilt else "inert" if Inert() in marks else "honoured",
        required=required,
        neutral=unbuilt.neutral if unbuilt else (),
        instead=unbuilt.instead if unbuilt else "",
        bulky=Bulky() in marks,
        free=not unbuilt and "Any" in str(plain),
        bounds=bounds,
        form=form,
        spelled=next((mark for mark in marks if isinstance(mark, Spelled)), None),
        decoder=msgspec.json.Decoder(Raw if plain == Raw | None else plain),  # null is dealt with before
    )


T = TypeVar("T", bound=msgspec.Struct)


def parse(kind: type[T], data: bytes | Raw, prefix: str = "") -> T:
    """`data`, a JSON object, as `kind`; `prefix` is where it stands in the body. Null counts as absent.

    Raises InvalidRequest that names the field at fault.
    """
    try:
        fields = _splitter(kind).decode(data)
    except msgspec.ValidationError as error:
        raise _wrong_object(str(error), kind, prefix) from None
    except _NOT_JSON as error:
        raise _not_json(error, prefix.rstrip(".")) from None
    values: dict[str, Any] = {}
    for name, field in field_table(kind).items():
        raw = getattr(fields, name)
        value = None if raw is msgspec.UNSET else _value(field, raw, prefix + name)
        if value is not None:
            values[name] = value
        elif field.required:
            raise InvalidRequest(f"{prefix + name} is missing", prefix + name)
    return kind(**values)


@cache
def _splitter(kind: Kind) -> msgspec.json.Decoder[Any]:
    """Splits an object into `kind`'s fields, none decoded yet; ends at the first unknown or missing one."""
    fields = [
        (info.name, Raw) if info.required else (info.name, Raw | msgspec.UnsetType, msgspec.UNSET)
        for info in msgspec.structs.fields(kind)
    ]
    return msgspec.json.Decoder(
        msgspec.defstruct(f"Raw{kind.__name__}", fields, kw_only=True, forbid_unknown_fields=True)
    )


_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _value(field: Field, raw: Raw, name: str) -> Any:
    text = memoryview(raw)
    size = len(text)
    if size == 4 and bytes(raw) == b"null":
        return None
    if size > MAX_FIELD_BYTES and not field.bulky:
        raise InvalidRequest(f"{name} has {size} bytes of JSON, more than {MAX_FIELD_BYTES}", name)
    if field.form is not None and size > MAX_FIELD_BYTES // 8 and text[0] == ord("["):
        _glance(field.form, raw, name)
    value = decode(field.decoder, raw, name)
    if field.free and _is_deep(value):
        raise InvalidRequest(f"{name} is nested more than {MAX_DEPTH} levels deep", name)
    if field.use == "unbuilt" and not _is_one_of(value, field.neutral):
        raise InvalidRequest(f"{name} is not supported: {field.instead}", name)
    return value


def _glance(form: Kind, raw: Raw, name: str) -> None:
    """Refuses a long list that is none of `form`, or too long, before millions of objects are made of it.

    Inside of text the quotes of a key are escaped, so that counting keys counts objects (and some values).
    """
    text = bytes(raw)
    for field in field_table(form).values():
        if field.required and text.count(b'"%b"' % field.name.encode()) > MAX_ITEMS:
            raise InvalidRequest(f"{name} has more than {MAX_ITEMS} entries", name)
    if len(decode(_glances(form), text, name)) > MAX_ITEMS:
        raise InvalidRequest(f"{name} has more than {MAX_ITEMS} entries", name)


@cache
def _glances(form: Kind) -> msgspec.json.Decoder[list[Any]]:
    """Ends at the first item that is no object with `form`'s required fields."""
    required = [(field.name, field.type) for field in field_table(form).values() if field.required]
    return msgspec.json.Decoder(list[msgspec.defstruct(f"Glance{form.__name__}", required, gc=False)])  # type: ignore[misc]


V = TypeVar("V")


def decode(decoder: msgspec.json.Decoder[V], raw: bytes | Raw, name: str) -> V:
    """The value of the field `name`. Raises InvalidRequest that names it."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise InvalidRequest(f"{name}{path.rstrip('`')}: {what}", name) from None
    except _NOT_JSON as error:
        raise _not_json(error, name) from None


def _not_json(error: Exception, name: str) -> InvalidRequest:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InvalidRequest(f"{name or 'the body'} is not valid JSON in UTF-8: {reason}", name or None)


def _wrong_object(text: str, kind: Kind, prefix: str) -> InvalidRequest:
    """msgspec's `text` in the terms of the request. Linear: a field's name may be megabytes long."""
    what, _, rest = text.partition(" field `")
    where = prefix + rest.removesuffix("`")
    if what == "Object missing required":
        return InvalidRequest(f"{where} is missing", where)
    if what == "Object contains unknown":
        return InvalidRequest(f"unknown field {where[:200]!r}{_similar(rest.removesuffix('`'), kind)}", where)
    name = prefix.rstrip(".")
    return InvalidRequest(f"{name or 'the body'} must be a JSON object: {text}", name or None)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        dicts = [child for item in level if isinstance(item, dict) for child in item.values()]
        level = [*dicts, *(child for item in level if isinstance(item, list) for child in item)]
        if not level:
            return False
    return True


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Membership in which True is not 1."""
    return any(type(value) is type(item) and value == item for item in values)


def _similar(name: str, kind: Kind) -> str:
    close = difflib.get_close_matches(name[:100], field_table(kind), n=1)
    return f": did you mean {close[0]!r}?" if close else ": remove it"
