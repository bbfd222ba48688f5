"""EnvPool: many environments stepped in lock-step, spread over processes that share memory."""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple, Self

import gymnasium as gym
import numpy as np

# spawn, not fork: a forked child inherits torch's thread pools in whatever state they are
_processes = multiprocessing.get_context("spawn")


class Step(NamedTuple):
    """What one step of N environments returned; all arrays are copies, the caller's to keep."""

    observations: np.ndarray  # [N, ...]; of the next episode where one ended
    rewards: np.ndarray  # float64 [N]
    terminated: np.ndarray  # bool [N]: the episode ended because of what happened in it
    truncated: np.ndarray  # bool [N]: it ran out of time
    final_observations: np.ndarray  # [N, ...]; the last ones of the episodes that ended, stale elsewhere


class EnvPool:
    """Environments of one kind of observation and action, addressed by their index.

    Environment i lives in process i % num_processes. Process 0 is the caller's own: it steps its share while the others
    step theirs, so a pool of one process costs no communication. An environment whose episode ends resets itself.

    Args:
        makers: one function per environment that makes it; picklable where num_processes > 1.
        num_processes: 1 or more.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env]], num_processes: int = 1):
        if num_processes < 1:
            raise ValueError(f"EnvPool: num_processes must be at least 1, got {num_processes}")
        num_processes = min(num_processes, len(makers))
        shares = [range(p, len(makers), num_processes) for p in range(num_processes)]
        self._envs = {i: makers[i]() for i in shares[0]}
        self.observation_space = self._envs[0].observation_space
        self.action_space = self._envs[0].action_space
        self._shared = _Shared(len(makers), self.observation_space, self.action_space)
        self._workers = [_Worker({i: makers[i] for i in share}, self._shared) for share in shares[1:]]

    def reset(self, indices: Sequence[int], seeds: np.ndarray) -> np.ndarray:
        """Start a new episode in each of these environments, from its seed; returns observations [N, ...]."""
        self._shared["seeds"][indices] = seeds
        self._run(b"reset", indices)
        return self._shared["observations"][indices]

    def step(self, indices: Sequence[int], actions: np.ndarray) -> Step:
        """Step these environments, each with its action."""
        self._shared["actions"][indices] = actions
        self._run(b"step", indices)
        return Step(*(self._shared[name][indices] for name in Step._fields))

    def _run(self, command: bytes, indices: Sequence[int]) -> None:
        self._shared["active"][:] = False
        self._shared["active"][indices] = True
        for worker in self._workers:
            worker.send(command)
        _COMMANDS[command](self._envs, self._shared)
        for worker in self._workers:
            worker.wait()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Shared:
    """Arrays with one row per environment, in memory that all processes see."""

    def __init__(self, num_envs: int, observation_space: gym.Space, action_space: gym.Space):
        observation = (observation_space.shape, observation_space.dtype)
        layout = {
            "active": ((), bool),
            "seeds": ((), np.int64),
            "actions": (action_space.shape, action_space.dtype),
            "observations": observation,
            "final_observations": observation,
            "rewards": ((), np.float64),
            "terminated": ((), bool),
            "truncated": ((), bool),
        }
        self._fields = {}
        for name, (shape, dtype) in layout.items():
            shape, dtype = (num_envs, *shape), np.dtype(dtype)
            self._fields[name] = (RawArray("b", int(np.prod(shape)) * dtype.itemsize), shape, dtype)
        self._view()

    def _view(self) -> None:
        self._arrays = {name: np.frombuffer(raw, d).reshape(s) for name, (raw, s, d) in self._fields.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __getstate__(self):
        return self._fields  # a view would be pickled by value, the raw memory is passed on

    def __setstate__(self, fields) -> None:
        self._fields = fields
        self._view()


def _reset(envs: dict[int, gym.Env], shared: _Shared) -> None:
    for i in _active(envs, shared):
        shared["observations"][i], _ = envs[i].reset(seed=int(shared["seeds"][i]))


def _step(envs: dict[int, gym.Env], shared: _Shared) -> None:
    for i in _active(envs, shared):
        # tolist: an environment compares a plain number faster than a NumPy scalar
        observation, reward, terminated, truncated, _ = envs[i].step(shared["actions"][i].tolist())
        if terminated or truncated:
            shared["final_observations"][i] = observation
            observation, _ = envs[i].reset()
        shared["observations"][i] = observation
        shared["rewards"][i], shared["terminated"][i], shared["truncated"][i] = reward, terminated, truncated


_COMMANDS = {b"reset": _reset, b"step": _step}


def _active(envs: dict[int, gym.Env], shared: _Shared) -> Iterable[int]:
    active = shared["active"].tolist()
    return (i for i in envs if active[i])


class _Worker:
    """The caller's end of one worker process."""

    def __init__(self, makers: dict[int, Callable[[], gym.Env]], shared: _Shared):
        self._connection, theirs = _processes.Pipe()
        self._name = f"the process of environments {list(makers)}"
        self._process = _processes.Process(target=_serve, args=(theirs, makers, shared), daemon=True)
        self._process.start()
        theirs.close()  # so that a dead worker reads as end of file here

    def send(self, command: bytes) -> None:
        try:
            self._connection.send_bytes(command)
        except (BrokenPipeError, ConnectionResetError):
            self._fail()

    def wait(self) -> None:
        try:
            self._connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            self._fail()

    def _fail(self) -> None:
        self._process.join()
        code = self._process.exitcode
        raise RuntimeError(f"EnvPool: {self._name} died with exit code {code}; what it said is above") from None

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, makers: dict[int, Callable[[], gym.Env]], shared: _Shared) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle; its end of the pipe then closes
    envs = {i: make() for i, make in makers.items()}
    while True:
        try:
            command = connection.recv_bytes()
        except EOFError:
            return
        _COMMANDS[command](envs, shared)
        connection.send_bytes(b"done")
