"""DeviceRule: a rule whose events the kernels of `sparsekern.rewire.on_device` can do, for all layers at once."""

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sparsekern import choose
from sparsekern.layer import SparseLayer
from sparsekern.rewire.hash import stream
from sparsekern.rewire.on_device import (
    Growth,
    LayerTensors,
    ModelEvent,
    ModelTables,
    refusal,
    rewire_model,
    tables_for,
    takes_gradient,
)
from sparsekern.rewire.optimizer_state import element_state
from sparsekern.rewire.ranks import distributed
from sparsekern.rewire.rule import Rule
from sparsekern.rewire.watch import Watch


class DeviceRule(Rule):
    """What SET, RigL and GMP share: counts by group, and events by kernels, for which much is the same every time.

    Numbers by group are one array for the whole model, in which `_groups` says where those of a layer are.
    """

    _prepared: "Prepared | None" = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_prepared": None}  # the launches are of this process

    @functools.cached_property
    def _groups(self) -> dict[str, slice]:
        ends = np.cumsum([layer.groups for layer in self.layers.values()]).tolist()
        return {path: slice(end - self.layers[path].groups, end) for path, end in zip(self.layers, ends, strict=True)}

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Of blocks, live or dead."""
        topologies = [layer.topology for layer in self.layers.values() for _ in range(layer.groups)]
        return np.array([topology.num_blocks // topology.groups for topology in topologies], np.int64)

    @functools.cached_property
    def _live(self) -> np.ndarray:
        """Live blocks, as the host last knew them; `_adopted` fills it."""
        return np.zeros_like(self._places)

    def _adopted(self, paths: list[str]) -> None:
        for path in paths:
            self._live[self._groups[path]] = self.layers[path].topology.live_per_group()

    def _by_layer(self, numbers: np.ndarray) -> dict[str, list]:
        return {path: numbers[groups].tolist() for path, groups in self._groups.items()}

    def _of_all(self, by_layer: dict[str, list], dtype: type) -> np.ndarray:
        """What `_by_layer` makes, back in one array."""
        return np.array([number for path in self.layers for number in by_layer[path]], dtype)

    def _is_on_device(self, layers: dict[str, SparseLayer], growth: Growth) -> bool:
        """Whether kernels do the event of these layers: all must be on one device, and the chooser must want it.

        Where nobody forces the kernels, they must also take all that they are to write, and there must be one rank:
        ranks that decide differently would drop other blocks, as norms by kernels and by torch differ in the last bit.

        Args:
            growth: of all layers, as far as it is known; MARK_DEAD_OF_ALL has limits of its own.
        """
        if self._watch is not None:
            devices = self._watch.devices
        else:
            devices = {layer.weight.device for layer in self.layers.values()}
        if len(devices) != 1 or not choose.rewires_by_cuda(next(iter(devices))):
            return False
        return choose.forced() is not None or (not distributed() and self._is_taken_by_kernels(layers, growth))

    def _is_taken_by_kernels(self, layers: dict[str, SparseLayer], growth: Growth) -> bool:
        held = self._held()  # so all was taken, and nothing but gradients has been replaced since
        weights = [layer.weight for layer in layers.values()] if held is None else held.weights
        if not all(takes_gradient(weight.grad, weight) for weight in weights):
            return False
        if held is None and refusal(self._layer_tensors(path, growth) for path in layers):
            self._prepared = None  # which would keep alive what was replaced
            return False
        return True

    def _has_full_stores(self) -> bool:
        return self._watch is None or self._watch.has_full_stores  # where nobody watches, there may be some

    def _held(self) -> "Prepared | None":
        """What was prepared at an earlier event, if nothing was replaced since."""
        held = self._prepared
        return held if held is not None and held.watch is self._watch is not None else None

    def _prepare_kernels(self, layers: dict[str, SparseLayer], kinds: list[Growth]) -> "Prepared":
        """What kernels need of these layers: what is held, as long as nothing was replaced, else new."""
        if (held := self._held()) is not None and held.kinds == kinds and held.seed == self.seed:
            return held
        held = self._prepared
        tensors = [self._layer_tensors(path, kind) for path, kind in zip(layers, kinds, strict=True)]
        tables = tables_for(tensors, held and held.tables)
        if held is None or tables is not held.tables:
            for path, nan in zip(layers, tables.stats[:, 1], strict=True):
                self._nan[path] = nan.logical_or_(self._nan[path])
        streams = [stream(self.seed, self._index[path]) for path in layers]
        groups = [n for path in layers for n in range(self._groups[path].start, self._groups[path].stop)]
        self._prepared = Prepared(
            self._watch, kinds, tables, self.seed, streams, groups, list(layers), list(self.layers)
        )
        return self._prepared

    def _layer_tensors(self, path: str, growth: Growth) -> LayerTensors:
        layer, copies = self.layers[path], self._copies(path)
        state = [(value, fresh) for _, _, value, fresh in element_state(self._optimizers, layer.weight)]
        tensors = [(copy.weight, 0.0) for copy in copies] + state
        layouts = [copy.topology.layout for copy in copies]
        return LayerTensors(layouts, layer.topology.shape, layer.weight, tensors, growth, path)


class Prepared:
    """Tables of some layers, and what else of them is the same at every event."""

    def __init__(
        self,
        watch: Watch | None,
        kinds: list[Growth],
        tables: ModelTables,
        seed: int,
        streams: Sequence[int],
        groups: Sequence[int],
        paths: Sequence[str],
        all_paths: Sequence[str],
    ):
        self.watch, self.kinds, self.tables, self.seed = watch, kinds, tables, seed
        self.streams = np.array(streams, np.uint64)
        self.groups = np.array(groups)
        """The numbers of their groups among those of all layers."""
        self.weights = [layer.weight for layer in tables.layers]
        self.moved = dict.fromkeys(all_paths, 0) | dict(zip(paths, tables.stats[:, 0].unbind(), strict=True))
        """Blocks that moved or died in each layer of the model: views of what the kernels write."""

    def rewire(self, counts: np.ndarray, live: np.ndarray, number: int = 0, **others) -> Tensor:
        """Do an event, of which `counts` and `live` are for the groups of all layers; returns `ModelTables.stats`."""
        gradients = [weight.grad for weight in self.weights]
        event = ModelEvent(counts[self.groups], live[self.groups], self.streams, number, gradients, **others)
        rewire_model(self.tables, self.tables.event_table(event))
        return self.tables.stats
