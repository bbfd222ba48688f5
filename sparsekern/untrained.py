"""A warning for sparse weights that no optimiser trains, as when the optimiser was built before sparsify(model)."""

import warnings
import weakref
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

PASSES = 50
"""Backward passes that leave a weight as it was before it is suspected."""


def watch(weight: nn.Parameter) -> None:
    """Warn if `weight` gets gradients but no optimiser changes it.

    Costs a few comparisons of host integers in each backward pass up to the first change, and nothing from then on.
    After `PASSES` backward passes without a change the next step of an optimiser decides: accumulating gradients,
    evaluating and rolling out never warn, since an optimiser that holds the weight, or none at all, takes that step.
    """
    if not weight.is_inference():
        _Watch(weight)


def settle(weight: nn.Parameter) -> None:
    """Say nothing more of a weight; something else has told that it is not trained."""
    for hook in (weight._post_accumulate_grad_hooks or {}).values():
        if isinstance(hook, _Watch):
            hook.settle()


class _Watch:
    def __init__(self, weight: nn.Parameter):
        self.passes = 0
        # neither holds the weight: torch.utils.swap_tensors, which `Module.to` may use, wants it free of references
        self.hooks = [weight.register_post_accumulate_grad_hook(self)]

    def __call__(self, weight: Tensor) -> None:
        if self.passes == 0:
            self.version = weight._version
        if self.passes == PASSES // 2:  # not before: a weight that is trained keeps no copy of a block
            self.sample = weight.detach()[:1].clone()
        if weight._version != self.version:
            return self.stop()
        self.passes += 1
        if self.passes == PASSES:
            self.stop()  # what has no optimiser at all pays for no more passes
            after_step = partial(self.judge, weakref.ref(weight, lambda _: self.stop()))
            self.hooks.append(register_optimizer_step_post_hook(after_step))

    def judge(self, reference: weakref.ref, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        weight = reference()
        if weight is None or self.version is None or not weight.requires_grad:
            return
        moved = (weight.device, weight.dtype) != (self.sample.device, self.sample.dtype)
        held = any(p is weight for group in optimizer.param_groups for p in group["params"])
        # a wrapper that trains a copy of the weights may write to `.data`, which leaves the version as it was
        changed = moved or weight._version != self.version or not torch.equal(self.sample, weight.detach()[:1])
        if not held and not changed:
            warnings.warn(
                f"the weight of a sparse layer got gradients in {PASSES} backward passes and never changed, and "
                f"{type(optimizer).__name__}, which took a step now, does not hold it; build the optimiser after "
                "sparsify(model), from model.parameters(), or freeze the layer with requires_grad_(False)",
                stacklevel=4,
            )
        self.settle()
        self.hooks.append(weight.register_post_accumulate_grad_hook(self))

    def settle(self) -> None:
        # the next backward pass removes the hooks, since the hook that runs now may not remove itself
        self.passes, self.version = max(1, self.passes), None

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
