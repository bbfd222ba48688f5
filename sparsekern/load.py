"""load: a sparse model out of a dense one and the state_dict that a sparse one saved."""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsekern.convert import refuse_taken, sparsify
from sparsekern.layer import SparseLayer
from sparsekern.planning import plan_from


def load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Make a dense model the sparse one whose state_dict this is, in place: layers, topologies and weights.

    Strict as `load_state_dict`. A tied weight may be there under one of its names, as safetensors saves it. All or
    nothing: what does not fit is found on a copy that holds no memory, before the model changes. Build the optimiser
    afterwards, and load its state then.

    Args:
        model: built as the saved one was before `sparsify`; layers that are sparse already adopt the saved topology.
        state_dict: of the whole sparse model.
    Returns:
        The model; a new module only if the model itself is one nn.Linear or nn.Conv2d.
    Raises:
        ValueError: the state_dict holds no sparse layer, or one that the model does not have in this shape.
        RuntimeError: keys are missing or unexpected, or another tensor has another shape.
    Example:
        >>> saved = sparsify(nn.Sequential(nn.Linear(64, 64)), density=0.25).state_dict()
        >>> load(nn.Sequential(nn.Linear(64, 64)), saved)[0].density
        0.25
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"load: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"load: state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    refuse_taken("load", model)
    planned = plan_from(state_dict)
    trial = sparsify(_without_memory(model), planned, keep="random")
    state = _with_all_names(trial, state_dict)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*to a meta parameter")  # copying nothing is what the trial is for
        trial.load_state_dict(state)
    model = sparsify(model, planned, keep="random")
    model.load_state_dict(state)
    return model


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of the model on "meta"; layers that are sparse already keep their memory, which is small."""
    sparse = {id(p) for m in model.modules() if isinstance(m, SparseLayer) for p in m.parameters()}
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in sparse:
            empty = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _with_all_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict, with a tied weight under each of its names."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    state = dict(state_dict)
    for tied in names.values():
        saved = next((name for name in tied if name in state), None)
        state |= {name: state[saved] for name in tied if saved is not None and name not in state}
    return state
