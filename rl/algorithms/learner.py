"""Learner: one network with its optimiser and what its treatment does to it."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn

import sparsekern as sk
from rl.config import Config
from rl.seeds import Stream, numpy_generator
from rl.treatments import TREATMENTS
from rl.treatments.context import Buffer, Context


class Learner:
    """An agent's network, built and treated as the configuration says.

    Args:
        role: "actor" or "critic".
        make_network: the dense network, its grouped layers in blocks of the size that it is called with.
        buffer: the plasticity buffer, for treatments that look at what the neurons do.
        adam: arguments of Adam; a treatment may add its own.
        max_gradient_norm: gradients of all parameters together are scaled down to this norm; None: they are not.
        with_target: keep `target`, a copy of the network that follows its topology.
    """

    def __init__(
        self,
        config: Config,
        role: str,
        make_network: Callable[[int], nn.Module],
        buffer: Buffer,
        adam: dict,
        max_gradient_norm: float | None = None,
        with_target: bool = False,
        device: str = "cpu",
    ):
        seeds = numpy_generator(config.seed, Stream[role.upper()])
        first_values, of_treatment = int(seeds.integers(2**63)), int(seeds.integers(2**31))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(first_values)
            self._parts = TREATMENTS[config.treatment] if config.networks in ("both", role) else ()
            # a dense layer in blocks of 1 is a matrix as it stands
            self.network = make_network(config.block_size if self._parts and config.sparse else 1)
            self.dense_parameters = self.live_parameters()
            context = Context(config, role, self.network, of_treatment, buffer)
            for prepare in self._offered("prepare"):
                prepare(context)
        self.network.to(device)
        self.target = deepcopy(self.network).requires_grad_(False) if with_target else None
        options = {"fused": True} | adam
        for optimizer_options in self._offered("optimizer_options"):
            options |= optimizer_options(config)
        self.optimizer = torch.optim.Adam(self.network.parameters(), **options)
        self._max_gradient_norm = max_gradient_norm
        self.buffer = buffer
        context.optimizer, context.followers = self.optimizer, [self.target] if with_target else []
        self.rules = [make_rule(context) for make_rule in self._offered("make_rule")]
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
        if self._max_gradient_norm is not None:
            scale_down([p.grad for p in self.network.parameters()], self._max_gradient_norm)
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
            "target": self.target and self.target.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        if self.target:
            self.target.load_state_dict(state["target"])
        load_optimizer(self.optimizer, state["optimizer"])
        for rule, rule_state in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(rule_state)

    def live_parameters(self) -> int:
        """Parameters that take part: neither slots of dead blocks nor the padding of blocks that stick out."""
        sparse = [m for m in self.network.modules() if isinstance(m, (sk.SparseLinear, sk.SparseConv2d))]
        stored = sum(p.numel() for p in self.network.parameters())
        return stored - sum(m.weight.numel() - int(m.lanes().expand_as(m.weight).sum()) for m in sparse)

    def nbytes(self) -> int:
        """Bytes of weights, gradients, optimiser state, target and, of sparse layers, coordinates and index."""
        target = sk.summary(self.target).total.total if self.target else 0
        return sk.summary(self.network, self.optimizer).total.total + target

    def dense_nbytes(self) -> int:
        """The same of the dense network, in float32: weight, gradient, Adam's two moments, target."""
        return (20 if self.target else 16) * self.dense_parameters


def backward(network, loss, rows, tasks, generator) -> None:
    """Fill the gradients of the mean loss of all rows: what a treatment's own `backward` stands in for."""
    value = loss(rows)
    value.backward(one(value.device))


@cache
def one(device: torch.device) -> Tensor:
    """The gradient of a loss with respect to itself, which `backward` would make anew every time."""
    return torch.ones((), device=device)


@torch.no_grad()
def scale_down(gradients: list[Tensor], norm: float) -> None:
    """Scale gradients down, where they are larger, to this norm of all together; in fewer kernels than PyTorch's."""
    torch._foreach_div_(gradients, nn.utils.get_total_norm(gradients).clamp_(min=norm))
    if norm != 1:
        torch._foreach_mul_(gradients, norm)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load what an optimiser has gathered; its options stay as the settings and this device want them."""
    optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})


def sizes(*learners: Learner) -> dict[str, float]:
    """Parameters and bytes of all networks together, and of the dense networks they stand for."""
    live = sum(learner.live_parameters() for learner in learners)
    dense = sum(learner.dense_parameters for learner in learners)
    return {
        "sparse/live_parameters": live,
        "sparse/dense_parameters": dense,
        "sparse/density": live / dense,
        "sparse/bytes": sum(learner.nbytes() for learner in learners),
        "sparse/dense_bytes": sum(learner.dense_nbytes() for learner in learners),
    }
