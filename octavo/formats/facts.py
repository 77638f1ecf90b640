"""A path becomes `ModelFacts`: which reader applies, and what generation_config.json adds.

config.json is read by `hf_config`, GGUF metadata by `gguf_facts`; both refuse what they do not know by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from octavo.core.errors import ConfigError, InvalidRequest
from octavo.core.facts import ModelFacts
from octavo.core.params import SamplingParams
from octavo.formats.gguf_facts import gguf_facts
from octavo.formats.hf_config import hf_facts
from octavo.formats.jsonfile import merge_ids, read_json, token_ids

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Names in generation_config.json -> those of SamplingParams, which owns the bounds."""


def read_facts(path: Path, generation_config: str = "auto") -> ModelFacts:
    """Facts of the model at `path`, a directory with config.json or a .gguf file.

    `generation_config` says where sampling defaults come from: "auto" the model itself, "vllm" nowhere, otherwise a
    folder with generation_config.json, which then also replaces the model's own. Raises UnsupportedModel for an
    architecture or value that is not implemented, ConfigError for files that are missing or damaged.
    """
    own: Path | None = None
    if path.is_file():
        facts = gguf_facts(path)
    elif path.is_dir():
        facts = hf_facts(path)
        own = path / "generation_config.json"
    else:
        raise ConfigError(f"{path} is neither a directory nor a file")
    if generation_config not in ("auto", "vllm"):
        own = Path(generation_config) / "generation_config.json"
        if not own.is_file():
            raise ConfigError(
                f"generation_config is {generation_config!r}: neither auto, nor vllm, nor a folder with "
                "generation_config.json"
            )
    if own is not None and own.is_file():
        facts = _with_generation_config(facts, own)
    if generation_config == "vllm":
        return msgspec.structs.replace(facts, sampling_defaults={})
    _check_sampling(facts.sampling_defaults, own or path)
    return facts


def _with_generation_config(facts: ModelFacts, file: Path) -> ModelFacts:
    config = read_json(file)
    return msgspec.structs.replace(
        facts,
        sampling_defaults={name: config[name] for name in _SAMPLING if config.get(name) is not None},
        eos_token_ids=merge_ids(facts.vocab_size, facts.eos_token_ids, token_ids(config, "eos_token_id", file)),
    )


def _check_sampling(defaults: dict[str, float], file: Path) -> None:
    given: dict[str, Any] = {_SAMPLING[name]: value for name, value in defaults.items()}
    try:
        SamplingParams(**given)
    except InvalidRequest as error:
        raise ConfigError(
            f"{file}: {error}: correct it, or ignore sampling defaults with generation_config vllm"
        ) from None
