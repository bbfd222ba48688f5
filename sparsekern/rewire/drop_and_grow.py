"""SET and RigL: drop the weakest blocks, grow as many elsewhere. A new rule of this kind is two functions."""

import weakref
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.geometry import check_balance
from sparsekern.layer import SparseLayer
from sparsekern.rewire.arguments import check_between, check_flag, listed_by_group
from sparsekern.rewire.device_rule import DeviceRule
from sparsekern.rewire.growth import GrowthScores, arm, best_candidates, float_bits, pack, positions_of, scores_of
from sparsekern.rewire.hash import stream, uniform_hash
from sparsekern.rewire.on_device import Growth
from sparsekern.rewire.ranks import distributed, gathered
from sparsekern.rewire.schedule import Constant, check_fraction
from sparsekern.rewire.scores import block_l1
from sparsekern.rewire.select import all_candidates, places, places_in_rows, random_candidates, weakest
from sparsekern.rewire.watch import SeenTensors

_ROUNDING = 1e-9  # of a number of blocks: 0.29 * 100 is 28.999... in floating point


class DropAndGrow(DeviceRule):
    """Drop the weakest blocks and grow as many elsewhere. The number of live blocks stays exactly the same.

    Args:
        model: its sparse layers are rewired; those that were frozen before are not, and those that are frozen later are
            not as long as they are.
        optimizer: built after the model; a wrapper of one (accelerate's, Lightning's, Lookahead) or a list of several
            will do. Rewired slots of its state are reset to what a fresh optimiser holds.
        drop_fraction: share of the live blocks replaced at an event, in [0, 1]; a float, or a schedule such as
            `cosine(0.3)`, which needs `end_step`. The remainder of drop_fraction * live is carried to the next event.
        update_every: steps (or units of the clock) between events; the first is at start_step + update_every.
        start_step, end_step: no event at or before the one, nor after the other (None: no end).
        seed: of the random choices; together with layer, event and position it decides them, on every device alike.
        followers: copies of the model that take over the topology; their rewired slots get the new value. Every copy
            that lives on beside the model (target network, EMA, AveragedModel) must be given here: a copy that is not
            keeps the old topology, and averaging or copying weights into it mixes blocks of different places.
        coverage: keep a boolean per place for `stats()["coverage"]`, the share of places that were ever live.
        balance: "rows" grows as many blocks in a row of the grid as were dropped there, so that every row keeps its
            number (see `Topology.random`); such an event holds a table of all places. None: anywhere in the group.

    A block dropped at an event is no candidate for growth at that event; where dead places run out, fewer are replaced.
    New blocks start at zero.

    On a GPU, `sk.use("cuda")` rewires all layers at once by a few kernels. They select as the torch operations do where
    scores are equal; norms may differ in their last bit, as every device adds up in its own order. Unforced, they do so
    where the device's table says it, there is one rank, and they take all tensors.

    A new rule is two functions, `drop_scores` and `grow_scores`; the base class counts, selects, moves optimiser state
    and followers, and carries what a resume needs.

    Example:
        >>> class Middle(DropAndGrow):  # drops the strongest blocks, grows in the middle of the matrix
        ...     def drop_scores(self, layer):
        ...         return -layer.weight.detach().float().abs().sum((1, 2))
        ...     def grow_scores(self, layer):
        ...         row, col = (torch.linspace(-1, 1, n // layer.groups) for n in layer.topology.grid)
        ...         return (2 - row[:, None].abs() - col.abs()).expand(layer.groups, -1, -1)
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
        balance: str | None = None,
    ):
        check_balance(type(self).__name__, balance)
        self.balance = balance
        self.end_step = end_step  # which a schedule may need; it is checked below
        self.drop_fraction = drop_fraction
        super().__init__(model, optimizer, update_every, start_step, end_step, seed, followers, coverage)
        self._carry = np.zeros(len(self._live))
        # Growth scores of the last event, if they were right as the rule gave them, and what they were.
        self._seen_growth: SeenTensors | None = None
        self._growth_kinds: list[Growth] = []

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_seen_growth": None}

    @property
    def drop_fraction(self) -> Callable[[float], float]:
        """The schedule of the share of live blocks that an event replaces; a number that is assigned is constant."""
        return self._drop_fraction

    @drop_fraction.setter
    def drop_fraction(self, fraction: float | Callable[[float], float]) -> None:
        schedule = fraction if callable(fraction) else Constant(fraction)
        if getattr(schedule, "needs_end", False) and self.end_step is None:
            raise ValueError(f"{type(self).__name__}: {schedule} needs an end_step, got None")
        self._drop_fraction = schedule

    def drop_scores(self, layer: SparseLayer) -> Tensor:
        """float32 [num_slots]; the live blocks with the smallest are dropped, NaN first. By default the L1 norm.

        Called without gradients. Elements of `layer.weight` outside of `layer.lanes()` stand for no weight.
        """
        return block_l1(layer)

    def grow_scores(self, layer: SparseLayer) -> Tensor | None:
        """float32 [groups, rows, cols], one for each place in the grid; the dead places with the largest are grown.

        Places whose score is negative or not finite do not grow; ties go to the lower place; what is said of live
        places does not matter. None: every dead place is as likely as another. Where a table of all places would be too
        large, keys of the best dead places instead, int64 [groups, count], see `sparsekern.rewire.growth`.
        """
        raise NotImplementedError(f"{type(self).__name__}: a rule must say where to grow; override grow_scores(layer)")

    def state_dict(self) -> dict:
        return super().state_dict() | {"carry": self._by_layer(self._carry)}

    def load_state_dict(self, state: dict) -> None:
        state = self._by_own_names(state)
        if isinstance(state, dict) and "carry" in state:  # before anything changes; what is missing is said above
            where = f"{type(self).__name__}.load_state_dict"
            for name, remainder, _ in listed_by_group(where, "carry", state["carry"], self.layers):
                check_between(where, name, remainder, -_ROUNDING, 1)
        super().load_state_dict(state)
        self._carry = self._of_all(state["carry"], np.float64)

    def _event(self, now: float) -> bool:
        fraction = self.drop_fraction(self._progress(now))
        check_fraction(fraction)
        # every layer is scored before the first is changed, so that scores that are refused leave all as it was
        counts, carry = self._counts(fraction)
        if self._has_full_stores():
            self._leave_full_stores(counts)
        layers = self._movable()
        anywhere = self.balance is None  # in a group, as the kernels grow
        if anywhere and self._is_on_device(layers, Growth.BY_HASH):
            self._event_on_device(layers, counts)
        else:
            self._check_gradients()
            of_layers = self._by_layer(counts)
            chosen = {path: self._choose(path, layer, of_layers[path]) for path, layer in self.layers.items()}
            for path, moves in chosen.items():
                self._move(path, *moves)
        self._carry = carry
        return bool(counts.any())

    def _leave_full_stores(self, counts: np.ndarray) -> None:
        """A full store has dead places: if blocks are to grow there, it is full no longer."""
        for path, groups in self._groups.items():
            if counts[groups].any():
                for copy in self._copies(path):
                    if copy.topology.full:
                        self._watch = None
                        copy.topology.leave_full_store()

    def _movable(self) -> dict[str, SparseLayer]:
        """The layers but full stores, where nothing moves."""
        if not self._has_full_stores():
            return self.layers
        return {path: layer for path, layer in self.layers.items() if not layer.topology.full}

    def _event_on_device(self, layers: dict[str, SparseLayer], counts: np.ndarray) -> None:
        if not layers:
            self._moved = dict.fromkeys(self.layers, (0, 0))
            return
        scores = None
        if getattr(self.drop_scores, "__func__", None) is not DropAndGrow.drop_scores:  # the kernels know the norms
            scores = [self._drop_scores(path, layer).contiguous() for path, layer in layers.items()]
        growth, kinds = self._growth_of_all(layers, counts)
        prepared = self._prepare_kernels(layers, kinds)
        prepared.rewire(counts, self._live, self.events, scores=scores, growth=growth)
        self._moved = {path: (moved, moved) for path, moved in prepared.moved.items()}
        if self._covered is not None:
            for path in layers:
                self._cover(path)

    def _growth_of_all(self, layers: dict[str, SparseLayer], counts: np.ndarray) -> tuple[list, list[Growth]]:
        """What to grow by, a tensor or None for each layer as the kernels take it, and of which kinds that is."""
        given = [self.grow_scores(layer) for layer in layers.values()]
        if self._held() is not None and self._seen_growth is not None and self._seen_growth.are(given):
            return given, self._growth_kinds
        found = []
        for (path, layer), scores in zip(layers.items(), given, strict=True):
            most = int(counts[self._groups[path]].max())
            growth = self._checked_growth(path, layer, scores, most)
            if growth is not None:
                growth = growth.topk(most, dim=1).values if growth.dtype == torch.int64 else growth.contiguous()
            found.append(growth)
        # tables that were taken as they are will be right again; keys are looked at every time
        same = all(growth is scores for growth, scores in zip(found, given, strict=True))
        self._seen_growth = SeenTensors(given) if same else None
        self._growth_kinds = [_kind(growth) for growth in found]
        return found, self._growth_kinds

    def _choose(self, path: str, layer: SparseLayer, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Slots to rewire, int64 [sum(counts)], and their new block rows and columns, -1 where candidates ran out."""
        layout = layer.topology.layout
        if not any(counts):
            return 3 * (torch.empty(0, dtype=torch.int64, device=layout.index.device),)
        scores = self._drop_scores(path, layer)
        self._note_nan(path, scores)
        slots = weakest(scores, layout, self._live[self._groups[path]].tolist(), counts)
        if self.balance:
            return slots, *places_in_rows(self._all_candidates(path, layer), layout, slots)
        return slots, *places(self._candidates(path, layer, max(counts)), layout, counts)

    def _move(self, path: str, slots: Tensor, rows: Tensor, cols: Tensor) -> None:
        layer = self.layers[path]
        kept = rows < 0
        self._moved[path] = 2 * ((~kept).sum(),)
        if not len(slots):
            return
        for tensor, fresh in self._element_tensors(path):
            _assign(tensor, slots, tensor[slots].masked_fill_(~kept[:, None, None], fresh))
        rows = torch.where(kept, layer.topology.block_rows[slots], rows)
        cols = torch.where(kept, layer.topology.block_cols[slots], cols)
        for copy in self._copies(path):
            _assign(copy.topology.block_rows, slots, rows)
            _assign(copy.topology.block_cols, slots, cols)
            copy.topology.rebuild()
            if copy is not layer:
                _assign(copy.weight, slots, torch.where(kept[:, None, None], copy.weight[slots], layer.weight[slots]))
        self._cover(path)

    def _candidates(self, path: str, layer: SparseLayer, count: int) -> Tensor:
        """Keys [groups, count] of the dead places that may grow, best first."""
        layout, growth = layer.topology.layout, self._growth(path, layer, count)
        if growth is None:
            return random_candidates(layout, count, stream(self.seed, self._index[path], self.events))
        if growth.dtype == torch.int64:
            return growth.topk(count, dim=1).values
        table = growth + 0.0  # -0.0 becomes 0.0, which may grow
        return best_candidates(layout, count, lambda strip, _: float_bits(table[:, strip].flatten(1)))

    def _all_candidates(self, path: str, layer: SparseLayer) -> Tensor:
        """Keys [groups, rows * cols] of all places, in their order; -1 where none may grow."""
        layout = layer.topology.layout
        size = layer.topology.num_blocks // layout.groups
        growth = self._growth(path, layer, 0)
        if growth is None:
            group = torch.arange(layout.groups, device=layer.weight.device)[:, None]
            place = torch.arange(size, device=layer.weight.device)
            scores = uniform_hash(stream(self.seed, self._index[path], self.events), group * size + place)
        elif growth.dtype == torch.int64:
            raise ValueError(
                f"{type(self).__name__}: balance='rows' needs scores of all places, and the rule gave keys of some for "
                f"layer {path!r}, as RigL does at block size 1"
            )
        else:
            scores = float_bits((growth + 0.0).flatten(1))
        return all_candidates(layout, scores)

    def _drop_scores(self, path: str, layer: SparseLayer) -> Tensor:
        return self._checked(path, "drop_scores", self.drop_scores(layer), (layer.topology.num_slots,))

    def _growth(self, path: str, layer: SparseLayer, count: int) -> Tensor | None:
        return self._checked_growth(path, layer, self.grow_scores(layer), count)

    def _checked_growth(self, path: str, layer: SparseLayer, scores: Tensor | None, count: int) -> Tensor | None:
        """What grow_scores gave: a float32 table of all places, keys of `count` or more, or None."""
        if scores is None:
            return None
        layout = layer.topology.layout
        if isinstance(scores, Tensor) and scores.dtype == torch.int64:
            return self._checked_keys(path, scores, count)
        grid = (layout.groups, layout.num_rows // layout.groups, layout.num_cols // layout.groups)
        return self._checked(path, "grow_scores", scores, grid)

    def _checked(self, path: str, function: str, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The scores that a rule gave, as float32."""
        device = self.layers[path].weight.device
        if not isinstance(scores, Tensor) or scores.shape != shape or not scores.is_floating_point():
            got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{type(self).__name__}.{function}: layer {path!r} wants floating-point scores {shape}, got {got}"
            )
        if scores.device != device:
            raise ValueError(
                f"{type(self).__name__}.{function}: layer {path!r} is on {device}, the scores are on {scores.device}"
            )
        return scores.float()

    def _checked_keys(self, path: str, keys: Tensor, count: int) -> Tensor:
        """The keys that a rule gave, whose places are those of the grid; reads nothing on the host."""
        groups, num_blocks = self.layers[path].groups, self.layers[path].topology.num_blocks // self.layers[path].groups
        where = f"{type(self).__name__}.grow_scores: layer {path!r} wants int64 keys"
        if keys.device != self.layers[path].weight.device:
            raise ValueError(f"{where} on {self.layers[path].weight.device}, got some on {keys.device}")
        if keys.dim() != 2 or keys.shape[0] != groups or keys.shape[1] < count:
            raise ValueError(f"{where} ({groups}, {count} or more), got {tuple(keys.shape)}")
        inside = (positions_of(keys) < num_blocks).all()
        torch._assert_async(inside, f"{where} of the {num_blocks} places of a group, got one of a place beyond")
        return keys

    def _counts(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Blocks to replace in each group, no more than there are dead places, and the remainders to carry."""
        exact = fraction * self._live + self._carry
        counts = np.floor(exact + _ROUNDING)
        most, carry = np.minimum(self._live, self._places - self._live), exact - counts
        counts = np.minimum(counts.astype(np.int64), most)
        for path, groups in self._groups.items():
            if not self.layers[path]._parameters["weight"].requires_grad:  # new blocks would stay at zero
                counts[groups], carry[groups] = 0, self._carry[groups]
        return counts, carry


class SET(DropAndGrow):
    """Sparse Evolutionary Training (Mocanu et al., arXiv 1707.04780): drop the smallest norms, grow at random.

    Example:
        >>> rule = SET(model, optimizer, drop_fraction=0.3, update_every=100)
        >>> for batch in batches:
        ...     loss(model, batch).backward(); optimizer.step(); optimizer.zero_grad()
        ...     rule.step()
    """

    def grow_scores(self, layer: SparseLayer) -> None:
        return None  # at random


class RigL(DropAndGrow):
    """The Rigged Lottery (Evci et al., arXiv 1911.11134): drop the smallest norms, grow where the gradient is largest.

    A block's growth score is the squared norm of its gradient in the training step of the event, summed over the uses
    of the layer, micro-batches and data-parallel ranks; it is computed strip by strip in the backward pass, and a dense
    gradient is never held. Passes that make no gradient for the weight are not scored, nor is what reaches the weight
    through a gradient of the input (gradient penalties, forces). Scores that are not finite never win. With a clock of
    your own, the step before an event is foreseen from the pace so far; an event that came unforeseen is put off by one
    step.
    """

    _armed = False

    def __init__(self, *args, **kwargs):
        self._scoring: dict[str, GrowthScores] = {}
        super().__init__(*args, **kwargs)
        weakref.finalize(self, _let_go, self.layers, self._scoring)
        self._prepare(1.0)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        weakref.finalize(self, _let_go, self.layers, self._scoring)
        self._hang()  # copies of layers are not scored

    def grow_scores(self, layer: SparseLayer) -> Tensor:
        scores = layer.growth.scores  # a table, or keys where blocks are single weights
        return _sum_keys_over_ranks(scores) if scores.dtype == torch.int64 else _sum_over_ranks(scores)

    def load_state_dict(self, state: dict) -> None:
        if isinstance(state, dict) and "armed" in state:
            check_flag(f"{type(self).__name__}.load_state_dict", "armed", state["armed"])
        super().load_state_dict(state)
        self._arm(state["armed"])

    def state_dict(self) -> dict:
        return super().state_dict() | {"armed": self._armed}

    def _adopted(self, paths: list[str]) -> None:
        super()._adopted(paths)
        layers = [self.layers[path] for path in paths]
        devices = {layer.weight.device for layer in layers}
        flags = {device: torch.zeros((), dtype=torch.bool, device=device) for device in devices}
        growth = [GrowthScores(layer.topology, flags[layer.weight.device]) for layer in layers]
        self._scoring.update(zip(paths, growth, strict=True))
        self._hang()
        self._arm(False)  # what was scored were other blocks, so an event that is due waits for the next step

    def _hang(self) -> None:
        for path, growth in self._scoring.items():
            self.layers[path].growth = growth

    def _ready(self) -> bool:
        return self._armed

    def _prepare(self, pace: float) -> None:
        due = self._due()
        self._arm(due is not None and self._reached(self.clock + pace, due))

    def _arm(self, armed: bool) -> None:
        if armed or self._armed:
            arm([layer.growth for layer in self.layers.values()], armed)
        self._armed = armed


def _let_go(layers: dict[str, SparseLayer], scoring: dict[str, GrowthScores]) -> None:
    """Score no more for a rule that is gone."""
    for path, growth in scoring.items():
        if layers[path].growth is growth:
            layers[path].growth = None


def _kind(growth: Tensor | None) -> Growth:
    if growth is None:
        return Growth.BY_HASH
    return Growth.BY_KEYS if growth.dtype == torch.int64 else Growth.BY_SCORES


def _assign(tensor: Tensor, slots: Tensor, values: Tensor) -> None:
    tensor.index_copy_(0, slots, values.to(tensor.dtype))


def _sum_over_ranks(scores: Tensor) -> Tensor:
    """Add tables of scores; -1 where no rank scored anything. In float64, so that the order of ranks is no matter."""
    if not distributed():
        return scores
    ranks = gathered(scores)
    return torch.where((ranks < 0).all(0), -1.0, ranks.clamp(min=0).double().sum(0).float())


def _sum_keys_over_ranks(keys: Tensor) -> Tensor:
    """Add the scores of data-parallel ranks position by position; each rank may hold another selection of positions."""
    if not distributed():
        return keys
    keys = torch.cat(gathered(keys).unbind(), dim=1)
    positions, order = positions_of(keys).sort(dim=1)
    totals = scores_of(keys).gather(1, order).double().cumsum(dim=1)
    last = torch.ones_like(positions, dtype=torch.bool)
    last[:, :-1] = positions[:, 1:] != positions[:, :-1]
    # the total at the end of the run before: totals never fall, so it is the running maximum over earlier run ends
    before = torch.where(last, totals, 0).cummax(dim=1).values.roll(1, dims=1)
    before[:, 0] = 0
    sums = torch.where(last & (positions >= 0), float_bits((totals - before).float()), -1)
    return torch.where(sums < 0, -1, pack(sums, positions))
