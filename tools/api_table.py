"""Prints docs/api.md, the reference of every route and field, from the tables that serve them, and the decisions.

python tools/api_table.py > docs/api.md
"""

from __future__ import annotations

import json
from typing import Any

from octavo.core.params import INT64_MAX
from octavo.server.fields import ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, TokenizeRequest
from octavo.server.openapi import ROUTES, request_kinds, value_schema
from octavo.server.table import MAX_FIELD_BYTES, Bounds, Field, Kind, field_table
from octavo.structured import ANNOTATIONS, KEYWORDS

HEAD = f"""# API

Written by `tools/api_table.py` from `octavo/server`. The same in OpenAPI 3.1 is at `/openapi.json` of a running server.
A body is one JSON object; null counts as absent. A field is honoured, accepted because it changes no result, or refused
with a 400 whose `param` names it. Fields other than prompts have at most {MAX_FIELD_BYTES:,} bytes of JSON.
"""

TITLES: dict[Kind, str] = {
    ChatRequest: "Chat completions",
    CompletionRequest: "Completions",
    GenerationRequest: "Of both",
    TokenizeRequest: "Tokenize",
    DetokenizeRequest: "Detokenize",
}

# fmt: off
DECISIONS: dict[str, str] = {
    "unknown_fields":
        "An unknown field is a 400 that names it, so that a typo does not pass. OpenAI's fields that "
        "change no result (`user`, `metadata`, `store`, `service_tier` and the like) are accepted. Old "
        "names (`guided_*`, `suffix`, `functions`) are refused, and so is `best_of` other than 1 and `n`.",
    "unknown_roles":
        "A role other than system, developer, user, assistant and tool is a 400.",
    "continuing":
        "An assistant's message at the end is continued only with `continue_final_message`.",
    "finishing_chunk":
        "The chunk that has the `finish_reason` has an empty delta.",
    "forced_tool_choices":
        "Required and named tool choices follow the tools' schemas whether `strict` is set or not, with "
        "no parser flag and with a chat template that knows no tools. With `auto` the model is free, "
        "`strict` or not. The `finish_reason` is `tool_calls`, but `stop` for a named choice, as OpenAI "
        "has it.",
    "max_tokens":
        "`max_tokens` defaults to 16 on completions and to what the context leaves on chat. 0 with `echo` "
        "returns the prompt. More than the context leaves is a 400 that names the limit.",
    "several_greedy_choices":
        "`n` above 1 at temperature 0 is allowed. Usage counts each prompt once and all choices.",
    "logprobs":
        "`logprobs.content` has no token that only ends the answer. `bytes` come from the token, never "
        "from decoded text.",
    "unenforced_keywords":
        "A JSON Schema keyword that is not enforced, or a `$ref` to nowhere, is a 400 that names it, "
        "`strict` or not.",
    "control_tokens_in_content":
        "The text of a control token inside a message is text like any other: nobody closes a turn from "
        "within.",
    "template_kwargs":
        "`chat_template_kwargs` cannot replace the conversation, the tools or the special tokens.",
    "split_characters":
        "A prompt that ends inside a character leaks none of that character's bytes into the answer.",
    "disconnects":
        "A client that disconnects ends its generation at once, whether it streams or not.",
    "keys":
        "With `--api-key`, every route but `/health` asks for a key.",
    "errors":
        "Every error has OpenAI's error object: validation, 401, 404, 405, invalid UTF-8, chat templates, "
        "the engine's.",
}
"""Where servers differ: name -> what is done; tests/server/test_decisions.py has a test of each name."""

NOTES: tuple[str, ...] = (
    "`reasoning` (vLLM's current name) holds what the model wrote for itself; `reasoning_content` is "
    "read, not written.",
    "`content` is null when an answer has only reasoning or tool calls.",
    "With tools that may be called, an answer under `response_format` or `structured_outputs` is either "
    "calls in the model's own format or what is constrained. Together with a required or named choice both "
    "are a 400: such an answer has nothing to constrain.",
    "A constraint begins where reasoning ends. A model that may reason first, by its format and the prompt, "
    "may do so: between its tags, or (gpt-oss) in messages before the final one.",
    "An answer to a required or named choice has calls only; what `max_tokens` cuts off of the next one is "
    "not told.",
    "`usage.completion_tokens_details.reasoning_tokens` counts the tokens of reasoning with its tags. "
    "`include_reasoning: false` leaves them out of the message, `logprobs` and `token_ids`; they still count.",
    "Constraints have limits, and what is beyond them is a 400 that says so: a schema 64 KiB, 10,000 values and "
    "1,500 schemas; a text in it 4 KiB; a pattern 2 KiB; a regex 4 KiB; a grammar 16 KiB and 1,000 rules; 2,000 "
    "choices of 4 KiB, 64 KiB together; all tools of a required choice 64 KiB.",
    "A request's own chat template has at most 32,768 characters and 5,000 names, operators and literals, and "
    "runs for 0.25 s.",
    "`parallel_tool_calls: false` constrains a required choice to one call; with `auto` only the first "
    "call is told.",
    "With `tool_choice` none the chat template is not told of the tools, with `allowed_tools` only of "
    "those.",
    "`reasoning_effort` and `documents` are a 400 when the chat template does not read them. A template "
    "that knows `enable_thinking` alone takes the effort none.",
    "The chat template must be trusted by the operator: `chat_template` needs `--trust-request-chat- "
    "template`.",
)
# fmt: on


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def routes() -> str:
    rows = [
        row(
            f"`{route.method.upper()} {route.path}`",
            route.summary,
            "" if route.request is None else TITLES[route.request],
        )
        for route in ROUTES
    ]
    return "\n".join(["\n## Routes\n", "| route | answers | fields |", "|---|---|---|", *rows, ""])


def fields(kind: Kind, left_out: dict[str, Field]) -> str:
    """The table of `kind` without what is the same in `left_out`, and what it refuses."""
    own = [field for field in field_table(kind).values() if left_out.get(field.name) != field]
    rows = [
        row(
            f"`{field.name}`" + (" (required)" if field.required else ""),
            type_text(field),
            bounds_text(field.bounds),
            "honoured" if field.use == "honoured" else "accepted, changes no result",
        )
        for field in own
        if field.use != "unbuilt"
    ]
    refused = [refusal(field) for field in own if field.use == "unbuilt"]
    title = f"\n### {TITLES.get(kind, kind.__name__)}\n"
    lines = [title, "| field | type | bounds | what becomes of it |", "|---|---|---|---|", *rows, ""]
    if refused:
        lines += [f"Refused: {', '.join(refused)}.", ""]
    return "\n".join(lines)


def refusal(field: Field) -> str:
    neutral = " or ".join(json.dumps(value) for value in field.neutral)
    unless = f"other than {neutral}" if neutral else ""
    instead = "" if field.instead == "leave it out" else field.instead
    said = ": ".join(part for part in (unless, instead) if part)
    return f"`{field.name}`" + (f" ({said})" if said else "")


def type_text(field: Field) -> str:
    return field.spelled.text if field.spelled is not None else schema_text(value_schema(field))


def schema_text(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(schema_text(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {schema_text(schema['items'])}"
    values = schema.get("additionalProperties")
    if isinstance(values, dict) and values:
        return f"object of {schema_text(values)}"
    return str(schema.get("type", "anything"))


def bounds_text(bounds: Bounds | None) -> str:
    if bounds is None:
        return ""
    low, high, open_low = bounds
    if low <= -INT64_MAX:
        return "64 bits"
    start = f"above {low:g}" if open_low else f"{low:g}"
    return f"{start} and more" if high == INT64_MAX else f"{start} to {high:g}"


def keywords() -> str:
    rows = [row(f"`{name}`", kind, what) for name, (kind, what) in KEYWORDS.items()]
    plain = ", ".join(f"`{name}`" for name in ANNOTATIONS)
    return "\n".join(
        [
            "\n## JSON Schema\n",
            "Of `response_format`, `structured_outputs` and the parameters of tools that must be called. Every other "
            "keyword is refused by name.\n",
            "| keyword | value | what is enforced |",
            "|---|---|---|",
            *rows,
            "",
            "An object that has `properties` and neither `additionalProperties` nor `patternProperties` is closed: the "
            "model adds no properties that the schema does not name. It stays open where properties come from several "
            "schemas (`allOf`, `$ref` or `anyOf` beside `properties`); `additionalProperties: true` opens it.\n",
            f"These say nothing about a value and are left out: {plain}.",
            "",
        ]
    )


def decisions() -> str:
    lines = [*DECISIONS.values(), *NOTES]
    return "\n## Decisions\n\n" + "".join(f"- {line}\n" for line in lines)


def document() -> str:
    shared = field_table(GenerationRequest)
    parts = [fields(ChatRequest, shared), fields(CompletionRequest, shared), fields(GenerationRequest, {})]
    parts += [fields(TokenizeRequest, {}), fields(DetokenizeRequest, {}), "\n## Parts of fields\n"]
    parts += [fields(kind, {}) for kind in request_kinds() if kind not in TITLES]
    return "".join([HEAD, routes(), "\n## Fields\n", *parts, keywords(), decisions()])


if __name__ == "__main__":
    print(document(), end="")
