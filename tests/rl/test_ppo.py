"""rl/algorithms, ppo and train_ppo: advantages by hand, and the policy's loss against its definition."""

import math

import pytest
import torch

from rl.algorithms.buffer import PlasticityBuffer
from rl.algorithms.ppo import gae, policy_loss
from rl.algorithms.rollout import collect_minigrid
from rl.algorithms.train_ppo import chosen, fit, make_learner
from rl.config import Config, PPOConfig
from rl.envs import SUITES
from rl.envs.pool import EnvPool


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
    actor, critic = (make_learner(config, role, out, PlasticityBuffer()) for role, out in (("actor", 7), ("critic", 1)))
    rollout = collect_minigrid(EnvPool(SUITES[suite]), actor.network, len(SUITES[suite]), steps=40, seed=0, clock=0)
    fit(actor, critic, rollout, config.ppo, seed=0, clock=0)
    for trained, steps in ((critic, critic_steps), (actor, 8)):
        assert {int(state["step"]) for state in trained.optimizer.state.values()} == {steps}


def test_fit_minimises_the_losses_of_plain_ppo_first_of_the_critic_then_of_the_actor(monkeypatch):
    config = Config(suite="mt3", treatment="dense", ppo=PPOConfig(epochs=2, minibatch=30))
    actor, critic = (make_learner(config, role, out, PlasticityBuffer()) for role, out in (("actor", 7), ("critic", 1)))
    steps, tasks = 90, 3
    rollout = collect_minigrid(EnvPool(SUITES["mt3"]), actor.network, tasks, steps, seed=0, clock=0)
    assert rollout.terminated.any()

    # transition by transition, from the networks as they are before the fit
    advantages, targets, old = torch.zeros(3, steps, tasks)
    with torch.no_grad():
        for task in range(tasks):
            seen = rollout.observations[rollout.seen[:, task]]
            which = torch.full((steps,), task)
            values, following = (
                critic.network(o, which).squeeze(1) for o in (seen, rollout.next_observations[:, task])
            )
            old[:, task] = actor.network(seen, which).log_softmax(1)[range(steps), rollout.actions[:, task]]
            for t in range(steps):
                weight = 1.0
                for k in range(t, steps):
                    ended = bool(rollout.terminated[k, task])
                    error = rollout.rewards[k, task] + (0 if ended else 0.99 * following[k]) - values[k]
                    advantages[t, task] += weight * error
                    weight *= 0.99 * 0.95
                    if ended or rollout.cut[k, task]:
                        break
            targets[:, task] = values + advantages[:, task]
            spread = advantages[:, task].pow(2).mean() - advantages[:, task].mean() ** 2
            advantages[:, task] = (advantages[:, task] - advantages[:, task].mean()) / spread.sqrt()

    def plain_critic(t, task):
        values = critic.network(rollout.observations[rollout.seen[t, task]], task).squeeze(1)
        return (values - targets[t, task]).pow(2).mean()

    def plain_actor(t, task):
        log_probs = actor.network(rollout.observations[rollout.seen[t, task]], task).log_softmax(1)
        ratio = (log_probs[range(len(t)), rollout.actions[t, task]] - old[t, task]).exp()
        gain = torch.minimum(ratio * advantages[t, task], ratio.clamp(0.8, 1.2) * advantages[t, task])
        return -gain.mean() - 0.01 * torch.distributions.Categorical(logits=log_probs).entropy().mean()

    steps_taken = []

    def comparing(name, learner, plain):
        minimise = learner.minimise

        def minimise_both(loss, rows, of_task, generator):
            t, task = rows // tasks, rows % tasks
            assert torch.equal(of_task, task)
            torch.testing.assert_close(loss(rows), plain(t, task), rtol=1e-4, atol=1e-5)
            steps_taken.append((name, len(rows), sorted(rows.tolist())))
            minimise(loss, rows, of_task, generator)

        monkeypatch.setattr(learner, "minimise", minimise_both)

    comparing("critic", critic, plain_critic)
    comparing("actor", actor, plain_actor)
    fit(actor, critic, rollout, config.ppo, seed=0, clock=0)
    assert [step[:2] for step in steps_taken] == [("critic", 270)] + 6 * [("actor", 90)]
    for first in (1, 4):  # every epoch is all transitions, shuffled anew
        assert sorted(sum((rows for *_, rows in steps_taken[first : first + 3]), [])) == list(range(270))
    assert steps_taken[1] != steps_taken[4]
