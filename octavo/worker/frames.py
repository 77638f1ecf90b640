"""What the engine's process tells the other ranks: one byte that says what it is, and its content."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

import msgspec
import numpy as np

from octavo.config.engine import EngineConfig
from octavo.core.plan import Masks, Plan, decode_plan, encode_plan

_SHAPE = struct.Struct("<II")


class Start(msgspec.Struct, frozen=True):
    """What a rank must know to begin."""

    rank: int
    config: EngineConfig
    """The engine's, with the rank's own device."""
    store: tuple[str, int]
    """Where ranks find each other: address and port."""
    host: str
    """The rank's own address, at which the others reach it."""
    neighbours: tuple[int, int]
    """(index, count): which of the ranks on its machine it is."""


class Order(Enum):
    """Frames without content."""

    WARM_UP = b"W"
    LEAVE = b"L"


@dataclass(frozen=True)
class Sample:
    """The plan before it is sampled, under masks or none."""

    masks: Masks | None


Frame = Plan | Sample | Order


def encode_frame(frame: Frame) -> bytes:
    match frame:
        case Plan():
            return b"P" + encode_plan(frame)
        case Sample(masks):
            if masks is None:
                return b"S"
            shape = _SHAPE.pack(*masks.bits.shape)
            return b"M" + shape + masks.lines.astype("<i4").tobytes() + masks.bits.astype("<i4").tobytes()
        case Order():
            return frame.value


def decode_frame(data: bytes) -> Frame:
    kind, content = data[:1], memoryview(data)[1:]
    match kind:
        case b"P":
            return decode_plan(content)
        case b"S":
            return Sample(None)
        case b"M":
            lines, words = _SHAPE.unpack_from(content)
            numbers = np.frombuffer(content, "<i4", offset=_SHAPE.size).astype(np.int32)
            return Sample(Masks(numbers[:lines], numbers[lines:].reshape(lines, words)))
        case _:
            return Order(kind)
