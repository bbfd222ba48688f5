"""Data parallelism: every rank must have the same topology, and nothing but the topology's own values can tell."""

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from sparsekern.layer import SparseLayer
from sparsekern.rewire.hash import uniform_hash
from sparsekern.topology import Topology


def distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(own: Tensor, group=None) -> Tensor:
    """A tensor of every rank, stacked."""
    ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(ranks, own, group=group)
    return torch.stack(ranks)


def checksum(topology: Topology) -> Tensor:
    """int64 that depends on which block is in which slot."""
    positions = topology.layout.positions()
    slots = torch.arange(len(positions), device=positions.device)
    return uniform_hash(0, positions * len(positions) + slots).sum()


def _share_topology(wrapper: nn.Module, name: str, model: nn.Module) -> None:
    """Give every rank the topologies of rank 0 when DistributedDataParallel takes a model.

    It broadcasts the weights of rank 0 itself, right after this, but knows of no topology.
    """
    if not (isinstance(wrapper, DistributedDataParallel) and name == "module"):
        return
    topologies = [m.topology for m in model.modules() if isinstance(m, SparseLayer)]
    if not topologies:
        return
    group, device = wrapper.process_group, topologies[0].index.device
    for what, own in (
        ("sparse layers", [len(topologies)]),
        ("slots per sparse layer", [t.num_slots for t in topologies]),
    ):
        found = gathered(torch.tensor(own, device=device), group).tolist()
        if any(other != own for other in found):
            raise RuntimeError(
                f"DistributedDataParallel: the ranks have {found} {what}; build the same model on every rank"
            )
    sums = gathered(torch.stack([checksum(topology) for topology in topologies]), group)
    for topology, differs in zip(topologies, (sums != sums[0]).any(0).tolist(), strict=True):
        if differs:
            coordinates = torch.stack(topology.layout.coordinates()).int()  # no backend knows int16
            torch.distributed.broadcast(coordinates, group=group, group_src=0)
            topology.replace(*coordinates)
            topology.adoptions += 1


# DistributedDataParallel has no hook of its own; it registers the model as its submodule on every rank, before it
# broadcasts the weights.
register_module_module_registration_hook(_share_topology)
