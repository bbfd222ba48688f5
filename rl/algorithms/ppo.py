"""What PPO does with any environments and policy: advantages, and epochs of the clipped surrogate loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rl.algorithms.learner import Learner
from rl.config import MT10PPOConfig, PPOConfig


def improve(
    actor: Learner,
    evaluate_actions: Callable[[Tensor], tuple[Tensor, Tensor]],
    old_log_probs: Tensor,
    advantages: Tensor,
    tasks: Tensor,
    minibatch: int,
    ppo: PPOConfig | MT10PPOConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Take epochs of minibatches over N transitions; returns the loss and what else says how it went.

    Args:
        evaluate_actions: from some rows, int64 [M], to the log-probabilities [M] of what was done there, and the
            policy's entropies [M] in nats, both with gradients.
        old_log_probs, advantages, tasks: [N]; of the policy that acted, and what this earned it.
        minibatch: rows of a step, at most.
    """
    history = []

    def loss(rows: Tensor) -> Tensor:
        of_policy = evaluate_actions(rows)
        value, stats = policy_loss(*of_policy, old_log_probs[rows], advantages[rows], ppo.clip, ppo.entropy)
        history.append(stats)
        return value

    for _ in range(ppo.epochs):
        for batch in minibatches(len(tasks), minibatch, generator):
            actor.minimise(loss, batch, tasks[batch], generator)
    names = ("loss/policy", "ppo/entropy", "ppo/approx_kl", "ppo/clip_fraction")
    return dict(zip(names, torch.stack(history).mean(0).tolist(), strict=True))


def minibatches(rows: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """All rows in random order, in parts of this size; the last may be smaller."""
    return torch.randperm(rows, generator=generator).split(size)


def policy_loss(
    log_probs: Tensor, entropies: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float, entropy: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate minus the entropy bonus, over N transitions.

    Returns:
        The loss, and detached [4]: loss, entropy in nats, approximate KL(old, new) in nats, share of clipped ratios.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    mean_entropy = entropies.mean()
    loss = -surrogate - entropy * mean_entropy
    clipped = ((ratio - 1).abs() > clip).float().mean()
    return loss, torch.stack((loss, mean_entropy, (ratio - 1 - log_ratio).mean(), clipped)).detach()


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, cut: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates [T, n].

    Args:
        rewards, values, next_values: float [T, n]; next_values[t] is the value of what followed timestep t.
        terminated: bool [T, n]: nothing followed, so next_values is not used.
        cut: bool [T, n]: the episode went on unseen; next_values is used, but no later timestep.
    """
    errors = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    decay = gamma * lam * ~(terminated | cut)
    advantages = torch.empty_like(errors)
    following = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = torch.addcmul(errors[t], decay[t], following, out=advantages[t])
    return advantages


def normalised(advantages: Tensor) -> Tensor:
    """Each task's advantages, [T, n], by its own mean and spread: rewards differ in scale between tasks."""
    return (advantages - advantages.mean(0)) / (advantages.std(0, correction=0) + 1e-8)


def explained_variance(values: Tensor, targets: Tensor) -> float:
    """Share of the targets' variance that the values explain: at most 1, and 0 of a constant."""
    return 1 - ((targets - values).var() / targets.var()).item()
