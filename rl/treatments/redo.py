"""ReDo (arXiv 2302.12902): every 5000 timesteps, dormant neurons start anew.

A recycled neuron gets fresh incoming weights, a zero bias and zero outgoing weights, so that the network's outputs stay
as they are, and zero Adam moments for all of these. Outputs are never recycled, and neither are the outputs of experts
in a mixture: they share the weights that read them.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sparsekern as sk
from rl.agents.neurons import Hidden, activity
from rl.seeds import Stream, torch_generator
from rl.treatments.context import Context
from rl.treatments.periodic import Periodic


def make_rule(context: Context) -> "ReDo":
    return ReDo(context)


class ReDo(Periodic):
    def __init__(self, context: Context):
        super().__init__(context.config.redo.every)
        self.context = context

    def act(self, clock: int) -> None:
        context = self.context
        generator = torch_generator(context.seed, Stream.TREATMENT, clock)
        for neurons in activity(context.network, *context.buffer.sample(generator)):
            if neurons.layer.outgoing is not None:
                recycle(neurons.layer, neurons.dormant(context.config.redo.tau), context.optimizer, generator)


@torch.no_grad()
def recycle(layer: Hidden, dormant: Tensor, optimizer: Optimizer, generator: torch.Generator) -> None:
    """Let the dormant neurons, bool [groups, neurons], of a layer start anew; its weights are dense."""
    weights = matrices(layer.incoming, layer.groups)
    bound = layer.gain * weights.shape[2] ** -0.5  # as first weights are drawn
    fresh = torch.empty(weights.shape).uniform_(-bound, bound, generator=generator).to(weights.device)
    rows = dormant.unsqueeze(2).expand_as(weights)
    weights.copy_(torch.where(rows, fresh, weights))
    layer.incoming.bias.masked_fill_(dormant.flatten(), 0)

    readers = getattr(layer.outgoing, "groups", 1)  # nn.Linear has no groups
    weights = matrices(layer.outgoing, readers)
    columns = dormant.repeat_interleave(weights.shape[2] // layer.neurons, dim=1)  # a channel is read at many taps
    columns = columns.repeat_interleave(readers // layer.groups, dim=0).unsqueeze(1).expand_as(weights)
    weights.masked_fill_(columns, 0)

    sk.reset_state(optimizer, layer.incoming, rows.reshape(layer.incoming.weight.shape))
    sk.reset_state(optimizer, layer.incoming.bias, dormant.flatten())
    sk.reset_state(optimizer, layer.outgoing, columns.reshape(layer.outgoing.weight.shape))


def matrices(layer: nn.Module, groups: int) -> Tensor:
    """The weight as a view [groups, out, in]; a sparse layer must be in blocks of 1 that all live, row by row."""
    return layer.weight.detach().view(groups, layer.bias.numel() // groups, -1)
