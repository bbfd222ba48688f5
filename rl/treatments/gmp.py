"""GMP: all layers start dense; between 5% and 80% of the run the smallest weights of the whole network are removed."""

from torch import nn
from torch.optim import Optimizer

import sparsekern as sk
from rl.buffer import PlasticityBuffer
from rl.config import Config


def prepare(network: nn.Module, config: Config, role: str) -> None:
    sk.sparsify(network, density=1.0, block_size=config.block_size, modules=(nn.Conv2d, nn.Linear))


def make_rule(
    network: nn.Module,
    optimizer: Optimizer,
    config: Config,
    seed: int,
    buffer: PlasticityBuffer,
    followers: list[nn.Module],
) -> sk.GMP:
    return sk.GMP(
        network,
        optimizer,
        final_density=config.density,
        start_step=round(config.gmp.start * config.timesteps),
        end_step=round(config.gmp.end * config.timesteps),
        update_every=config.gmp.update_every,
        followers=followers,
        scope="global",  # a threshold per layer would empty the small ones
    )
