"""Convert whole models: plan which layers become sparse, sparsify them in place, densify them again."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsekern.conv import SparseConv2d
from sparsekern.layer import SparseLayer
from sparsekern.linear import SparseLinear
from sparsekern.rewire.density import DISTRIBUTIONS, Dims
from sparsekern.table import table
from sparsekern.topology import check_geometry

SPARSE = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
MAX_PADDING = 0.25  # of a layer's elements; a layer padded by more is larger and slower than its density says


@dataclass(frozen=True)
class LayerPlan:
    """What one layer of a model becomes."""

    name: str
    """its name in `model.named_modules()`"""
    shape: tuple[int, int]
    """(out_features, in_features) of all groups together; of a convolution (out_channels, in_channels * kh * kw)"""
    groups: int
    block_size: int
    """0 where no block size was given"""
    live: tuple[int, ...]
    """live blocks of each group; () if the layer stays as it is"""
    reason: str = ""
    """why the layer stays as it is; "" if it becomes sparse"""

    @property
    def num_elements(self) -> int:
        """Elements of the dense weight; of all groups."""
        return self.shape[0] * self.shape[1] // self.groups

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns) of one group."""
        return tuple(-(-size // self.groups // self.block_size) for size in self.shape)

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups, live or dead."""
        return self.groups * self.grid[0] * self.grid[1]

    @property
    def density(self) -> float:
        """Live blocks / all blocks; 1 if the layer stays as it is."""
        return sum(self.live) / self.num_blocks if self.live else 1.0


@dataclass(frozen=True)
class Plan:
    """What `sparsify` does to a model, layer by layer; `print(plan)` shows it as a table."""

    layers: tuple[LayerPlan, ...]

    def __str__(self) -> str:
        sparse = [layer for layer in self.layers if layer.live]
        rows = [
            (
                layer.name or "(the model)",
                " x ".join(map(str, layer.shape)) + (f" in {layer.groups} groups" if layer.groups > 1 else ""),
                layer.block_size or "-",
                layer.density,
                sum(layer.live) if layer.live else "-",
                layer.num_blocks if layer.live else "-",
                "stays: " + layer.reason if layer.reason else "sparse",
            )
            for layer in self.layers
        ]
        live, blocks = sum(sum(layer.live) for layer in sparse), sum(layer.num_blocks for layer in sparse)
        places = sum(layer.num_elements for layer in self.layers)
        kept = sum(layer.density * layer.num_elements for layer in self.layers)
        return "\n".join(
            (
                table(("layer", "shape", "block size", "density", "live", "of", "becomes"), rows),
                f"{len(sparse)} of {len(self.layers)} layers sparse, {live} of {blocks} blocks live: "
                f"density {live / max(1, blocks):.4f} of these, {kept / max(1, places):.4f} of all layers listed",
            )
        )

    __repr__ = __str__


def plan(
    model: nn.Module,
    density: float | Mapping[str, float] = 0.1,
    block_size: int | Mapping[str, int] = 16,
    distribution: str = "erk",
    exclude: Iterable[str] = (),
    modules: Iterable[type[nn.Module]] = (nn.Linear,),
) -> Plan:
    """Plan which layers of a model `sparsify` would make sparse, and how sparse; nothing is changed.

    Every layer of the types in `modules` is planned, and every layer that is sparse already (with its own block size).
    A layer stays as it is if `exclude` names it, if another module holds its weight too (tied weights), if it is of a
    subclass or its weight is computed (another module may read it), or if whole blocks would pad it by over 25%.

    Args:
        density: live blocks / all blocks over all planned layers together, in (0, 1]. Or {pattern: density}: the first
            pattern that fits a layer's name counts, and the layers of one pattern share that density among them. Layers
            of different block sizes do not share: the density holds for each block size by itself.
        block_size: power of two from 1 to 128, or {pattern: block_size}.
        distribution: "erk" (small layers denser; see `sparsekern.rewire.density`) or "uniform". Each group counts as a
            layer of its own.
        exclude: patterns of layer names, as "head*" or "*.out_proj" ("*" also matches dots).
        modules: nn.Linear, nn.Conv2d or both.
    Returns:
        A Plan, which prints as a table and which `sparsify` takes.
    Raises:
        ValueError: a density, block size, distribution or module type is none that is allowed.
    Warns:
        UserWarning: a pattern fits no layer.
    Example:
        >>> plan(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7)), density=0.25)
        layer  shape    block size  density  live  of  becomes
        0      64 x 64          16   0.2500     4  16  sparse
        2      7 x 64           16   1.0000     -   -  stays: blocks of 16 would pad it by 129%
        1 of 2 layers sparse, 4 of 16 blocks live: density 0.2500 of these, 0.3239 of all layers listed
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"plan: distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if isinstance(exclude, str):
        raise ValueError(f"plan: exclude must be a list of patterns, got the text {exclude!r}")
    exclude, modules = tuple(exclude), tuple(modules)
    for module_type in modules:
        if module_type not in SPARSE:
            raise ValueError(f"plan: modules may hold nn.Linear and nn.Conv2d, got {module_type!r}")
    densities = density if isinstance(density, Mapping) else {"*": density}
    block_sizes = block_size if isinstance(block_size, Mapping) else {"*": block_size}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (SparseLayer, *modules))}
    for argument, patterns in (("exclude", exclude), ("density", densities), ("block_size", block_sizes)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                warnings.warn(f"plan: {argument} pattern {pattern!r} fits no layer of the model", stacklevel=2)

    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    planned: dict[str, LayerPlan] = {}
    sharing: dict[tuple[str, int], list[str]] = {}  # (density pattern, block size) -> names of its layers
    for name, layer in layers.items():
        pattern, size_pattern = _first(densities, name), _first(block_sizes, name)
        size = layer.block_size if isinstance(layer, SparseLayer) else block_sizes.get(size_pattern, 0)
        reason = "no density is given for it" if pattern is None else _reason_to_stay(name, layer, size, holders)
        if any(fnmatchcase(name, p) for p in exclude):
            reason = "excluded"
        planned[name] = LayerPlan(name, *_geometry(name, layer), size, (), reason)
        if not reason:
            sharing.setdefault((pattern, size), []).append(name)
    for (pattern, _), names in sharing.items():
        dims = [_dims(planned[name], layers[name]) for name in names for _ in range(planned[name].groups)]
        counts = iter(DISTRIBUTIONS[distribution](dims, densities[pattern]))
        for name in names:
            planned[name] = replace(planned[name], live=tuple(next(counts) for _ in range(planned[name].groups)))
    return Plan(tuple(planned.values()))


def sparsify(
    model: nn.Module,
    density: float | Mapping[str, float] | Plan = 0.1,
    block_size: int | Mapping[str, int] = 16,
    distribution: str = "erk",
    exclude: Iterable[str] = (),
    modules: Iterable[type[nn.Module]] = (nn.Linear,),
    keep: str | Tensor | Mapping[str, str | Tensor] = "magnitude",
) -> nn.Module:
    """Make the layers of a model sparse, in place. Build the optimiser afterwards: their weights are new Parameters.

    An nn.Linear or nn.Conv2d is replaced by a sparse layer of its options, dtype, device and mode; hooks on it are not
    carried over. A layer that is sparse already stays the same module and Parameter, with a new topology.

    Args:
        density: as in `plan`; or a Plan, and then the arguments up to `modules` are not looked at.
        block_size, distribution, exclude, modules: as in `plan`.
        keep: as in `SparseLinear.from_linear`, for all layers or as {pattern: keep}. The default "magnitude" loses
            nothing that was learned; for training from scratch take "fresh", whose first weights have the scale that
            the sparse fan-in asks for. A mask settles the live blocks by itself, whatever the plan says.
    Returns:
        The model; a new module only if the model itself is one nn.Linear or nn.Conv2d.
    Raises:
        ValueError: as `plan`; or the plan is of another model.
    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> sparsify(model, density=0.25, keep="fresh")[0].weight.shape
        torch.Size([3, 16, 16])
    """
    chosen = density if isinstance(density, Plan) else plan(model, density, block_size, distribution, exclude, modules)
    keeps = keep if isinstance(keep, Mapping) else {"*": keep}
    layers = dict(model.named_modules())
    targets = [layer for layer in chosen.layers if layer.live]
    for target in targets:
        _check_target(target, layers.get(target.name))
        if _first(keeps, target.name) is None:
            raise ValueError(f"sparsify: no pattern of keep fits layer {target.name!r}; end with '*'")
    replaced = {}
    for target in targets:
        layer, kept = layers[target.name], keeps[_first(keeps, target.name)]
        if isinstance(layer, SparseLayer):
            layer.set_density(list(target.live), kept)
        else:
            replaced[layer] = SPARSE[type(layer)]._from_dense(layer, list(target.live), target.block_size, kept)
    model = _swap(model, replaced)
    for module in model.modules():
        # torch's fused inference path of these two reads linear1.weight as a dense matrix: take the ordinary path
        if any(isinstance(child, SparseLayer) for child in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace the sparse layers of a model by nn.Linear and nn.Conv2d of the same function, in place: ONNX, serving.

    A SparseLinear with groups becomes the nn.Linear of its block-diagonal matrix. That is what `layer(x)` computes; a
    model that calls `layer(x, group=ids)` fails at that call afterwards.

    Returns:
        The model; a new module only if the model itself is one sparse layer.
    """
    return _swap(
        model,
        {
            layer: layer.to_linear() if isinstance(layer, SparseLinear) else layer.to_conv2d()
            for layer in model.modules()
            if isinstance(layer, (SparseLinear, SparseConv2d))
        },
    )


def plan_from(state_dict: Mapping[str, object]) -> Plan:
    """The plan of a saved model, so that it can be rebuilt: `sparsify(model, plan_from(saved)).load_state_dict(saved)`.

    Raises:
        ValueError: the state_dict holds no sparse layer.
    """
    end = "topology._extra_state"
    layers = []
    for key, state in state_dict.items():
        if key.endswith(end):
            *shape, block_size, groups, _ = state.tolist()
            layer = LayerPlan(key.removesuffix(end).removesuffix("."), tuple(shape), groups, block_size, ())
            rows = state_dict[key.removesuffix("_extra_state") + "block_rows"].long()
            live = torch.bincount(rows[rows >= 0] // layer.grid[0], minlength=groups)
            layers.append(replace(layer, live=tuple(live.tolist())))
    if not layers:
        raise ValueError(f"plan_from: the state_dict holds no sparse layer (no key ends in {end!r})")
    return Plan(tuple(layers))


def _first(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that fits the name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _geometry(name: str, layer: nn.Module) -> tuple[tuple[int, int], int]:
    """(out, in) of the weight as a matrix, all groups together, and the number of groups."""
    if isinstance(layer, SparseLayer):
        return layer.topology.shape, layer.groups
    if is_lazy(layer.weight):
        raise ValueError(f"plan: layer {name!r} is lazy and has no shape yet; run the model once")
    groups = getattr(layer, "groups", 1)
    return (layer.weight.shape[0], groups * layer.weight[0].numel()), groups


def _reason_to_stay(name: str, layer: nn.Module, block_size: int, holders: Counter) -> str:
    """Why the layer must not become sparse, or ""."""
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters"
    if holders[id(layer.weight)] > 1:
        return "its weight is tied, another module holds it too"
    if isinstance(layer, SparseLayer):
        return ""
    if type(layer) not in SPARSE:
        return f"it is a {type(layer).__name__}, whose weight other code may read"
    if not block_size:
        return "no block size is given for it"
    shape, groups = _geometry(name, layer)
    check_geometry(shape, block_size, groups)
    padded = math.prod(size // groups + -(size // groups) % block_size for size in shape)
    padding = padded * groups * groups / math.prod(shape) - 1
    return f"blocks of {block_size} would pad it by {padding:.0%}" if padding > MAX_PADDING else ""


def _dims(layer_plan: LayerPlan, layer: nn.Module) -> Dims:
    """Sizes of one group in blocks, as the distributions want them."""
    rows, cols = layer_plan.grid
    kernel = getattr(layer, "kernel_size", ())
    return (rows, cols / math.prod(kernel), *kernel)


def _check_target(target: LayerPlan, layer: nn.Module | None) -> None:
    """Refuse a plan that does not fit the model, before anything is changed."""
    if layer is None or not isinstance(layer, (SparseLayer, *SPARSE)):
        found = "does not have" if layer is None else f"has as {type(layer).__name__}"
        raise ValueError(f"sparsify: the plan has layer {target.name!r}, which the model {found}")
    shape, groups = _geometry(target.name, layer)
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
