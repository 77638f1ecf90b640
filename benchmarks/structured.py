"""Structured output of a real model: what masks cost, and whether what comes out is valid.

python -m benchmarks.structured [--model PATH] [--rows 64] [--tokens 32] [--rounds 3]
python -m benchmarks.structured --validity [--outputs 250]

The first compares decode steps in which all rows follow schemas of their own with steps of the same rows without any,
in turn. The second compiles every schema of tests/structured and checks the outputs that finish with jsonschema.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.core.request import Request

PROMPT = "Here is the record of a customer as JSON, with all fields filled in:\n"


def schema(i: int) -> dict[str, Any]:
    """One of many different schemas, whose texts have no end within the measurement."""
    item = {
        "type": "object",
        "properties": {
            f"name_{i}": {"type": "string", "maxLength": 20 + i},
            "age": {"type": "integer", "minimum": i, "maximum": 100 + i},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 10 + i % 7}, "maxItems": 4},
            "kind": {"enum": ["home", "work", f"place {i}"]},
            "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        },
        "required": [f"name_{i}", "age", "tags", "kind", "zip"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": 100}


def decode_seconds(llm: LLM, requests: list[Request], tokens: int) -> float:
    """Median duration of a step in which every request decodes a token."""
    engine = llm.engine
    for request in requests:
        engine.add(request)
    produced = dict.fromkeys((request.id for request in requests), 0)
    durations: list[float] = []
    while engine.has_work():
        whole = min(produced.values()) > 1 and max(produced.values()) < tokens - 1
        began = time.perf_counter()
        deltas = engine.step()
        if whole and len(deltas) == len(requests):
            durations.append(time.perf_counter() - began)
        for delta in deltas:
            assert delta.error is None, delta.error
            produced[delta.request_id] += len(delta.token_ids)
    return statistics.median(durations)


def speed(llm: LLM, rows: int, tokens: int, rounds: int) -> None:
    inputs = llm._inputs

    def made(name: str, structured: bool) -> list[Request]:
        return [
            inputs.process(
                PROMPT,
                SamplingParams(
                    temperature=1.0,
                    seed=i,
                    max_tokens=tokens,
                    ignore_eos=True,
                    structured_outputs=StructuredOutputsParams(json=schema(i)) if structured else None,
                ),
                f"{name} {i}",
                arrival=0.0,
            )[0]
            for i in range(rows)
        ]

    ratios = []
    for turn in range(rounds + 1):
        free = decode_seconds(llm, made(f"free {turn}", False), tokens)
        bound = decode_seconds(llm, made(f"schema {turn}", True), tokens)
        if turn:  # the first warms up
            ratios.append(free / bound)
            print(
                f"{rows} rows: free {rows / free:.1f} tokens/s ({free * 1e3:.1f} ms a step), "
                f"{rows} schemas {rows / bound:.1f} tokens/s ({bound * 1e3:.1f} ms): {free / bound:.1%}",
                flush=True,
            )
    print(f"median: {statistics.median(ratios):.1%} of free-text speed")


def validity(llm: LLM, count: int, max_tokens: int = 150) -> tuple[int, int]:
    """(outputs that finished, outputs); asserts that all that finished are valid."""
    import jsonschema

    from tests.structured.schemas import schemas

    found = schemas()
    chosen = [found[i * len(found) // count] for i in range(count)] if count < len(found) else found
    params = [
        SamplingParams(
            temperature=0.8, seed=i, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(json=one)
        )
        for i, one in enumerate(chosen)
    ]
    prompts = [f"An example of a JSON value for the schema {json.dumps(one)[:200]}:\n" for one in chosen]
    finished = 0
    for one, result in zip(chosen, llm.generate(prompts, params, use_tqdm=False), strict=True):
        (output,) = result.outputs
        assert output.finish_reason in ("stop", "length"), output
        if output.finish_reason == "stop":
            jsonschema.validate(
                json.loads(output.text), one, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            finished += 1
    return finished, len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--validity", action="store_true")
    parser.add_argument("--outputs", type=int, default=250)
    given = parser.parse_args()
    with LLM(given.model, max_model_len=1024, max_num_seqs=given.rows) as llm:
        if given.validity:
            began = time.perf_counter()
            finished, all_ = validity(llm, given.outputs)
            print(
                f"{all_} schemas compiled, {finished} outputs finished, all valid ({time.perf_counter() - began:.0f} s)"
            )
        else:
            speed(llm, given.rows, given.tokens, given.rounds)


if __name__ == "__main__":
    main()
