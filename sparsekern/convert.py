"""Convert whole models in place: make their layers sparse as a plan says, and dense again."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsekern.conv import SparseConv2d
from sparsekern.handover import check_handover, hand_over, watch_stale
from sparsekern.layer import SparseLayer, choose_topology
from sparsekern.linear import SparseLinear
from sparsekern.planning import SPARSE, LayerPlan, Plan, by_pattern, conv1d_types, first_fitting, geometry_of, plan
from sparsekern.rewire.optimizer_state import check_elementwise, unwrap
from sparsekern.topology import Topology


def sparsify(
    model: nn.Module,
    density: float | Mapping[str, float] | Plan = 0.1,
    block_size: int | Mapping[str, int] = 16,
    distribution: str = "erk",
    exclude: Iterable[str] = (),
    modules: Iterable[type[nn.Module]] = (nn.Linear,),
    keep: str | Tensor | Mapping[str, str | Tensor] = "magnitude",
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> nn.Module:
    """Make the layers of a model sparse, in place. Their weights are new Parameters.

    Build the optimiser afterwards, or give it: then the new Parameters take the places of the old ones in its groups.
    All is checked before anything changes.

    An nn.Linear or nn.Conv2d is replaced by a sparse layer of its options, dtype, device and mode; hooks on it are not
    carried over. A layer that is sparse already stays the same module and Parameter, with a new topology.

    Args:
        density: as in `plan`; or a Plan, and then the arguments up to `modules` are not looked at.
        block_size, distribution, exclude, modules: as in `plan`.
        keep: as in `SparseLinear.from_linear`, for all layers or as {pattern: keep}. The default "magnitude" loses
            nothing that was learned; for training from scratch take "fresh", whose first weights have the scale that
            the sparse fan-in asks for. A mask settles the live blocks by itself, whatever the plan says.
            Layers of equal weights, biases, density and keep are copies, as in a target network beside an online one:
            they get the same topology and the same weights, also where these are drawn. Equal density is meant up to
            one block of each group, which the plan's rounding may add.
        optimizer: what trains the model already: a torch optimiser, a wrapper of one, or a list of all of them. State
            of the converted layers is dropped.
    Returns:
        The model; a new module only if the model itself is one nn.Linear or nn.Conv2d.
    Raises:
        ValueError: as `plan`; the plan is of another model; DistributedDataParallel has taken the model; or `optimizer`
            does not hold a weight that wants training, keeps Parameters outside of its groups, or is one that rules
            refuse.
    Warns:
        UserWarning: nothing became sparse. Later, at the first step of an optimiser that holds a replaced weight and
            not the new one: it trains what the model no longer has.
    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> sparsify(model, density=0.25, keep="fresh")[0].weight.shape
        torch.Size([3, 16, 16])
    """
    refuse_taken("sparsify", model)
    chosen = density if isinstance(density, Plan) else plan(model, density, block_size, distribution, exclude, modules)
    keeps = by_pattern("sparsify: keep", keep)
    layers = dict(model.named_modules())
    targets = [layer for layer in chosen.layers if layer.live]
    for target in targets:
        _check_target(target, layers.get(target.name))
        if first_fitting(keeps, target.name) is None:
            raise ValueError(f"sparsify: no pattern of keep fits layer {target.name!r}; end with '*'")
    optimizers = [] if optimizer is None else unwrap("sparsify", optimizer)
    converted = {target.name: layers[target.name] for target in targets}
    if optimizers:
        check_elementwise("sparsify", optimizers, (layer.weight for layer in converted.values()))
        check_handover(optimizers, converted)
    copies = _copies(targets, layers, keeps)
    if not targets:
        reasons = sorted({layer.reason for layer in chosen.layers})
        warnings.warn(f"sparsify: nothing became sparse ({'; '.join(reasons) or 'no layer was found'})", stacklevel=2)
    replaced: dict[nn.Module, nn.Module] = {}
    topologies: dict[SparseLayer, tuple[Topology, str | Tensor]] = {}
    for target in targets:
        layer, kept = layers[target.name], keeps[first_fitting(keeps, target.name)]
        if isinstance(layer, SparseLayer):
            topologies[layer] = choose_topology(layer._matrices(), list(target.live), layer.block_size, kept), kept
        else:
            source = _as_linear(layer) if isinstance(layer, conv1d_types()) else layer
            replaced[layer] = SPARSE[type(source)]._from_dense(source, list(target.live), target.block_size, kept)
    # from here on nothing can fail
    for layer, (topology, kept) in topologies.items():
        layer.take_topology(topology, kept)
    new = {name: replaced.get(layer, layer) for name, layer in converted.items()}
    for name, original in copies.items():
        new[name].load_state_dict(new[original].state_dict())
    if optimizers:
        hand_over(optimizers, converted, new, _held_elsewhere(model, converted))
    else:
        watch_stale({name: layer for name, layer in converted.items() if layer in replaced}, new)
    model = _swap(model, replaced)
    _set_nested_tensors(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace the sparse layers of a model by nn.Linear and nn.Conv2d of the same function, in place: ONNX, serving.

    A SparseLinear with groups becomes the nn.Linear of its block-diagonal matrix. That is what `layer(x)` computes; a
    model that calls `layer(x, group=ids)` fails at that call afterwards.

    Returns:
        The model; a new module only if the model itself is one sparse layer.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"densify: model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_taken("densify", model)
    model = _swap(
        model,
        {
            layer: layer.to_linear() if isinstance(layer, SparseLinear) else layer.to_conv2d()
            for layer in model.modules()
            if isinstance(layer, (SparseLinear, SparseConv2d))
        },
    )
    _set_nested_tensors(model)
    return model


def _held_elsewhere(model: nn.Module, converted: Mapping[str, nn.Module]) -> set[int]:
    """Ids of the Parameters that modules hold which are not converted."""
    layers = set(converted.values())
    return {id(p) for module in model.modules() if module not in layers for p in module.parameters(recurse=False)}


def refuse_taken(where: str, model: nn.Module) -> None:
    """Refuse a model inside of DistributedDataParallel, which would average no gradient of a new Parameter."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{where}: {f'module {name!r}' if name else 'the model'} is a DistributedDataParallel, which averages "
                f"the gradients of the Parameters that it was given; call {where} first, and wrap the model then"
            )


def _set_nested_tensors(model: nn.Module) -> None:
    """nn.TransformerEncoder gives its layers nested tensors, which only torch's fused dense path takes."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if any(isinstance(child, SparseLayer) for child in module.modules()):
                module.__dict__.setdefault("_nested_when_dense", module.use_nested_tensor)
                module.use_nested_tensor = False
            else:
                module.use_nested_tensor = module.__dict__.pop("_nested_when_dense", module.use_nested_tensor)


def _copies(
    targets: Sequence[LayerPlan], layers: Mapping[str, nn.Module], keeps: Mapping[str, str | Tensor]
) -> dict[str, str]:
    """Layers of which an earlier one is the original, and its name: equal options, weight, bias, density and keep."""
    copies: dict[str, str] = {}
    alike: dict[tuple, list[LayerPlan]] = {}
    for target in targets:
        layer, kept = layers[target.name], keeps[first_fitting(keeps, target.name)]
        if isinstance(kept, Tensor) or layer.weight.is_meta:
            continue
        sample = layer.weight.detach().flatten()[:8].tolist()  # so that few pairs are compared in full
        key = (type(layer), layer.extra_repr(), target.groups, target.block_size, str(kept), *sample)
        earlier = alike.setdefault(key, [])
        for original in earlier:
            # the plan's rounding may give one of two copies a block more
            rounded = all(abs(a - b) <= 1 for a, b in zip(original.live, target.live, strict=True))
            if rounded and _is_copy(layer, layers[original.name]):
                copies[target.name] = original.name
                break
        else:
            earlier.append(target)
    return copies


def _is_copy(layer: nn.Module, other: nn.Module) -> bool:
    same = True
    if isinstance(layer, SparseLayer):
        same = other.topology.is_at(*layer.topology.layout.coordinates())
    return same and _equal(other.weight, layer.weight) and _equal(other.bias, layer.bias)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.is_meta or b.is_meta:
        return a is b
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    # layers that start at zero are equal without being copies
    return torch.equal(a, b) and (a.dim() == 1 or bool((a != a.flatten()[0]).any()))


@torch.no_grad()
def _as_linear(conv1d: nn.Module) -> nn.Linear:
    """The nn.Linear of transformers' Conv1D, which keeps its weight transposed."""
    weight, bias = conv1d.weight, conv1d.bias
    linear = nn.Linear(*weight.shape, device=weight.device, dtype=weight.dtype).train(conv1d.training)
    linear.weight.copy_(weight.t()).requires_grad_(weight.requires_grad)
    linear.bias.copy_(bias).requires_grad_(bias.requires_grad)
    return linear


def _check_target(target: LayerPlan, layer: nn.Module | None) -> None:
    """Refuse a plan that does not fit the model, before anything is changed."""
    if layer is None or not isinstance(layer, (SparseLayer, *SPARSE, *conv1d_types())):
        found = "does not have" if layer is None else f"has as {type(layer).__name__}"
        raise ValueError(f"sparsify: the plan has layer {target.name!r}, which the model {found}")
    shape, groups = geometry_of(target.name, layer)
    if (shape, groups) != (target.shape, target.groups):
        raise ValueError(
            f"sparsify: layer {target.name!r} has shape {shape} in {groups} groups, "
            f"the plan {target.shape} in {target.groups}"
        )
    if isinstance(layer, SparseLayer) and layer.block_size != target.block_size:
        raise ValueError(
            f"sparsify: layer {target.name!r} has block_size {layer.block_size}, the plan {target.block_size}"
        )


def _swap(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return replaced.get(model, model)
