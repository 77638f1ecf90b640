"""Reasoning before what is constrained, and calls instead of it, in the grammar that the engine follows."""

from __future__ import annotations

import pytest

from octavo.core.params import StructuredOutputs
from octavo.structured import Vocabulary, compile_grammar
from octavo.structured.grammar import new_matcher
from octavo.text import Tokenizer
from octavo.text.parsing import TOOL_FORMATS, Formats, lead
from octavo.text.parsing.formats import REASONING_FORMATS
from tests.frontend.tiny import EOS, byte_tokenizer

MARKERS = sorted(
    {m for f in (*TOOL_FORMATS.values(), *REASONING_FORMATS.values()) for m in (*f.markers, *(f.tags or ()))}
)
CONTROL = {text: 257 + i for i, text in enumerate(MARKERS)}


class Controlled(Tokenizer):
    """Bytes and, above them, every format's markers as control tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        return MARKERS[token_id - 257].encode() if token_id > EOS else super().token_bytes(token_id)


def vocabulary() -> Vocabulary:
    tokenizer = Controlled(byte_tokenizer()._vocabulary)
    tokenizer.special_ids = frozenset({EOS, *CONTROL.values()})
    return Vocabulary(tokenizer, 257 + len(MARKERS), (EOS,))


def ids(text: str, control: dict[str, int]) -> list[int]:
    """Tokens of `text`, the longest control token at each place."""
    found: list[int] = []
    while text:
        mark = max((m for m in control if text.startswith(m)), key=len, default="")
        found += [control[mark]] if mark else text[:1].encode()
        text = text[len(mark or text[:1]) :]
    return found


def admits(rules: str, text: str, control: dict[str, int]) -> bool:
    """Whether an answer constrained to "ok" may be `text`, and may end there."""
    words = vocabulary()
    grammar = compile_grammar(StructuredOutputs(choice=["ok"], lead=rules), words)
    matcher = new_matcher(grammar, words)
    return bool(matcher.consume_tokens(ids(text, control))) and matcher.is_accepting()


TAGGED = [
    ("qwen3", "<|im_start|>assistant\n", ["ok", "<think>hm ok</think>ok"], ["hm</think>ok", "<think>hm", "ok<think>"]),
    ("qwen3", "<|im_start|>assistant\n<think>\n", ["hm</think>ok"], ["ok", "<think>"]),
    ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", ["ok"], ["hm</think>ok", "<think>hm</think>ok"]),
    ("deepseek_r1", "<｜Assistant｜>", ["hm</think>ok"], ["ok"]),
    ("deepseek_r1", "<｜Assistant｜></think>", ["ok"], ["hm</think>ok"]),
    ("mistral", "[/INST]", ["ok", "[THINK]hm[/THINK]ok"], ["hm[/THINK]ok"]),
]


@pytest.mark.parametrize("control", [{}, CONTROL], ids=["text", "control"])
@pytest.mark.parametrize(("reasoning", "tail", "good", "bad"), TAGGED)
def test_reasoning_comes_before(
    reasoning: str, tail: str, good: list[str], bad: list[str], control: dict[str, int]
) -> None:
    rules = lead(Formats(reasoning=reasoning), tail, control)
    for text in good:
        assert admits(rules, text, control), text
    for text in bad:
        assert not admits(rules, text, control), text


HARMONY = [
    "<|channel|>final<|message|>ok",
    "<|channel|>analysis<|message|>hm ok<|end|><|start|>assistant<|channel|>final<|message|>ok",
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>so"
    "<|end|><|start|>assistant<|channel|>final<|message|>ok",
]
HARMONY_CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"


def test_harmony_has_messages_before_the_final_one() -> None:
    formats, tail = Formats("openai", "openai_gptoss"), "<|start|>assistant"
    rules = lead(formats, tail, CONTROL)
    assert all(admits(rules, text, CONTROL) for text in HARMONY)
    for text in ("ok", "<|channel|>analysis<|message|>ok", "<|channel|>final<|message|>no", HARMONY_CALL):
        assert not admits(rules, text, CONTROL), text
    rules = lead(formats, tail, CONTROL, ["f"])
    assert all(admits(rules, text, CONTROL) for text in [*HARMONY, HARMONY_CALL])
    assert not admits(rules, HARMONY_CALL.replace("functions.f", "functions.g"), CONTROL)
    begun = lead(formats, f"{tail}<|channel|>analysis<|message|>", CONTROL)
    assert admits(begun, f"hm<|end|><|start|>assistant{HARMONY[0]}", CONTROL)
    assert not admits(begun, "ok", CONTROL)
    assert lead(formats, tail, {}) == "", "without its control tokens there is no harmony"


CALLS = {
    "hermes": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=f>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
    "mistral": "[TOOL_CALLS]f[ARGS]{}",
    "granite": '<|tool_call|>[{"name": "f", "arguments": {}}]',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "pythonic": "[f(a=1)]",
    "llama3_json": '{"name": "f", "parameters": {}}',
}


@pytest.mark.parametrize("control", [{}, CONTROL], ids=["text", "control"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_may_come_instead(name: str, control: dict[str, int]) -> None:
    rules = lead(Formats(tool=name, reasoning="qwen3"), "", control, ["f", "g"])
    for text in (CALLS[name], f"<think>hm</think>{CALLS[name]}", "ok", "<think>hm</think>ok"):
        assert admits(rules, text, control), text
    for text in ("no", "hm", f"ok{CALLS[name]}", f"a{CALLS[name]}", CALLS[name].replace("f", "h", 1), CALLS[name][:2]):
        assert not admits(rules, text, control), text


def test_nothing_is_free_where_nothing_may_come() -> None:
    assert lead(Formats(), "", CONTROL) == lead(Formats(tool="hermes"), "", CONTROL) == ""
    assert lead(Formats(reasoning="qwen3"), "<think></think>", CONTROL) == ""
