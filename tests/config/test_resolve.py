"""`resolve` is pure, so its rules are tables: made-up models and machines in, decisions or refusals out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo.config.args import EngineArgs
from octavo.config.device import detect_cpu
from octavo.config.engine import EngineConfig
from octavo.config.kv import kv_groups, page_bytes, pages_for_sequence
from octavo.config.parallel import shard_of, stage_layers
from octavo.config.resolve import CPU_KV_CACHE, GIB, RESERVE, check_floats_fit, estimate_memory, resolve
from octavo.core.errors import ConfigError
from octavo.core.facts import DeviceFacts, ModelFacts, RopeFacts

SMALL = ModelFacts(
    path="small",
    files="safetensors",
    architecture="llama",
    vocab_size=1000,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    max_position=2048,
    norm_eps=1e-5,
    rope=RopeFacts(rotary_dim=16),
    windows=(None,) * 4,
)
LARGE = msgspec.structs.replace(  # Llama 3 8B's shape
    SMALL,
    path="large",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_position=131072,
    windows=(None,) * 32,
)
CPU = DeviceFacts(kind="cpu", name="a CPU", total_memory=32 * GIB, free_memory=24 * GIB, native_bfloat16=False, cores=8)
GPU = DeviceFacts(kind="cuda", name="a GPU", total_memory=80 * GIB, free_memory=79 * GIB, native_bfloat16=True)


def config(model: ModelFacts = SMALL, device: DeviceFacts = CPU, **args: Any) -> EngineConfig:
    return resolve(EngineArgs(**args), model, device)[0]


def reasons(model: ModelFacts = SMALL, device: DeviceFacts = CPU, **args: Any) -> dict[str, str]:
    return {decision.name: decision.reason for decision in resolve(EngineArgs(**args), model, device)[1]}


def refusal(model: ModelFacts = SMALL, device: DeviceFacts = CPU, **args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineArgs(**args), model, device)
    return str(caught.value)


def free(gib: float, device: DeviceFacts = CPU) -> DeviceFacts:
    return msgspec.structs.replace(device, free_memory=int(gib * GIB))


def test_defaults_on_a_cpu() -> None:
    found = config()
    assert found.dtype == found.cache.dtype == "float32"
    assert found.load_format == "safetensors"
    assert found.scheduler.max_model_len == 2048
    assert found.scheduler.max_num_seqs == 256
    assert found.scheduler.max_num_batched_tokens == 512
    assert found.scheduler.overlap == 0
    assert found.cache.prefix_caching
    assert found.cache.num_blocks == 256 * 2048 // 16 + 1
    assert found.cache.kv_tokens == 256 * 2048


def test_defaults_on_a_gpu() -> None:
    found = config(LARGE, GPU)
    assert found.dtype == "bfloat16"
    assert found.scheduler.max_num_batched_tokens == 8192
    assert found.scheduler.overlap == 1
    memory = estimate_memory(EngineArgs(), LARGE, GPU, "bfloat16", "none", 1024, 8192)
    assert memory.budget == int(80 * GIB * 0.92)
    assert memory.weights == LARGE.num_parameters * 2
    page = page_bytes(LARGE, found.cache.groups, 16, "bfloat16")
    assert found.cache.num_blocks == memory.left // page


def test_what_is_given_is_taken() -> None:
    found = config(
        dtype="float64",
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=7,
        overlap=1,
        block_size=8,
        seed=5,
        enable_prefix_caching=False,
        load_format="dummy",
    )
    assert (found.dtype, found.seed, found.load_format) == ("float64", 5, "dummy")
    assert found.scheduler == msgspec.structs.replace(
        found.scheduler, max_model_len=100, max_num_seqs=3, max_num_batched_tokens=7, overlap=1
    )
    assert found.cache.block_size == 8
    assert not found.cache.prefix_caching
    assert reasons(dtype="float64")["dtype"] == "as given"


@pytest.mark.parametrize(
    ("checkpoint", "native", "dtype"),
    [
        ("bfloat16", True, "bfloat16"),
        ("float16", True, "float16"),
        ("float32", True, "bfloat16"),
        ("bfloat16", False, "float16"),
    ],
)
def test_dtype_on_a_gpu_follows_checkpoint_and_hardware(checkpoint: str, native: bool, dtype: str) -> None:
    model = msgspec.structs.replace(SMALL, dtype=checkpoint)
    device = msgspec.structs.replace(GPU, native_bfloat16=native)
    assert config(model, device).dtype == dtype


@pytest.mark.parametrize("checkpoint", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx512f avx512_bf16", "bfloat16"), ("fpu avx2 amx_bf16", "bfloat16"), ("avx512f", "float32")],
)
def test_dtype_on_a_cpu_is_bfloat16_where_it_multiplies_that(
    tmp_path: Path, flags: str, dtype: str, checkpoint: str
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name : Chip 9\nflags : {flags}\n")
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal: {32 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {24 << 20} kB\n"
    )
    model, device = msgspec.structs.replace(SMALL, dtype=checkpoint), detect_cpu(tmp_path)
    found = config(model, device)
    assert found.dtype == found.cache.dtype == dtype
    assert "Chip 9" in reasons(model, device)["dtype"]


def test_bfloat16_is_refused_where_the_gpu_lacks_it() -> None:
    assert "choose float16" in refusal(device=msgspec.structs.replace(GPU, native_bfloat16=False), dtype="bfloat16")


@pytest.mark.parametrize(
    ("given", "seqs", "tokens"),
    [
        ({}, 256, 512),
        ({"max_num_batched_tokens": 64}, 64, 64),
        ({"max_num_batched_tokens": 4096}, 256, 4096),
        ({"max_num_seqs": 600}, 600, 600),
        ({"max_num_seqs": 2, "max_model_len": 100}, 2, 200),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 3}, 8, 3),
    ],
)
def test_rows_and_tokens_of_a_step(given: dict[str, Any], seqs: int, tokens: int) -> None:
    found = config(**given).scheduler
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (seqs, tokens)


@pytest.mark.parametrize(
    ("files", "asked", "chosen"),
    [
        ("safetensors", "auto", "safetensors"),
        ("gguf", "auto", "gguf"),
        ("gguf", "gguf", "gguf"),
        ("none", "dummy", "dummy"),
    ],
)
def test_load_format_follows_the_files(files: str, asked: str, chosen: str) -> None:
    assert config(msgspec.structs.replace(SMALL, files=files), load_format=asked).load_format == chosen


@pytest.mark.parametrize(("files", "asked"), [("none", "auto"), ("none", "gguf"), ("gguf", "safetensors")])
def test_a_load_format_without_its_files_is_refused(files: str, asked: str) -> None:
    message = refusal(msgspec.structs.replace(SMALL, files=files), load_format=asked)
    assert "small" in message
    assert "--load-format" in message


def test_more_tokens_than_positions_are_refused() -> None:
    assert refusal(max_model_len=2049) == ("--max-model-len is 2049, but the model has 2048 positions: lower it")


def test_a_model_that_cannot_fit_is_refused_with_need_have_and_remedy() -> None:
    message = refusal(LARGE)
    assert message.startswith("the model needs 31.")
    assert "29.92 GiB for 8,030,261,248 parameters in float32" in message
    assert "a CPU has 24.00 GiB" in message
    assert "use --dtype bfloat16" in message
    assert config(LARGE, dtype="bfloat16").dtype == "bfloat16"


def test_on_a_cpu_the_pool_is_bounded_by_4_gib_and_by_half_of_what_is_left() -> None:
    page = page_bytes(LARGE, kv_groups(LARGE), 16, "float32")
    assert config(LARGE, free(100)).cache.num_blocks == CPU_KV_CACHE // page
    memory = estimate_memory(EngineArgs(), LARGE, free(36), "float32", "none", 256, 512)
    assert config(LARGE, free(36)).cache.num_blocks == memory.left // 2 // page
    assert "half of what is left" in reasons(LARGE, free(36))["kv_cache"]


def test_on_a_cpu_an_unasked_length_shrinks_to_the_pool() -> None:
    found = config(LARGE, free(100))
    assert found.scheduler.max_model_len == (found.cache.num_blocks - 1) * 16 < LARGE.max_position
    assert "131072" in reasons(LARGE, free(100))["max_model_len"]


def test_on_a_cpu_the_pool_grows_to_the_length_that_was_asked_for() -> None:
    found = config(LARGE, free(100), max_model_len=131072)
    assert found.scheduler.max_model_len == 131072
    assert found.cache.num_blocks == 131072 // 16 + 1


@pytest.mark.parametrize(
    ("device", "args"),
    [
        (GPU, {"gpu_memory_utilization": 0.3}),
        (GPU, {"gpu_memory_utilization": 0.22, "max_num_batched_tokens": 512, "max_num_seqs": 256}),
        (free(36), {"max_model_len": 131072}),
    ],
)
def test_a_length_that_does_not_fit_names_the_longest_that_does(device: DeviceFacts, args: dict[str, Any]) -> None:
    message = refusal(LARGE, device, **args)
    assert "one sequence of --max-model-len 131072 needs" in message
    assert "GiB of weights" in message
    longest = int(message.split("set --max-model-len to ")[1].split()[0])
    assert config(LARGE, device, **args | {"max_model_len": longest}).scheduler.max_model_len == longest
    assert f"{longest} or less" in refusal(LARGE, device, **args | {"max_model_len": longest + 1})


def test_a_gpu_that_is_in_use_is_refused_with_the_share_that_is_free() -> None:
    message = refusal(SMALL, free(40, GPU))
    assert "73.60 GiB of a GPU, but 40.00 GiB are free: lower it to 0.5" in message
    assert config(SMALL, free(40, GPU), gpu_memory_utilization=0.5)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_size_of_the_pool_can_be_given(device: DeviceFacts) -> None:
    assert config(device=device, num_gpu_blocks_override=200).cache.num_blocks == 200
    page = page_bytes(SMALL, kv_groups(SMALL), 16, config(device=device).dtype)
    assert config(device=device, kv_cache_memory_bytes=200 * page + 1).cache.num_blocks == 200


def test_a_given_pool_that_is_too_small() -> None:
    message = refusal(num_gpu_blocks_override=11, max_model_len=2048)
    assert "--num-gpu-blocks-override" in message
    assert "set --max-model-len to 160 or less" in message
    assert config(num_gpu_blocks_override=11).scheduler.max_model_len == 160
    assert refusal(num_gpu_blocks_override=1).endswith(": raise --num-gpu-blocks-override")
    assert config(num_gpu_blocks_override=2).scheduler.max_model_len == 16


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_given_pool_that_is_too_large(device: DeviceFacts) -> None:
    message = refusal(device=device, kv_cache_memory_bytes=100 * GIB)
    assert "--kv-cache-memory-bytes 107374182400 is 100.00 GiB" in message
    most = int(message.split("lower it to ")[1].split()[0])
    assert config(device=device, kv_cache_memory_bytes=most)
    assert refusal(device=device, num_gpu_blocks_override=1 << 40)


def test_a_window_model_needs_pages_for_the_window_only() -> None:
    model = msgspec.structs.replace(LARGE, windows=(4096,) * 32)
    groups = kv_groups(model)
    pages = pages_for_sequence(groups, 131072, 512, 16)
    assert pages < 131072 // 16 // 10
    found = config(model, free(100), num_gpu_blocks_override=pages + 1)
    assert found.scheduler.max_model_len == 131072
    assert config(model, free(100), num_gpu_blocks_override=pages).scheduler.max_model_len < 131072


def test_mixed_windows_make_groups_of_equal_size() -> None:
    model = msgspec.structs.replace(SMALL, windows=(64, 64, 64, None))
    found = config(model, max_num_seqs=2, max_num_batched_tokens=32)
    assert [group.window for group in found.cache.groups] == [64, 64, 64, None]
    assert found.cache.num_blocks == 2 * (2048 // 16 + 3 * 7) + 1


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("model", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_resolved_fits(model: ModelFacts, device: DeviceFacts, dtype: str) -> None:
    if model is LARGE and dtype == "float32":
        device = free(60, device) if device is CPU else device
    found = config(model, device, dtype=dtype)
    page = page_bytes(model, found.cache.groups, 16, dtype)
    spent = model.num_parameters * (2 if dtype == "bfloat16" else 4) + found.cache.num_blocks * page
    assert spent + RESERVE[device.kind] <= device.free_memory
    assert (
        pages_for_sequence(
            found.cache.groups,
            found.scheduler.max_model_len,
            found.scheduler.max_num_batched_tokens,
            found.cache.block_size,
        )
        < found.cache.num_blocks
    )


def test_every_decision_has_a_value_and_a_reason() -> None:
    decisions = resolve(EngineArgs(), LARGE, GPU)[1]
    assert len({decision.name for decision in decisions}) == len(decisions) >= 9
    assert all(decision.value and decision.reason for decision in decisions)


def test_resolving_twice_is_the_same_and_survives_the_wire() -> None:
    first, second = config(LARGE, GPU), config(LARGE, GPU)
    assert first == second == msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=EngineConfig)


SMOL = msgspec.structs.replace(  # SmolLM2 135M's shape
    SMALL, vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    intermediate_size=1536, windows=(None,) * 30, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (SMOL, {"tensor_parallel_size": 2}, "9 query heads do not divide by 2: this model works with 1, 3"),
        (SMOL, {"tensor_parallel_size": 9}, "an MLP of 1536 does not divide by 9: this model works with 1, 3"),
        (SMALL, {"tensor_parallel_size": 3}, "4 query heads do not divide by 3: this model works with 1, 2, 4"),
        (LARGE, {"tensor_parallel_size": 64}, "this model works with 1, 2, 4, 8, 16, 32"),
        (SMALL, {"tensor_parallel_size": 4, "quantization": "int8"}, "in blocks of 32 do not divide by 4"),
        (
            msgspec.structs.replace(SMALL, num_heads=12, num_kv_heads=8, intermediate_size=144),
            {"tensor_parallel_size": 6},
            "8 KV heads can neither be split nor be repeated over 6 ranks: this model works with 1, 2, 4",
        ),
        (SMALL, {"pipeline_parallel_size": 5}, "the model has 4 layers: take 4 or less"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_those_that_do(
    model: ModelFacts, args: dict[str, Any], message: str
) -> None:
    assert message in refusal(model, **args)


def test_as_many_gpus_as_ranks() -> None:
    two = msgspec.structs.replace(GPU, count=2)
    assert config(LARGE, two, tensor_parallel_size=2).parallel.ranks == 2
    assert "needs 4 GPUs, but 2 can be seen" in refusal(LARGE, two, tensor_parallel_size=2, pipeline_parallel_size=2)
    elsewhere = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert config(LARGE, two, **elsewhere).parallel.backend == "ray"


def test_ranks_leave_more_of_a_gpu_to_the_kv_cache() -> None:
    four = msgspec.structs.replace(GPU, count=4)
    tokens = {
        sizes: config(LARGE, four, tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1]).cache.kv_tokens
        for sizes in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
    }
    assert tokens[2, 1] > 2.2 * tokens[1, 1]
    assert tokens[4, 1] > 2 * tokens[2, 1]
    assert tokens[1, 2] == pytest.approx(tokens[2, 1], rel=0.05)
    assert tokens[2, 2] == pytest.approx(tokens[4, 1], rel=0.05)


def test_ranks_of_a_cpu_share_its_memory() -> None:
    made = config(LARGE, CPU, tensor_parallel_size=4, dtype="bfloat16", max_model_len=4096)
    assert made.device.free_memory == CPU.free_memory // 4
    assert made.scheduler.stages == 1
    assert config(SMALL, CPU, pipeline_parallel_size=2).scheduler.stages == 2


def test_kv_heads_that_ranks_repeat_are_paid_for_by_each() -> None:
    by_size = {n: page_bytes(shard_of(LARGE, n), kv_groups(LARGE), 16, "bfloat16") for n in (1, 8, 16, 32)}
    assert by_size[1] == 8 * by_size[8]
    assert by_size[8] == by_size[16] == by_size[32]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("model", [SMOL, LARGE], ids=["smol", "large"])
def test_stages_hold_about_the_same(model: ModelFacts, stages: int) -> None:
    layers = stage_layers(model, stages)
    assert [layer for stage in layers for layer in stage] == list(range(model.num_layers))
    assert all(layers)
    one = (model.num_parameters - model.vocab_size * model.hidden_size * (2 - model.tie_embeddings)) / model.num_layers
    loads = [len(stage) * one for stage in layers]
    loads[0] += model.vocab_size * model.hidden_size
    loads[-1] += model.vocab_size * model.hidden_size
    assert max(loads) - min(loads) < 1.01 * one or len(layers[loads.index(max(loads))]) == 1


def test_a_gguf_file_keeps_its_formats_on_a_cpu_unless_floats_are_asked_for() -> None:
    gguf = msgspec.structs.replace(SMALL, files="gguf")
    assert config(gguf, CPU).quantization == "auto"
    assert config(gguf, CPU, dtype="float32").quantization == "none"
    assert config(gguf, CPU, quantization="native", dtype="float32").quantization == "native"
    assert config(gguf, CPU, tensor_parallel_size=2).quantization == "none"
    assert config(gguf, CPU, load_format="dummy").quantization == "none"
    assert config(gguf, GPU).quantization == config(SMALL, CPU).quantization == "none"


@pytest.mark.parametrize("quantization", ["native", "int8"])
def test_quantized_weights_are_refused_on_a_gpu_before_any_is_read(quantization: str) -> None:
    gguf = msgspec.structs.replace(SMALL, files="gguf")
    assert config(gguf, CPU, quantization=quantization).quantization == quantization
    assert config(gguf, GPU, quantization="none").quantization == "none"
    assert refusal(gguf, GPU, quantization=quantization) == (
        f"--quantization is '{quantization}', which needs a CPU, but the device is a GPU: choose none or auto, or give "
        "--device cpu"
    )


MIXED = msgspec.structs.replace(
    LARGE, files="gguf", formats={"F32": 266_240, "Q6_K": 1_500_000_000, "Q4_K": 6_529_995_008}
)
"""As llama.cpp's Q4_K_M has it."""


@pytest.mark.parametrize(
    ("model", "args", "gib", "kept"),
    [
        (LARGE, {}, 29.92, "float32"),
        (LARGE, {"quantization": "int8"}, 7.95, "int8"),
        (MIXED, {"quantization": "none"}, 29.92, "float32"),
        (MIXED, {"dtype": "bfloat16"}, 14.96, "bfloat16"),
        (MIXED, {}, 5.02, "Q4_K, Q6_K, float32"),
        (MIXED, {"quantization": "native", "dtype": "bfloat16"}, 5.02, "Q4_K, Q6_K, bfloat16"),
        (msgspec.structs.replace(MIXED, formats={"Q2_K": 3, "Q8_0": 1}), {}, 24.42, "float32, Q8_0"),
    ],
)
def test_weights_take_what_their_formats_do(model: ModelFacts, args: dict[str, Any], gib: float, kept: str) -> None:
    decisions = resolve(EngineArgs(max_model_len=512, **args), model, free(100))[1]
    (told,) = [decision for decision in decisions if decision.name == "weights"]
    assert told.value == f"{gib:.2f} GiB"
    assert told.reason == f"{LARGE.num_parameters:,} parameters in {kept}"


def test_a_quantized_file_fits_where_its_floats_do_not() -> None:
    assert config(MIXED, free(12)).cache.kv_tokens > 4096
    message = refusal(MIXED, free(12), quantization="none")
    assert "(29.92 GiB for" in message
    assert "keep the file's formats (--quantization native)" in message
    assert "in Q4_K, Q6_K, float32, " in refusal(MIXED, free(5))


def test_floats_in_place_of_quantized_weights_must_fit() -> None:
    check_floats_fit(config(MIXED, free(40)))
    tight = config(MIXED, free(12))
    with pytest.raises(ConfigError, match=r"in float32 its weights take 29\.92 GiB .* install gcc or clang"):
        check_floats_fit(tight)
