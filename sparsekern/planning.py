"""Plan which layers of a model become sparse, and how sparse: a dry run, which changes nothing."""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparsekern.conv import SparseConv2d
from sparsekern.geometry import check_block_size, check_blocks, check_geometry, live_count, saved_geometry
from sparsekern.layer import SparseLayer
from sparsekern.linear import SparseLinear
from sparsekern.rewire.density import DISTRIBUTIONS, Dims
from sparsekern.table import table
from sparsekern.topology import COORDINATES

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
    present: float = 1.0
    """density of the layer as it is: 1 if it is dense"""

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
        """Live blocks / all blocks; `present` if the layer stays as it is."""
        return sum(self.live) / self.num_blocks if self.live else self.present


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
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise ValueError(f"plan: distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"plan: model must be a torch.nn.Module, got {type(model).__name__}")
    exclude, modules = _patterns(exclude), _module_types(modules)
    densities, block_sizes = by_pattern("plan: density", density), by_pattern("plan: block_size", block_size)
    for value in densities.values():
        live_count(value, 1)  # checks the range
    for value in block_sizes.values():
        check_block_size(value)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (SparseLayer, *modules))}
    given = {"exclude": exclude, "density": density, "block_size": block_size}
    for argument, patterns in given.items():
        for pattern in patterns if isinstance(patterns, Mapping | tuple) else ():
            if not any(fnmatchcase(name, pattern) for name in layers):
                warnings.warn(f"plan: {argument} pattern {pattern!r} fits no layer of the model", stacklevel=2)

    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    planned: dict[str, LayerPlan] = {}
    sharing: dict[tuple[str, int], list[str]] = {}  # (density pattern, block size) -> names of its layers
    for name, layer in layers.items():
        pattern, size_pattern = first_fitting(densities, name), first_fitting(block_sizes, name)
        size = layer.block_size if isinstance(layer, SparseLayer) else block_sizes.get(size_pattern, 0)
        reason = "no density is given for it" if pattern is None else _reason_to_stay(name, layer, size, holders)
        if any(fnmatchcase(name, p) for p in exclude):
            reason = "excluded"
        present = layer.density if isinstance(layer, SparseLayer) else 1.0
        planned[name] = LayerPlan(name, *geometry_of(name, layer), size, (), reason, present)
        if not reason:
            sharing.setdefault((pattern, size), []).append(name)
    for (pattern, _), names in sharing.items():
        dims = [_dims(planned[name], layers[name]) for name in names for _ in range(planned[name].groups)]
        counts = iter(DISTRIBUTIONS[distribution](dims, densities[pattern]))
        for name in names:
            planned[name] = replace(planned[name], live=tuple(next(counts) for _ in range(planned[name].groups)))
    planned |= {layer.name: layer for layer in _not_taken(model, layers)}
    return Plan(tuple(planned[name] for name, _ in model.named_modules() if name in planned))


def plan_from(state_dict: Mapping[str, object]) -> Plan:
    """The plan of a saved model, so that it can be rebuilt: `sparsify(model, plan_from(saved)).load_state_dict(saved)`.

    Raises:
        ValueError: the state_dict holds no sparse layer, or one whose topology is none.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"plan_from: state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}"
        )
    end = "topology._extra_state"
    for key in state_dict:
        if not isinstance(key, str):
            raise ValueError(f"plan_from: state_dict must have names as keys, got {key!r}")
    layers = [_saved_layer(state_dict, key.removesuffix(end)) for key in state_dict if key.endswith(end)]
    if not layers:
        raise ValueError(f"plan_from: the state_dict holds no sparse layer (no key ends in {end!r})")
    return Plan(tuple(layers))


def _saved_layer(state_dict: Mapping[str, object], prefix: str) -> LayerPlan:
    """The plan of the layer at this prefix, which ends in a dot unless it is the model itself."""
    name, keys = prefix.removesuffix("."), [f"{prefix}topology.{part}" for part in ("_extra_state", *COORDINATES)]
    for key in keys:
        if key not in state_dict:
            raise ValueError(f"plan_from: layer {name!r} has no {key} in the state_dict")
    extra, rows, cols = (state_dict[key] for key in keys)
    try:
        *shape, block_size, groups = saved_geometry(keys[0], extra)
        check_geometry(tuple(shape), block_size, groups)
        layer = LayerPlan(name, tuple(shape), groups, block_size, ())
        check_blocks(rows, cols, tuple(groups * size for size in layer.grid), groups)
    except ValueError as error:
        raise ValueError(f"plan_from: layer {name!r}: {error}") from error
    if rows.is_meta or cols.is_meta:
        raise ValueError(f"plan_from: {keys[1]} and {keys[2]} are on meta, where they have no values")
    rows = rows.long()
    live = torch.bincount(rows[rows >= 0] // layer.grid[0], minlength=groups)
    return replace(layer, live=tuple(live.tolist()))


def _patterns(exclude: Iterable[str]) -> tuple[str, ...]:
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        got = f"the text {exclude!r}" if isinstance(exclude, str) else repr(exclude)
        raise ValueError(f"plan: exclude must be a list of patterns, got {got}")
    exclude = tuple(exclude)
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise ValueError(f"plan: exclude must hold patterns as 'head*', got {pattern!r}")
    return exclude


def _module_types(modules: type[nn.Module] | Iterable[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    if isinstance(modules, str) or not isinstance(modules, type | Iterable):
        raise ValueError(f"plan: modules may hold nn.Linear and nn.Conv2d, got {modules!r}")
    modules = (modules,) if isinstance(modules, type) else tuple(modules)
    for module_type in modules:
        if not isinstance(module_type, type) or module_type not in SPARSE:
            raise ValueError(f"plan: modules may hold nn.Linear and nn.Conv2d, got {module_type!r}")
    return (*modules, *conv1d_types()) if nn.Linear in modules else modules


def conv1d_types() -> tuple[type[nn.Module], ...]:
    """Of transformers, where it is in use: a linear layer that keeps its weight transposed."""
    utilities = sys.modules.get("transformers.pytorch_utils")
    return (utilities.Conv1D,) if hasattr(utilities, "Conv1D") else ()


def by_pattern(name: str, value: object) -> Mapping[str, object]:
    """A {pattern: value} as it is, any other value for all names."""
    if not isinstance(value, Mapping):
        return {"*": value}
    if not value:
        raise ValueError(f"{name} must name at least one pattern, got an empty mapping")
    for pattern in value:
        if not isinstance(pattern, str):
            raise ValueError(f"{name} must be keyed by patterns as 'head*', got {pattern!r}")
    return value


def _not_taken(model: nn.Module, taken: Mapping[str, nn.Module]) -> list[LayerPlan]:
    """Modules that hold a weight of two axes or more and are none of the types asked for."""
    found = []
    for name, module in model.named_modules():
        if name in taken or any(module is layer for layer in taken.values()):
            continue
        own = [(key, p) for key, p in module._parameters.items() if p is not None and not is_lazy(p) and p.dim() > 1]
        if own and not any(name.startswith(f"{path}." if path else "") for path in taken):
            key, weight = max(own, key=lambda pair: pair[1].numel())
            shape = (weight.shape[0], math.prod(weight.shape[1:]))
            reason = f"it is of type {type(module).__name__}" + ("" if key == "weight" else f" with a matrix {key}")
            if type(module) in SPARSE:
                reason += ", which modules does not name"
            found.append(LayerPlan(name, shape, 1, 0, (), reason))
    return found


def first_fitting(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that fits the name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def geometry_of(name: str, layer: nn.Module) -> tuple[tuple[int, int], int]:
    """(out, in) of the weight as a matrix, all groups together, and the number of groups."""
    if isinstance(layer, SparseLayer):
        return layer.topology.shape, layer.groups
    if is_lazy(layer.weight):
        raise ValueError(f"plan: layer {name!r} is lazy and has no shape yet; run the model once")
    if isinstance(layer, conv1d_types()):
        return tuple(layer.weight.shape[::-1]), 1
    groups = getattr(layer, "groups", 1)
    return (layer.weight.shape[0], groups * math.prod(layer.weight.shape[1:])), groups


def _reason_to_stay(name: str, layer: nn.Module, block_size: int, holders: Counter) -> str:
    """Why the layer must not become sparse, or ""."""
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters"
    if holders[id(layer.weight)] > 1:
        return "its weight is tied, another module holds it too"
    if isinstance(layer, SparseLayer):
        return ""
    if type(layer) not in (*SPARSE, *conv1d_types()):
        return f"it is of type {type(layer).__name__}, whose weight other code may read"
    if not block_size:
        return "no block size is given for it"
    shape, groups = geometry_of(name, layer)
    if not all(shape):
        return "its weight is empty"
    check_geometry(shape, block_size, groups)
    padded = math.prod(size // groups + -(size // groups) % block_size for size in shape)
    padding = padded * groups * groups / math.prod(shape) - 1
    return f"blocks of {block_size} would pad it by {padding:.0%}" if padding > MAX_PADDING else ""


def _dims(layer_plan: LayerPlan, layer: nn.Module) -> Dims:
    """Sizes of one group in blocks, as the distributions want them."""
    rows, cols = layer_plan.grid
    kernel = getattr(layer, "kernel_size", ())
    return (rows, cols / math.prod(kernel), *kernel)
