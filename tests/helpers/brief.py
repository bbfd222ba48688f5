"""Environments of MT10's shapes whose episodes are brief, for processes that import this file."""

import time
from functools import partial

import gymnasium as gym
import numpy as np
import torch

from rl.envs.metaworld import ACTIONS, OBSERVATIONS

TASKS = tuple(f"task {i}" for i in range(10))


class Brief(gym.Env):
    """An episode draws its goal and its length when it begins; what happens in it depends on the actions.

    kind: "slow" for one that never ends, "failing" for one whose step raises.
    """

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def __init__(self, kind: str):
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=49).astype(np.float32)
        self.left = int(self.np_random.integers(2, 9))
        return self.state, {}

    def step(self, action):
        if self.kind == "failing":
            raise ValueError("this task fails")
        if self.kind == "slow":
            time.sleep(1e-3)
        else:
            self.left -= 1
        self.state = np.roll(self.state, 1) + np.float32(np.pad(action, (0, 45)))
        reward = float(np.square(self.state).mean())
        return self.state, reward, False, self.left == 0, {"success": float(reward > 1)}

    def toggle_terminate_on_success(self, on: bool):
        pass


def brief_mt10(kind: str = "", failing: str | None = None) -> dict:
    return {name: partial(Brief, "failing" if name == failing else kind) for name in TASKS}


def act_by_precision(policy, observations: np.ndarray) -> np.ndarray:
    return np.full((len(observations), 4), float(torch.get_float32_matmul_precision() == "high"), np.float32)
