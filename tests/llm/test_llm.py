from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import octavo
from octavo.core.errors import ConfigError, InvalidRequest
from octavo.core.params import SamplingParams
from octavo.core.request import Delta
from octavo.llm import LLM
from tests.frontend.fake_engine import EchoEngine
from tests.frontend.tiny import byte_tokenizer, tiny_config

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


class ScriptedEngine(EchoEngine):
    """Echoes, and does what `on_step` says before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.on_step: Any = lambda: None
        self.closed = False
        self.resets = 0

    def step(self) -> list[Delta]:
        self.on_step()
        return super().step()

    def warm_up(self) -> None:
        pass

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def llm(engine: ScriptedEngine) -> Iterator[LLM]:
    yield LLM.over(engine, tiny_config(sampling_defaults={"temperature": 0.5, "max_new_tokens": 3}), byte_tokenizer())
    assert not engine.running, "requests were left in the engine"


def texts(llm: LLM, prompts: Any, params: Any = None, **kwargs: Any) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False, **kwargs)]


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (5, 1, 3)]
    assert texts(llm, ["ab", "cd", "ef"], params) == ["ababa", "c", "efe"]
    assert [output.prompt for output in llm.generate(["ab", "cd"], use_tqdm=False)] == ["ab", "cd"]


@pytest.mark.parametrize(
    "prompts",
    [
        "ab",
        ["ab"],
        [97, 98],
        [[97, 98]],
        {"prompt": "ab"},
        [{"prompt": "ab"}],
        {"prompt_token_ids": [97, 98]},
        [{"prompt_token_ids": [97, 98]}],
    ],
)
def test_every_form_of_prompts(llm: LLM, prompts: Any) -> None:
    assert texts(llm, prompts, SamplingParams(max_tokens=2)) == ["ab"]


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_without_parameters_the_models_defaults_hold(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5, max_tokens=3)
    assert texts(llm, "ab") == ["aba"]


def test_stop_strings_end_sequences_in_the_engine(llm: LLM, engine: ScriptedEngine) -> None:
    (output,) = llm.generate("abcd", SamplingParams(max_tokens=50, stop="da", n=2), use_tqdm=False)
    assert [o.text for o in output.outputs] == ["abc", "abc"]
    assert (engine.stats.preemptions, engine.stats.steps) == (2, 5)


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (["ab", ""], None, "empty"),
        (["ab", "cd"], [SamplingParams()], "1 sampling_params for 2 prompts"),
        (7, None, "not int"),
        (["ab", [1, 999]], None, "999"),
    ],
)
def test_nothing_starts_when_anything_is_wrong(
    llm: LLM, engine: ScriptedEngine, prompts: Any, params: Any, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(prompts, params)
    assert engine.stats.steps == 0


def test_chat_renders_the_template(llm: LLM) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    (one,) = llm.chat([message], use_tqdm=False, chat_template=TEMPLATE)
    assert one.prompt == "[user] hi\n>"
    two = llm.chat([[message], [message, message]], use_tqdm=False, chat_template=TEMPLATE)
    assert [output.prompt for output in two] == ["[user] hi\n>", "[user] hi\n[user] hi\n>"]
    (open_,) = llm.chat([message], use_tqdm=False, chat_template="{{ tone }}", chat_template_kwargs={"tone": "calm"})
    assert open_.prompt == "calm"
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([message])


def test_without_a_tokenizer_there_are_tokens_only(engine: ScriptedEngine) -> None:
    llm = LLM.over(engine, tiny_config(), None)
    (output,) = llm.generate([[97, 98]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [97, 98, 97])
    with pytest.raises(InvalidRequest, match="skip_tokenizer_init"):
        llm.get_tokenizer()


def test_interrupting_ends_what_runs_and_the_next_call_works(llm: LLM, engine: ScriptedEngine) -> None:
    def interrupt_at_third() -> None:
        if engine.stats.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    engine.on_step = interrupt_at_third
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["ab", "cd"], SamplingParams(max_tokens=50), use_tqdm=False)
    assert engine.stats.steps == 3, "the step that was running came to its end"
    assert not engine.running
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert texts(llm, "ab") == ["aba"]


def test_progress_cache_and_close(llm: LLM, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate("ab", use_tqdm=True)
    assert llm.reset_prefix_cache()
    with llm:
        assert llm.stats.generated_tokens == 3
    assert (engine.resets, engine.closed, capsys.readouterr().out) == (1, True, "")


@pytest.mark.parametrize(
    ("name", "words"), [("max_model_length", "did you mean max_model_len"), ("quantization", "fp8")]
)
def test_unknown_arguments_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM("nowhere", **{name: "fp8"})


def test_the_package_is_lazy() -> None:
    code = (
        "import sys, octavo\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'zmq', 'msgspec')]\n"
        "from octavo import AsyncLLM, SamplingParams, RequestOutput\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(octavo, name) is not None for name in octavo.__all__)
    assert dir(octavo) == sorted(octavo.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        octavo.nonsense  # noqa: B018
