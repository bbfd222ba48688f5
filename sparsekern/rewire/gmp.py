"""GMP: gradual magnitude pruning that really shrinks the layers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import choose
from sparsekern.rewire.arguments import check_by_group, check_count, check_finite, check_flag
from sparsekern.rewire.optimizer_state import element_state
from sparsekern.rewire.ranks import distributed
from sparsekern.rewire.rule import Rule
from sparsekern.rewire.schedule import cubic_density
from sparsekern.rewire.scores import block_l1, sortable
from sparsekern.rewire.select import weakest
from sparsekern.topology import live_count


class GMP(Rule):
    """Gradual Magnitude Pruning (Zhu and Gupta, arXiv 1710.01878), strictly monotone: a pruned block never returns.

    At every event the weakest blocks are marked dead until the density is
    final + (initial - final) * (1 - (t - start_step) / (end_step - start_step))**3. Dead slots cost no time; once no
    more than half of a layer's slots are live, and after the last event, the layer is compacted: the same Parameter
    gets a smaller storage, and gradient and optimiser state follow. Start from `sparsify(model, density=1.0)`, which
    runs the vendor's dense GEMM as long as that is faster, and is not compacted before, but for the last event.

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
        for path, layer in self.layers.items():
            if layer.weight.is_cuda:  # a CUDA graph that is captured before the first event clears dead slots too
                for copy in self._copies(path):
                    copy.topology.hold_bits()
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
            self._live[path] = self.layers[path].topology.live_per_group()

    def _due(self) -> float | None:
        return None if self._done else min(self.start_step + self._next * self.update_every, self.end_step)

    def _advance(self, now: float) -> None:
        super()._advance(now)
        self._done = now >= self.end_step

    def _event(self, now: float) -> bool:
        self._settle(wait=True)
        progress = self._progress(now)
        dead = self._weakest_of_all(progress) if self.scope == "global" else self._weakest_of_each(progress)
        for path, mask in dead.items():
            self._mark(path, mask)
        counts = torch.stack([layer.topology.layout.live().sum() for layer in self.layers.values()])
        self._counts = counts.to("cpu", non_blocking=True)
        if counts.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return True

    def _prepare(self, pace: float) -> None:
        self._settle(wait=False)

    def _weakest_of_all(self, progress: float) -> dict[str, Tensor]:
        """Masks of the slots to be dead, from one ranking over all layers, in elements as block sizes may differ."""
        unit = min(layer.block_size for layer in self.layers.values()) ** 2
        scores, sizes, total, initial = [], [], 0, 0
        for path, layer in self.layers.items():
            score = block_l1(layer, mean=True)
            self._note_nan(path, score)
            live = layer.topology.layout.live()
            size = layer.block_size**2 // unit
            scores.append(torch.where(live, score, torch.inf))
            sizes.append(live * size)
            total += size * layer.topology.num_blocks
            initial += size * sum(self._initial[path])
        sizes = torch.cat(sizes)
        target = round(cubic_density(progress, initial / total, self.final_density) * total)
        order = torch.sort(sortable(torch.cat(scores)), stable=True).indices
        dropped = sizes[order].cumsum(0) <= sizes.sum() - target
        dead = torch.empty_like(dropped).scatter_(0, order, dropped | (sizes[order] == 0))
        parts = dead.split([layer.topology.num_slots for layer in self.layers.values()])
        return dict(zip(self.layers, parts, strict=True))

    def _weakest_of_each(self, progress: float) -> dict[str, Tensor]:
        dead = {}
        for path, layer in self.layers.items():
            topology = layer.topology
            scores = block_l1(layer)
            self._note_nan(path, scores)
            places = topology.num_blocks // topology.groups
            live = self._live[path]
            targets = [
                min(now, max(1, round(cubic_density(progress, first / places, self.final_density) * places)))
                for now, first in zip(live, self._initial[path], strict=True)
            ]
            slots = weakest(scores, topology.layout, live, [n - t for n, t in zip(live, targets, strict=True)])
            self._live[path] = targets
            dead[path] = (~topology.layout.live()).index_fill_(0, slots, True)
        return dead

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
