"""Meta-World's MT10: ten tasks of one robot arm, with continuous actions and rewards."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np

from rl.envs.workers import Workers

STEPS = 500  # of an episode; the step at which Meta-World truncates it
OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (49,), np.float32)  # 39 of arm, objects and goal, then the task one-hot
ACTIONS = gym.spaces.Box(-1, 1, (4,), np.float32)  # where the hand moves, and how hard the gripper closes


@dataclass(frozen=True)
class Task:
    """One environment; calling it makes one instance, which shows float32 [49] and takes float32 [4] in [-1, 1].

    Reward version 2, as there is no third. Success does not end an episode, until `toggle_terminate_on_success(True)`.
    """

    name: str
    """Meta-World's name without version: the task's name in metrics and tables."""
    cost: float
    """Microseconds of a step with random actions, measured on a 4-core EPYC: only ratios matter, for sharing out."""

    def __call__(self, seed: int) -> gym.Env:
        """Make an environment whose 50 goals are drawn from this seed; `reset(seed=)` decides in which order they come.

        Raises:
            RuntimeError: Meta-World is not installed.
        """
        require_metaworld()
        from metaworld import make_mt_envs

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precision lowered by casting")  # of bounds that are not used
            env = make_mt_envs(
                f"{self.name}-v3",
                seed=seed,
                env_id=MT10.index(self),
                num_tasks=len(MT10),
                use_one_hot=True,
                reward_function_version="v2",
                terminate_on_success=False,
            )
        look_at_contacts_at_once(env.unwrapped)
        return Seeded(env)


MT10 = (
    Task("reach", 207),
    Task("push", 262),
    Task("pick-place", 277),
    Task("door-open", 200),
    Task("drawer-open", 158),
    Task("drawer-close", 148),
    Task("button-press-topdown", 133),
    Task("peg-insert-side", 261),
    Task("window-open", 143),
    Task("window-close", 149),
)  # in Meta-World's order, which is that of the one-hot


class Seeded(gym.Wrapper):
    """Lets `reset(seed=)` seed what the goals are drawn from, which Meta-World does not, and shows float32."""

    observation_space = OBSERVATIONS  # Meta-World's has the bounds of a hidden goal
    action_space = ACTIONS

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.unwrapped.seed(seed)
        observation, info = self.env.reset(options=options)
        return observation.astype(np.float32), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, *rest = self.env.step(action)
        return observation.astype(np.float32), *rest


def look_at_contacts_at_once(env: gym.Env) -> None:
    """Have this environment ask for all contacts in one call whether the gripper touches something.

    Half of a step of push and pick-place goes into Meta-World's loops over them: 540 microseconds, with this 270.
    """
    data = env.data

    def touching_object(object_geom_id: int) -> bool:
        pairs, addresses = data.contact.geom, data.contact.efc_address
        of_object = (pairs == object_geom_id).any(1)

        def force(pad: str) -> float:
            return sum(data.efc_force[addresses[of_object & (pairs == data.geom(pad).id).any(1)]])

        return force("leftpad_geom") > 0 and force("rightpad_geom") > 0

    env.touching_object = touching_object


def make_mt10(seed: int, num_workers: int) -> Workers:
    """The ten environments of a run, in worker processes; `infos["success"]` says for each whether the task is solved.

    Args:
        seed: of the run; each environment has 50 goals of its own, and its own stream to draw one at every reset.
        num_workers: processes to spread them over, 1 to 10.
    """
    require_metaworld()
    costs = [task.cost for task in MT10]
    return Workers(makers(seed), OBSERVATIONS, ACTIONS, num_workers, costs, info=("success",))


def makers(seed: int) -> dict[str, Callable[[], gym.Env]]:
    """What makes each environment of the run with this seed, by the task's name."""
    from rl.seeds import Stream, numpy_generator  # here, because workers import this file and do without torch

    seeds = numpy_generator(seed, Stream.GOALS).integers(2**31, size=len(MT10)).tolist()
    return {task.name: partial(task, of_task) for task, of_task in zip(MT10, seeds, strict=True)}


def require_metaworld() -> None:
    """Raise RuntimeError if Meta-World cannot be imported."""
    try:
        import metaworld  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"suite mt10 needs Meta-World, but {error.name} is missing: pip install 'sparsekern[metaworld]'"
        ) from error
