"""GMP: gradual magnitude pruning that really shrinks the layers."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import choose
from sparsekern.geometry import live_count
from sparsekern.rewire.arguments import check_count, check_finite, check_flag, listed_by_group
from sparsekern.rewire.device_rule import DeviceRule
from sparsekern.rewire.on_device import Growth
from sparsekern.rewire.optimizer_state import element_state
from sparsekern.rewire.ranks import distributed
from sparsekern.rewire.schedule import cubic_density
from sparsekern.rewire.scores import block_l1
from sparsekern.rewire.select import relative_sizes, weakest, weakest_of_all


class GMP(DeviceRule):
    """Gradual Magnitude Pruning (Zhu and Gupta, arXiv 1710.01878), strictly monotone: a pruned block never returns.

    At every event the weakest blocks are marked dead until the density is
    final + (initial - final) * (1 - (t - start_step) / (end_step - start_step))**3. Dead slots cost no time; once no
    more than half of a layer's slots are live, and after the last event, the layer is compacted: the same Parameter
    gets a smaller storage, and gradient and optimiser state follow. On a GPU that is when a full store gets faster:
    without compaction it stays with the dense GEMM, whatever is dead. Start from `sparsify(model, density=1.0)`, which
    runs the vendor's dense GEMM as long as that is faster, and is not compacted before, but for the last event.

    On a GPU, `sk.use("cuda")` marks the slots of all layers at once by a few kernels, as it rewires under SET, and
    unforced they do where they would there. Compaction changes shapes, and stays with torch. `step` returns True at
    every event, also if it marks nothing, which only the device knows.

    Args:
        model, optimizer, followers: as in SET; but layers that are frozen later are pruned on, as they were counted in.
        final_density: live blocks / all blocks at end_step, in (0, 1].
        start_step, end_step: the ramp. Events are due every `update_every` after start_step, and the last at end_step.
        update_every: steps (or units of the clock) between events.
        scope: "global" ranks the blocks of all layers together, by mean |w|; "layer" prunes each layer (and each group)
            to the same density.
        compact: False keeps every storage as it is, with dead slots; also so under data parallelism, where the buckets
            of gradients have fixed sizes.

    Attributes:
        compactions: how often a layer was compacted; whoever captured a CUDA graph must capture it again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        final_density: float = 0.05,
        start_step: float = 0,
        end_step: float | None = None,
        update_every: float = 500,
        scope: str = "global",
        compact: bool = True,
        followers: Iterable[nn.Module] = (),
    ):
        check_finite("GMP", "final_density", final_density)
        live_count(final_density, 1)  # checks the range
        check_flag("GMP", "compact", compact)
        if scope not in ("global", "layer"):
            raise ValueError(f"GMP: scope must be 'global' or 'layer', got {scope!r}")
        if end_step is None:
            raise ValueError("GMP: end_step is the time at which final_density is reached; it must be given, got None")
        super().__init__(model, optimizer, update_every, start_step, end_step, 0, followers, False)
        self.final_density, self.scope = final_density, scope
        self.compact = compact and not distributed()
        self.compactions = 0
        self._done = False
        sizes = relative_sizes([layer.topology.layout for layer in self.layers.values()])
        self._sizes = np.repeat(sizes, [layer.groups for layer in self.layers.values()])
        self._initial = self._live.copy()
        # How many live blocks each layer has, on the way from device to host, and the event that says it arrived.
        self._counts: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def state_dict(self) -> dict:
        initial = self._by_layer(self._initial)
        return super().state_dict() | {"done": self._done, "initial": initial, "compactions": self.compactions}

    def load_state_dict(self, state: dict) -> None:
        state = self._by_own_names(state)
        if isinstance(state, dict) and {"done", "initial", "compactions"} <= state.keys():
            where = "GMP.load_state_dict"
            check_flag(where, "done", state["done"])
            check_count(where, "compactions", state["compactions"])
            for name, live, layer in listed_by_group(where, "initial", state["initial"], self.layers):
                check_count(where, name, live, most=layer.topology.num_blocks // layer.groups)
        super().load_state_dict(state)
        self._done, self.compactions = state["done"], state["compactions"]
        self._initial = self._of_all(state["initial"], np.int64)

    def _adopted(self, paths: list[str]) -> None:
        super()._adopted(paths)
        for path in paths:
            if self.layers[path].weight.is_cuda:  # a graph captured before the first event clears dead slots too
                for copy in self._copies(path):
                    copy.topology.hold_bits()

    def _due(self) -> float | None:
        return None if self._done else min(self.start_step + self._next * self.update_every, self.end_step)

    def _advance(self, now: float) -> None:
        super()._advance(now)
        self._done = now >= self.end_step

    def _event(self, now: float) -> bool:
        self._settle(wait=True)
        progress = self._progress(now)
        kind = Growth.MARK_DEAD_OF_ALL if self.scope == "global" else Growth.MARK_DEAD
        if self._is_on_device(self.layers, kind):
            self._event_on_device(progress, kind)
            return True
        self._check_gradients()
        dead = self._weakest_of_all(progress) if self.scope == "global" else self._weakest_of_each(progress)
        for path, mask in dead.items():
            self._mark(path, mask)
        device = next(iter(self.layers.values())).weight.device  # the layers may be on several
        self._send(torch.stack([layer.topology.layout.live().sum().to(device) for layer in self.layers.values()]))
        return True

    def _event_on_device(self, progress: float, kind: Growth) -> None:
        if self._watch is None or self._watch.lacks_bits:
            self._hold_bits()
        counts, target = np.zeros_like(self._live), 0
        if self.scope == "global":
            target = self._target_of_all(progress)
        else:
            counts = self._counts_of_each(progress)
        prepared = self._prepare_kernels(self.layers, [kind] * len(self.layers))
        stats = prepared.rewire(counts, self._live, target=target)
        self._moved = {path: (moved, 0) for path, moved in prepared.moved.items()}
        self._live = self._live - counts
        if self.scope == "global":
            self._send(stats)
        else:  # the host knows how many are live
            self._counts = torch.from_numpy(self._sums_of_layers(self._live))

    def _hold_bits(self) -> None:
        """Into which the kernels write what is dead in a full store."""
        self._watch = None
        for path in self.layers:
            for copy in self._copies(path):
                copy.topology.hold_bits()

    def _send(self, counts: Tensor) -> None:
        """Begin to bring live counts to the host: [layers], or the statistics of the kernels, where they come last."""
        counts_on_host = counts.to("cpu", non_blocking=True)
        self._counts = counts_on_host if counts.dim() == 1 else counts_on_host[:, -1]
        if counts.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def _prepare(self, pace: float) -> None:
        self._settle(wait=False)

    def _weakest_of_all(self, progress: float) -> dict[str, Tensor]:
        """Masks of the slots to be dead, from one ranking over all layers."""
        scores = {path: block_l1(layer, mean=True) for path, layer in self.layers.items()}
        for path, score in scores.items():
            self._note_nan(path, score)
        layouts = [layer.topology.layout for layer in self.layers.values()]
        parts = weakest_of_all(list(scores.values()), layouts, self._target_of_all(progress))
        return dict(zip(self.layers, parts, strict=True))

    def _target_of_all(self, progress: float) -> int:
        """How much shall be live, in elements of the smallest block of all layers."""
        total, initial = (int((self._sizes * number).sum()) for number in (self._places, self._initial))
        return round(cubic_density(progress, initial / total, self.final_density) * total)

    def _weakest_of_each(self, progress: float) -> dict[str, Tensor]:
        dead, counts = {}, self._counts_of_each(progress)
        for path, layer in self.layers.items():
            topology = layer.topology
            scores = block_l1(layer)
            self._note_nan(path, scores)
            groups = self._groups[path]
            slots = weakest(scores, topology.layout, self._live[groups].tolist(), counts[groups].tolist())
            dead[path] = (~topology.layout.live()).index_fill_(0, slots, True)
        self._live = self._live - counts
        return dead

    def _counts_of_each(self, progress: float) -> np.ndarray:
        """Blocks that each group loses, with scope "layer"."""
        density = cubic_density(progress, self._initial / self._places, self.final_density)
        targets = np.maximum(1, np.rint(density * self._places)).astype(np.int64)
        return np.maximum(0, self._live - targets)

    def _sums_of_layers(self, numbers: np.ndarray) -> np.ndarray:
        return np.add.reduceat(numbers, [groups.start for groups in self._groups.values()])

    def _mark(self, path: str, dead: Tensor) -> None:
        """Make these slots dead, with weight, gradient and state as in a fresh slot."""
        self._moved[path] = (self.layers[path].topology.layout.live() & dead).sum(), 0
        for tensor, fresh in self._element_tensors(path):
            tensor.masked_fill_(dead[:, None, None], fresh)
        for copy in self._copies(path):
            copy.weight.masked_fill_(dead[:, None, None], 0)
            copy.topology.mark_dead(dead)

    def _settle(self, wait: bool) -> None:
        """Compact the layers that have become half empty, as soon as the host knows their number of live blocks."""
        if self._counts is None or not (wait or self._arrived is None or self._arrived.query()):
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        for path, live in self._may_change(self._counts.numpy()):
            layer, topology = self.layers[path], self.layers[path].topology
            state = topology.layout, layer.weight.dtype
            half_empty = 2 * live <= topology.num_slots and not choose.full_store_is_faster(*state)
            if self.compact and live < topology.num_slots and (half_empty or self._done):
                self._compact(path, max(live, 1))
            elif topology.full and choose.sparse_is_faster(*state):
                self._watch = None
                for copy in self._copies(path):
                    copy.topology.leave_full_store()
        self._counts = self._arrived = None

    def _may_change(self, live: np.ndarray) -> list[tuple[str, int]]:
        """The layers, with their live blocks, that `_settle` has to look at."""
        numbers, paths = range(len(live)), list(self.layers)
        if not self._done and self._watch is not None:
            may = (2 * live <= self._watch.num_slots) & self.compact
            if any(device.type == "cpu" for device in self._watch.devices):  # where a full store is left by density
                may |= self._watch.full
            numbers = np.flatnonzero(may)
        return [(paths[n], int(live[n])) for n in numbers]

    @torch.no_grad()
    def _compact(self, path: str, live: int) -> None:
        """Keep the first `live` live slots, in order, in smaller storages of the same Parameters."""
        layer, self._watch, self._prepared = self.layers[path], None, None
        kept = torch.sort((~layer.topology.layout.live()).int(), stable=True).indices[:live]
        for state, name, value, _ in list(element_state(self._optimizers, layer.weight)):
            state[name] = value[kept]
        for copy in self._copies(path):
            grad, copy.weight.grad = copy.weight.grad, None
            copy.weight.set_(copy.weight[kept])
            copy.weight.grad = None if grad is None else grad[kept]
            copy.topology.keep_slots(kept)
        self.compactions += 1
