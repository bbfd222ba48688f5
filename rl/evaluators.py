"""Evaluators: processes that play MT10's evaluations with a copy of the policy, while the learner goes on.

Every process has the ten environments and plays some of the episodes of every task, asking its own copy of the policy.
So none waits for another, and a policy sees the ten rows that it sees where one process plays all episodes.
"""

import ctypes
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawValue

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from rl.config import Config
from rl.envs.metaworld import ACTIONS, OBSERVATIONS, makers
from rl.envs.workers import SameProcess, processes
from rl.episodes import evaluate_mt10

Makers = Mapping[str, Callable[[], gym.Env]]
Act = Callable[[nn.Module, np.ndarray], np.ndarray]


def mt10_evaluators(config: Config, act: Act) -> "Evaluators | None":
    """Those that this run asks for."""
    if config.evaluators == 0:
        return None
    return Evaluators(makers(config.seed), act, config.episodes, config.evaluators)


class Evaluators:
    """Processes that play evaluations; they start at once, and wait for the first.

    Args:
        tasks: what makes the environment of each, by its name (picklable).
        act: what is asked for actions, with the policy and observations [num_tasks, ...] (picklable).
        episodes: of each task.
        number: of processes; those beyond the number of episodes would have nothing to play, and are not started.
    """

    def __init__(self, tasks: Makers, act: Act, episodes: int, number: int):
        self._tasks = tuple(tasks)
        self._shares = [len(share) for share in np.array_split(range(episodes), min(number, episodes))]
        self._evaluators = [_Evaluator(tasks, act) for _ in self._shares]
        self._closed = False

    def play(self, policy: nn.Module, seed: int, clock: int) -> tuple[np.ndarray, np.ndarray]:
        """What `evaluate_mt10` returns, whatever the number of processes.

        Raises:
            RuntimeError: a process died, at the task that is named; the others are ended.
        """
        packed, first = pickle.dumps(policy), 0
        for evaluator, share in zip(self._evaluators, self._shares, strict=True):
            evaluator.send((packed, share, seed, clock, first))
            first += share
        results = {}
        while len(results) < len(self._evaluators):
            waiting = {e.connection: e for e in self._evaluators if e not in results}
            for connection in wait(list(waiting)):
                evaluator = waiting[connection]
                try:
                    results[evaluator] = connection.recv()
                except (EOFError, OSError):
                    self._fail(evaluator)
        parts = (results[evaluator] for evaluator in self._evaluators)
        return tuple(np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True))

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._closed = True
        for evaluator in self._evaluators:
            evaluator.process.kill()
        for evaluator in self._evaluators:
            evaluator.process.join()

    def _fail(self, evaluator: "_Evaluator") -> None:
        if self._closed:
            raise RuntimeError("Evaluators: closed during an evaluation") from None
        evaluator.process.join(timeout=5)  # its pipe closes a moment before it is gone
        code, task = evaluator.process.exitcode, evaluator.task.value
        self.close()
        where = "before it played" if task < 0 else f"at task {self._tasks[task]}"
        message = f"Evaluators: the process of an evaluation died {where} with exit code {code}"
        raise RuntimeError(message + ("; its error is printed above" if code == 1 else "")) from None


class _Evaluator:
    """The learner's end of one process."""

    def __init__(self, tasks: Makers, act: Act):
        self.connection, theirs = processes.Pipe()
        self.task = RawValue("i", -1)
        precision = torch.get_float32_matmul_precision()
        self.process = processes.Process(target=_serve, args=(theirs, self.task, tasks, act, precision), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead process reads as end of file here

    def send(self, job: tuple) -> None:
        try:
            self.connection.send(job)
        except OSError:  # it died; what waits for its answer finds that out, and says where
            pass


def _serve(connection: Connection, task: ctypes.c_int, tasks: Makers, act: Act, precision: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to handle; it ends this process
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
    envs = SameProcess(tasks, OBSERVATIONS, ACTIONS, info=("success",), at=task)
    while True:
        try:
            packed, *job = connection.recv()
        except EOFError:  # the learner closed, or died
            return
        policy = pickle.loads(packed)

        def act_while_wanted(observations: np.ndarray, policy: nn.Module = policy) -> np.ndarray:
            if connection.poll():  # nothing is sent during an evaluation: the learner died
                os._exit(0)
            return act(policy, observations)

        share, seed, clock, first = job
        connection.send(evaluate_mt10(envs, act_while_wanted, share, seed, clock, first))
