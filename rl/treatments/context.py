"""Context: what a treatment is told about the network that it treats."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rl.config import Config


class Buffer(Protocol):
    """The plasticity buffer: what the networks have seen of late."""

    def sample(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Some entries: what a network sees, and tasks."""


@dataclass
class Context:
    """One network of an agent, and what belongs to it."""

    config: Config
    role: Literal["actor", "critic"]
    network: nn.Module
    seed: int  # for the treatment's own draws; actor and critic have different ones
    buffer: Buffer
    optimizer: Optimizer | None = None  # None while the network is prepared
    followers: list[nn.Module] = field(default_factory=list)  # target networks; empty while the network is prepared
