"""The embedded model under schemas; `python -m benchmarks.structured --validity` is the whole run."""

from __future__ import annotations

from benchmarks.structured import validity
from octavo import LLM, StructuredOutputsParams
from octavo.structured import Vocabulary, compile_grammar
from tests.structured.schemas import schemas


def test_every_schema_compiles_and_finished_outputs_are_valid() -> None:
    with LLM(max_model_len=512, max_num_seqs=24) as llm:
        model = llm.config.model
        vocabulary = Vocabulary(llm.get_tokenizer(), model.vocab_size, model.eos_token_ids)
        compiled = [compile_grammar(StructuredOutputsParams(json=schema), vocabulary) for schema in schemas()]
        assert len(compiled) >= 200
        finished, outputs = validity(llm, 24, max_tokens=80)
    assert outputs == 24
    assert finished >= 12
