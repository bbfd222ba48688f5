"""What every rule asks of its arguments, each refused by name and value."""

import math
import numbers
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsekern.layer import SparseLayer

LARGEST = 2**63 - 1
"""Of the integers that NumPy and the kernels count with."""


def check_finite(where: str, argument: str, value: float) -> int | float:
    """Refuse what is not a plain, finite number; a tensor too, since comparing it would wait for its device.

    Returns:
        The number as one of Python: torch.load with weights_only refuses a checkpoint with another, such as NumPy's.
    """
    try:
        finite = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        finite = False
    if not finite:
        raise ValueError(f"{where}: {argument} must be a finite number, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_between(where: str, argument: str, value: float, least: float, most: float) -> int | float:
    number = check_finite(where, argument, value)
    if not least <= number <= most:
        raise ValueError(f"{where}: {argument} must be a number from {least} to {most}, got {value!r}")
    return number


def check_flag(where: str, argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {argument} must be True or False, got {value!r}")


def check_times(
    where: str, update_every: float, start_step: float, end_step: float | None
) -> tuple[float, float, float | None]:
    """The three as numbers of Python."""
    update_every = check_finite(where, "update_every", update_every)
    start_step = check_finite(where, "start_step", start_step)
    if update_every <= 0:
        raise ValueError(f"{where}: update_every must be positive, got {update_every}")
    if start_step < 0:
        raise ValueError(f"{where}: start_step must not be negative, got {start_step}")
    if end_step is not None:
        end_step = check_finite(where, "end_step", end_step)
        if end_step < start_step:
            raise ValueError(f"{where}: end_step must not be before start_step, got {end_step} and {start_step}")
    return update_every, start_step, end_step


def check_seed(where: str, seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
        raise ValueError(f"{where}: seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


def check_count(where: str, argument: str, value: int, least: int = 0, most: int = LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        raise ValueError(f"{where}: {argument} must be an integer from {least} to {most}, got {value!r}")


def listed_by_group(
    where: str, argument: str, value: object, layers: dict[str, SparseLayer]
) -> Iterator[tuple[str, object, SparseLayer]]:
    """Yield what stands for each group, its name for an error before it, and its layer.

    Raises:
        ValueError: it is no dictionary of a list for each layer, with as many entries as the layer has groups.
    """
    if not isinstance(value, dict) or value.keys() != layers.keys():
        raise ValueError(f"{where}: {argument} must be a dictionary of the layers {sorted(layers)}, got {value!r}")
    for path, of_groups in value.items():
        if not isinstance(of_groups, list | tuple) or len(of_groups) != layers[path].groups:
            got = f"got {of_groups!r}"
            raise ValueError(f"{where}: {argument} of layer {path!r} must be {layers[path].groups} numbers, {got}")
        for number in of_groups:
            yield f"{argument} of layer {path!r}", number, layers[path]


def sparse_layers(where: str, model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by name; at least one."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, SparseLayer)}
    if not layers:
        raise ValueError(f"{where}: the model has no sparse layers; build it with SparseLinear or call sparsify(model)")
    return layers


def list_of_modules(where: str, followers: Iterable[nn.Module]) -> list[nn.Module]:
    if isinstance(followers, nn.Module) or not isinstance(followers, Iterable):
        raise ValueError(f"{where}: followers must be a list of modules, got {type(followers).__name__}")
    followers = list(followers)
    for follower in followers:
        if not isinstance(follower, nn.Module):
            raise ValueError(f"{where}: followers must be a list of modules, got {type(follower).__name__} in it")
    return followers


def check_rewirable(where: str, path: str, layer: SparseLayer) -> None:
    """Refuse a layer whose weight is not a parameter of its own that holds every slot."""
    weight = layer._parameters.get("weight")
    if weight is None:
        found = layer.parametrizations["weight"] if is_parametrized(layer, "weight") else ()
        kinds = ", ".join(type(parametrization).__name__.strip("_") for parametrization in found)
        norm = "; it would normalise the slots [num_slots, B, B], and not W" if "SpectralNorm" in kinds else ""
        raise ValueError(
            f"{where}: the weight of layer {path!r} is computed anew from other parameters ({kinds or 'by a hook'}), "
            f"so a rewire cannot overwrite its slots{norm}; remove the parametrization, or keep the layer dense"
        )
    if weight.requires_grad and type(weight) not in (nn.Parameter, Tensor):
        raise ValueError(
            f"{where}: the weight of layer {path!r} is a {type(weight).__name__}: this rank holds a part of it "
            "(fully_shard, tensor parallelism), or it is quantised. A rule overwrites slots of a plain parameter; "
            "use DistributedDataParallel, or sk.Static, which keeps the topology and checks that the ranks agree"
        )
