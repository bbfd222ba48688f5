"""The convolutional encoders of MiniGrid's 7 x 7 view: k experts, all in three launches."""

from torch import Tensor, nn

CHANNELS, POSITIONS = 64, 4 * 4
FEATURES = CHANNELS * POSITIONS


class Encoder(nn.Sequential):
    """Per expert three 2 x 2 convolutions, 7-6-5-4; uint8 observations [N, 7, 7, 3] to [N, experts, 1024].

    All experts see the same image, so the first convolution computes them side by side; the others have a group per
    expert. The last activation is the agent's: one expert is followed by a Tanh, several are mixed before it.
    """

    def __init__(self, experts: int = 1):
        super().__init__(
            nn.Conv2d(3, experts * 16, kernel_size=2),
            nn.ReLU(),
            nn.Conv2d(experts * 16, experts * 32, kernel_size=2, groups=experts),
            nn.ReLU(),
            nn.Conv2d(experts * 32, experts * CHANNELS, kernel_size=2, groups=experts),
            nn.Flatten(),
            nn.Unflatten(1, (experts, FEATURES)),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations.permute(0, 3, 1, 2).float())  # the paper feeds object codes unscaled
