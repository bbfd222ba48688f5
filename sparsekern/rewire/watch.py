"""Watch: what the checks of an event have seen, so that the next one asks once, for all layers, whether it is the same.

A rewire changes contents in place, so from event to event nearly nothing is replaced. But somebody may: a checkpoint
makes new state, `model.to` moves, GMP compacts. To look at every object from Python takes a millisecond for 28 layers.
"""

import weakref
from collections.abc import Iterable, Sequence
from types import NoneType

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.agreement import shown_by
from sparsekern.layer import SparseLayer
from sparsekern.layout import Layout
from sparsekern.rewire.optimizer_state import settings_of_fresh

try:
    from sparsekern import _cuda
except ImportError:
    _cuda = None

_NUMBERS = (int, float, bool, str, NoneType)


class Watch:
    """Facts about layers, their followers and the optimiser's state, of which C++ says whether they still hold.

    Raises:
        Unwatchable: there is something of which no fact says that it is the same.
    """

    def __init__(self, layers: Iterable[Sequence[SparseLayer]], optimizers: Iterable[Optimizer]):
        if _cuda is None:
            raise Unwatchable
        layers = list(layers)
        self._items: list[tuple] = []
        self._attributes: list[tuple] = []
        self._sizes: list[tuple] = []
        self._types: list[tuple] = []
        self._tensors: list[tuple[Tensor, bytes]] = []
        self.layouts: list[Layout] = []
        """Of every layer and, behind it, of its followers."""
        for copies in layers:
            for copy in copies:
                self._see_layer(copy)
        self.full = np.array([copies[0].topology.full for copies in layers])
        self.num_slots = np.array([copies[0].topology.num_slots for copies in layers])
        self.has_full_stores = any(layout.full for layout in self.layouts)
        self.lacks_bits = any(layout.full and not layout.index.numel() for layout in self.layouts)
        self.devices = {copies[0].weight.device for copies in layers}
        for optimizer in optimizers:
            self._see_optimizer(optimizer, [copies[0].weight for copies in layers])

    def holds(self) -> bool:
        return _cuda.unchanged(
            items=self._items,
            attributes=self._attributes,
            sizes=self._sizes,
            types=self._types,
            tensors=self._tensors,
        )

    def versions(self) -> tuple[int, ...]:
        """How often the coordinates and the index of each layout were written."""
        return _cuda.versions(layouts=self.layouts)

    def _see_layer(self, layer: SparseLayer) -> None:
        topology, weight = layer.topology, layer._parameters.get("weight")
        self.layouts.append(layout := topology.layout)  # which may follow coordinates that somebody wrote
        self._items += [(layer._parameters, "weight", weight), (layer._modules, "topology", topology)]
        self._items += [(vars(topology), name, getattr(topology, name)) for name in _OF_TOPOLOGY]
        if layout.full:
            if shown_by(layout) is not None:  # somebody may write the coordinates
                raise Unwatchable
            self._items.append((vars(layout.index), "shown", None))
        for tensor in (weight, *layout.tensors):
            self._see_tensor(tensor)

    def _see_optimizer(self, optimizer: Optimizer, weights: Sequence[nn.Parameter]) -> None:
        state, groups = optimizer.state, getattr(optimizer, "param_groups", [])
        if not isinstance(state, dict) or not isinstance(groups, list):
            raise Unwatchable
        self._attributes.append((optimizer, "state", state))
        if groups:
            self._attributes.append((optimizer, "param_groups", groups))
        self._sizes.append((groups, len(groups)))
        places = {}
        for number, group in enumerate(groups):
            self._items += [(groups, number, group), (group, "params", group["params"])]
            self._sizes.append((group["params"], len(group["params"])))
            places |= {id(param): (group["params"], place) for place, param in enumerate(group["params"])}
            for name in settings_of_fresh(optimizer):
                if isinstance(group[name], Tensor):
                    raise Unwatchable
                self._items.append((group, name, group[name]))
        for weight in weights:
            if id(weight) in places:
                self._items.append((*places[id(weight)], weight))
            self._items.append((state, weight, own := state.get(weight)))
            if own is not None:
                self._see_state(own, weight)

    def _see_state(self, state: dict, weight: Tensor) -> None:
        self._sizes.append((state, len(state)))
        for name, value in state.items():
            if isinstance(value, Tensor):
                self._items.append((state, name, value))
                if value.shape == weight.shape:  # others, such as a count of steps, are not rewired
                    self._see_tensor(value)
            elif type(value) in _NUMBERS:  # a count of steps is another object after every step
                self._types.append((state, name, type(value)))
            else:
                raise Unwatchable

    def _see_tensor(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            raise Unwatchable
        self._tensors.append((tensor, _cuda.describe(tensor=tensor)))


_OF_TOPOLOGY = ("_rows", "_cols", "index", "full", "adoptions")


class Unwatchable(Exception):
    """There is something of which no fact says that it is the same; or `sparsekern._cuda` is missing."""


def watch(layers: Iterable[Sequence[SparseLayer]], optimizers: Iterable[Optimizer]) -> Watch | None:
    """A watch over layers, each with its followers, and over their optimisers' state; None where there can be none."""
    try:
        return Watch(layers, optimizers)
    except Unwatchable:
        return None


class SeenTensors:
    """Tensors that were checked, or None in the place of one; it does not keep them alive."""

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._seen = [t if t is None else (weakref.ref(t), _cuda.describe(tensor=t)) for t in tensors]

    def are(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the very same, as they were."""
        described = []
        for seen, tensor in zip(self._seen, tensors, strict=True):
            if seen is None or tensor is None:
                if seen is not tensor:
                    return False
            elif seen[0]() is tensor:
                described.append((tensor, seen[1]))
            else:
                return False
        return _cuda.unchanged(items=[], attributes=[], sizes=[], types=[], tensors=described)
