"""Gaussian policies: an actor's outputs [N, 2 * actions] are means, then logarithms of standard deviations."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_STD = (-20, 2)  # what the logarithm of a standard deviation is clamped to
LOG_ROOT_TAU = 0.5 * math.log(2 * math.pi)


def gaussian(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Means and logarithms of standard deviations, each [N, actions]."""
    mean, log_std = outputs.chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD)


def log_probs(outputs: Tensor, actions: Tensor) -> Tensor:
    """Log-densities [N] of these actions [N, actions]."""
    mean, log_std = gaussian(outputs)
    return (-0.5 * ((actions - mean) / log_std.exp()).square() - log_std - LOG_ROOT_TAU).sum(-1)


def entropies(outputs: Tensor) -> Tensor:
    """Differential entropies [N], in nats."""
    return (gaussian(outputs)[1] + 0.5 + LOG_ROOT_TAU).sum(-1)


class Squash(torch.autograd.Function):
    """Actions [..., actions] in (-1, 1), tanh of Gaussian draws made of normal noise, and their surprise [...].

    Surprise is minus the logarithm of the density, so its mean is the entropy.

    Written out with its gradient: PyTorch's own takes twice as many kernels, which is what an update's time on a GPU
    consists of.
    """

    @staticmethod
    def forward(ctx, outputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = gaussian(outputs)
        draw = torch.addcmul(mean, log_std.exp(), noise)
        actions = draw.tanh()
        ctx.save_for_backward(outputs, draw, actions)
        # of the stretch log(1 - tanh(u)^2) = 2 log 2 - 2 u - 2 log(1 + exp(-2 u)), which does not round to log(0)
        half_log = F.softplus(draw, beta=-2)  # -log(1 + exp(-2 u)) / 2
        surprise = torch.sub(log_std, draw, alpha=2).add_(half_log, alpha=4).addcmul_(noise, noise, value=0.5)
        return actions, surprise.sum(-1).add_(mean.shape[-1] * (2 * math.log(2) + LOG_ROOT_TAU))

    @staticmethod
    def backward(ctx, of_actions: Tensor, of_surprise: Tensor) -> tuple[Tensor, None]:
        outputs, draw, actions = ctx.saved_tensors
        mean, log_std = outputs.chunk(2, dim=-1)
        of_surprise = of_surprise.unsqueeze(-1)
        gradient = torch.empty_like(outputs)
        of_draws, of_log_std = gradient.chunk(2, dim=-1)
        torch.ops.aten.tanh_backward.grad_input(of_actions, actions, grad_input=of_draws)
        of_draws.addcmul_(actions, of_surprise, value=-2)
        unclamped = torch.addcmul(of_surprise, draw - mean, of_draws)  # the deviation from the mean is std * noise
        torch.ops.aten.hardtanh_backward.grad_input(unclamped, log_std, *LOG_STD, grad_input=of_log_std)
        return gradient, None


def log_probs_of_draws(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """The LogProbs (rl/metrics.py) of a Gaussian; of a squashed one too, but for the stretch, which nothing moves."""
    mean, log_std = gaussian(outputs)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return log_probs(outputs, (mean + log_std.exp() * noise).detach())
