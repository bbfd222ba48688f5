"""summary: what every sparse layer of a model really takes in memory, against the dense layer it stands for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.layer import SparseLayer
from sparsekern.table import table


@dataclass(frozen=True)
class Bytes:
    """Bytes of tensors as they are allocated now."""

    weight: int
    gradient: int
    """0 while there is none"""
    state: int
    """the optimiser's; 0 before its first step"""
    index: int
    """block coordinates, index and growth scores"""
    dense: int
    """what weight, gradient and state, as far as they exist, would take in a dense layer"""

    @property
    def total(self) -> int:
        return self.weight + self.gradient + self.state + self.index

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class LayerSummary:
    """One sparse layer; its bias belongs to the rest of the model."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features), all groups together"""
    groups: int
    block_size: int
    live: int
    """live blocks"""
    num_blocks: int
    """all blocks"""
    bytes: Bytes

    @property
    def density(self) -> float:
        return self.live / self.num_blocks


@dataclass(frozen=True)
class Summary:
    """The sparse layers of a model and their bytes; `print(summary)` shows a table."""

    layers: tuple[LayerSummary, ...]
    rest: Bytes
    """all other parameters and buffers of the model, biases of the sparse layers included"""
    notes: tuple[str, ...]
    """what is not in the numbers"""

    @property
    def total(self) -> Bytes:
        return sum((layer.bytes for layer in self.layers), self.rest)

    def __str__(self) -> str:
        header = ("layer", "shape", "block size", "density", "live", "of")
        header += ("weight", "gradient", "optimiser", "index", "bytes", "dense bytes", "of dense")
        rows = [
            (
                layer.name or "(the model)",
                " x ".join(map(str, layer.shape)) + (f" in {layer.groups} groups" if layer.groups > 1 else ""),
                layer.block_size,
                layer.density,
                layer.live,
                layer.num_blocks,
                *_cells(layer.bytes),
            )
            for layer in self.layers
        ]
        rows.append(("rest of the model", *5 * ("",), *_cells(self.rest)))
        rows.append(("total", *5 * ("",), *_cells(self.total)))
        return "\n".join((table(header, rows), *self.notes))

    __repr__ = __str__


def summary(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> Summary:
    """Measure the memory of a model's sparse layers, index included, against dense layers of the same shapes.

    Bytes are those of the tensors there are. Before the first backward there is no gradient, and before the first step
    no optimiser state; the table then says so, and does not count them for the dense layers either.

    Args:
        model: any module; sparse layers get a line each, everything else one line together.
        optimizer: counts its state; a list of several will do.
    Example:
        >>> summary(nn.Sequential(SparseLinear(64, 64, density=0.25), nn.Linear(64, 8)))
        layer              shape    block size  density  live  of  weight  gradient  ...  of dense
        0                  64 x 64          16   0.2500     4  16   4,096         0  ...    0.2593
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"summary: model must be a torch.nn.Module, got {type(model).__name__}")
    several = isinstance(optimizer, list | tuple) and optimizer
    optimizers = optimizer if several else [] if optimizer is None else [optimizer]
    for one in optimizers:
        if not (hasattr(one, "state") and hasattr(one, "param_groups")):
            raise ValueError(f"summary: optimizer must be a torch optimiser, or a list, got {type(one).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    state = {parameter: own for one in optimizers for parameter, own in one.state.items()}
    lines = tuple(
        LayerSummary(
            name,
            layer.topology.shape,
            layer.groups,
            layer.block_size,
            layer.topology.num_live,
            layer.topology.num_blocks,
            _parameter_bytes(
                layer.weight,
                state,
                dense_elements=layer.topology.shape[0] * layer.topology.shape[1] // layer.groups,
                index=layer.topology.nbytes + (0 if layer.growth is None else layer.growth.scores.nbytes),
            ),
        )
        for name, layer in layers.items()
    )
    covered = {id(layer.weight) for layer in layers.values()}
    rest = [_parameter_bytes(p, state, p.numel()) for p in model.parameters() if id(p) not in covered]
    buffers = _sum(model.buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    notes = []
    if any(p.grad is None for p in trained):
        notes.append("Not every gradient is allocated: they are there between backward and zero_grad.")
    if not optimizers:
        notes.append("No optimiser was given, so its state is not counted.")
    elif any(not state.get(p) for one in optimizers for group in one.param_groups for p in group["params"]):
        notes.append("The optimiser does not hold state for every parameter: it comes with the first step, if at all.")
    return Summary(lines, sum(rest, Bytes(buffers, 0, 0, 0, buffers)), tuple(notes))


def _parameter_bytes(parameter: nn.Parameter, state: dict, dense_elements: int, index: int = 0) -> Bytes:
    gradient = [] if parameter.grad is None else [parameter.grad]
    states = [value for value in state.get(parameter, {}).values() if isinstance(value, Tensor)]
    dense = sum(
        dense_elements * tensor.element_size() if tensor.shape == parameter.shape else _nbytes(tensor)
        for tensor in (parameter, *gradient, *states)
    )
    return Bytes(_nbytes(parameter), _sum(gradient), _sum(states), index, dense)


def _sum(tensors: Iterable[Tensor]) -> int:
    return sum(map(_nbytes, tensors))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cells(count: Bytes) -> tuple:
    share = count.total / count.dense if count.dense else 0.0
    return count.weight, count.gradient, count.state, count.index, count.total, count.dense, share
