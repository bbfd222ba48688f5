"""Reset (arXiv 2205.07802): every 100,000 timesteps, twice, the last layer of every head starts anew.

So does that of a target network, with the same values.
"""

import torch
from torch import nn
from torch.optim import Optimizer

import sparsekern as sk
from rl.buffer import PlasticityBuffer
from rl.config import Config
from rl.seeds import Stream, drawing_from, torch_generator
from rl.treatments.periodic import Periodic


def make_rule(
    network: nn.Module,
    optimizer: Optimizer,
    config: Config,
    seed: int,
    buffer: PlasticityBuffer,
    followers: list[nn.Module],
) -> "Reset":
    heads = [follower.heads for follower in followers]
    return Reset(network.heads, heads, optimizer, config.reset.every, config.reset.times, seed)


class Reset(Periodic):
    def __init__(
        self, heads: nn.Module, following: list[nn.Module], optimizer: Optimizer, every: int, times: int, seed: int
    ):
        super().__init__(every, times)
        self.heads, self.following, self.optimizer, self.seed = heads, following, optimizer, seed

    @torch.no_grad()
    def act(self, clock: int) -> None:
        with drawing_from(torch_generator(self.seed, Stream.TREATMENT, clock)):
            self.heads.reset_output()
        for parameter in self.heads.output.parameters():
            sk.reset_state(self.optimizer, parameter, parameter.new_ones((), dtype=bool))
        for heads in self.following:
            for parameter, new in zip(heads.output.parameters(), self.heads.output.parameters(), strict=True):
                parameter.copy_(new)
