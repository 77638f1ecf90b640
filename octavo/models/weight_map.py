"""Where each tensor of a checkpoint goes: names bound to the layers of a built model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter

from torch import Tensor

from octavo.core.errors import UnsupportedModel
from octavo.layers import Layer, Slot
from octavo.quant import Stored

Names = Mapping[str, tuple[str, str]]
"""Module name in the checkpoint -> (attribute path of the layer, part of it)."""


class WeightMap:
    """Names of a checkpoint -> slots; remembers which have not come yet."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._elsewhere: tuple[str, ...] = ()
        self._layers: dict[str, Layer] = {}
        self._missing: set[str] = set()

    def bind(self, prefix: str, root: object, names: Names, path_prefix: str = "") -> None:
        """Binds the tables' names, which the checkpoint has under `prefix`, to layers that are attributes of `root`."""
        for name, (path, part) in names.items():
            layer: Layer = attrgetter(path)(root)
            self._layers[path_prefix + path] = layer
            for (of, key), slot in layer.slots().items():
                if of == part:
                    self._slots[f"{prefix}{name}.{key}"] = slot
        self._missing = set(self._slots)

    def leave_out(self, prefix: str) -> None:
        """Names that begin with `prefix` belong to another stage, unless they are bound here."""
        self._elsewhere += (prefix,)

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that is needed."""
        return ((name, slot.shape) for name, slot in self._slots.items())

    def load(self, name: str, tensor: Stored) -> None:
        slot = self._slots.get(name)
        if slot is None:
            if name.startswith(self._elsewhere):
                return
            raise UnsupportedModel(f"the model has no place for weight {name!r}; is config.json of another model?")
        try:
            slot(tensor)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{name}: {error}") from None
        self._missing.discard(name)

    def finish(self) -> None:
        if self._missing:
            first = ", ".join(sorted(self._missing)[:5])
            raise UnsupportedModel(f"the checkpoint lacks {len(self._missing)} of the model's weights: {first} ...")
        for layer in self._layers.values():
            layer.finish()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path, layer in self._layers.items():
            for name, tensor in layer.tensors().items():
                yield f"{path}.{name}", tensor
