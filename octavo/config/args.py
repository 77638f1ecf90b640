"""What a user may set: the engine's and the server's arguments, each a documented, validated field.

The fields are the single source of the command line's flags, of `LLM(...)`'s keyword arguments and of the
documentation: a field `max_model_len` is the flag `--max-model-len`. Names and meaning are vLLM's where both
have them; `compat.py` knows vLLM's other ones. Nothing here looks at a model or a machine: `resolve.py` does.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from octavo.core.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]
DTYPE_ALIASES = {"half": "float16", "float": "float32"}


class Args(msgspec.Struct, frozen=True, kw_only=True):
    """Base of argument structs: values are checked against their field's type; ConfigError names the flag."""

    def __post_init__(self) -> None:
        for setting in settings_of(type(self)):
            value = getattr(self, setting.name)
            try:
                checked = msgspec.convert(value, setting.type)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{setting.flag} is {value!r}: {_expectation(setting, error)}") from None
            msgspec.structs.force_setattr(self, setting.name, checked)
        self.check()

    def check(self) -> None:
        """Rules that a type cannot state. Raises ConfigError."""


class EngineArgs(Args, frozen=True, kw_only=True):
    """Arguments of the engine; None and "auto" leave the choice to `resolve`."""

    model: Annotated[
        str | None,
        Meta(description="Directory, .gguf file, hub id or built-in name; the embedded model when absent"),
    ] = None
    tokenizer: Annotated[
        str | None,
        Meta(description="Where the tokenizer is, in the same terms; the model's own when absent"),
    ] = None
    revision: Annotated[str | None, Meta(description="Branch, tag or commit of a hub model")] = None
    skip_tokenizer_init: Annotated[
        bool, Meta(description="Load no tokenizer: prompts are token ids and results carry token ids only")
    ] = False
    load_format: Annotated[
        Literal["auto", "safetensors", "gguf", "dummy"],
        Meta(description="Kind of weight files; dummy fills random weights and needs config.json only"),
    ] = "auto"
    generation_config: Annotated[
        str,
        Meta(
            description="Where sampling defaults come from: auto (the model's generation_config.json), vllm "
            "(none but the engine's own), or a directory that holds the file"
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32", "float64"],
        Meta(description="Number format of weights, activations and KV cache (half and float are aliases)"),
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "native", "int8"],
        Meta(
            description="How weights are held: none (floats), native (a GGUF file's own 4 to 8 bits, on a CPU: less "
            "memory and faster), or int8 (rounded when loaded, on a CPU); auto is native for a GGUF file on a CPU "
            "unless --dtype is given or there are several ranks, otherwise none"
        ),
    ] = "auto"
    seed: Annotated[
        int, Meta(ge=0, le=2**63 - 1, description="Seed of dummy weights and of requests that bring none")
    ] = 0
    device: Annotated[
        str,
        Meta(
            pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
            description="auto, cpu, cuda or cuda:N; auto takes the first GPU where there is one",
        ),
    ] = "auto"
    max_model_len: Annotated[
        Positive | None,
        Meta(description="Most tokens of a sequence, output included; the model's limit when absent"),
    ] = None
    max_num_seqs: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None, Meta(description="Most sequences that run at once")
    ] = None
    max_num_batched_tokens: Annotated[
        Positive | None,
        Meta(description="Most tokens computed in a step; longer prompts are computed in chunks"),
    ] = None
    overlap: Annotated[
        Literal[0, 1] | None,
        Meta(description="Steps launched ahead of the last one's tokens; on a GPU 1, on a CPU 0 when absent"),
    ] = None
    block_size: Annotated[
        int, Meta(ge=1, le=256, description="Tokens in a block of KV cache, a power of two up to 256")
    ] = 16
    enable_prefix_caching: Annotated[
        bool, Meta(description="Reuse the KV of earlier sequences that begin with the same tokens")
    ] = True
    gpu_memory_utilization: Annotated[
        float,
        Meta(gt=0, le=1, description="Share of the GPU's memory to use, weights and activations included"),
    ] = 0.92
    kv_cache_memory_bytes: Annotated[
        Positive | None,
        Meta(description="Size of the KV cache in bytes (4G and the like), in place of what is worked out"),
    ] = None
    num_gpu_blocks_override: Annotated[
        Positive | None,
        Meta(description="Number of KV blocks, in place of what is worked out"),
    ] = None
    tensor_parallel_size: Annotated[Positive, Meta(description="GPUs (on a CPU processes) that share each layer")] = 1
    pipeline_parallel_size: Annotated[Positive, Meta(description="Stages of layers, each on GPUs of its own")] = 1
    distributed_executor_backend: Annotated[
        Literal["mp", "ray"],
        Meta(description="What runs the ranks: processes of this machine (mp) or actors of a Ray cluster (ray)"),
    ] = "mp"

    def __post_init__(self) -> None:
        spelled = str(self.dtype).removeprefix("torch.")
        msgspec.structs.force_setattr(self, "dtype", DTYPE_ALIASES.get(spelled, spelled))
        super().__post_init__()

    def check(self) -> None:
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size is {self.block_size}: choose a power of two from 1 to 256")
        if self.kv_cache_memory_bytes is not None and self.num_gpu_blocks_override is not None:
            raise ConfigError("--kv-cache-memory-bytes and --num-gpu-blocks-override both size the KV cache: give one")


class ServerArgs(Args, frozen=True, kw_only=True):
    """Arguments of the HTTP server."""

    host: Annotated[str, Meta(description="Address to listen on; 0.0.0.0 for every one")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 takes any free one")] = 8000
    api_key: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="Keys of which a client must send one as a bearer token; also from OCTAVO_API_KEY"),
    ] = ()
    served_model_name: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="Names the model is served under, the first one shown; MODEL when absent"),
    ] = ()
    chat_template: Annotated[
        str | None, Meta(description="Chat template in place of the model's: a file, or the template itself")
    ] = None
    trust_request_chat_template: Annotated[
        bool, Meta(description="Let a request bring its own chat_template, which runs in the sandbox")
    ] = False
    tool_call_parser: Annotated[
        str,
        Meta(description="Format of the model's tool calls; auto sees it in the chat template, none reads no calls"),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Meta(description="Format of the model's reasoning, likewise; none leaves it in the content"),
    ] = "auto"
    uvicorn_log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug", "trace"],
        Meta(description="What the HTTP layer logs"),
    ] = "warning"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One argument as flags and docs see it, derived from a field."""

    name: str
    flag: str
    type: Any
    default: Any
    help: str
    kind: type
    """What one value is parsed as: bool, int, float or str."""
    choices: tuple[Any, ...] | None = None
    many: bool = False
    """Whether several values may be given."""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(struct: type[Args]) -> tuple[Setting, ...]:
    """The settings of `struct` in the order of its fields, worked out once."""
    if struct not in _SETTINGS:
        _SETTINGS[struct] = tuple(_setting(field) for field in msgspec.structs.fields(struct))
    return _SETTINGS[struct]


_SETTINGS: dict[type[Args], tuple[Setting, ...]] = {}


def _setting(field: msgspec.structs.FieldInfo) -> Setting:
    choices, many = None, False
    value = _bare(field.type)
    if get_origin(value) is tuple:
        many, value = True, _bare(get_args(value)[0])
    if get_origin(value) is Literal:
        choices = get_args(value)
        value = type(choices[0])
    descriptions = [meta.description for meta in field.type.__metadata__ if meta.description]
    return Setting(
        name=field.name,
        flag=flag_of(field.name),
        type=field.type,
        default=field.default,
        help=descriptions[0],
        kind=value,
        choices=choices,
        many=many,
    )


def _bare(annotation: Any) -> Any:
    """The annotation without metadata and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (member,) = [part for part in get_args(annotation) if part is not NoneType]
        return _bare(member)
    return annotation


def _expectation(setting: Setting, error: msgspec.ValidationError) -> str:
    if setting.choices is not None:
        return f"choose one of {', '.join(map(str, setting.choices))}"
    if setting.name == "device":
        return "choose auto, cpu, cuda or cuda:N"
    return str(error).replace("Expected", "expected").replace("`", "")
