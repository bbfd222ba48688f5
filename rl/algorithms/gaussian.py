"""Gaussian policies: an actor's outputs [N, 2 * actions] are means, then logarithms of standard deviations."""

import math

import torch
from torch import Tensor

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


def log_probs_of_draws(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """The LogProbs (rl/metrics.py) of a Gaussian; of a squashed one too, but for the stretch, which nothing moves."""
    mean, log_std = gaussian(outputs)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return log_probs(outputs, (mean + log_std.exp() * noise).detach())
