"""The update step of reinforcement learning (forward, backward, Adam on one minibatch): SET at 0.05 against dense.

MTPPO, MoE and MOORE are rl's actors of MT3, SAC is rl's MTSAC, an actor and a pair of critics; each also with all its
hidden layers, convolutions included, three times as wide, and eight times in blocks of 16, as a step takes seconds.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparsekern as sk
from bench.case import Case
from bench.networks import check_close
from rl.agents import AGENTS
from rl.agents.encoder import Encoder, ImageEncoder, StateEncoder
from rl.agents.mtsac import MTSACActor, MTSACCritics

TASKS, ACTIONS = 3, 7  # MT3's
MINIBATCH = 256 * TASKS
SAC_TASKS, SAC_MINIBATCH = 10, 1280  # MT10's


@dataclass(frozen=True)
class NetworkCase(Case):
    """Its shape is that of the widest sparse layer."""

    network: str
    width: int


def cases(networks, widths, block_sizes=(1, 16)) -> list[NetworkCase]:
    return [
        NetworkCase(400 * width, 400 * width, SAC_MINIBATCH, 0.05, block_size, 1, network, width)
        if network == "sac"
        else NetworkCase(128 * width, 1024 * width, MINIBATCH, 0.05, block_size, 1, network, width)
        for width in widths
        for network in networks
        for block_size in block_sizes
    ]


NETWORKS = (*AGENTS, "sac")
CASES = {
    "smoke": cases(NETWORKS, [1], [16]),
    "quick": cases(NETWORKS, [1]),
    "full": [*cases(NETWORKS, [1, 3]), *cases(NETWORKS, [8], [16])],
}


def wide(encoder: type[Encoder], width: int) -> type[Encoder]:
    class Wide(encoder):
        neurons = tuple(width * neurons for neurons in encoder.neurons)
        head_hidden = encoder.head_hidden and width * encoder.head_hidden

    return Wide


def networks(case: NetworkCase, block_size: int = 1) -> list[nn.Module]:
    """Dense. rl's grouped layers are SparseLinear at density 1: in blocks of 1, as in its dense runs, vendor GEMM."""
    if case.network == "sac":
        encoder = wide(StateEncoder, case.width)
        return [MTSACActor(SAC_TASKS, 49, 4, block_size, encoder), MTSACCritics(SAC_TASKS, 53, block_size, encoder)]
    return [AGENTS[case.network](TASKS, ACTIONS, block_size, wide(ImageEncoder, case.width))]


def minibatch(case: NetworkCase) -> list[tuple[Tensor, Tensor | None]]:
    """Observations and tasks, for each network."""
    if case.network == "sac":
        per_task = SAC_MINIBATCH // SAC_TASKS
        return [(torch.randn(per_task, SAC_TASKS, features), None) for features in (49, 53)]
    return [(torch.randint(11, (MINIBATCH, 7, 7, 3), dtype=torch.uint8), torch.arange(TASKS).repeat(256))]


class Update:
    """One step of each network's Adam."""

    def __init__(self, networks: list[nn.Module], batch: list[tuple[Tensor, Tensor | None]]):
        self.networks, self.batch = networks, batch
        self.gradients = [torch.randn_like(net(*rows)) for net, rows in zip(networks, batch, strict=True)]
        self.optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, fused=True) for network in networks]

    def step(self):
        parts = zip(self.networks, self.batch, self.gradients, self.optimizers, strict=True)
        for network, rows, gradient, optimizer in parts:
            network(*rows).backward(gradient)
            optimizer.step()
            optimizer.zero_grad()


def sparse(network: nn.Module, case: NetworkCase) -> nn.Module:
    """As rl's SET begins: linear layers only, ERK, those whose blocks rl's heads made smaller stay dense."""
    stay = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, sk.SparseLinear) and layer.block_size != case.block_size
    ]
    return sk.sparsify(network, case.density, case.block_size, "erk", stay, keep="fresh")


def check(network: nn.Module, rows: tuple[Tensor, Tensor | None]) -> None:
    """Compare outputs and gradients with those on the reference backend."""
    found = []
    for backend in (None, "reference"):
        own = deepcopy(network)
        with sk.use(backend) if backend else torch.enable_grad():
            y = own(*rows)
            y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in own.parameters())])
    check_close(*found)


def bench_update(compare, record, case):
    batch = minibatch(case)
    ours = Update([sparse(network, case) for network in networks(case, case.block_size)], batch)
    dense = Update(networks(case), batch)
    for network, rows in zip(ours.networks, batch, strict=True):
        check(network, rows)
    record(f"{case.network} x{case.width}", partner="dense", **compare(ours.step, dense.step))
