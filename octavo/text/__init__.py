"""Text on its way in and out: tokenizers, incremental detokenizing, stop strings, chat templates, parsers of outputs.

Owns everything that knows both characters and tokens; reads tokenizer files through octavo.formats. Knows nothing about
requests, sampling or the engine. Start reading at tokenizer.py; parsing/ is imported by its name.
"""

from octavo.text.chat import ChatPrompt
from octavo.text.detokenizer import Detokenizer
from octavo.text.messages import normalise_messages
from octavo.text.stop import StopMatcher
from octavo.text.template import ChatTemplate, model_template
from octavo.text.tokenizer import Tokenizer, check_unicode, load_tokenizer

__all__ = [
    "ChatPrompt",
    "ChatTemplate",
    "Detokenizer",
    "StopMatcher",
    "Tokenizer",
    "check_unicode",
    "load_tokenizer",
    "model_template",
    "normalise_messages",
]
