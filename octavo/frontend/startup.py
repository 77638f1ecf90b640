"""What starting an engine has in common whoever runs it: arguments to configuration, the tokenizer, the log lines."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from octavo.config import EngineArgs, detect_device, resolve
from octavo.config.engine import EngineConfig
from octavo.core.facts import ModelFacts
from octavo.formats import locate, read_facts
from octavo.text import Tokenizer, load_tokenizer

logger = logging.getLogger("octavo")


def resolve_config(args: EngineArgs) -> EngineConfig:
    """Finds the model (fetching it if need be) and settles every value; logs each decision. Raises ConfigError."""
    facts = read_facts(locate(args.model, args.revision), args.generation_config)
    if args.tokenizer is not None:
        args = msgspec.structs.replace(args, tokenizer=str(locate(args.tokenizer, args.revision)))
    config, decisions = resolve(args, facts, detect_device(args.device))
    for decision in decisions:
        logger.info("%s = %s (%s)", decision.name, decision.value, decision.reason)
    return config


def open_tokenizer(args: EngineArgs, facts: ModelFacts) -> Tokenizer | None:
    """The tokenizer of `args`, by default the model's; None with skip_tokenizer_init."""
    if args.skip_tokenizer_init:
        return None
    return load_tokenizer(Path(facts.path) if args.tokenizer is None else locate(args.tokenizer, args.revision))
