"""From what was asked for to what is done: every default, every limit, the size of the KV cache.

`resolve` is pure: it reads arguments and facts, and returns a complete `EngineConfig` with the list of
decisions and their reasons, or raises ConfigError with the figures and the flag to change. Weights are sized
from the facts alone, so that a model that cannot fit is refused before any of it is read.

The memory of a rank is split as

    budget = weights + activations + reserve + KV cache

where the budget is `gpu_memory_utilization` of a GPU's memory, or a CPU's free memory divided among the ranks. All
ranks keep to the figures of the one that holds most.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from octavo.config.args import EngineArgs, flag_of
from octavo.config.engine import CacheConfig, Decision, EngineConfig, ParallelConfig, SchedulerConfig
from octavo.config.kv import DTYPE_BYTES, KVGroup, kv_groups, page_bytes, pages_for_sequence
from octavo.config.parallel import check_sizes, rank_parameters, shard_of, stage_layers
from octavo.core.errors import ConfigError
from octavo.core.facts import DeviceFacts, ModelFacts

GIB = 1 << 30
MAX_NUM_SEQS = 256
MAX_NUM_SEQS_LARGE = 1024
LARGE_GPU = 64 * GIB
"""Memory from which a GPU holds the KV cache of more sequences."""
MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
"""Enough tokens in a step to use the machine fully, few enough that decoding rows do not wait long."""
RESERVE = {"cpu": GIB // 2, "cuda": GIB}
"""What libraries, workspaces and the allocator's rounding take beside tensors of ours."""
CPU_KV_CACHE = 4 * GIB
QUANT_BLOCK = {"auto": 1, "none": 1, "native": 32, "int8": 32}
"""Inputs that share a scale, by quantization; a GGUF file's format may ask for more, which loading tells."""
KEPT_BITS = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 6.5, "Q5_1": 7.0, "Q8_0": 8.5, "Q4_K": 5.0, "Q5_K": 7.0, "Q6_K": 7.0}
"""Bits of a weight in memory, scales counted in, by the file's format where kernels multiply it as it is."""
INT8_BITS = 8.5
MAX_BLOCKS = 1 << 20
"""Where a pool sized by us ends: its bookkeeping would cost more than further pages bring."""

_Choice = tuple[str, str]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a worker's memory and where they go."""

    budget: int
    weights: int
    activations: int
    reserve: int

    @property
    def left(self) -> int:
        """Bytes for the KV cache; negative when the model alone does not fit."""
        return self.budget - self.weights - self.activations - self.reserve

    def __str__(self) -> str:
        return (
            f"{_gib(self.budget)} less {_gib(self.weights)} of weights, "
            f"{_gib(self.activations)} of activations and {_gib(self.reserve)} of reserve"
        )


def resolve(args: EngineArgs, model: ModelFacts, device: DeviceFacts) -> tuple[EngineConfig, list[Decision]]:
    """The configuration of an engine for `model` on `device`, and why. Raises ConfigError."""
    tensor, pipeline = args.tensor_parallel_size, args.pipeline_parallel_size
    check_sizes(model, tensor, pipeline, block=QUANT_BLOCK[args.quantization])
    backend = args.distributed_executor_backend
    if device.kind == "cuda" and backend == "mp" and tensor * pipeline > device.count:
        raise ConfigError(
            f"--tensor-parallel-size {tensor} times --pipeline-parallel-size {pipeline} needs {tensor * pipeline} GPUs,"
            f" but {device.count} can be seen from {device.name} number {device.index} on: lower them,"
            " or give --distributed-executor-backend ray for those of other machines"
        )
    if device.kind == "cpu":
        device = msgspec.structs.replace(device, free_memory=device.free_memory // (tensor * pipeline))
    dtype, dtype_reason = _dtype(args, model, device)
    load_format, format_reason = _load_format(args, model)
    quantization, quantization_reason = _quantization(args, device, load_format)
    length, length_reason = _max_model_len(args, model)
    seqs, seqs_reason = _max_num_seqs(args, device)
    tokens, tokens_reason = _max_num_batched_tokens(args, device, seqs, length)
    overlap, overlap_reason = _overlap(args, device)
    memory = estimate_memory(args, model, device, dtype, quantization, seqs, tokens)
    _check_model_fits(args, model, device, dtype, quantization, memory)

    groups = kv_groups(model)
    page = rank_page_bytes(model, groups, args.block_size, dtype, tensor, pipeline)
    pool = _Pool(groups, tokens, args.block_size, page)
    blocks, blocks_reason = _num_blocks(args, device, pool, length, seqs, memory)
    fits = pool.longest(blocks - 1, length)
    if fits < length:
        if args.max_model_len is not None or device.kind != "cpu" or fits == 0:
            raise ConfigError(_too_long(args, device, length, fits, pool, blocks, memory))
        length, length_reason = fits, f"the model's {length} do not fit the KV cache; more memory holds more"

    config = EngineConfig(
        model=model,
        tokenizer=None if args.skip_tokenizer_init else args.tokenizer or model.path,
        device=device,
        dtype=dtype,
        load_format=load_format,
        quantization=quantization,
        seed=args.seed,
        cache=CacheConfig(
            block_size=args.block_size,
            num_blocks=blocks,
            prefix_caching=args.enable_prefix_caching,
            dtype=dtype,
            groups=groups,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length, overlap=overlap, stages=pipeline
        ),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, backend=backend),
    )
    kv = f"{_gib(blocks * page)}, {blocks} blocks of {args.block_size}, {config.cache.kv_tokens} tokens"
    return config, [
        Decision("device", device.name, _asked(args.device != "auto", "the best that was found")),
        Decision("dtype", dtype, dtype_reason),
        Decision("load_format", load_format, format_reason),
        Decision("quantization", quantization, quantization_reason),
        Decision("max_model_len", str(length), length_reason),
        Decision("max_num_seqs", str(seqs), seqs_reason),
        Decision("max_num_batched_tokens", str(tokens), tokens_reason),
        Decision("overlap", str(overlap), overlap_reason),
        *_parallel(tensor, pipeline, model),
        Decision("weights", _gib(memory.weights), _weights(model, quantization, dtype, tensor * pipeline)),
        Decision("kv_cache", kv, blocks_reason),
    ]


def _parallel(tensor: int, pipeline: int, model: ModelFacts) -> list[Decision]:
    """What is said of several ranks."""
    if tensor * pipeline == 1:
        return []
    stages = ", ".join(f"{len(layers)} layers" for layers in stage_layers(model, pipeline))
    return [
        Decision("parallel", f"{tensor} x {pipeline}", f"as given: {tensor} ranks share a layer; stages of {stages}")
    ]


def _weights(model: ModelFacts, quantization: str, dtype: str, ranks: int) -> str:
    whole = f"{model.num_parameters:,} parameters in {_kept(model, quantization, dtype)}"
    return whole if ranks == 1 else f"of each rank; {whole} in all"


def _kept(model: ModelFacts, quantization: str, dtype: str) -> str:
    """The number formats of the weights in memory."""
    if quantization == "int8":
        return "int8"
    if quantization == "none":
        return dtype
    common = sorted(model.formats, key=lambda name: -model.formats[name])
    return ", ".join(dict.fromkeys(name if name in KEPT_BITS else dtype for name in common)) or dtype


def weight_bytes(model: ModelFacts, quantization: str, dtype: str) -> float:
    """Of a parameter in memory, on average over all."""
    floats = DTYPE_BYTES[dtype]
    if quantization == "int8":
        return INT8_BITS / 8
    if quantization == "none" or not model.formats:
        return floats
    bits = sum(count * KEPT_BITS.get(name, 8 * floats) for name, count in model.formats.items())
    return bits / 8 / sum(model.formats.values())


def _asked(given: bool, otherwise: str) -> str:
    return "as given" if given else otherwise


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _dtype(args: EngineArgs, model: ModelFacts, device: DeviceFacts) -> _Choice:
    if args.dtype != "auto":
        if args.dtype == "bfloat16" and device.kind == "cuda" and not device.native_bfloat16:
            raise ConfigError(f"--dtype is 'bfloat16', which {device.name} does not compute: choose float16")
        return args.dtype, "as given"
    return _cuda_dtype(model, device) if device.kind == "cuda" else _cpu_dtype(device)


def _cpu_dtype(device: DeviceFacts) -> _Choice:
    if device.native_bfloat16:
        return "bfloat16", f"half the memory to read, and {device.name} multiplies it"
    return "float32", f"exact, and {device.name} does not multiply bfloat16"


def _cuda_dtype(model: ModelFacts, device: DeviceFacts) -> _Choice:
    if not device.native_bfloat16:
        return "float16", f"{device.name} does not compute bfloat16"
    if model.dtype == "float16":
        return "float16", "the checkpoint's"
    return (
        "bfloat16",
        "the checkpoint's" if model.dtype == "bfloat16" else f"half of the checkpoint's {model.dtype}",
    )


def _load_format(args: EngineArgs, model: ModelFacts) -> tuple[Literal["safetensors", "gguf", "dummy"], str]:
    if args.load_format == "dummy":
        return "dummy", "as given: random weights"
    if model.files == "none":
        raise ConfigError(
            f"{model.path} has no weights (*.safetensors or .gguf): give a complete model, or --load-format dummy"
        )
    if args.load_format not in ("auto", model.files):
        raise ConfigError(
            f"--load-format is {args.load_format!r}, but {model.path} holds {model.files}: leave the flag out"
        )
    return model.files, _asked(args.load_format != "auto", "the files that are there")


def _quantization(
    args: EngineArgs, device: DeviceFacts, load_format: str
) -> tuple[Literal["auto", "none", "native", "int8"], str]:
    if args.quantization in ("native", "int8") and device.kind != "cpu":
        raise ConfigError(
            f"--quantization is {args.quantization!r}, which needs a CPU, but the device is {device.name}: choose none"
            " or auto, or give --device cpu"
        )
    if args.quantization != "auto":
        return args.quantization, "as given"
    alone = args.tensor_parallel_size * args.pipeline_parallel_size == 1
    if device.kind == "cpu" and load_format == "gguf" and args.dtype == "auto" and alone:
        return "auto", "the file's own formats where their kernels compile, otherwise floats"
    return "none", "floats"


def _max_model_len(args: EngineArgs, model: ModelFacts) -> tuple[int, str]:
    if args.max_model_len is None:
        return model.max_position, "the model's"
    if args.max_model_len > model.max_position:
        raise ConfigError(
            f"--max-model-len is {args.max_model_len}, but the model has {model.max_position} positions: lower it"
        )
    return args.max_model_len, "as given"


def _max_num_seqs(args: EngineArgs, device: DeviceFacts) -> tuple[int, str]:
    large = device.kind == "cuda" and device.total_memory >= LARGE_GPU
    default = MAX_NUM_SEQS_LARGE if large else MAX_NUM_SEQS
    if args.max_num_seqs is not None:
        return args.max_num_seqs, "as given"
    if args.max_num_batched_tokens is not None and args.max_num_batched_tokens < default:
        return args.max_num_batched_tokens, "one for each token of a step"
    return default, "the default on a large GPU" if large else "the default"


def _max_num_batched_tokens(args: EngineArgs, device: DeviceFacts, seqs: int, length: int) -> tuple[int, str]:
    if args.max_num_batched_tokens is not None:
        return args.max_num_batched_tokens, "as given"
    default = MAX_NUM_BATCHED_TOKENS[device.kind]
    if seqs > default:
        return seqs, "one for each running sequence"
    if seqs * length < default:
        return seqs * length, "all that the running sequences can hold"
    return default, f"the default on {device.kind}"


def _overlap(args: EngineArgs, device: DeviceFacts) -> tuple[Literal[0, 1], str]:
    if args.overlap is not None:
        return args.overlap, "as given"
    if device.kind == "cuda":
        return 1, "the GPU computes while the host plans the next step"
    return 0, "on a CPU planning and computing share the cores"


def estimate_memory(
    args: EngineArgs, model: ModelFacts, device: DeviceFacts, dtype: str, quantization: str, seqs: int, tokens: int
) -> Memory:
    """How a worker's memory is spent before the KV cache.

    Activations are the most that live at once within a layer for T tokens (residual, normed input, output;
    q, k, v and the attention's result; gate, up and their product), and the logits of S rows with the sampler's
    sorted values, indices and probabilities, seven numbers of at least 4 bytes for each entry:

        T x (3 hidden + 2 q + 2 kv + 3 intermediate) x bytes + S x vocabulary x 7 x max(4, bytes)

    Weights that stay quantized are counted with the file's average, which may differ between the stages of a pipeline.
    """
    size, tensor = DTYPE_BYTES[dtype], args.tensor_parallel_size
    shard, intermediate = shard_of(model, tensor), model.intermediate_size // tensor
    per_token = 3 * model.hidden_size + 2 * shard.q_size + 2 * shard.kv_size + 3 * intermediate
    rows = min(seqs, tokens)
    budget = device.free_memory
    sized_by_user = args.kv_cache_memory_bytes is not None or args.num_gpu_blocks_override is not None
    if device.kind == "cuda" and not sized_by_user:
        budget = int(device.total_memory * args.gpu_memory_utilization)
        if budget > device.free_memory:
            most = int(device.free_memory / device.total_memory * 100) / 100
            raise ConfigError(
                f"--gpu-memory-utilization {args.gpu_memory_utilization} means {_gib(budget)} of "
                f"{device.name}, but {_gib(device.free_memory)} are free: lower it to {most} or end what uses the GPU"
            )
    return Memory(
        budget=budget,
        weights=math.ceil(
            rank_parameters(model, tensor, args.pipeline_parallel_size) * weight_bytes(model, quantization, dtype)
        ),
        activations=tokens * per_token * size + rows * model.vocab_size * 7 * max(4, size),
        reserve=RESERVE[device.kind],
    )


def _check_model_fits(
    args: EngineArgs, model: ModelFacts, device: DeviceFacts, dtype: str, quantization: str, memory: Memory
) -> None:
    if memory.left > 0:
        return
    remedies = ["lower --max-num-batched-tokens and --max-num-seqs", "take a smaller model"]
    if quantization == "none" and DTYPE_BYTES[dtype] > 2:
        remedies.insert(0, "use --dtype bfloat16")
    if quantization == "none" and device.kind == "cpu" and model.files == "gguf":
        remedies.insert(0, "keep the file's formats (--quantization native)")
    if device.kind == "cuda" and device.count > args.tensor_parallel_size * args.pipeline_parallel_size:
        remedies.insert(0, "raise --tensor-parallel-size")
    if device.kind == "cuda" and args.gpu_memory_utilization < 0.95:
        remedies.insert(0, "raise --gpu-memory-utilization")
    need = memory.weights + memory.activations + memory.reserve
    raise ConfigError(
        f"the model needs {_gib(need)} before any KV cache ({_gib(memory.weights)} for "
        f"{model.num_parameters:,} parameters in {_kept(model, quantization, dtype)}, "
        f"{_gib(memory.activations)} for activations, {_gib(memory.reserve)} in reserve), "
        f"but {device.name} has {_gib(memory.budget)} for it: {' or '.join(remedies)}"
    )


def check_floats_fit(config: EngineConfig) -> None:
    """Raises ConfigError when weights that were to stay quantized, and cannot, leave no room for the KV cache."""
    model, cache = config.model, config.cache
    weights = model.num_parameters * DTYPE_BYTES[config.dtype]
    kv = cache.num_blocks * rank_page_bytes(model, cache.groups, cache.block_size, cache.dtype, 1, 1)
    if weights + kv > config.device.free_memory:
        raise ConfigError(
            f"no kernels for the file's own formats compile here, and in {config.dtype} its weights take "
            f"{_gib(weights)} beside {_gib(kv)} of KV cache, but {_gib(config.device.free_memory)} are free: "
            "install gcc or clang, or take a smaller model or --kv-cache-memory-bytes"
        )


def rank_page_bytes(
    model: ModelFacts, groups: tuple[KVGroup, ...], block_size: int, dtype: str, tensor: int, pipeline: int
) -> int:
    """Bytes of a page in the rank that holds most of it: its share of the KV heads, in the layers of its stage."""
    layer = page_bytes(shard_of(model, tensor), groups, block_size, dtype) // len(groups[0].layers)
    place = {at: j for group in groups for j, at in enumerate(group.layers)}
    return layer * max(len({place[at] for at in layers}) for layers in stage_layers(model, pipeline))


class _Pool:
    """A pool's arithmetic: pages of `page` bytes, sequences that grow by at most `chunk` tokens a step."""

    def __init__(self, groups: tuple[KVGroup, ...], chunk: int, block_size: int, page: int) -> None:
        self.groups, self.chunk, self.block_size, self.page = groups, chunk, block_size, page

    def pages(self, length: int) -> int:
        """Pages of one sequence of `length` tokens."""
        return pages_for_sequence(self.groups, length, self.chunk, self.block_size)

    def longest(self, pages: int, limit: int) -> int:
        """Most tokens, up to `limit`, of a sequence that `pages` pages hold."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.pages(middle) <= pages else (low, middle - 1)
        return low


def _num_blocks(
    args: EngineArgs, device: DeviceFacts, pool: _Pool, length: int, seqs: int, memory: Memory
) -> tuple[int, str]:
    """Pages of the pool, the padding page included."""
    if args.num_gpu_blocks_override is not None or args.kv_cache_memory_bytes is not None:
        return _given_blocks(args, device, pool, memory), "as given"
    affordable = memory.left // pool.page
    if device.kind == "cuda":
        return min(affordable, MAX_BLOCKS), f"{args.gpu_memory_utilization} of the GPU's memory: {memory}"
    useful = seqs * pool.pages(length) + 1
    usual = min(CPU_KV_CACHE, memory.left // 2) // pool.page
    if useful <= min(usual, MAX_BLOCKS):
        return useful, f"{seqs} sequences of {length} tokens use no more"
    if args.max_model_len is not None and usual <= pool.pages(length):
        return min(pool.pages(length) + 1, affordable), "one sequence of --max-model-len"
    reason = "the default on a CPU" if memory.left // 2 >= CPU_KV_CACHE else f"half of what is left: {memory}"
    return min(usual, MAX_BLOCKS), reason


def _given_blocks(args: EngineArgs, device: DeviceFacts, pool: _Pool, memory: Memory) -> int:
    if args.num_gpu_blocks_override is not None:
        name, blocks = "num_gpu_blocks_override", args.num_gpu_blocks_override
    else:
        name, blocks = "kv_cache_memory_bytes", (args.kv_cache_memory_bytes or 0) // pool.page
    if blocks * pool.page > memory.left:
        most = memory.left // pool.page if name == "num_gpu_blocks_override" else memory.left
        raise ConfigError(
            f"{flag_of(name)} {getattr(args, name)} is {_gib(blocks * pool.page)} of KV cache, "
            f"but {device.name} has {_gib(memory.left)} for it ({memory}): lower it to {most} or less"
        )
    return blocks


def _too_long(
    args: EngineArgs, device: DeviceFacts, length: int, fits: int, pool: _Pool, blocks: int, memory: Memory
) -> str:
    need, have = (pool.pages(length) + 1) * pool.page, max(blocks, 0) * pool.page
    if args.num_gpu_blocks_override is not None:
        source, other = "--num-gpu-blocks-override", "raise --num-gpu-blocks-override"
    elif args.kv_cache_memory_bytes is not None:
        source, other = "--kv-cache-memory-bytes", "raise --kv-cache-memory-bytes"
    elif device.kind == "cuda":
        source, other = str(memory), "raise --gpu-memory-utilization, or lower --max-num-batched-tokens"
    else:
        source, other = str(memory), "lower --max-num-batched-tokens, or free some memory"
    remedy = f"set --max-model-len to {fits} or less, or {other}" if fits else other
    return (
        f"one sequence of --max-model-len {length} needs {_gib(need)} of KV cache, but there are "
        f"{_gib(have)} ({source}): {remedy}"
    )
