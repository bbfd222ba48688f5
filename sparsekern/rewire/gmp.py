"""GMP: gradual magnitude pruning that really shrinks the layers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import choose
from sparsekern.rewire.arguments import check_by_group, check_count, check_finite, check_flag
from sparsekern.rewire.device_rule import DeviceRule
from sparsekern.rewire.on_device import Growth, LayerEvent
from sparsekern.rewire.optimizer_state import element_state
from sparsekern.rewire.ranks import distributed
from sparsekern.rewire.schedule import cubic_density
from sparsekern.rewire.scores import block_l1
from sparsekern.rewire.select import relative_sizes, weakest, weakest_of_all
from sparsekern.topology import live_count


class GMP(DeviceRule):
    """Gradual Magnitude Pruning (Zhu and Gupta, arXiv 1710.01878), strictly monotone: a pruned block never returns.

    At every event the weakest blocks are marked dead until the density is
    final + (initial - final) * (1 - (t - start_step) / (end_step - start_step))**3. Dead slots cost no time; once no
    more than half of a layer's slots are live, and after the last event, the layer is compacted: the same Parameter
    gets a smaller storage, and gradient and optimiser state follow. Start from `sparsify(model, density=1.0)`, which
    runs the vendor's dense GEMM as long as that is faster, and is not compacted before, but for the last event.

    On a GPU, `sk.use("cuda")` marks the slots of all layers at once by a few kernels, as it rewires under SET.
    Compaction changes shapes, and stays with torch.

    Args:
        model, optimizer, followers: as in SET.
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
        self._live: dict[str, list[int]] = {}
        super().__init__(model, optimizer, update_every, start_step, end_step, 0, followers, False)
        self.final_density, self.scope = final_density, scope
        self.compact = compact and not distributed()
        self.compactions = 0
        self._done = False
        self._initial = {path: layer.topology.live_per_group() for path, layer in self.layers.items()}
        # How many live blocks each layer has, on the way from device to host, and the event that says it arrived.
        self._counts: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def state_dict(self) -> dict:
        initial = {path: list(live) for path, live in self._initial.items()}
        return super().state_dict() | {"done": self._done, "initial": initial, "compactions": self.compactions}

    def load_state_dict(self, state: dict) -> None:
        if isinstance(state, dict) and {"done", "initial", "compactions"} <= state.keys():
            check_flag("GMP.load_state_dict", "done", state["done"])
            check_count("GMP.load_state_dict", "compactions", state["compactions"])
            check_by_group("GMP.load_state_dict", "initial", state["initial"], self.layers, least=0)
        super().load_state_dict(state)
        self._done, self._initial, self.compactions = state["done"], state["initial"], state["compactions"]

    def _adopted(self, paths: list[str]) -> None:
        for path in paths:
            layer = self.layers[path]
            self._live[path] = layer.topology.live_per_group()
            if layer.weight.is_cuda:  # a CUDA graph that is captured before the first event clears dead slots too
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
        if self._is_on_device():
            self._event_on_device(progress)
            return True
        dead = self._weakest_of_all(progress) if self.scope == "global" else self._weakest_of_each(progress)
        for path, mask in dead.items():
            self._mark(path, mask)
        self._send(torch.stack([layer.topology.layout.live().sum() for layer in self.layers.values()]))
        return True

    def _event_on_device(self, progress: float) -> None:
        growth = Growth.MARK_DEAD_OF_ALL if self.scope == "global" else Growth.MARK_DEAD
        for path in self.layers:
            for copy in self._copies(path):
                copy.topology.hold_bits()  # into which the kernels write
        layers = [self._layer_tensors(path, growth) for path in self.layers]
        events = []
        target = self._target_of_all(progress) if self.scope == "global" else 0
        for path, layer in self.layers.items():
            live = self._live[path]
            counts = [0] * len(live) if self.scope == "global" else self._counts_of(path, progress)
            events.append(LayerEvent(counts, live, gradient=layer.weight.grad, target=target))
        stats = self._by_kernels(list(self.layers), layers, events)
        for (path, moved), event in zip(zip(self.layers, stats[:, 0], strict=True), events, strict=True):
            self._moved[path] = moved, 0
            self._live[path] = [live - count for live, count in zip(event.live, event.counts, strict=True)]
        if self.scope == "global":
            self._send(stats)
        else:  # the host knows how many are live
            self._counts = torch.tensor([sum(live) for live in self._live.values()], device="cpu")

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
        layouts = [layer.topology.layout for layer in self.layers.values()]
        total = initial = 0
        for (path, layer), size in zip(self.layers.items(), relative_sizes(layouts), strict=True):
            total += size * layer.topology.num_blocks
            initial += size * sum(self._initial[path])
        return round(cubic_density(progress, initial / total, self.final_density) * total)

    def _weakest_of_each(self, progress: float) -> dict[str, Tensor]:
        dead = {}
        for path, layer in self.layers.items():
            topology = layer.topology
            scores = block_l1(layer)
            self._note_nan(path, scores)
            live, counts = self._live[path], self._counts_of(path, progress)
            slots = weakest(scores, topology.layout, live, counts)
            self._live[path] = [n - count for n, count in zip(live, counts, strict=True)]
            dead[path] = (~topology.layout.live()).index_fill_(0, slots, True)
        return dead

    def _counts_of(self, path: str, progress: float) -> list[int]:
        """Blocks that each group of a layer loses, with scope "layer"."""
        topology = self.layers[path].topology
        places = topology.num_blocks // topology.groups
        targets = [
            max(1, round(cubic_density(progress, first / places, self.final_density) * places))
            for first in self._initial[path]
        ]
        return [max(0, live - target) for live, target in zip(self._live[path], targets, strict=True)]

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
        for (path, layer), live in zip(self.layers.items(), self._counts.tolist(), strict=True):
            topology = layer.topology
            state = topology.layout, layer.weight.dtype
            half_empty = 2 * live <= topology.num_slots and not choose.full_store_is_faster(*state)
            if self.compact and live < topology.num_slots and (half_empty or self._done):
                self._compact(path, max(live, 1))
            elif topology.full and choose.sparse_is_faster(*state):
                for copy in self._copies(path):
                    copy.topology.leave_full_store()
        self._counts = self._arrived = None

    @torch.no_grad()
    def _compact(self, path: str, live: int) -> None:
        """Keep the first `live` live slots, in order, in smaller storages of the same Parameters."""
        layer = self.layers[path]
        kept = torch.sort((~layer.topology.layout.live()).int(), stable=True).indices[:live]
        for state, name, value, _ in list(element_state(self._optimizers, layer.weight)):
            state[name] = value[kept]
        for copy in self._copies(path):
            grad, copy.weight.grad = copy.weight.grad, None
            copy.weight.set_(copy.weight[kept])
            copy.weight.grad = None if grad is None else grad[kept]
            copy.topology.keep_slots(kept)
        self.compactions += 1
