"""The optimiser's state per element: reset where blocks are rewired, gathered where a store is compacted.

Works on the state dictionaries of any element-wise torch optimiser, whatever its class: every tensor of the
parameter's shape belongs to the elements, a tensor of one element (a step count) to the whole parameter, anything
else cannot be followed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.backends.reference import gather
from sparsekern.layer import SparseLayer

# What a fresh optimiser holds where that is not zero: (class name, state name) -> param group -> value.
_FRESH = {
    ("Adagrad", "sum"): lambda group: group["initial_accumulator_value"],
    ("Rprop", "step_size"): lambda group: group["lr"],
}

_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


def check_elementwise(name: str, optimizer: Optimizer) -> None:
    """Refuse optimisers whose state does not belong to single elements, by class."""
    kind = type(optimizer).__name__
    if kind in _NOT_ELEMENTWISE:
        raise ValueError(
            f"{name}: the state of {kind} is not element-wise, so it cannot follow a rewire; "
            "use an element-wise optimiser such as torch.optim.AdamW for the sparse layers"
        )


def element_state(optimizer: Optimizer, param: nn.Parameter) -> Iterator[tuple[str, Tensor, float]]:
    """Yield (name, tensor, fresh value) of each state tensor with the parameter's shape.

    Raises:
        ValueError: the state is factored or quantised: a tensor of another shape, or of a tensor subclass.
    """
    kind = type(optimizer).__name__
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    for name, value in optimizer.state.get(param, {}).items():
        if not isinstance(value, Tensor) or value.numel() <= 1 and value.shape != param.shape:
            continue
        if value.shape != param.shape or type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point():
            raise ValueError(
                f"rewire: {kind} keeps {name!r} as {type(value).__name__} {tuple(value.shape)} ({value.dtype}) "
                f"for a weight of shape {tuple(param.shape)}: factored or quantised state cannot follow a rewire; "
                "use an element-wise optimiser such as torch.optim.AdamW for the sparse layers"
            )
        fresh = _FRESH.get((kind, name), lambda group: 0.0)(group)
        yield name, value, float(fresh)


@torch.no_grad()
def reset_state(optimizer: Optimizer, layer: nn.Module | nn.Parameter, mask: Tensor) -> None:
    """Set the optimiser's state of some elements of a weight to what a fresh optimiser holds.

    This is what ReDo and Reset need. Step counts stay, as torch keeps one for the whole tensor.

    Args:
        layer: a module whose `weight` is meant (sparse or dense), or a parameter.
        mask: boolean, of the parameter's shape or broadcastable to it; for a sparse layer also [out, in].
    Raises:
        ValueError: the optimiser does not hold the parameter, or its state is factored or quantised.
    """
    param = layer if isinstance(layer, nn.Parameter) else layer.weight
    if not any(p is param for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"reset_state: {type(optimizer).__name__} does not hold this parameter of shape {tuple(param.shape)}"
        )
    if isinstance(layer, SparseLayer) and mask.shape == layer.topology.shape:
        mask = _gather_mask(mask, layer)
    try:
        mask = mask.expand(param.shape)
    except RuntimeError:
        shapes = f"{tuple(mask.shape)} and {tuple(param.shape)}"
        raise ValueError(f"reset_state: the mask must fit the parameter, got shapes {shapes}") from None
    for _, value, fresh in element_state(optimizer, param):
        value.masked_fill_(mask, fresh)


def _gather_mask(mask: Tensor, layer: SparseLayer) -> Tensor:
    """[out, in] -> [num_slots, B, B]; False in padding and dead slots."""
    topology = layer.topology
    groups, (out, into) = topology.groups, topology.shape
    parts = mask.view(groups, out // groups, groups, into // groups)
    parts = torch.stack([parts[g, :, g] for g in range(groups)])
    padded = mask.new_zeros(groups, *(blocks // groups * topology.block_size for blocks in topology.grid))
    padded[:, : out // groups, : into // groups] = parts
    return gather(padded, topology.layout)
