"""DeviceRule: a rule whose events the kernels of `sparsekern.rewire.on_device` can do, for all layers at once."""

from collections.abc import Sequence

from torch import Tensor

from sparsekern import choose
from sparsekern.rewire.on_device import Growth, LayerEvent, LayerTensors, ModelTables, rewire_model, tables_for
from sparsekern.rewire.optimizer_state import element_state
from sparsekern.rewire.rule import Rule


class DeviceRule(Rule):
    """What SET, RigL and GMP share where kernels do an event. They hold its tables from event to event."""

    _tables: ModelTables | None = None

    def _is_on_device(self) -> bool:
        """Whether kernels do the events: all layers must be on one device, and the chooser must want it."""
        devices = {layer.weight.device for layer in self.layers.values()}
        return len(devices) == 1 and choose.rewires_by_cuda(devices.pop())

    def _layer_tensors(self, path: str, growth: Growth) -> LayerTensors:
        layer, copies = self.layers[path], self._copies(path)
        state = [(value, fresh) for _, _, value, fresh in element_state(self._optimizers, layer.weight)]
        tensors = [(copy.weight, 0.0) for copy in copies] + state
        layouts = [copy.topology.layout for copy in copies]
        return LayerTensors(layouts, layer.topology.shape, layer.weight, tensors, growth)

    def _by_kernels(self, paths: list[str], layers: Sequence[LayerTensors], events: Sequence[LayerEvent]) -> Tensor:
        """Do an event of these layers; returns `ModelTables.stats`."""
        tables = tables_for(layers, self._tables)
        rewire_model(tables, tables.event_table(events))
        if tables is not self._tables:
            for path, nan in zip(paths, tables.stats[:, 1], strict=True):
                self._nan[path] = nan.logical_or_(self._nan[path])
            self._tables = tables
        return tables.stats
