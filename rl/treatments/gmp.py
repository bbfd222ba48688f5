"""GMP: all layers start dense; between 5% and 80% of the run the smallest weights of the whole network are removed."""

from torch import nn

import sparsekern as sk
from rl.treatments.context import Context


def prepare(context: Context) -> None:
    block_size = context.config.block_size
    sk.sparsify(context.network, density=1.0, block_size=block_size, modules=(nn.Conv2d, nn.Linear))


def make_rule(context: Context) -> sk.GMP:
    config = context.config
    return sk.GMP(
        context.network,
        context.optimizer,
        final_density=config.density,
        start_step=round(config.gmp.start * config.timesteps),
        end_step=round(config.gmp.end * config.timesteps),
        update_every=config.gmp.update_every,
        followers=context.followers,
        scope="global",  # a threshold per layer would empty the small ones
    )
