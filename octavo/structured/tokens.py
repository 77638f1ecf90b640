"""llguidance's view of our tokenizers: the bytes of every token, which ones are no text, and where a text ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from octavo.text import Tokenizer


class _Wrapper:
    """The attributes that LLTokenizer reads; special tokens are no text, so no grammar over text allows them."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos[0]
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos} & set(range(vocab_size)))

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


class Vocabulary:
    """A tokenizer prepared for grammars: 0.25 s for 49,000 tokens, the half of it with the GIL. Any thread may ask.

    It is prepared when it is first needed; `prepare_soon` makes that now, beside other work.

    `vocab_size` is the width of the model's logits; ids without a token are never allowed. Every one of `eos` ends a
    grammar.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos = tuple(token for token in eos if token < vocab_size)
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def prepare_soon(self) -> None:
        if self.eos:
            threading.Thread(target=self.prepare, name="octavo-vocabulary", daemon=True).start()

    def prepare(self) -> LLTokenizer:
        with self._lock:
            if self._prepared is None:
                from llguidance import LLTokenizer

                wrapper = _Wrapper(self.tokenizer, self.vocab_size, self.eos)
                self._prepared = LLTokenizer(wrapper, eos_token=list(self.eos))  # type: ignore[arg-type]
            return self._prepared
