"""A path becomes `ModelFacts`: which reader applies, and what generation_config.json adds.

config.json is read by `hf_config`, GGUF metadata by `gguf_facts`; both refuse what they do not know by name.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from octavo.core.errors import ConfigError
from octavo.core.facts import ModelFacts
from octavo.formats.gguf_facts import gguf_facts
from octavo.formats.hf_config import hf_facts
from octavo.formats.jsonfile import merge_ids, read_json, token_ids

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


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
    return msgspec.structs.replace(facts, sampling_defaults={}) if generation_config == "vllm" else facts


def _with_generation_config(facts: ModelFacts, file: Path) -> ModelFacts:
    config = read_json(file)
    defaults: dict[str, float] = {}
    for name in _SAMPLING:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file}: {name} is {value!r}, not a number: correct or remove it")
        defaults[name] = value
    return msgspec.structs.replace(
        facts,
        sampling_defaults=defaults,
        eos_token_ids=merge_ids(facts.vocab_size, facts.eos_token_ids, token_ids(config, "eos_token_id", file)),
    )
