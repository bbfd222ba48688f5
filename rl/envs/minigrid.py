"""The MiniGrid tasks and the suites MT3, MT5 and MT7 made of them."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from minigrid.core.world_object import WorldObj
from minigrid.minigrid_env import MiniGridEnv  # importing minigrid registers its environments with gymnasium
from minigrid.wrappers import ImgObsWrapper


@dataclass(frozen=True)
class Task:
    """One environment; calling it makes one instance, which shows uint8 [7, 7, 3] and takes one of 7 actions."""

    name: str
    """The gymnasium id without `MiniGrid-` and version: the task's name in metrics and tables."""
    optimal_steps: int
    """Length of an optimal episode, in steps (Table 4 of the paper)."""
    max_steps: int
    """Steps after which the environment truncates an episode."""

    def __call__(self) -> gym.Env:
        env = ImgObsWrapper(gym.make(f"MiniGrid-{self.name}-v0", disable_env_checker=True))
        remember_views(env.unwrapped)
        return env

    def score(self, episode_return: float) -> float:
        """The return as a share of what an optimal episode earns: 1 - 0.9 * optimal_steps / max_steps."""
        return episode_return / (1 - 0.9 * self.optimal_steps / self.max_steps)

    def solved(self, episode_return: float) -> bool:
        return episode_return > 0  # only the goal is rewarded


MT3 = (Task("LavaGapS7", 8, 196), Task("RedBlueDoors-6x6", 8, 720), Task("MemoryS11", 15, 605))
MT5 = (*MT3, Task("DoorKey-6x6", 11, 360), Task("DistShift1", 11, 252))
MT7 = (*MT5, Task("SimpleCrossingS9N2", 15, 324), Task("MultiRoom-N2-S4", 5, 40))


_views: dict[bytes, np.ndarray] = {}  # uint8 [7, 7, 3]; a full run meets some thousand, of 300 bytes with their key


def remember_views(env: MiniGridEnv) -> None:
    """Have this environment look up views it has computed before.

    Of a MiniGrid step, 85% goes into computing what the agent sees, in Python loops over cells: 12k steps/s, with this
    75k. A view depends on nothing but the objects in the window before the agent and whether walls block sight.
    """
    compute = env.gen_obs

    def gen_obs() -> dict[str, np.ndarray]:
        left, top, right, bottom = env.get_view_exts()
        first, last = max(left, 0), min(right, env.width)  # beyond the grid all is wall
        key = [env.see_through_walls, env.agent_dir, first - left, last - first, max(top, 0) - top, _code(env.carrying)]
        for y in range(max(top, 0), min(bottom, env.height)):
            key += map(_code, env.grid.grid[y * env.width + first : y * env.width + last])
        key = bytes(key)
        if key not in _views:
            _views[key] = compute()["image"]
            _views[key].flags.writeable = False
        return {"image": _views[key]}

    env.gen_obs = gen_obs


def _code(cell: WorldObj | None) -> int:
    """All that can be seen of an object, in 0..255: one of 11 types, 6 colours, 3 states."""
    if cell is None:
        return 255
    kind, colour, state = cell.encode()
    return (kind * 6 + colour) * 3 + state
