"""SET and RigL: drop the weakest blocks, grow as many elsewhere. A new rule of this kind is two functions."""

import math
from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.layer import SparseLayer
from sparsekern.rewire.growth import GrowthScores, float_bits, pack, positions_of, scores_of
from sparsekern.rewire.hash import stream
from sparsekern.rewire.rule import Rule, distributed
from sparsekern.rewire.schedule import Constant, check_fraction
from sparsekern.rewire.scores import block_l1
from sparsekern.rewire.select import places, random_candidates, weakest


class DropAndGrow(Rule):
    """Drop the weakest blocks and grow as many elsewhere. The number of live blocks stays exactly the same.

    Args:
        model: its sparse layers are rewired; frozen ones are not.
        optimizer: built after the model; rewired slots of its state are reset to what a fresh optimiser holds.
        drop_fraction: share of the live blocks replaced at an event, in [0, 1]; a float, or a schedule such as
            `cosine(0.3)`, which needs `end_step`. The remainder of drop_fraction * live is carried to the next event.
        update_every: steps (or units of the clock) between events; the first is at start_step + update_every.
        start_step, end_step: no event at or before the one, nor after the other (None: no end).
        seed: of the random choices; together with layer, event and position it decides them, on every device alike.
        followers: copies of the model (target, EMA) that take over the topology; their rewired slots get the new value.
        coverage: keep a boolean per place for `stats()["coverage"]`, the share of places that were ever live.

    A block dropped at an event is no candidate for growth at that event; where dead places run out, fewer are replaced.
    New blocks start at zero. A new rule overrides `drop_scores` and `growth_candidates`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        drop_fraction=0.3,
        update_every: float = 100,
        start_step: float = 0,
        end_step: float | None = None,
        seed: int = 0,
        followers: Iterable[nn.Module] = (),
        coverage: bool = False,
    ):
        self.drop_fraction = drop_fraction if callable(drop_fraction) else Constant(drop_fraction)
        if getattr(self.drop_fraction, "needs_end", False) and end_step is None:
            raise ValueError(f"{type(self).__name__}: {self.drop_fraction} needs an end_step, got None")
        super().__init__(model, optimizer, update_every, start_step, end_step, seed, followers, coverage)
        self._live: dict[str, list[int]] = {}
        self._adopted(list(self.layers))
        self._carry = {path: [0.0] * layer.groups for path, layer in self.layers.items()}

    def drop_scores(self, path: str, layer: SparseLayer) -> Tensor:
        """float32 [num_slots]; the blocks with the smallest are dropped."""
        return block_l1(layer)

    def growth_candidates(self, path: str, layer: SparseLayer, count: int) -> Tensor:
        """Keys [groups, count or more] of dead blocks, the largest to be grown; see `sparsekern.rewire.growth`."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        return super().state_dict() | {"carry": {path: list(carry) for path, carry in self._carry.items()}}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._carry = {path: list(carry) for path, carry in state["carry"].items()}

    def _adopted(self, paths: list[str]) -> None:
        for path in paths:
            self._live[path] = self.layers[path].topology.live_per_group()

    def _event(self, now: float) -> bool:
        fraction = self.drop_fraction(self._progress(now))
        check_fraction(fraction)
        moved = [self._rewire(path, layer, fraction) for path, layer in self.layers.items()]
        return any(moved)

    def _rewire(self, path: str, layer: SparseLayer, fraction: float) -> bool:
        counts = self._counts(path, fraction)
        if not any(counts):
            self._moved[path] = (0, 0)
            return False
        layout = layer.topology.layout
        scores = self.drop_scores(path, layer)
        self._note_nan(path, scores)
        slots = weakest(scores, layout, self._live[path], counts)
        rows, cols = places(self.growth_candidates(path, layer, max(counts)), layout, counts)
        kept = rows < 0  # no candidate was left for this slot
        self._moved[path] = 2 * ((~kept).sum(),)
        for tensor, fresh in self._element_tensors(path):
            _assign(tensor, slots, tensor[slots].masked_fill_(~kept[:, None, None], fresh))
        rows = torch.where(kept, layout.block_rows[slots], rows)
        cols = torch.where(kept, layout.block_cols[slots], cols)
        for copy in self._copies(path):
            _assign(copy.topology.block_rows, slots, rows)
            _assign(copy.topology.block_cols, slots, cols)
            copy.topology.rebuild()
            if copy is not layer:
                _assign(copy.weight, slots, torch.where(kept[:, None, None], copy.weight[slots], layer.weight[slots]))
        self._cover(path)
        return True

    def _counts(self, path: str, fraction: float) -> list[int]:
        """Blocks to replace in each group: exact, the remainder carried, and no more than there are dead places."""
        topology = self.layers[path].topology
        counts = []
        for g, live in enumerate(self._live[path]):
            exact = fraction * live + self._carry[path][g]
            count = math.floor(exact + 1e-9)  # 0.29 * 100 is 28.999... in floating point
            self._carry[path][g] = exact - count
            counts.append(min(count, live, topology.num_blocks // topology.groups - live))
        return counts


class SET(DropAndGrow):
    """Sparse Evolutionary Training (Mocanu et al., arXiv 1707.04780): drop the smallest norms, grow at random.

    Example:
        >>> rule = SET(model, optimizer, drop_fraction=0.3, update_every=100)
        >>> for batch in batches:
        ...     loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        ...     rule.step()
    """

    def growth_candidates(self, path: str, layer: SparseLayer, count: int) -> Tensor:
        return random_candidates(layer.topology.layout, count, stream(self.seed, self._index[path], self.events))


class RigL(DropAndGrow):
    """The Rigged Lottery (Evci et al., arXiv 1911.11134): drop the smallest norms, grow where the gradient is largest.

    A block's growth score is the squared norm of its gradient in the training step of the event, summed over
    micro-batches and data-parallel ranks; it is computed strip by strip in the backward pass, and a dense gradient is
    never held. Scores that are not finite never win. With a clock of your own, the step before an event is foreseen
    from the pace so far; an event that came unforeseen is put off by one step.
    """

    _armed = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._prepare(1.0)

    def growth_candidates(self, path: str, layer: SparseLayer, count: int) -> Tensor:
        return _sum_over_ranks(layer.growth.keys)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._arm(state["armed"])

    def state_dict(self) -> dict:
        return super().state_dict() | {"armed": self._armed}

    def _adopted(self, paths: list[str]) -> None:
        super()._adopted(paths)
        for path in paths:
            self.layers[path].growth = GrowthScores(self.layers[path].topology)
        self._arm(False)  # what was scored were other blocks, so an event that is due waits for the next step

    def _ready(self) -> bool:
        return self._armed

    def _prepare(self, pace: float) -> None:
        due = self._due()
        self._arm(due is not None and self._reached(self.clock + pace, due))

    def _arm(self, armed: bool) -> None:
        if armed or self._armed:
            for layer in self.layers.values():
                layer.growth.arm(armed)
        self._armed = armed


def _assign(tensor: Tensor, slots: Tensor, values: Tensor) -> None:
    tensor.index_copy_(0, slots, values.to(tensor.dtype))


def _sum_over_ranks(keys: Tensor) -> Tensor:
    """Add the scores of data-parallel ranks position by position; each rank may hold another selection of positions."""
    if not distributed():
        return keys
    ranks = [torch.empty_like(keys) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(ranks, keys)
    keys = torch.cat(ranks, dim=1)
    positions, order = positions_of(keys).sort(dim=1)
    totals = scores_of(keys).gather(1, order).double().cumsum(dim=1)
    last = torch.ones_like(positions, dtype=torch.bool)
    last[:, :-1] = positions[:, 1:] != positions[:, :-1]
    # the total at the end of the run before: totals never fall, so it is the running maximum over earlier run ends
    before = torch.where(last, totals, 0).cummax(dim=1).values.roll(1, dims=1)
    before[:, 0] = 0
    sums = torch.where(last & (positions >= 0), float_bits((totals - before).float()), -1)
    return torch.where(sums < 0, -1, pack(sums, positions))
