"""Rule: the base of all rules. It keeps the clock, layers and followers, the stats, and what a resume needs."""

import math
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsekern.layer import SparseLayer
from sparsekern.rewire.arguments import (
    LARGEST,
    check_between,
    check_count,
    check_finite,
    check_flag,
    check_rewirable,
    check_seed,
    check_times,
    list_of_modules,
    sparse_layers,
)
from sparsekern.rewire.optimizer_state import check_elementwise, element_state, held_by, shares_memory, unwrap
from sparsekern.rewire.ranks import checksum, distributed, gathered
from sparsekern.rewire.watch import Watch, watch


class Rule:
    """Base of all rules: clock, layers and followers, stats and resume. A subclass says what an event does.

    Events are due at start_step + k * update_every for k = 1, 2, ... up to end_step, and fire at the first call at or
    past their time. Times are in calls of `step()`, or in the units of the clock that is given to it.

    Copies of the model that live on beside it, such as target networks and running averages, must be given as
    `followers`. A copy that is not knows nothing of a rewire: it keeps the old topology, and weights that are then
    averaged or copied into it, slot by slot, land in blocks of other places.
    """

    _moves = True  # whether blocks move, and so the optimiser's state with them

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        update_every: float,
        start_step: float,
        end_step: float | None,
        seed: int,
        followers: Iterable[nn.Module],
        coverage: bool,
    ):
        name = type(self).__name__
        # all checks come before anything is attached: a rule that fails leaves model and optimiser as they were
        self.update_every, self.start_step, self.end_step = check_times(name, update_every, start_step, end_step)
        check_flag(name, "coverage", coverage)
        self.seed = check_seed(name, seed)
        layers = sparse_layers(name, model)
        if self._moves:
            for path, layer in layers.items():
                check_rewirable(name, path, layer)
        self.layers = {path: layer for path, layer in layers.items() if layer.weight.requires_grad}
        """The sparse layers by name, without those that are frozen (weight.requires_grad is False) from the start."""
        self._index = {path: i for i, path in enumerate(layers)}
        self._optimizer, self._optimizers = optimizer, self._checked_optimizers(optimizer)
        # What the checks of the last event have seen; None where something may be another than then.
        self._watch: Watch | None = None
        self.followers = followers
        self.clock = 0.0
        self.events = 0
        """Events that fired so far."""
        self._next = 1
        # Blocks dropped and grown at the last event; tensors while only the device knows.
        self._moved: dict[str, tuple[int | Tensor, int | Tensor]] = dict.fromkeys(self.layers, (0, 0))
        self._nan = {path: torch.zeros((), dtype=torch.bool, device=l.weight.device) for path, l in self.layers.items()}
        self._covered = {path: l.topology.mask() for path, l in self.layers.items()} if coverage else None
        self._seen = self._adoptions()
        self._states = self._states_of_layers()
        self._state_was_loaded = False  # by an optimiser, since the last step
        self._check_wrapped(model)
        self._check_ranks()
        self._adopted(list(self.layers))
        self._hooks: list[weakref.finalize] = []
        self._listen()

    def __getstate__(self) -> dict:
        return vars(self) | {"_watch": None, "_hooks": []}  # a copy has other objects

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._listen()  # a copy of an optimiser has no hooks

    @property
    def optimizer(self) -> Optimizer | Sequence[Optimizer] | None:
        """What trains the layers, as it was given. Another that is assigned has its state reset from the next event."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        self._optimizers = self._checked_optimizers(optimizer)
        self._optimizer = optimizer
        self._watch = None  # it has seen another
        self._states = {}  # as at the start, what it brings is of the blocks that are here now
        self._check_adoptions()
        self._listen()

    @property
    def followers(self) -> tuple[nn.Module, ...]:
        """The copies of the model that take over its topology. Others that are assigned do so from the next event."""
        return self._followers

    @followers.setter
    def followers(self, followers: Iterable[nn.Module]) -> None:
        name = type(self).__name__
        modules = tuple(list_of_modules(name, followers))
        layers_of_each = [self._layers_of(module) for module in modules]
        for path, layer in self.layers.items():
            copies = [layer, *(layers[path] for layers in layers_of_each)]
            if len({id(copy) for copy in copies} | {id(copy.weight) for copy in copies}) < 2 * len(copies):
                raise ValueError(
                    f"{name}: layer {path!r} of a follower is that of the model or of another follower, or shares its "
                    "weight; give each copy (copy.deepcopy) once"
                )
        self._followers, self._layers_of_followers = modules, layers_of_each
        self._watch = None  # it has seen others
        # Versions of the coordinates when layers and their followers were last known to have one topology.
        self._compared = self._versions()

    def step(self, clock: float | None = None) -> bool:
        """Count one training step, and rewire if an event is due.

        Args:
            clock: time in the units of update_every and the *_step arguments; without it, the number of calls so far.
        Returns:
            True when blocks were rewired.
        """
        now = self.clock + 1 if clock is None else check_finite(f"{type(self).__name__}.step", "clock", clock)
        if now < self.clock:
            raise ValueError(
                f"{type(self).__name__}.step: the clock must not run backwards, got {clock} after {self.clock}"
            )
        if self._watch is None or not self._watch.holds():
            self._watch = None
            self._check_adoptions()
            self._state_was_loaded = False
        pace, self.clock = now - self.clock, now
        due = self._due()
        fires = due is not None and self._reached(now, due) and self._ready()
        changed = False
        if fires:
            if self._watch is None or self._versions() != self._compared:
                self._check_event()
            with torch.no_grad():
                changed = self._event(now)
            self._compared = self._versions()
            self.events += 1
            self._advance(now)
        self._prepare(pace)
        return changed

    def stats(self) -> dict[str, dict[str, float]]:
        """Per layer: live blocks, blocks dropped and grown at the last event, rows and columns without live blocks.

        With `coverage=True` given to the rule, also the share of places that ever held a live block. Synchronises
        with the device; names layers where NaN weights were dropped.
        """
        stats = {}
        for path, layer in self.layers.items():
            if self._nan[path]:
                self._warn_nan(path)
            mask = layer.topology.mask()
            dropped, grown = self._moved[path]
            stats[path] = {
                "live": int(mask.sum()),
                "dropped": int(dropped),
                "grown": int(grown),
                "dead_rows": int((~mask.any(dim=2)).sum()),
                "dead_cols": int((~mask.any(dim=1)).sum()),
            }
            if self._covered is not None:
                stats[path]["coverage"] = self._covered[path].float().mean().item()
        return stats

    def state_dict(self) -> dict:
        """Plain numbers and tensors: what, beside the model and the optimiser, a bit-exact resume needs."""
        moved = {path: tuple(map(int, moved)) for path, moved in self._moved.items()}
        state = {"clock": self.clock, "events": self.events, "next": self._next, "moved": moved}
        if self._covered is not None:
            state["covered"] = dict(self._covered)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken. Load the model's and the optimiser's state first.

        The model may be wrapped otherwise than then (DistributedDataParallel, torch.compile), and update_every may be
        another: the next event is the next multiple of it.
        """
        state = self._by_own_names(state)
        where = f"{type(self).__name__}.load_state_dict"
        missing = self.state_dict().keys() - {"covered"} - (state.keys() if isinstance(state, dict) else set())
        if missing:
            lacks = ", ".join(sorted(missing))
            raise ValueError(f"{where}: this is no state of a {type(self).__name__}; it lacks {lacks}")
        clock = check_between(where, "clock", state["clock"], 0, LARGEST)
        check_count(where, "events", state["events"])
        check_count(where, "next", state["next"], least=1)
        if not isinstance(state["moved"], dict):
            raise ValueError(f"{where}: moved must be a dictionary by layer, got {state['moved']!r}")
        for path, moved in state["moved"].items():
            if not isinstance(moved, tuple | list) or len(moved) != 2:
                raise ValueError(f"{where}: moved of layer {path!r} must be two integers, got {moved!r}")
            for count in moved:
                check_count(where, f"moved of layer {path!r}", count)
        if set(state["moved"]) != set(self.layers):
            found = sorted(map(str, state["moved"]))
            raise ValueError(f"{where}: the state is for layers {found}, but the model has {sorted(self.layers)}")
        if self._covered is not None and "covered" in state:
            self._check_covered(where, state["covered"])
        self._check_adoptions()
        self.clock, self.events = clock, state["events"]
        # an event may be due and have waited, but none lies farther off; it does where update_every was smaller
        self._next = min(state["next"], self._next_after(clock))
        self._moved = {path: tuple(moved) for path, moved in state["moved"].items()}
        if self._covered is not None and "covered" in state:
            self._covered = {p: state["covered"][p].to(mask.device, copy=True) for p, mask in self._covered.items()}

    # What a subclass fills in.

    def _event(self, now: float) -> bool:
        """Rewire; return whether a block moved."""
        raise NotImplementedError

    def _ready(self) -> bool:
        """Whether an event that is due can fire now; else it waits for the next step."""
        return True

    def _prepare(self, pace: float) -> None:
        """Called at the end of every step with the time it took."""

    # The clock.

    def _due(self) -> float | None:
        """Time of the next event."""
        due = self.start_step + self._next * self.update_every
        return None if self.end_step is not None and not self._reached(self.end_step, due) else due

    def _reached(self, now: float, due: float) -> bool:
        return now >= due - 1e-9 * self.update_every  # 3 * 0.1 > 0.3 in floating point

    def _advance(self, now: float) -> None:
        self._next = self._next_after(now)

    def _next_after(self, now: float) -> int:
        """Number of the first event that is due after this time."""
        return max(0, math.floor((now - self.start_step) / self.update_every + 1e-9)) + 1

    def _progress(self, now: float) -> float:
        if self.end_step is None:
            return 0.0
        span = self.end_step - self.start_step
        return min(max((now - self.start_step) / span, 0.0), 1.0) if span else 1.0

    # Checks.

    def _checked_optimizers(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
        """The optimisers that train the layers; none for a rule that was given none because it moves nothing."""
        if not self._moves:
            return []
        name = type(self).__name__
        optimizers = unwrap(name, optimizer)
        check_elementwise(name, optimizers, (layer.weight for layer in self.layers.values()))
        held = held_by(optimizers)
        owners: dict[int, str] = {}
        for path, layer in self.layers.items():
            if id(layer.weight) not in held:
                raise ValueError(
                    f"{name}: the optimiser does not hold the weight of layer {path!r}; "
                    "build the optimiser after sparsify(model), from model.parameters(), "
                    "or freeze the layer with requires_grad_(False)"
                )
            other = owners.setdefault(id(layer.weight), path)
            if other != path:
                raise ValueError(
                    f"{name}: layers {other!r} and {path!r} share one weight, and each would rewire it; use one layer"
                )
        return optimizers

    def _layers_of(self, follower: nn.Module) -> dict[str, SparseLayer]:
        """The layers of a copy of the model, by the names that they have in the model."""
        modules = {_bare(path): module for path, module in follower.named_modules()}
        for path, layer in self.layers.items():
            other = modules.get(_bare(path))
            if not isinstance(other, SparseLayer) or other.topology.shape != layer.topology.shape:
                found = "nothing" if other is None else type(other).__name__
                raise ValueError(
                    f"{type(self).__name__}: a follower needs a sparse layer {path!r} of shape {layer.topology.shape}, "
                    f"but has {found} there"
                )
            if not other.topology.is_at(*layer.topology.layout.coordinates()):
                raise ValueError(
                    f"{type(self).__name__}: layer {path!r} of a follower has another topology than the model; "
                    "copy the model (copy.deepcopy, or load_state_dict) before making the rule"
                )
        return {path: modules[_bare(path)] for path in self.layers}

    def _check_event(self) -> None:
        """Refuse what cannot follow a rewire, before the first layer changes."""
        self._watch = None
        self._check_copies()
        for layer in self.layers.values():
            deque(element_state(self._optimizers, layer.weight), maxlen=0)
        if self._adoptions() == self._seen:  # else the next step has to look at them
            self._watch = watch(map(self._copies, self.layers), self._optimizers)

    def _check_copies(self) -> None:
        """Refuse layers whose weight, or whose follower's topology, is no longer what the rule was made for."""
        where, held = f"{type(self).__name__}.step", held_by(self._optimizers)
        versions, size = self._versions(), 3 * (1 + len(self._followers))
        for number, (path, layer) in enumerate(self.layers.items()):
            own_versions = slice(size * number, size * (number + 1))
            if self._moves and id(layer.weight) not in held:
                raise RuntimeError(
                    f"{where}: the weight of layer {path!r} is another parameter than when the rule was made, and the "
                    "optimiser does not hold it; build the optimiser and the rule anew"
                )
            for copy in self._copies(path):
                if copy.weight.device != layer.weight.device:
                    raise RuntimeError(
                        f"{where}: layer {path!r} is on {layer.weight.device}, but that of a follower is on "
                        f"{copy.weight.device}; a rewire copies between them, so move the follower"
                    )
                if copy.weight.shape[0] != copy.topology.num_slots:
                    raise RuntimeError(
                        f"{where}: the weight of layer {path!r} has {copy.weight.shape[0]} slots, "
                        f"but its topology has {copy.topology.num_slots}"
                    )
            if versions[own_versions] != self._compared[own_versions]:
                # somebody wrote coordinates; otherwise none are read
                own = layer.topology
                coordinates = own.layout.coordinates()
                for other in (copy.topology for copy in self._copies(path)[1:]):
                    if not other.is_at(*coordinates):
                        raise RuntimeError(
                            f"{where}: layer {path!r} of a follower no longer has the topology of the model, with "
                            f"{other.num_slots} and {own.num_slots} slots; load the model's state_dict into it"
                        )

    def _check_gradients(self) -> None:
        """Refuse gradients whose rewired slots cannot be reset alone, before the first layer changes."""
        for path, layer in self.layers.items():
            if (grad := layer.weight.grad) is None:
                continue
            where = f"{type(self).__name__}.step: the gradient of layer {path!r}"
            if grad.layout != torch.strided:
                raise ValueError(f"{where} is {grad.layout}, and a rewire resets slots of a dense one; use to_dense()")
            if shares_memory(grad):
                raise ValueError(
                    f"{where} has strides {grad.stride()}, so its elements share memory and cannot be reset one by "
                    "one; give the weight a clone() of it"
                )

    def _versions(self) -> tuple[int, ...]:
        """How often the coordinates and the index of each layer and of its followers were written."""
        if self._watch is not None:
            return self._watch.versions()
        copies = chain.from_iterable(map(self._copies, self.layers))
        return tuple(chain.from_iterable(copy.topology.layout.versions() for copy in copies))

    def _by_own_names(self, state: object) -> object:
        """A state with its layers named as in this model, where only a wrapper makes their names differ."""
        own = {_bare(path): path for path in self.layers}
        if not isinstance(state, dict) or len(own) < len(self.layers):
            return state
        renamed = {}
        for key, value in state.items():
            if isinstance(value, dict) and all(isinstance(path, str) for path in value):
                by_name = {own.get(_bare(path), path): of_layer for path, of_layer in value.items()}
                value = by_name if len(by_name) == len(value) else value
            renamed[key] = value
        return renamed

    def _check_covered(self, where: str, covered: object) -> None:
        if not isinstance(covered, dict) or covered.keys() != self._covered.keys():
            raise ValueError(f"{where}: covered must be a dictionary of the layers {sorted(self._covered)}")
        for path, own in self._covered.items():
            mask = covered[path]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != own.shape:
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"{where}: covered of layer {path!r} must be a boolean {tuple(own.shape)}, got {got}")
            if mask.layout != torch.strided or mask.is_meta:
                got = f"{mask.layout} on {mask.device}"
                raise ValueError(f"{where}: covered of layer {path!r} must be dense and have values, got {got}")

    def _adoptions(self) -> dict[str, int]:
        return {path: layer.topology.adoptions for path, layer in self.layers.items()}

    def _listen(self) -> None:
        """Hear of it when an optimiser loads a state, and no longer when one does that was replaced."""
        for finish in self._hooks:
            finish()
        # the optimiser may outlive this rule, and must not keep its followers alive
        hear = partial(_note_state_load, weakref.ref(self))
        self._hooks = [
            weakref.finalize(self, one.register_load_state_dict_post_hook(hear).remove)
            for one in self._optimizers
            if hasattr(one, "_optimizer_load_state_dict_post_hooks")  # wrappers may lack what Optimizer.__init__ makes
        ]

    def _states_of_layers(self) -> dict[str, list[dict]]:
        """What the optimisers hold of each layer that they have a state of: the dictionaries themselves."""
        every = {path: [one.state.get(layer.weight) for one in self._optimizers] for path, layer in self.layers.items()}
        return {path: own for path, states in every.items() if (own := [state for state in states if state])}

    def _check_adoptions(self) -> None:
        # state that came up since the last step belongs to the blocks that were loaded, not to those before
        before, self._states = self._states, self._states_of_layers()
        if (seen := self._adoptions()) == self._seen:
            return
        changed = [path for path, count in seen.items() if count != self._seen[path]]
        held = {id(state) for states in self._states.values() for state in states}
        stale = any(id(state) in held for path in changed for state in before.get(path, ()))
        if stale and not self._state_was_loaded:
            raise RuntimeError(
                f"{type(self).__name__}.step: weights of another topology were loaded into {', '.join(changed)}, but "
                "the optimiser still holds the state of the old blocks; "
                "load the optimiser's checkpoint too, or build a new one"
            )
        self._seen = seen
        self._adopted(changed)

    def _adopted(self, paths: list[str]) -> None:
        """The topologies of these layers came from a checkpoint."""

    def _check_wrapped(self, model: nn.Module) -> None:
        """Refuse weights that are newer than the DistributedDataParallel around them: no rank would hear of others'."""
        for wrapper in model.modules():
            if not isinstance(wrapper, DistributedDataParallel):
                continue
            inside = {id(p) for p in wrapper.parameters()}
            averaged = {id(p) for p in getattr(wrapper, "_module_parameters", wrapper.parameters())}  # as it was made
            for path, layer in self.layers.items():
                if id(layer.weight) in inside - averaged:
                    raise ValueError(
                        f"{type(self).__name__}: DistributedDataParallel was given another weight of layer {path!r}, "
                        "and averages no gradient of this one; wrap the model after sparsify or load"
                    )

    def _check_ranks(self) -> None:
        if not distributed():
            return
        sums = gathered(torch.stack([checksum(layer.topology) for layer in self.layers.values()]))
        for path, *values in zip(self.layers, *sums.tolist(), strict=True):
            if len(set(values)) > 1:
                raise RuntimeError(
                    f"{type(self).__name__}: ranks start with different topologies in layer {path!r} ({values}); "
                    "seed all ranks alike, or broadcast the model's state_dict"
                )

    def _note_nan(self, path: str, scores: Tensor) -> None:
        if len(scores):
            self._nan[path] |= scores.max().isnan()  # NaN where one is, and five times faster than any()
        if scores.device.type == "cpu" and self._nan[path]:  # on a GPU, reading it here would synchronise: see stats()
            self._warn_nan(path)

    def _warn_nan(self, path: str) -> None:
        self._nan[path].fill_(False)
        warnings.warn(
            f"{type(self).__name__}: layer {path!r} has NaN weights; their blocks were dropped first", stacklevel=4
        )

    # Acting on a layer, its followers and its optimiser state alike.

    def _copies(self, path: str) -> list[SparseLayer]:
        return [self.layers[path], *(layers[path] for layers in self._layers_of_followers)]

    def _element_tensors(self, path: str) -> list[tuple[Tensor, float]]:
        """Weight, gradient and optimiser state of a layer, with the value that a rewired slot starts from."""
        weight = self.layers[path].weight
        tensors = [(weight, 0.0)] if weight.grad is None else [(weight, 0.0), (weight.grad, 0.0)]
        return tensors + [(value, fresh) for _, _, value, fresh in element_state(self._optimizers, weight)]

    def _cover(self, path: str) -> None:
        if self._covered is not None:
            self._covered[path] |= self.layers[path].topology.mask()


class Static(Rule):
    """The topology stays as it is; `stats()` and the checks work as in other rules.

    Example:
        >>> rule = Static(model)
        >>> rule.step()
        False
    """

    _moves = False

    def __init__(self, model: nn.Module):
        super().__init__(model, None, 1, 0, 0, 0, (), False)

    def _event(self, now: float) -> bool:
        return False


def _note_state_load(reference: weakref.ref[Rule], optimizer: Optimizer) -> None:
    rule = reference()
    if rule is not None:
        rule._state_was_loaded = True


def _bare(path: str) -> str:
    """A module's name without the prefixes of wrappers: AveragedModel, DistributedDataParallel, torch.compile."""
    for prefix in ("module.", "_orig_mod."):
        if path.startswith(prefix):
            return _bare(path.removeprefix(prefix))
    return path
