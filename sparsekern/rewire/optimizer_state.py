"""The optimiser's state per element: reset where blocks are rewired, gathered where a store is compacted.

Works on the state dictionaries of any element-wise torch optimiser, whatever its class: every tensor of the
parameter's shape belongs to the elements, a tensor of one element (a step count) to the whole parameter, anything
else cannot be followed.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.backends.reference import gather
from sparsekern.layer import SparseLayer

# What a fresh optimiser holds where that is not zero: (class name, state name) -> the setting of a group that says it.
_FRESH = {("Adagrad", "sum"): "initial_accumulator_value", ("Rprop", "step_size"): "lr"}

_NOT_ELEMENTWISE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


# Where wrappers (accelerate, Lightning, Lookahead, SAM, ZeroRedundancyOptimizer) keep the optimiser that they wrap.
_WRAPPED = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim")


def unwrap(where: str, optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimisers in what a caller gave: one, a wrapper of one, or a list; wrappers that hold state count too.

    Raises:
        ValueError: it is no optimiser.
    """
    found: list[Optimizer] = []
    for outer in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        chain = [outer]
        while inner := _wrapped(chain):
            chain.append(inner)
        if not isinstance(chain[-1], Optimizer):
            raise ValueError(
                f"{where}: optimizer must be a torch optimiser, a wrapper with an attribute `optimizer`, "
                f"or a list of them, got {type(outer).__name__}"
            )
        states = {id(getattr(o, "state", None)) for o in found} | {id(None)}
        for one in reversed(chain):
            # a wrapper may show the state of the optimiser inside as its own
            if one is chain[-1] or id(getattr(one, "state", None)) not in states:
                found.append(one)
                states.add(id(getattr(one, "state", None)))
    if not found:
        raise ValueError(f"{where}: optimizer is an empty list; give the optimisers that train the sparse layers")
    return found


def check_elementwise(where: str, optimizers: Iterable[Optimizer], weights: Iterable[Tensor]) -> None:
    """Refuse an optimiser that holds one of these weights and whose state does not belong to single elements."""
    weights = {id(weight) for weight in weights}
    for optimizer in optimizers:
        for kind in (cls.__name__ for cls in type(optimizer).__mro__):
            if kind in _NOT_ELEMENTWISE and weights & held_by([optimizer]):
                raise ValueError(
                    f"{where}: the state of {kind} is not element-wise, so it cannot follow a rewire; "
                    "use an element-wise optimiser such as torch.optim.AdamW for the sparse layers"
                )


def _wrapped(chain: list) -> Optimizer | None:
    for name in _WRAPPED:
        inner = getattr(chain[-1], name, None)
        if hasattr(inner, "param_groups") and all(inner is not outer for outer in chain):
            return inner
    return None


def held_by(optimizers: list[Optimizer]) -> set[int]:
    """Ids of all parameters that these optimisers train."""
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    return {id(p) for group in groups for p in group["params"]}


def element_state(optimizers: list[Optimizer], param: nn.Parameter) -> Iterator[tuple[dict, str, Tensor, float]]:
    """Yield (state dictionary, name, tensor, fresh value) of each state tensor with the parameter's shape.

    Raises:
        ValueError: the state is factored or quantised: a tensor of another shape, or of a tensor subclass, or tensors
            inside of lists and objects, as Kronecker-factored optimisers keep them.
    """
    shape, device = param.shape, param.device
    for optimizer in optimizers:
        kind, state = type(optimizer).__name__, optimizer.state.get(param, {})
        for name, value in state.items():
            if not isinstance(value, Tensor):
                if _hides_tensors(value):
                    raise _refusal(kind, name, f"{type(value).__name__} with tensors in it", param)
                continue
            has_shape = value.shape == shape
            if not has_shape and value.numel() <= 1:
                continue
            if not has_shape and value.dim() == 3 and value.shape[1:] == shape[1:]:
                raise ValueError(
                    f"rewire: {kind} keeps {name!r} of {len(value)} slots, but the weight has {len(param)}: it took "
                    "over another topology since; build the optimiser anew, or load its state too"
                )
            plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
            if not has_shape or not plain or not value.is_floating_point():
                raise _refusal(kind, name, f"{type(value).__name__} {tuple(value.shape)} ({value.dtype})", param)
            if shares_memory(value):
                raise ValueError(
                    f"rewire: {kind} keeps {name!r} with strides {value.stride()}, so its elements share memory and "
                    "cannot be reset one by one; keep a clone() of it"
                )
            if value.device != device:
                raise ValueError(
                    f"rewire: {kind} keeps {name!r} on {value.device}, but the weight is on {param.device}; "
                    "state that is kept elsewhere cannot follow a rewire"
                )
            yield state, name, value, _fresh(optimizer, name, param)


def shares_memory(tensor: Tensor) -> bool:
    """Whether several elements are one number in memory, as those of `expand` are."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _refusal(kind: str, name: str, found: str, param: Tensor) -> ValueError:
    return ValueError(
        f"rewire: {kind} keeps {name!r} as {found} for a weight of shape {tuple(param.shape)}: factored or quantised "
        "state cannot follow a rewire; use an element-wise optimiser such as torch.optim.AdamW for the sparse layers"
    )


def _hides_tensors(value, depth: int = 6) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 1
    inside = list(getattr(value, "__dict__", {}).values())
    inside += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return depth > 0 and any(_hides_tensors(v, depth - 1) for v in inside)


def _fresh(optimizer: Optimizer, name: str, param: Tensor) -> float:
    for cls in type(optimizer).__mro__:
        if setting := _FRESH.get((cls.__name__, name)):
            return float(next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))[setting])
    return 0.0


def settings_of_fresh(optimizer: Optimizer) -> list[str]:
    """Settings of the optimiser's groups by which the values differ that a fresh optimiser holds."""
    kinds = {cls.__name__ for cls in type(optimizer).__mro__}
    return [setting for (kind, _), setting in _FRESH.items() if kind in kinds]


@torch.no_grad()
def reset_state(optimizer: Optimizer | Sequence[Optimizer], layer: nn.Module | nn.Parameter, mask: Tensor) -> None:
    """Set the optimiser's state of some elements of a weight to what a fresh optimiser holds.

    This is what ReDo and Reset need. Step counts stay, as torch keeps one for the whole tensor.

    Args:
        optimizer: a torch optimiser, a wrapper of one, or a list of them.
        layer: a module whose `weight` is meant (sparse or dense), or a parameter.
        mask: boolean, of the parameter's shape or broadcastable to it; for a sparse layer also [out, in].
    Raises:
        ValueError: the optimiser does not hold the parameter, or its state is factored or quantised.
    """
    optimizers = unwrap("reset_state", optimizer)
    param = layer if isinstance(layer, nn.Parameter) else getattr(layer, "weight", None)
    if not isinstance(param, nn.Parameter):
        raise ValueError(f"reset_state: layer must be a module with a weight, or a parameter, got {layer!r}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"reset_state: the mask must be a boolean tensor, got {got}")
    if mask.layout != torch.strided or mask.device != param.device:
        got = f"{mask.layout} on {mask.device}"
        raise ValueError(f"reset_state: the mask must be dense, on the parameter's device {param.device}, got {got}")
    check_elementwise("reset_state", optimizers, [param])
    if id(param) not in held_by(optimizers):
        kinds = ", ".join(type(o).__name__ for o in optimizers)
        raise ValueError(f"reset_state: {kinds} does not hold this parameter of shape {tuple(param.shape)}")
    if isinstance(layer, SparseLayer) and mask.shape == layer.topology.shape:
        mask = _gather_mask(mask, layer)
    try:
        mask = mask.expand(param.shape)
    except RuntimeError:
        shapes = f"{tuple(mask.shape)} and {tuple(param.shape)}"
        raise ValueError(f"reset_state: the mask must fit the parameter, got shapes {shapes}") from None
    for _, _, value, fresh in list(element_state(optimizers, param)):  # all of it is checked before any is changed
        value.masked_fill_(mask, fresh)


def _gather_mask(mask: Tensor, layer: SparseLayer) -> Tensor:
    """[out, in] -> [num_slots, B, B]; False in padding and dead slots."""
    topology = layer.topology
    groups, (out, into) = topology.groups, topology.shape
    parts = mask.reshape(groups, out // groups, groups, into // groups)
    parts = torch.stack([parts[g, :, g] for g in range(groups)])
    padded = mask.new_zeros(groups, *(blocks // groups * topology.block_size for blocks in topology.grid))
    padded[:, : out // groups, : into // groups] = parts
    return gather(padded, topology.layout)
