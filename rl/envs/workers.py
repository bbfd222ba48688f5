"""Workers: environments spread over processes that step them while the caller does something else.

Why not gymnasium's AsyncVectorEnv: it has one process per environment and pickles every info, so that MT10 in 4 places
at once runs at half the speed of one process alone; it steps all environments or none; and when a process dies it says
"Connection reset by peer".
"""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray, RawValue
from multiprocessing.synchronize import Semaphore
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

AWAKE = 2e-3  # seconds: a step of a fourth of MT10 takes 0.5 ms, acting 0.3 to 1.5
CHECK = 0.2  # seconds between two looks whether the other process lives
# spawn, not fork: a forked child inherits torch's thread pools in whatever state they are, and others' pipes
processes = multiprocessing.get_context("spawn")


class Workers(VectorEnv):
    """N environments in worker processes, which share memory with the caller; one whose episode ends resets itself.

    Processes start in the background; the first call waits for them. All arrays returned are copies, the caller's to
    keep.

    Args:
        makers: for each environment its name, and what makes it (picklable).
        observation_space, action_space: of one environment; boxes.
        num_workers: processes, 1 to N.
        costs: relative time of a step of each environment, by which they are shared out; None: all alike.
        info: names of the numbers in the environments' infos that are wanted.

    Any call raises RuntimeError, and ends all processes, when it finds that one has died.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        makers: Mapping[str, Callable[[], gym.Env]],
        observation_space: gym.spaces.Box,
        action_space: gym.spaces.Box,
        num_workers: int,
        costs: Sequence[float] | None = None,
        info: Sequence[str] = (),
    ):
        self.names, self.num_envs, self.info = tuple(makers), len(makers), tuple(info)
        if not 1 <= num_workers <= self.num_envs:
            raise ValueError(f"Workers: num_workers must be in 1..{self.num_envs}, got {num_workers}")
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        self._shared = _Shared(self.num_envs, observation_space, action_space, self.info)
        self._stepping = False
        self._workers: list[_Worker] = []
        for share in share_out(costs or [1.0] * self.num_envs, num_workers):
            self._workers.append(_Worker({i: (self.names[i], makers[self.names[i]]) for i in share}, self._shared))

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode everywhere; observations [N, ...].

        Args:
            seed: one per environment, from which all that happens in it then follows; an int stands for seed + index.
                None: every environment goes on with its stream.
        """
        if isinstance(seed, int | np.integer):
            seed = range(seed, seed + self.num_envs)
        seeds = [None] * self.num_envs if seed is None else [int(s) for s in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(f"Workers.reset: {self.num_envs} environments need one seed each, got {len(seeds)}")
        self._run("reset", seeds, options)
        return self._shared["observations"].copy(), {}

    def step(self, actions: np.ndarray, mask: np.ndarray | None = None) -> tuple:
        """`step_async`, then `step_wait`."""
        self.step_async(actions, mask)
        return self.step_wait()

    def step_async(self, actions: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Have the environments begin a step.

        Args:
            actions: [N, ...]; copied.
            mask: bool [N], which environments to step; None: all. The others keep their observation, and get reward 0.
        """
        self._require_idle("step_async")
        self._shared["actions"][:] = actions
        self._shared["active"][:] = True if mask is None else mask
        self._shared.calling.value = False
        for worker in self._workers:
            worker.asked.release()
        self._stepping = True

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Wait for the step to end.

        Returns:
            observations [N, ...] to act on now, of a new episode where one ended; rewards float64 [N]; terminated and
            truncated, bool [N]; infos: "final_obs" [N, ...], what the actions led to: the last observation of its
            episode where one ended ("_final_obs", bool [N]), else the same as in observations; and float32 [N] for each
            name in `info`, of the step just taken.
        """
        if not self._stepping:
            raise NoAsyncCallError("Workers.step_wait: no step was begun by step_async", "step")
        self._stepping = False
        for worker in self._workers:
            while not worker.stepped.acquire(timeout=CHECK):  # asleep: awake, it would take a worker's core
                if not worker.process.is_alive():
                    self._fail(worker)
        return self._shared.after_step()

    def call(self, name: str, *args: Any) -> tuple:
        """Call a method of every environment, or of one of its wrappers; results in order."""
        return self._run("call", name, args)

    def get_attr(self, name: str) -> tuple:
        """An attribute of every environment, or of one of its wrappers; in order."""
        return self._run("get_attr", name)

    def close_extras(self, **_) -> None:
        self._shared.calling.value = True
        for worker in self._workers:
            worker.connection.close()  # it reads the end of the file, and returns
            worker.asked.release()
        for worker in self._workers:
            worker.end()

    def _run(self, command: str, *args: Any) -> tuple:
        self._require_idle(command)
        self._shared.calling.value = True
        results = {}
        try:
            for worker in self._workers:
                worker.asked.release()
                worker.connection.send((command, *args))
            for worker in self._workers:
                results |= worker.connection.recv()
        except (EOFError, OSError):
            self._fail(worker)
        return tuple(results[i] for i in range(self.num_envs))

    def _require_idle(self, command: str) -> None:
        if self.closed:
            raise ClosedEnvironmentError(f"Workers.{command}: the environments were closed")
        if self._stepping:
            raise AlreadyPendingCallError(f"Workers.{command}: a step is under way, call step_wait first", "step")

    def _fail(self, worker: "_Worker") -> None:
        worker.process.join(timeout=5)  # its pipe closes a moment before it is gone
        code = worker.process.exitcode
        self.close()
        message = f"Workers: the process of {', '.join(worker.names)} died with exit code {code}"
        raise RuntimeError(message + ("; its error is printed above" if code == 1 else "")) from None


class SameProcess:
    """Environments in this process, with those calls of `Workers` that an evaluation makes.

    Args:
        makers, observation_space, action_space, info: as of Workers.
        at: where the index of the environment that is at work is noted, for whoever wants to know where it failed.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], gym.Env]],
        observation_space: gym.spaces.Box,
        action_space: gym.spaces.Box,
        info: Sequence[str],
        at: ctypes.c_int,
    ):
        self.num_envs, self._at = len(makers), at
        self._shared = _Shared(self.num_envs, observation_space, action_space, tuple(info))
        self._envs = {}
        for i, make in enumerate(makers.values()):
            at.value = i
            self._envs[i] = make()

    def reset(self, *, seed: Sequence[int] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """As Workers.reset."""
        self._run(_reset, [None] * self.num_envs if seed is None else [int(s) for s in seed], None)
        return self._shared["observations"].copy(), {}

    def step(self, actions: np.ndarray, mask: np.ndarray) -> tuple:
        """As Workers.step."""
        self._shared["actions"][:], self._shared["active"][:] = actions, mask
        self._run(_step)
        return self._shared.after_step()

    def call(self, name: str, *args: Any) -> tuple:
        """As Workers.call."""
        return tuple(result for results in self._run(_call, name, args) for result in results.values())

    def _run(self, command: Callable, *args: Any) -> list:
        results = []
        for i, env in self._envs.items():
            self._at.value = i
            results.append(command({i: env}, self._shared, *args))
        return results


def acquire(semaphore: Semaphore, timeout: float) -> bool:
    """As semaphore.acquire; awake for a while, because a process that sleeps takes about as long to wake as to step."""
    sleepy = time.perf_counter() + AWAKE
    while time.perf_counter() < sleepy:
        if semaphore.acquire(block=False):
            return True
        os.sched_yield()  # there may be more processes than cores
    return semaphore.acquire(timeout=timeout)


def share_out(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """Indices of each share, such that the costliest share costs little: the costliest first, each to the least yet."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(shares, key=lambda share: (sum(costs[j] for j in share), len(share))).append(i)
    return [sorted(share) for share in shares]


class _Shared:
    """Arrays with one row per environment, in memory that all processes see."""

    def __init__(
        self, num_envs: int, observation_space: gym.spaces.Box, action_space: gym.spaces.Box, info: Sequence[str]
    ):
        observation = (observation_space.shape, observation_space.dtype)
        layout = {
            "active": ((), bool),
            "actions": (action_space.shape, action_space.dtype),
            "observations": observation,
            "final_obs": observation,
            "rewards": ((), np.float64),
            "terminated": ((), bool),
            "truncated": ((), bool),
        } | dict.fromkeys(info, ((), np.float32))
        self.info = info
        self.calling = RawValue("b", False)  # what the workers are asked for: what the pipe says, or a step
        self._fields = {}
        for name, (shape, dtype) in layout.items():
            shape, dtype = (num_envs, *shape), np.dtype(dtype)
            self._fields[name] = (RawArray("b", int(np.prod(shape)) * dtype.itemsize), shape, dtype)
        self._view()

    def _view(self) -> None:
        self._arrays = {name: np.frombuffer(raw, d).reshape(s) for name, (raw, s, d) in self._fields.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def after_step(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """What Workers.step_wait returns."""
        found = {name: self[name].copy() for name in ("final_obs", *self.info)}
        rewards, terminated, truncated = (self[name].copy() for name in ("rewards", "terminated", "truncated"))
        infos = found | {"_final_obs": terminated | truncated}
        return self["observations"].copy(), rewards, terminated, truncated, infos

    def __getstate__(self):
        return self.info, self.calling, self._fields  # a view would be pickled by value, the raw memory is passed on

    def __setstate__(self, state) -> None:
        self.info, self.calling, self._fields = state
        self._view()


class _Worker:
    """The caller's end of one worker process."""

    def __init__(self, named_makers: dict[int, tuple[str, Callable[[], gym.Env]]], shared: _Shared):
        self.names = [name for name, _ in named_makers.values()]
        self.connection, theirs = processes.Pipe()
        self.asked, self.stepped = processes.Semaphore(0), processes.Semaphore(0)
        makers = {i: make for i, (_, make) in named_makers.items()}
        self.process = processes.Process(
            target=_serve, args=(theirs, self.asked, self.stepped, makers, shared), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a dead worker reads as end of file here

    def end(self) -> None:
        self.process.join(timeout=5)
        if self.process.is_alive():  # it hangs, or is still making its environments
            self.process.kill()
            self.process.join()


def _serve(
    connection: Connection,
    asked: Semaphore,
    stepped: Semaphore,
    makers: dict[int, Callable[[], gym.Env]],
    shared: _Shared,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; its end of the pipe then closes
    envs = {i: make() for i, make in makers.items()}
    while True:
        # asked comes before a message, so a pipe with something to read, unasked, is at its end: the caller died
        while not acquire(asked, CHECK):
            if connection.poll() and not asked.acquire(block=False):
                return
        if not shared.calling.value:
            _step(envs, shared)
            stepped.release()
            continue
        try:
            command, *args = connection.recv()
            connection.send(_COMMANDS[command](envs, shared, *args))
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the caller closed, or died
            return


def _reset(envs: dict[int, gym.Env], shared: _Shared, seeds: list[int | None], options: dict | None) -> dict:
    for i, env in envs.items():
        shared["observations"][i], _ = env.reset(seed=seeds[i], options=options)
    return dict.fromkeys(envs)


def _step(envs: dict[int, gym.Env], shared: _Shared) -> None:
    for i, env in envs.items():
        reward, terminated, truncated = 0.0, False, False
        if shared["active"][i]:
            observation, reward, terminated, truncated, info = env.step(shared["actions"][i].copy())
            shared["final_obs"][i] = observation
            for name in shared.info:
                shared[name][i] = info[name]
            shared["observations"][i] = env.reset()[0] if terminated or truncated else observation
        shared["rewards"][i], shared["terminated"][i], shared["truncated"][i] = reward, terminated, truncated


def _call(envs: dict[int, gym.Env], shared: _Shared, name: str, args: Iterable) -> dict:
    return {i: env.get_wrapper_attr(name)(*args) for i, env in envs.items()}


def _get_attr(envs: dict[int, gym.Env], shared: _Shared, name: str) -> dict:
    return {i: env.get_wrapper_attr(name) for i, env in envs.items()}


_COMMANDS = {"reset": _reset, "call": _call, "get_attr": _get_attr}
