"""The convolutional encoder of MiniGrid's 7 x 7 view."""

from torch import Tensor, nn

FEATURES = 64 * 4 * 4


class Encoder(nn.Sequential):
    """Three 2 x 2 convolutions, 7-6-5-4; uint8 observations [N, 7, 7, 3] to features [N, 1024], not yet activated.

    The last activation is the agent's: one encoder is followed by a Tanh, a mixture of encoders is mixed before it.
    """

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, kernel_size=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=2),
            nn.Flatten(),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations.permute(0, 3, 1, 2).float())  # the paper feeds object codes unscaled
