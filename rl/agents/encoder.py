"""Encoders: observations to features, by k experts side by side, all in three launches."""

import torch
from torch import Tensor, nn

import sparsekern as sk


class Encoder(nn.Sequential):
    """Observations [N, ...] to [N, experts, features]; layers 0, 2 and 4 compute, 1 and 3 are their activations.

    All experts see the same observation, so layer 0 computes them as one layer; the others have a group per expert.
    The last activation is the agent's, which may first mix the experts.
    """

    neurons: tuple[int, int, int]
    """Of each layer, per expert; a neuron of a convolution is a channel."""
    positions: tuple[int, int, int]
    """At which each neuron of a layer is computed: pixels."""
    head_hidden: int | None
    """Hidden neurons of a task head that reads these features; None: it has no hidden layer."""
    head_bound: float | None
    """What the first weights of an actor's head are within; None: as in nn.Linear."""
    gain: float = 1
    """First weights are uniform within gain / sqrt(fan_in); 1: as in PyTorch's layers."""

    def __init__(self, experts: int, *layers: nn.Module):
        super().__init__(*layers, nn.Flatten(), nn.Unflatten(1, (experts, self.features)))
        self.experts = experts

    @property
    def features(self) -> int:
        """Per expert."""
        return self.neurons[-1] * self.positions[-1]

    def initialise(self) -> None:
        """Draw first values, where they are not those of PyTorch's layers; sparse layers by their live weights."""


class ImageEncoder(Encoder):
    """Per expert three 2 x 2 convolutions, 7-6-5-4, on MiniGrid's view: uint8 [N, 7, 7, 3] to [N, experts, 1024]."""

    neurons, positions, head_hidden = (16, 32, 64), (6 * 6, 5 * 5, 4 * 4), 128
    head_bound = None

    def __init__(self, experts: int = 1):
        first, second, third = (experts * channels for channels in self.neurons)
        super().__init__(
            experts,
            nn.Conv2d(3, first, kernel_size=2),
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=2, groups=experts),
            nn.ReLU(),
            nn.Conv2d(second, third, kernel_size=2, groups=experts),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations.permute(0, 3, 1, 2).float())  # the paper feeds object codes unscaled


class StateEncoder(Encoder):
    """Per expert three layers of 400, on Meta-World's state: float32 [N, in_features] to [N, experts, 400]."""

    neurons, positions, head_hidden = (400, 400, 400), (1, 1, 1), None
    head_bound, gain = 1e-3, 6**0.5

    def __init__(self, experts: int = 1, *, in_features: int, block_size: int = 1):
        first, second, third = (experts * neurons for neurons in self.neurons)

        def per_expert(features_in: int, features_out: int) -> nn.Module:
            if experts == 1:
                return nn.Linear(features_in, features_out)
            # every block is live: it is the dense layer, until a treatment makes it sparse
            return sk.SparseLinear(features_in, features_out, density=1.0, block_size=block_size, groups=experts)

        layers = (nn.Linear(in_features, first), per_expert(first, second), per_expert(second, third))
        super().__init__(experts, layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """He-uniform weights, zero biases."""
        for layer in (self[0], self[2], self[4]):
            layer.reset_parameters()  # uniform within 1 / sqrt(fan_in)
            layer.weight.mul_(self.gain)
            layer.bias.zero_()
