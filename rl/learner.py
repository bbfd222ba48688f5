"""Learner: one network with its optimiser and what its treatment does to it."""

from collections.abc import Callable

import torch
from torch import Tensor

import sparsekern as sk
from rl.agents import AGENTS
from rl.buffer import PlasticityBuffer
from rl.config import Config
from rl.envs import SUITES
from rl.seeds import Stream, numpy_generator
from rl.treatments import TREATMENTS


class Learner:
    """An agent's network, built and treated as the configuration says.

    Args:
        role: "actor" or "critic".
        out_features: outputs per observation.
        buffer: the plasticity buffer, for treatments that look at what the neurons do.
    """

    def __init__(self, config: Config, role: str, out_features: int, buffer: PlasticityBuffer):
        seeds = numpy_generator(config.seed, Stream[role.upper()])
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(seeds.integers(2**63)))
            self._parts = TREATMENTS[config.treatment] if config.networks in ("both", role) else ()
            # a dense layer in blocks of 1 is a matrix as it stands
            block_size = config.block_size if self._parts and config.sparse else 1
            self.network = AGENTS[config.agent](len(SUITES[config.suite]), out_features, block_size)
            self.dense_parameters = self.live_parameters()
            for prepare in self._offered("prepare"):
                prepare(self.network, config, role)
        options = {"lr": config.ppo.learning_rate, "fused": True}
        for optimizer_options in self._offered("optimizer_options"):
            options |= optimizer_options(config)
        self.optimizer = torch.optim.Adam(self.network.parameters(), **options)
        seed = int(seeds.integers(2**31))  # another one per network, else actor and critic would grow alike
        self.rules = [
            make_rule(self.network, self.optimizer, config, seed, buffer) for make_rule in self._offered("make_rule")
        ]
        (self._backward,) = self._offered("backward") or [backward]

    def _offered(self, function: str) -> list[Callable]:
        """These functions of the treatment's parts, as far as they have it."""
        return [getattr(part, function) for part in self._parts if hasattr(part, function)]

    def minimise(
        self, loss: Callable[[Tensor], Tensor], rows: Tensor, tasks: Tensor, generator: torch.Generator
    ) -> None:
        """Take one optimiser step.

        Args:
            loss: the mean loss of some of the rows, int64 [M].
            rows, tasks: int64 [N]: all rows of this step, and the task of each.
            generator: for treatments that draw at every step.
        """
        self.optimizer.zero_grad()
        self._backward(self.network, loss, rows, tasks, generator)
        self.optimizer.step()

    def rewire(self, clock: int) -> None:
        """Tell the treatment that `clock` timesteps have passed."""
        for rule in self.rules:
            rule.step(clock=clock)

    def state_dict(self) -> dict:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rules": [rule.state_dict() for rule in self.rules],
        }

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for rule, rule_state in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(rule_state)

    def live_parameters(self) -> int:
        """Parameters that take part: neither slots of dead blocks nor the padding of blocks that stick out."""
        sparse = [m for m in self.network.modules() if isinstance(m, (sk.SparseLinear, sk.SparseConv2d))]
        stored = sum(p.numel() for p in self.network.parameters())
        return stored - sum(m.weight.numel() - int(m.lanes().expand_as(m.weight).sum()) for m in sparse)

    def nbytes(self) -> int:
        """Bytes of weights, gradients, optimiser state and, of sparse layers, coordinates and index."""
        return sk.summary(self.network, self.optimizer).total.total


def backward(network, loss, rows, tasks, generator) -> None:
    """Fill the gradients of the mean loss of all rows: what a treatment's own `backward` stands in for."""
    loss(rows).backward()


def sizes(*learners: Learner) -> dict[str, float]:
    """Parameters and bytes of all networks together, and of the dense networks they stand for."""
    live = sum(learner.live_parameters() for learner in learners)
    dense = sum(learner.dense_parameters for learner in learners)
    return {
        "sparse/live_parameters": live,
        "sparse/dense_parameters": dense,
        "sparse/density": live / dense,
        "sparse/bytes": sum(learner.nbytes() for learner in learners),
        "sparse/dense_bytes": 16 * dense,  # float32: weight, gradient and Adam's two moments
    }
