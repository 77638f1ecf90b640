"""`response_format` and `structured_outputs`: two spellings of one constraint on the answer. What they ask for is
compiled, and hence judged, by `frontend`."""

from __future__ import annotations

from octavo.core.errors import InvalidRequest
from octavo.core.params import StructuredOutputs
from octavo.server.fields import GenerationRequest, JsonSchemaFormat, ResponseFormat, StructuredOutputsOption
from octavo.server.table import field_table, parse

_FORMS = tuple(name for name, field in field_table(StructuredOutputsOption).items() if field.use == "honoured")


def request_constraint(request: GenerationRequest) -> tuple[StructuredOutputs | None, str]:
    """The constraint that `request` asks for, and the field that does. Raises InvalidRequest."""
    formatted, structured = _response_format(request), _structured_outputs(request)
    if formatted is not None and structured is not None:
        raise InvalidRequest(
            "response_format and structured_outputs both constrain the answer: give one", "response_format"
        )
    return (formatted, "response_format") if structured is None else (structured, "structured_outputs")


def _response_format(request: GenerationRequest) -> StructuredOutputs | None:
    if request.response_format is None:
        return None
    chosen = parse(ResponseFormat, request.response_format, "response_format.")
    if chosen.type == "json_schema":
        where = "response_format.json_schema"
        if chosen.json_schema is None:
            raise InvalidRequest(f"{where} is missing", where)
        return StructuredOutputs(json=parse(JsonSchemaFormat, chosen.json_schema, f"{where}.").schema)
    if chosen.json_schema is not None:
        raise InvalidRequest(
            f"response_format.json_schema goes with the type json_schema, not {chosen.type}",
            "response_format.json_schema",
        )
    return StructuredOutputs(json_object=True) if chosen.type == "json_object" else None


def _structured_outputs(request: GenerationRequest) -> StructuredOutputs | None:
    if request.structured_outputs is None:
        return None
    option = parse(StructuredOutputsOption, request.structured_outputs, "structured_outputs.")
    given = {name: getattr(option, name) for name in _FORMS}
    return StructuredOutputs(**{name: value for name, value in given.items() if value is not None})
