"""Structured output: what a request wants its text to look like becomes a grammar, then masks over the vocabulary.

Owns the compiling with its limits (grammar.py), the table of JSON Schema keywords (keywords.py), the vocabulary as
llguidance needs it (tokens.py) and the following of grammars while sequences grow (masks.py). Knows nothing of logits:
`sampling` applies the masks. Does not import torch. Start reading at grammar.py.
"""

from octavo.structured.grammar import MAX_BYTES, compile_grammar, json_schema_grammar
from octavo.structured.keywords import ANNOTATIONS, KEYWORDS
from octavo.structured.masks import Grammars
from octavo.structured.tokens import Vocabulary

__all__ = ["ANNOTATIONS", "KEYWORDS", "MAX_BYTES", "Grammars", "Vocabulary", "compile_grammar", "json_schema_grammar"]
