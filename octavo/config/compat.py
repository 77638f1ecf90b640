"""vLLM's arguments that Octavo does not have: which are dropped without changing a result, which are refused.

One table serves the command line and `LLM(...)`. An argument that is dropped is told to the user once; one whose
absence would change what happens is refused by name, unless it only states what Octavo does anyway.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from octavo.config.args import EngineArgs, ServerArgs, flag_of, settings_of
from octavo.core.errors import ConfigError

HARMLESS: frozenset[str] = frozenset(
    {
        "async_scheduling",
        "code_revision",
        "compilation_config",
        "cuda_graph_sizes",
        "cudagraph_capture_sizes",
        "disable_async_output_proc",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_frontend_multiprocessing",
        "disable_log_requests",
        "disable_log_stats",
        "disable_uvicorn_access_log",
        "enable_log_outputs",
        "enable_log_requests",
        "enforce_eager",
        "limit_mm_per_prompt",
        "log_config_file",
        "long_prefill_token_threshold",
        "max_log_len",
        "max_long_partial_prefills",
        "max_num_partial_prefills",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "num_scheduler_steps",
        "optimization_level",
        "prefix_caching_hash_algo",
        "show_hidden_metrics_for_version",
        "stream_interval",
        "swap_space",
        "trust_remote_code",
        "use_tqdm_on_load",
        "use_v2_block_manager",
        "uvicorn_access_log",
    }
)
"""Arguments of vLLM about speed, logs and inner workings: results are the same without them."""

REFUSED: dict[str, tuple[str, ...]] = {
    "allow_credentials": ("false",),
    "allowed_headers": (),
    "allowed_local_media_path": ("",),
    "allowed_methods": (),
    "allowed_origins": (),
    "api_server_count": ("1",),
    "attention_backend": ("auto",),
    "calculate_kv_scales": ("false",),
    "chat_template_content_format": ("auto", "string"),
    "config_format": ("auto", "hf"),
    "cpu_offload_gb": ("0", "0.0"),
    "data_parallel_size": ("1",),
    "decode_context_parallel_size": ("1",),
    "default_mm_loras": (),
    "disable_fastapi_docs": ("false",),
    "disable_hybrid_kv_cache_manager": ("false",),
    "disable_sliding_window": ("false",),
    "download_dir": (),
    "enable_auto_tool_choice": ("true",),
    "enable_chunked_prefill": ("true",),
    "enable_eplb": ("false",),
    "enable_expert_parallel": ("false",),
    "enable_force_include_usage": ("false",),
    "enable_lora": ("false",),
    "enable_prompt_embeds": ("false",),
    "enable_prompt_tokens_details": ("false",),
    "enable_request_id_headers": ("false",),
    "enable_server_load_tracking": ("false",),
    "enable_sleep_mode": ("false",),
    "enable_ssl_refresh": ("false",),
    "guided_decoding_backend": ("auto",),
    "hf_config_path": (),
    "hf_overrides": ("{}",),
    "hf_token": (),
    "kv_cache_dtype": ("auto",),
    "kv_sharing_fast_prefill": ("false",),
    "kv_transfer_config": (),
    "logits_processors": (),
    "logprobs_mode": ("raw_logprobs",),
    "lora_modules": (),
    "max_logprobs": ("20",),
    "max_loras": ("1",),
    "middleware": (),
    "mm_processor_kwargs": ("{}",),
    "model_impl": ("auto",),
    "num_lookahead_slots": ("0",),
    "override_generation_config": ("{}",),
    "override_neuron_config": ("{}",),
    "override_pooler_config": (),
    "response_role": ("assistant",),
    "return_tokens_as_token_ids": ("false",),
    "root_path": ("",),
    "rope_scaling": ("{}",),
    "rope_theta": (),
    "runner": ("auto", "generate"),
    "scheduler_cls": (),
    "scheduling_policy": ("fcfs",),
    "speculative_config": (),
    "ssl_ca_certs": (),
    "ssl_cert_reqs": ("0",),
    "ssl_certfile": (),
    "ssl_keyfile": (),
    "structured_outputs_config": (),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto", "hf"),
    "tokenizer_revision": (),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
}
"""Arguments of vLLM that would change what happens, and the values, beside None, that ask for nothing."""

SWITCHES: frozenset[str] = frozenset(
    name
    for name in (*HARMLESS, *REFUSED)
    if "false" in REFUSED.get(name, ())
    or name.startswith(("disable_", "enable_", "enforce_", "use_", "trust_"))
    or name in ("async_scheduling", "uvicorn_access_log")
)
"""Those of both tables that are switches on the command line; the others take a value."""


_SERVERS = frozenset(("served_model_name", "tool_call_parser", "reasoning_parser"))
"""Arguments of vLLM's LLM that only the server here has."""


def drop(name: str, value: Any) -> str:
    """What is said about dropping the argument `name` of vLLM; ConfigError when `value` asks for what is not there."""
    if name in HARMLESS:
        return f"{flag_of(name)} changes no result here and is dropped"
    neutral = REFUSED[name]
    if value is None or str(value).lower() in neutral:
        return f"{_spelled(name, value)} is what happens anyway"
    allowed = "" if isinstance(value, bool) else " or ".join(repr(choice) for choice in neutral if choice)
    raise ConfigError(
        f"{_spelled(name, value)} is not built yet" + (f" (only {allowed} is)" if allowed else "") + ": leave it out"
    )


def _spelled(name: str, value: Any) -> str:
    """The flag as it is typed."""
    if isinstance(value, bool):
        return flag_of(name if value else f"no_{name}")
    return f"{flag_of(name)} {value}"


def unknown(name: str, known: Iterable[str]) -> ConfigError:
    """The error for an argument that nobody knows, with the nearest known one."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return ConfigError(f"unknown argument {name}" + (f": did you mean {close[0]}?" if close else ""))


def engine_args_from_kwargs(model: str | None, kwargs: dict[str, Any]) -> tuple[EngineArgs, list[str]]:
    """Keyword arguments in vLLM's terms -> the engine's arguments, and a line about each one dropped.

    None means not given. Raises ConfigError for unknown arguments, with the nearest known name, and for what is not
    built yet.
    """
    own = {setting.name for setting in settings_of(EngineArgs)}
    given: dict[str, Any] = {}
    dropped: list[str] = []
    for name, value in kwargs.items():
        if name in own:
            if value is not None:
                given[name] = value
        elif name in HARMLESS or name in REFUSED:
            dropped.append(drop(name, value))
        elif name in _SERVERS:
            dropped.append(f"{name} is the server's and changes no result here")
        else:
            raise unknown(name, own | HARMLESS | REFUSED.keys())
    return EngineArgs(model=model, **given), dropped


def split(given: dict[str, Any]) -> tuple[EngineArgs, ServerArgs, list[str]]:
    """Flags of `octavo serve` that were given, by name -> both structs, and a line about each flag dropped."""
    server_names = {setting.name for setting in settings_of(ServerArgs)}
    server = {name: value for name, value in given.items() if name in server_names}
    rest = {name: value for name, value in given.items() if name not in server_names}
    engine, dropped = engine_args_from_kwargs(rest.pop("model", None), rest)
    return engine, ServerArgs(**server), dropped
