"""How ranks share a model: which sizes work, who stands where, what each holds. Pure arithmetic from facts.

Ranks of one engine are numbered so that rank 0, which the engine's own process is, belongs to the last stage: what is
sampled is there, and results need no transport.

    rank      0 ... T-1        T ... 2T-1        ...   (P-1)T ... PT-1
    stage     P-1 (samples)    P-2               ...   0 (embeds)
    shard     0 ... T-1        0 ... T-1               0 ... T-1
"""

from __future__ import annotations

import msgspec

from octavo.core.errors import ConfigError
from octavo.core.facts import ModelFacts


class Place(msgspec.Struct, frozen=True):
    """Where a rank stands: which share of each layer, and which slice of the layers."""

    shard: int
    shards: int
    stage: int
    stages: int

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1


def place_of(rank: int, tensor: int, pipeline: int) -> Place:
    return Place(rank % tensor, tensor, pipeline - 1 - rank // tensor, pipeline)


def shard_of(facts: ModelFacts, tensor: int) -> ModelFacts:
    """The facts with the query and KV heads that one rank computes."""
    return msgspec.structs.replace(
        facts, num_heads=facts.num_heads // tensor, num_kv_heads=max(facts.num_kv_heads // tensor, 1)
    )


def tensor_obstacle(facts: ModelFacts, size: int, block: int = 1) -> str | None:
    """Why `size` ranks cannot share a layer, None if they can. Weights are cut between blocks of `block` inputs."""
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if heads % size:
        return f"{heads} query heads do not divide by {size}"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads can neither be split nor be repeated over {size} ranks"
    if facts.intermediate_size % size:
        return f"an MLP of {facts.intermediate_size} does not divide by {size}"
    if -(-facts.vocab_size // size) * (size - 1) >= facts.vocab_size:
        return f"a vocabulary of {facts.vocab_size} leaves nothing for some of {size}"
    for what, inputs in (("attention output", facts.q_size), ("MLP", facts.intermediate_size)):
        if inputs % block == 0 and inputs // size % block:
            return f"{inputs} inputs of the {what} in blocks of {block} do not divide by {size}"
    return None


def check_sizes(facts: ModelFacts, tensor: int, pipeline: int, block: int = 1) -> None:
    """Raises ConfigError for sizes that cannot work, naming those that do."""
    if (obstacle := tensor_obstacle(facts, tensor, block)) is not None:
        works = [n for n in range(1, facts.num_heads + 1) if tensor_obstacle(facts, n, block) is None]
        raise ConfigError(f"--tensor-parallel-size is {tensor}, but {obstacle}: {_choices(works)}")
    if pipeline > facts.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size is {pipeline}, but the model has {facts.num_layers} layers:"
            f" take {facts.num_layers} or less"
        )


def _choices(sizes: list[int]) -> str:
    return "this model works with " + ", ".join(map(str, sizes))


def stage_layers(facts: ModelFacts, stages: int) -> tuple[range, ...]:
    """The layers of each stage: one at least, so that the stage with most parameters has as few as can be.

    The embedding counts for the first stage and the head, which a tied model holds a second time, for the last. All
    layers weigh the same, so giving each in turn to the lightest stage is optimal.
    """
    layer, table = _layer_parameters(facts), facts.vocab_size * facts.hidden_size
    weights = [layer] * stages
    weights[0] += table
    weights[-1] += table
    counts = [1] * stages
    for _ in range(facts.num_layers - stages):
        lightest = weights.index(min(weights))
        counts[lightest] += 1
        weights[lightest] += layer
    ends = [sum(counts[: i + 1]) for i in range(stages)]
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def rank_parameters(facts: ModelFacts, tensor: int, pipeline: int) -> int:
    """Weights in the memory of the rank that holds most."""
    table = -(-facts.vocab_size // tensor) * facts.hidden_size
    layer = _layer_parameters(facts, tensor)
    most = 0
    for stage, layers in enumerate(stage_layers(facts, pipeline)):
        embeds, projects = stage == 0, stage == pipeline - 1
        tables = (embeds or projects) if facts.tie_embeddings else embeds + projects
        most = max(most, len(layers) * layer + tables * table + projects * facts.hidden_size)
    return most


def _layer_parameters(facts: ModelFacts, tensor: int = 1) -> int:
    """Of one layer on shard 0; norms and the biases of outputs are not split."""
    shard, h, m = shard_of(facts, tensor), facts.hidden_size, facts.intermediate_size // tensor
    qkv = shard.q_size + 2 * shard.kv_size
    attention = h * qkv + shard.q_size * h + (qkv if facts.qkv_bias else 0) + (h if facts.output_bias else 0)
    mlp = 3 * h * m + (2 * m + h if facts.mlp_bias else 0)
    return attention + mlp + 2 * h + (2 * facts.head_dim if facts.qk_norm else 0)
