"""Optimisers and a conversion: new Parameters take the places of the old ones, or a stale optimiser is told of."""

import warnings
import weakref
from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsekern.layer import SparseLayer
from sparsekern.rewire.optimizer_state import held_by
from sparsekern.untrained import settle


def check_handover(optimizers: list[Optimizer], layers: Mapping[str, nn.Module]) -> None:
    """Refuse optimisers in which the Parameters of these layers cannot be replaced.

    Raises:
        ValueError: no optimiser holds a weight that wants training, or one keeps Parameters outside of its groups.
    """
    held = held_by(optimizers)
    names = {}
    for name, layer in layers.items():
        if layer.weight.requires_grad and id(layer.weight) not in held:
            raise ValueError(
                f"sparsify: optimizer does not hold the weight of layer {name!r}; give every optimiser of the model as "
                "a list, or freeze the layer with requires_grad_(False)"
            )
        if not isinstance(layer, SparseLayer):
            names |= {id(p): f"{name}.{key}" for key, p in layer.named_parameters(recurse=False)}
    for optimizer in optimizers:
        for attribute, value in vars(optimizer).items():
            if attribute not in ("param_groups", "state") and (key := _first_inside(value, names)):
                raise ValueError(
                    f"sparsify: {type(optimizer).__name__} also keeps {names[key]!r} in its attribute {attribute!r}, "
                    "which cannot be replaced; build this optimiser after sparsify(model)"
                )


def hand_over(
    optimizers: list[Optimizer], old: Mapping[str, nn.Module], new: Mapping[str, nn.Module], kept: set[int]
) -> None:
    """Put the Parameters of new layers where those of the old layers of the same names were, without any state.

    `kept` are the ids of those that stay too, with their state, as another module holds them.
    """
    places: dict[int, list[nn.Parameter]] = {}
    for name, layer in old.items():
        for key, parameter in layer.named_parameters(recurse=False):
            if (own := getattr(new[name], key, None)) is not None:  # what somebody else hung there is no part of it
                first = [parameter] if id(parameter) in kept else []
                places.setdefault(id(parameter), first).append(own)
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            # in place: a wrapper may hold the same list. A bias that layers shared has become one of each.
            if "param_names" in group:
                pairs = zip(group["param_names"], group["params"], strict=True)
                group["param_names"][:] = [name for name, p in pairs for _ in places.get(id(p), [p])]
            group["params"][:] = [one for p in group["params"] for one in places.get(id(p), [p])]
        for layer in old.values():
            for parameter in layer.parameters(recurse=False):
                if id(parameter) not in kept:
                    optimizer.state.pop(parameter, None)


def watch_stale(old: Mapping[str, nn.Module], new: Mapping[str, nn.Module]) -> None:
    """Warn at the first step of an optimiser that holds replaced weights, and not those that took their places."""
    pairs = {name: layer.weight for name, layer in old.items() if layer.weight.requires_grad}
    if pairs:
        _StaleWatch({name: (weight, new[name]) for name, weight in pairs.items()})


class _StaleWatch:
    def __init__(self, pairs: Mapping[str, tuple[nn.Parameter, SparseLayer]]):
        # of the new side the layer, not the weight: torch.utils.swap_tensors wants weights free of references
        self.pairs = {n: (weakref.ref(weight, self.forget), weakref.ref(layer)) for n, (weight, layer) in pairs.items()}
        self.judged: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.hook = register_optimizer_step_post_hook(self.judge)

    def judge(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer in self.judged:
            return
        self.judged.add(optimizer)
        held = held_by([optimizer])
        stale = {}
        for name, (weight, layer) in self.pairs.items():
            weight, layer = weight(), layer()
            if weight is not None and layer is not None and id(weight) in held and id(layer.weight) not in held:
                stale[name] = layer
        if stale:
            first, *others = stale
            more = f" and of {len(others)} more" if others else ""
            warnings.warn(
                f"{type(optimizer).__name__}, which took a step now, holds the weight that layer {first!r}{more} had "
                "before sparsify(model), and does not train the new one; build the optimiser after sparsify(model), or "
                "call sparsify(model, optimizer=optimizer)",
                stacklevel=3,
            )
        for layer in stale.values():
            settle(layer.weight)

    def forget(self, _: weakref.ref) -> None:
        if not any(weight() is not None for weight, _ in self.pairs.values()):
            self.hook.remove()


def _first_inside(value: object, wanted: Mapping[int, str], depth: int = 4) -> int | None:
    """The first of the wanted ids among the Parameters in lists and dictionaries."""
    if id(value) in wanted:
        return id(value)
    inside = (*value, *value.values()) if isinstance(value, dict) else value
    if depth == 0 or not isinstance(inside, list | tuple | set | frozenset):
        return None
    return next((key for one in inside if (key := _first_inside(one, wanted, depth - 1)) is not None), None)
