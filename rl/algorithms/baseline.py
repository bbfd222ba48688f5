"""A linear baseline: each task's values by ridge regression on its observations, where there is no critic network."""

import torch
from torch import Tensor

BOUND = 10  # what observations are clamped to, so that one that flies off does not bend the fit
RIDGE = 1e-5  # times the sum of squared weights is added to that of squared errors


class LinearBaseline:
    """Values linear in [o, o^2, t, t^2, t^3, 1] of observation o and time t in its episode, fitted once.

    As in metaworld-algorithms. In float64: a task's one-hot is as constant as the 1.

    Args:
        observations: float [T, n, features].
        elapsed: int [T, n]: timesteps since the observation's episode began.
        targets: float [T, n], what the values of each of the n tasks shall be.
    """

    def __init__(self, observations: Tensor, elapsed: Tensor, targets: Tensor):
        x = baseline_features(observations, elapsed).transpose(0, 1)
        y = targets.to(x.dtype).T.unsqueeze(2)
        ridge = RIDGE * torch.eye(x.shape[2], dtype=x.dtype)
        self._weights = torch.linalg.solve(x.mT @ x + ridge, x.mT @ y).squeeze(2)

    def __call__(self, observations: Tensor, elapsed: Tensor, tasks: Tensor) -> Tensor:
        """Values, in the observations' dtype, of observations [..., features] of tasks, int64 [...]."""
        return (baseline_features(observations, elapsed) * self._weights[tasks]).sum(-1).to(observations.dtype)


def baseline_features(observations: Tensor, elapsed: Tensor) -> Tensor:
    """What values are linear in: float64 [..., 2 * features + 4]."""
    o, t = observations.double().clamp(-BOUND, BOUND), elapsed.unsqueeze(-1).double() / 100
    return torch.cat((o, o**2, t, t**2, t**3, torch.ones_like(t)), dim=-1)
