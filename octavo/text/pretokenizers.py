"""How byte-level BPE vocabularies cut text into words before merging, by the names of GGUF's `tokenizer.ggml.pre`.

A row is the cut that the model was trained with. GGUF states it by name only, so a name without a row is refused: a
near cut gives near tokens, which nobody would notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.core.errors import UnsupportedModel

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str, contractions: str = _CONTRACTIONS + "|", marks: str = "") -> str:
    """The family of expressions that began with cl100k: contractions, words with one leading sign, numbers, signs."""
    letter, sign = rf"[\p{{L}}{marks}]", rf"[^\s\p{{L}}{marks}\p{{N}}]"
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letter}+|{numbers}| ?{sign}+[\r\n]*|{_SPACES}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(numbers: str, suffix: str) -> str:
    """The family of o200k and Tekken: a word also ends where an upper case letter follows a lower case one."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_CL100K = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)


@dataclass(frozen=True)
class Cut:
    """One row: expressions that cut in turn, each its matches and what lies between; then GPT-2's own where wanted.

    `whole_words` takes a word that is a token as it is, without merging. `bos` is the default of add_bos_token.
    """

    expressions: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    whole_words: bool = False
    bos: bool = False

    def build(self) -> PreTokenizer:
        from tokenizers import Regex, pre_tokenizers

        steps: list[PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(expression), "isolated") for expression in self.expressions]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        return pre_tokenizers.Sequence(steps)


_GPT2 = Cut(gpt2=True)
_DIGITS = Cut(digits=True, gpt2=True)
_LLAMA3 = Cut((_CL100K,), whole_words=True, bos=True)
_PLAIN_CL100K = Cut((_CL100K,))
_PLAIN_QWEN2 = Cut((_QWEN2,))

CUTS: dict[str, Cut] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _PLAIN_CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _PLAIN_QWEN2),
    "qwen35": Cut((_words(r"\p{N}", marks=r"\p{M}"),)),
    "tekken": Cut((_cased_words(r"\p{N}", ""),), whole_words=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Cut((_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))),
    "deepseek-v3": Cut(_DEEPSEEK3),
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
}


def cut_named(name: object) -> Cut:
    """The row of `tokenizer.ggml.pre`. Raises UnsupportedModel for a name without one."""
    found = CUTS.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(CUTS))}: use the model's original directory "
            "with tokenizer.json as --tokenizer"
        )
    return found
