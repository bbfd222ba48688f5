"""Reset (arXiv 2205.07802): every 100,000 timesteps, twice, the last layer of every head starts anew.

So does that of a target network, with the same values.
"""

import torch

import sparsekern as sk
from rl.seeds import Stream, drawing_from, torch_generator
from rl.treatments.context import Context
from rl.treatments.periodic import Periodic


def make_rule(context: Context) -> "Reset":
    return Reset(context)


class Reset(Periodic):
    def __init__(self, context: Context):
        super().__init__(context.config.reset.every, context.config.reset.times)
        self.context = context

    @torch.no_grad()
    def act(self, clock: int) -> None:
        context, heads = self.context, self.context.network.heads
        with drawing_from(torch_generator(context.seed, Stream.TREATMENT, clock)):
            heads.reset_output()
        for parameter in heads.output.parameters():
            sk.reset_state(context.optimizer, parameter, parameter.new_ones((), dtype=bool))
        for follower in context.followers:
            for parameter, new in zip(follower.heads.output.parameters(), heads.output.parameters(), strict=True):
                parameter.copy_(new)
