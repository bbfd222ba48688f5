"""SET: linear layers are sparse from the start; every 2000 timesteps their smallest weights move to random places.

Convolutions stay dense. The densities of the layers follow Erdős-Rényi-Kernel and together make up `density`. The paper
masks a dense network, so its live weights begin at the small scale of the dense layer; `--set.initial fan-in` draws
them for the inputs that a neuron really has.
"""

import sparsekern as sk
from rl.treatments.context import Context


def prepare(context: Context) -> None:
    network, config = context.network, context.config
    heads = {name: layer for name, layer in network.named_modules() if isinstance(layer, sk.SparseLinear)}
    stay_dense = [name for name, layer in heads.items() if layer.block_size != config.block_size]  # too small for it
    sk.sparsify(
        network,
        density=config.density,
        block_size=config.block_size,
        distribution="erk",
        exclude=stay_dense,
        keep="random" if config.set.initial == "dense" else "fresh",
    )
    if config.set.initial == "fan-in":  # "dense" keeps what the dense network had drawn
        network.encoder.initialise()
        network.heads.initialise()


def make_rule(context: Context) -> sk.SET:
    options = context.config.set
    return sk.SET(
        context.network,
        context.optimizer,
        drop_fraction=options.drop_fraction,
        update_every=options.update_every,
        seed=context.seed,
        followers=context.followers,
    )
