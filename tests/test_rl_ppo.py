"""rl/ppo.py and rl/train_ppo.py: advantages by hand, and the policy's loss against its definition."""

import math

import pytest
import torch

from rl.buffer import PlasticityBuffer
from rl.config import Config, PPOConfig
from rl.envs import SUITES
from rl.envs.pool import EnvPool
from rl.ppo import gae, policy_loss
from rl.rollout import collect
from rl.train_ppo import chosen, fit, learner


def test_gae_matches_a_trajectory_computed_by_hand():
    # one task: an episode of two timesteps that terminates, one of two that runs out of time, one that the rollout cuts
    gamma, lam = 0.5, 0.5
    rewards = torch.tensor([[1.0], [2.0], [0.0], [4.0], [1.0]])
    values = torch.tensor([[2.0], [4.0], [8.0], [2.0], [6.0]])
    next_values = torch.tensor([[4.0], [math.nan], [2.0], [10.0], [12.0]])  # after an end: must not count
    terminated = torch.tensor([[False], [True], [False], [False], [False]])
    cut = torch.tensor([[False], [False], [False], [True], [True]])

    # errors: 1 + 0.5*4 - 2 = 1 | 2 - 4 = -2 | 0 + 0.5*2 - 8 = -7 | 4 + 0.5*10 - 2 = 7 | 1 + 0.5*12 - 6 = 1
    by_hand = torch.tensor([[1 - 2 / 4], [-2], [-7 + 7 / 4], [7], [1]])
    torch.testing.assert_close(gae(rewards, values, next_values, terminated, cut, gamma, lam), by_hand)


def test_policy_loss_and_its_gradient_match_the_definition_transition_by_transition():
    torch.manual_seed(0)
    logits = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.randint(7, (40,)), torch.randn(40, dtype=torch.float64)
    old = torch.distributions.Categorical(logits=logits.detach() + 0.5 * torch.randn(40, 7)).log_prob(actions)
    loss, stats = policy_loss(*chosen(logits, actions), old, advantages, clip=0.2, entropy=0.01)

    plain, clipped = 0, 0
    for row, action, old_log_prob, advantage in zip(logits, actions, old, advantages, strict=True):
        p = torch.exp(row) / torch.exp(row).sum()
        ratio = p[action] / torch.exp(old_log_prob)
        inside = max(min(ratio, 1.2), 0.8)
        clipped += ratio != inside
        plain = plain - min(ratio * advantage, inside * advantage) / 40 + 0.01 * (p * p.log()).sum() / 40
    torch.testing.assert_close(loss, plain)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, *torch.autograd.grad(plain, logits))
    assert 0 < clipped < 40
    torch.testing.assert_close(stats[3].item(), int(clipped) / 40, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("suite", "critic_steps"), [("mt3", 1), ("LavaGapS7", 4)])
def test_critic_takes_one_step_on_everything_but_minibatches_of_a_single_task(suite, critic_steps):
    config = Config(suite=suite, treatment="dense", ppo=PPOConfig(epochs=2, minibatch=10))
    actor, critic = (learner(config, role, out, PlasticityBuffer()) for role, out in (("actor", 7), ("critic", 1)))
    rollout = collect(EnvPool(SUITES[suite]), actor.network, len(SUITES[suite]), steps=40, seed=0, clock=0)
    fit(actor, critic, rollout, config.ppo, seed=0, clock=0)
    for trained, steps in ((critic, critic_steps), (actor, 8)):
        assert {int(state["step"]) for state in trained.optimizer.state.values()} == {steps}
