"""Grammars in the engine: masked sampling equals a naive loop that masks every step, however the engine runs it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from octavo.config.engine import EngineConfig
from octavo.core.params import SamplingParams, StructuredOutputs
from octavo.core.request import Delta, Request
from octavo.core.sequence import Sequence
from octavo.engine import Engine, InlineExecutor
from octavo.kernels import load
from octavo.structured import Vocabulary, compile_grammar
from octavo.structured.grammar import new_matcher
from octavo.text import load_tokenizer
from tests.support.tiny import VOCAB, Naive, tiny_config, write_tiny

EOS = 0
CHARACTERS = 'abcd0123456789-[],"{}: '
LIST = {"type": "array", "items": {"enum": [1, 20, "a"]}, "maxItems": 3}
SPECS: list[dict[str, Any] | None] = [
    {"regex": "[ab]{2,4}(-[cd])?"},
    None,
    {"json": LIST},
    {"choice": ["abc", "abd", "10"]},
    None,
    {"regex": "[0-9]+", "lead": 'start: free @then\nfree[lazy]: TEXT ":"\nTEXT: /(?s:.*)/'},
]
SHARED = [7, 3, 9, 1, 4, 4, 8, 2]
PROMPTS = [[*SHARED, 6, 5], [5], SHARED, [*SHARED, 6, 10, 11, 12], [1, 2], [9]]
Tokens = dict[tuple[str, int], list[int]]


def write_tokenizer(folder: Path) -> None:
    fast = FastTokenizer(models.BPE(vocab={"<eos>": EOS} | {c: i + 1 for i, c in enumerate(_spelled())}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<eos>", special=True)])
    fast.save(str(folder / "tokenizer.json"))


def _spelled() -> list[str]:
    return ["Ġ" if c == " " else c for c in CHARACTERS]


def text_of(tokens: list[int]) -> str:
    return "".join(CHARACTERS[t - 1] for t in tokens if t != EOS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Naive, Vocabulary]:
    assert len(CHARACTERS) + 1 == VOCAB
    folder = tmp_path_factory.mktemp("grammars")
    naive = Naive(write_tiny("full", folder))
    write_tokenizer(folder)
    return folder, naive, Vocabulary(load_tokenizer(folder), VOCAB, (EOS,))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def requests(n: int, vocabulary: Vocabulary, specs: list[Any]) -> list[Request]:
    return [
        Request(
            str(i),
            prompt,
            SamplingParams(n=n, temperature=i % 3 * 0.7, seed=i, max_tokens=14, ignore_eos=spec is None),
            0.0,
            grammar="" if spec is None else compile_grammar(StructuredOutputs(**spec), vocabulary),
        )
        for i, (prompt, spec) in enumerate(zip(PROMPTS, specs, strict=True))
    ]


def naive_tokens(naive: Naive, vocabulary: Vocabulary, request: Request, index: int) -> list[int]:
    """Recomputes every logit and every mask."""
    params = request.params
    assert params.seed is not None
    assert params.max_tokens is not None
    if not request.grammar:
        return naive.generate(
            request.prompt_token_ids, params.max_tokens, params.temperature, params.seed + index, None
        )
    tokens: list[int] = []
    neutral = torch.zeros(1)
    while len(tokens) < params.max_tokens:
        matcher = new_matcher(request.grammar, vocabulary)
        assert matcher.consume_tokens(tokens)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:VOCAB]
        logits = naive._logits((*request.prompt_token_ids, *tokens)).clone()
        logits[torch.from_numpy(bits) == 0] = float("-inf")
        place = len(request.prompt_token_ids) + len(tokens)
        token = load("cpu").sample(
            logits[None], torch.tensor([params.temperature]), torch.zeros(1, dtype=torch.int64), neutral + 1, neutral,
            torch.tensor([params.seed + index]), torch.tensor([place]),
        )  # fmt: skip
        tokens.append(int(token))
        if tokens[-1] == EOS:
            break
    return tokens


class Script:
    """Drafts what is known to follow, spoilt at every third position."""

    def __init__(self, wanted: Tokens) -> None:
        self._wanted = wanted
        self.proposed: set[str] = set()

    def propose(self, seq: Sequence, limit: int) -> list[int]:
        at = seq.num_generated
        draft = self._wanted[seq.request.id, seq.index][at : at + limit]
        self.proposed.add(seq.request.id)
        return [(t + 1) % VOCAB if (at + i) % 3 == 0 else t for i, t in enumerate(draft)]


_executors: dict[tuple[object, ...], InlineExecutor] = {}


def config_of(folder: Path, **changes: Any) -> EngineConfig:
    given = {"block_size": 4, "max_model_len": 28, "max_num_seqs": 5, "max_num_batched_tokens": 9,
             "num_gpu_blocks_override": 200} | changes  # fmt: skip
    return tiny_config(folder, **given)


def engine_of(config: EngineConfig, **kwargs: Any) -> Engine:
    key = (config.model.path, config.cache.num_blocks, config.scheduler.max_num_seqs)
    if key not in _executors:
        _executors[key] = InlineExecutor(config)
        _executors[key].load()
    return Engine(config, executor=_executors[key], **kwargs)


def run(engine: Engine, on_delta: Callable[[Delta], None] = lambda delta: None) -> tuple[Tokens, dict[Any, Delta]]:
    got: Tokens = {}
    last: dict[Any, Delta] = {}
    while engine.has_work():
        for delta in engine.step():
            key = delta.request_id, delta.index
            got.setdefault(key, []).extend(delta.token_ids)
            last[key] = delta
            on_delta(delta)
        engine.scheduler.check()
    return got, last


@pytest.mark.parametrize(
    ("overlap", "pool", "n", "draft", "seqs"), list(product((0, 1), ("tight", "ample"), (1, 2), (0, 2), (2, 5)))
)
def test_tokens_equal_a_naive_loop_that_masks_every_step(
    model: tuple[Path, Naive, Vocabulary], overlap: int, pool: str, n: int, draft: int, seqs: int
) -> None:
    folder, naive, vocabulary = model
    config = config_of(
        folder, overlap=overlap, max_num_seqs=seqs, num_gpu_blocks_override=9 if pool == "tight" else 200
    )
    mixed = requests(n, vocabulary, SPECS)
    wanted = {(r.id, i): naive_tokens(naive, vocabulary, r, i) for r in mixed for i in range(n)}
    script = Script(wanted)
    engine = engine_of(config, proposer=script if draft else None, max_draft=draft)
    for request in mixed:
        engine.add(request)
    got, last = run(engine)
    assert got == wanted
    assert engine.stats.kv_blocks_used == 0
    assert script.proposed == ({"1", "4"} if draft else set()), "rows with a grammar are not drafted"
    assert all(
        (delta.finish_reason, delta.stop_reason) == ("length", None) or got[key][-1] == EOS
        for key, delta in last.items()
    )
    for (id_, _), tokens in got.items():
        if tokens[-1] == EOS and id_ == "0":
            assert re.fullmatch("[ab]{2,4}(-[cd])?", text_of(tokens))
        if tokens[-1] == EOS and id_ == "3":
            assert text_of(tokens) in ("abc", "abd", "10")


def test_free_rows_do_not_notice_grammars(model: tuple[Path, Naive, Vocabulary]) -> None:
    folder, _, vocabulary = model
    alone = engine_of(config_of(folder, overlap=1))
    for request in requests(1, vocabulary, [None] * 6):
        alone.add(request)
    free, _ = run(alone)
    mixed = engine_of(config_of(folder, overlap=1))
    for request in requests(1, vocabulary, SPECS):
        mixed.add(request)
    got, _ = run(mixed)
    assert {key: got[key] for key in (("1", 0), ("4", 0))} == {key: free[key] for key in (("1", 0), ("4", 0))}


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_grammar_wins_where_other_parameters_leave_nothing(
    model: tuple[Path, Naive, Vocabulary], overlap: int
) -> None:
    folder, _, vocabulary = model
    a, b = CHARACTERS.index("a") + 1, CHARACTERS.index("b") + 1
    grammar = compile_grammar(StructuredOutputs(regex="[ab]{1,3}"), vocabulary)
    params = {
        "min": SamplingParams(min_tokens=10, max_tokens=12, temperature=0.0),
        "allowed": SamplingParams(allowed_token_ids=[9, 10], max_tokens=12, temperature=0.0),
        "bias": SamplingParams(logit_bias={a: -100.0, b: 100.0, EOS: -100.0}, max_tokens=12, temperature=0.0),
        "stop": SamplingParams(stop_token_ids=[b], logit_bias={b: 100.0}, max_tokens=12, temperature=0.0),
    }
    engine = engine_of(config_of(folder, overlap=overlap))
    for name, own in params.items():
        engine.add(Request(name, [1, 2, 3], own, 0.0, grammar=grammar))
    got, last = run(engine)
    assert len(got["min", 0]) == 4, "as long as the grammar allows, not longer"
    assert text_of(got["bias", 0]) == "bbb"
    assert re.fullmatch("[ab]{1,3}", text_of(got["allowed", 0]))
    assert (got["stop", 0], last["stop", 0].stop_reason) == ([b], b)
    assert [last[name, 0].finish_reason for name in params] == ["stop"] * 4


def test_a_whole_request_is_answered_once(model: tuple[Path, Naive, Vocabulary]) -> None:
    folder, _, vocabulary = model
    engine = engine_of(config_of(folder, overlap=1))
    grammar = compile_grammar(StructuredOutputs(choice=["abcd"]), vocabulary)
    engine.add(Request("w", [1, 2], SamplingParams(max_tokens=9), 0.0, whole=True, grammar=grammar))
    deltas: list[Delta] = []
    run(engine, deltas.append)
    assert [(text_of(delta.token_ids), delta.finish_reason) for delta in deltas] == [("abcd", "stop")]


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_grammar_that_fails_ends_its_own_request(model: tuple[Path, Naive, Vocabulary], overlap: int) -> None:
    folder, _, vocabulary = model
    good = compile_grammar(StructuredOutputs(choice=["ab"]), vocabulary)
    engine = engine_of(config_of(folder, overlap=overlap))
    engine.add(Request("bad", [1, 2], SamplingParams(max_tokens=5, n=2), 0.0, grammar="start: gone"))
    engine.add(Request("good", [1, 2], SamplingParams(max_tokens=5), 0.0, grammar=good))
    engine.add(Request("free", [1, 2], SamplingParams(max_tokens=5, ignore_eos=True), 0.0))
    got, last = run(engine)
    assert [last["bad", i].finish_reason for i in (0, 1)] == ["error", "error"]
    assert "gone" in (last["bad", 0].error or "")
    assert text_of(got["good", 0]) == "ab"
    assert len(got["free", 0]) == 5
    assert engine.stats.kv_blocks_used == 0


def test_without_a_tokenizer_grammars_end_with_an_error(model: tuple[Path, Naive, Vocabulary]) -> None:
    engine = engine_of(config_of(model[0], skip_tokenizer_init=True))
    engine.add(Request("g", [1, 2], SamplingParams(max_tokens=5), 0.0, grammar='start: "a"'))
    _, last = run(engine)
    assert "skip_tokenizer_init" in (last["g", 0].error or "")


@pytest.mark.parametrize("overlap", [0, 1])
def test_others_run_while_a_grammar_is_being_compiled(
    model: tuple[Path, Naive, Vocabulary], overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, vocabulary = model
    ready = threading.Event()

    def open_slowly(engine: Engine) -> Vocabulary:
        assert ready.wait(30)
        return vocabulary

    monkeypatch.setattr(Engine, "_open_vocabulary", open_slowly)
    engine = engine_of(config_of(folder, overlap=overlap))
    grammar = compile_grammar(StructuredOutputs(choice=["ab"]), vocabulary)
    engine.add(Request("late", [1, 2], SamplingParams(max_tokens=5), 0.0, grammar=grammar))
    engine.add(Request("gone", [1, 2], SamplingParams(max_tokens=5), 0.0, grammar=grammar + " "))
    engine.add(Request("free", [1, 2], SamplingParams(max_tokens=5, ignore_eos=True), 0.0))
    tokens = 0
    while tokens < 5:
        tokens += sum(len(delta.token_ids) for delta in engine.step())
    assert engine.step() == []
    assert engine.has_work()
    engine.finish([("gone", -1)])
    ready.set()
    got, last = run(engine)
    assert (text_of(got["late", 0]), last["late", 0].finish_reason) == ("ab", "stop")
    assert ("gone", 0) not in got


def test_compiled_grammars_are_kept_and_forgotten(model: tuple[Path, Naive, Vocabulary]) -> None:
    folder, _, vocabulary = model
    engine = engine_of(config_of(folder))
    for i in range(70):
        grammar = compile_grammar(StructuredOutputs(regex=f"a{{1,{1 + i % 68}}}"), vocabulary)
        engine.add(Request(str(i), [1, 2], SamplingParams(max_tokens=4), 0.0, grammar=grammar))
    got, last = run(engine)
    assert len(got) == 70
    assert {delta.finish_reason for delta in last.values()} <= {"stop", "length"}
    assert len(engine._grammars._compiled) <= 64
