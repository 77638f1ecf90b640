"""LLM: offline generation with vLLM's interface, frontend and engine in this process.

Composes `frontend` and `engine`; owns neither. A call validates every prompt before it hands any to the engine, then
steps the engine until all have finished. Ctrl-C takes effect between two steps and ends what is running.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol, cast

import msgspec

from octavo.config import engine_args_from_kwargs
from octavo.config.engine import EngineConfig
from octavo.core.errors import InvalidRequest
from octavo.core.params import SamplingParams
from octavo.core.request import Delta, Request, Stats
from octavo.frontend.inputs import InputProcessor, Prompt
from octavo.frontend.outputs import RequestOutput
from octavo.frontend.process import OutputProcessor, RequestState
from octavo.frontend.progress import generation_bar, loading_bars
from octavo.frontend.startup import logger, open_tokenizer, resolve_config
from octavo.text import ChatTemplate, Tokenizer, model_template, normalise_messages
from octavo.text.template import check_names

Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams]


class EngineLike(Protocol):
    """What LLM needs of `octavo.engine.Engine`."""

    @property
    def stats(self) -> Stats: ...

    def add(self, request: Request) -> None: ...
    def finish(self, sequences: list[tuple[str, int]]) -> list[Delta]: ...
    def step(self) -> list[Delta]: ...
    def has_work(self) -> bool: ...
    def reset_prefix_cache(self) -> bool: ...
    def warm_up(self) -> None: ...
    def close(self) -> None: ...


class LLM:
    """A model in this process.

    `model` is a directory, a .gguf file, a hub id or a built-in name; None is the embedded model. Keyword arguments
    are the fields of `EngineArgs`. Arguments of vLLM that change no result are dropped with a log line; unknown ones
    raise ConfigError.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        args, dropped = engine_args_from_kwargs(model, kwargs)
        for line in dropped:
            logger.info(line)
        config = resolve_config(args)
        tokenizer = open_tokenizer(args, config.model)
        from octavo.engine import Engine

        inputs = InputProcessor(config, tokenizer)
        engine = Engine(config, vocabulary=inputs.vocabulary)
        with loading_bars() as progress:
            engine.load(progress)
        self._compose(engine, inputs)

    @classmethod
    def over(cls, engine: EngineLike, config: EngineConfig, tokenizer: Tokenizer | None) -> LLM:
        """An LLM over an engine that is loaded already."""
        llm = cls.__new__(cls)
        llm._compose(engine, InputProcessor(config, tokenizer))
        return llm

    def _compose(self, engine: EngineLike, inputs: InputProcessor) -> None:
        self.engine = engine
        self.config = inputs.config
        self.tokenizer = inputs.tokenizer
        self._inputs = inputs
        self._outputs = OutputProcessor(inputs.tokenizer)
        self._ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | None = None,
        *,
        use_tqdm: bool = True,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """One result per prompt, in the order of the prompts.

        A prompt is text, token ids or a dictionary of one; a list of integers is one prompt. `sampling_params` holds
        for all prompts or, as a list, one for each; None is `get_default_sampling_params()`. `use_tqdm` draws a
        progress bar. Raises InvalidRequest, with nothing started, when any of them cannot be served.
        """
        return self._generate(_as_list(prompts), sampling_params, use_tqdm, cache_salt=cache_salt)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, rendered with the model's chat template or `chat_template`.

        `tools` are told to the model. Outputs are text as the model writes it, calls and reasoning included:
        `text.parsing.build_parser` reads them.
        """
        template = self._template(chat_template)
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if single else messages)
        check_names(chat_template_kwargs or {})
        prompts: list[Prompt] = []
        for conversation in conversations:
            rendered = template.rendered(
                normalise_messages(conversation),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            self._inputs.check_text(rendered.text)
            prompts.append({"prompt": rendered.text, "prompt_token_ids": template.encode(rendered)})
        return self._generate(prompts, sampling_params, use_tqdm)

    def _template(self, source: str | None) -> ChatTemplate:
        tokenizer = self.get_tokenizer()
        template = model_template(tokenizer) if source is None else ChatTemplate(source, tokenizer)
        if template is None:
            raise InvalidRequest("the model has no chat template: give chat_template, or use generate", "chat_template")
        return template

    def get_tokenizer(self) -> Tokenizer:
        """Raises InvalidRequest with skip_tokenizer_init."""
        if self.tokenizer is None:
            raise InvalidRequest("there is no tokenizer: leave out skip_tokenizer_init")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """generation_config's sampling defaults over SamplingParams' own."""
        max_new_tokens = self.config.model.sampling_defaults.get("max_new_tokens")
        return self._inputs.default_params(16 if max_new_tokens is None else int(max_new_tokens))

    def warm_up(self) -> None:
        """Prepares every shape of decode step now instead of when it first comes, as a measurement wants it."""
        self.engine.warm_up()

    def reset_prefix_cache(self) -> bool:
        """Forgets the prefix cache."""
        return self.engine.reset_prefix_cache()

    @property
    def stats(self) -> Stats:
        """The engine's counters as they are now; the copy does not change."""
        return msgspec.structs.replace(self.engine.stats)

    def close(self) -> None:
        """Frees the engine's memory and threads."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: Params | None,
        use_tqdm: bool,
        *,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        chosen = self._params_for(prompts, params)
        arrival = time.time()
        inputs = [
            self._inputs.process(
                prompt,
                own,
                next(self._ids),
                arrival=arrival,
                cache_salt=cache_salt,
            )
            for prompt, own in zip(prompts, chosen, strict=True)
        ]
        states = []
        with _Interruptible() as check, generation_bar(len(inputs), use_tqdm) as advance:
            try:
                for request, text in inputs:
                    request = msgspec.structs.replace(request, whole=not request.params.stops)
                    states.append(self._outputs.add(request, text))
                    self.engine.add(request)
                self._run(check, advance)
            except BaseException:
                self._end(states)
                raise
        return [state.take() for state in states]

    def _params_for(self, prompts: Sequence[Prompt], params: Params | None) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"{len(params)} sampling_params for {len(prompts)} prompts: give one, or one for each prompt",
                "sampling_params",
            )
        return params

    def _run(self, check: Callable[[], None], advance: Callable[[int, int], None]) -> None:
        engine, outputs = self.engine, self._outputs
        while outputs.states:
            check()
            assert engine.has_work(), "requests are unfinished, but the engine has nothing to do"
            deltas = engine.step()
            finished, ended = outputs.process(deltas, time.time())
            if ended:
                engine.finish(ended)
            advance(len(finished), sum(len(delta.token_ids) for delta in deltas))
        while engine.has_work():  # steps in flight of what has ended
            engine.step()

    def _end(self, states: list[RequestState]) -> None:
        """Leaves the engine as it was: no request of ours, no step in flight."""
        ids = [state.request.id for state in states]
        for id_ in ids:
            self._outputs.abort(id_, time.time())
        self.engine.finish([(id_, -1) for id_ in ids])
        while self.engine.has_work():
            self.engine.step()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Sequence):
        raise InvalidRequest(f"prompts must be a prompt or a list of them, not {type(prompts).__name__}", "prompts")
    if prompts and not isinstance(prompts[0], str | Mapping | Sequence):
        return [cast(Prompt, prompts)]
    return cast("Sequence[Prompt]", prompts)


class _Interruptible:
    """Ctrl-C becomes a question asked between steps, so that no step is cut in two. A second one acts at once.

    Only in the main thread, and only where Python's own handler is in place.
    """

    def __init__(self) -> None:
        self._seen = False
        self._installed = False

    def __enter__(self) -> Callable[[], None]:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self._check

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            raise KeyboardInterrupt
        self._seen = True

    def _check(self) -> None:
        if self._seen:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._seen and kind is None:
            raise KeyboardInterrupt
