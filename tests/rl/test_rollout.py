"""rl/algorithms/rollout.py: what a rollout says happened, against the networks and environments themselves."""

import numpy as np
import torch

from rl.agents import MTPPO
from rl.agents.policy import Policy
from rl.algorithms.rollout import collect_minigrid, episode_sums
from rl.envs import SUITES
from rl.envs.pool import EnvPool

TASKS = SUITES["mt3"]


def test_rollout_keeps_what_was_seen_and_how_the_actor_answered():
    torch.manual_seed(0)
    actor = MTPPO(num_tasks=3, out_features=7, block_size=1)
    rollout = collect_minigrid(EnvPool(TASKS), actor, num_tasks=3, steps=200, seed=0, clock=0)
    assert len(rollout.observations) < 400  # of 600: the rest had been seen before

    seen, following = rollout.observations[rollout.seen], rollout.next_observations
    assert torch.equal(rollout.tasks[rollout.seen], torch.arange(3).expand(200, 3))
    ended = (rollout.terminated | rollout.cut)[:-1]
    assert torch.equal(seen[1:][~ended], following[:-1][~ended])
    assert ended.any() and rollout.cut[-1].logical_xor(rollout.terminated[-1]).all()
    task = torch.arange(3).repeat(200)
    torch.testing.assert_close(rollout.logits[rollout.seen].flatten(0, 1), actor(seen.flatten(0, 1), task))


def test_actions_are_drawn_from_the_softmax_of_the_logits():
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    policy = Policy(lambda observations, task: logits.expand(len(task), 3))
    rows = policy.rows(np.zeros((1, 2), np.uint8), [0]) * 20_000
    frequency = np.bincount(policy.act(rows, np.random.default_rng(0)), minlength=3) / 20_000
    np.testing.assert_allclose(frequency, logits[0].softmax(-1), atol=0.01)


def test_the_same_view_of_two_tasks_is_two_questions():
    policy = Policy(lambda observations, task: torch.eye(3)[task])
    views = np.zeros((4, 2), np.uint8)
    views[3] = 1
    assert policy.rows(views, [0, 1, 0, 0]) == [0, 1, 0, 2]
    assert policy.tasks == [0, 1, 0]


def test_returns_are_of_whole_episodes_only():
    rewards, ended = np.array([1.0, 2, 4, 8, 16]), np.array([False, True, True, False, False])
    of_tasks = episode_sums(np.stack([rewards, rewards], axis=1), np.stack([ended, np.zeros(5, bool)], axis=1))
    assert of_tasks == [[3, 4], []]
