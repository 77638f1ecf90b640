"""`octavo plan` over made-up models and GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.cli.entry import main
from octavo.cli.plan import gpu_of, options
from octavo.config import EngineArgs
from octavo.config.resolve import GIB
from octavo.formats import read_facts


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Llama 3 70B's shape."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_what_fits_is_listed_smallest_first_and_what_does_not_with_the_reason(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load-format", "dummy", "--gpus", "4", "--gpu-memory", "80G", "--max-model-len", "32768"]
    assert main(["plan", str(large), *flags]) == 0
    said = capsys.readouterr().out
    assert "take --tensor-parallel-size 4 --pipeline-parallel-size 1" in said
    assert "not 1 x 1: the model needs" in said
    assert "not 2 x 1: one sequence of --max-model-len 32768 needs" in said


def test_kv_tokens_are_those_of_the_engine_that_would_run(large: Path) -> None:
    args = EngineArgs(model=str(large), load_format="dummy", max_model_len=16384, max_num_seqs=256)
    fits, refused = options(args, read_facts(large), gpu_of(141 * GIB, 2))
    assert [(c.parallel.tensor, c.parallel.pipeline) for c in fits] == [(2, 1), (1, 2)]
    assert [sizes for *sizes, _ in refused] == [[1, 1]]
    weights, page = 70_553_706_496, 2 * 80 * 4 * 128 * 2  # bytes of half the weights in bf16; of a token in each rank
    left = 141 * GIB * 0.92 - GIB - weights
    assert fits[0].cache.kv_tokens * page == pytest.approx(left, rel=0.08)  # less activations


def test_nothing_fits(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(large), "--load-format", "dummy", "--gpus", "1", "--gpu-memory", "80G"]) == 2
    assert "raise --gpu-memory-utilization" in capsys.readouterr().out
    assert main(["plan", str(large), "--load-format", "dummy", "--gpus", "0", "--gpu-memory", "80G"]) == 2
    assert "--gpus is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu-memory", "-5"], "--gpu-memory is -5"),
        (["--tensor-parallel-size", "3"], "plan tries all parallel sizes"),
        (["-pp", "2"], "plan tries all parallel sizes"),
        (["--device", "cpu"], "--device is 'cpu', but plan is about GPUs"),
        (["--quantization", "int8"], "--quantization is 'int8', which is for CPUs"),
    ],
)
def test_what_would_change_nothing_is_refused(
    large: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    given = ["--load-format", "dummy", "--gpus", "8", "--gpu-memory", "80G"]
    assert main(["plan", str(large), *given, *flags]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert not shown.out
