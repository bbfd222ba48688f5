"""Weights that get gradients and are trained by nobody are told of, once; whatever is meant so is not."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks

import sparsekern as sk
from sparsekern.untrained import PASSES

ENOUGH = PASSES + 3


def forgotten(layers=1):
    """A model whose optimiser was given something else."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    return sk.sparsify(model, density=0.5, block_size=4), optim.SGD(nn.Linear(16, 16).parameters(), 0.1)


def before_sparsify(layers=1):
    """A model whose optimiser was built too early."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    optimizer = optim.SGD(model.parameters(), 0.1)
    return sk.sparsify(model, density=0.5, block_size=4), optimizer


def warnings_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert {w.filename for w in caught} <= {__file__}
    return [str(w.message) for w in caught]


def backward(model, passes=1):
    for _ in range(passes):
        model(torch.randn(4, 16)).square().mean().backward()


def train(model, *optimizers, steps=ENOUGH):
    for _ in range(steps):
        backward(model)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def hooks(layer):
    return len(layer.weight._post_accumulate_grad_hooks or ())


@pytest.mark.parametrize("layers", [1, 3])
def test_an_optimiser_that_does_not_hold_the_weights_is_told_of_once(layers):
    model, optimizer = forgotten(layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train(model, optimizer, steps=2 * ENOUGH)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1
    assert "never changed, and SGD" in messages[0] and "after sparsify(model)" in messages[0]
    assert caught[0].filename == __file__
    assert not any(map(hooks, model))
    assert not _global_optimizer_post_hooks


OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, 1e-3),
    "foreach": lambda p: optim.AdamW(p, foreach=True),
    "rprop": lambda p: optim.Rprop(p),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_that_is_trained_is_watched_until_its_first_change_only(kind):
    layer = sk.SparseLinear(16, 16, density=0.5, block_size=4)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    backward(layer)
    assert hooks(layer) == 1
    optimizer.step()
    backward(layer)
    assert hooks(layer) == 0


def test_a_fused_optimiser_which_leaves_version_counters_alone_ends_the_watch_later(recwarn):
    layer = sk.SparseLinear(16, 16, density=0.5, block_size=4)
    train(layer, optim.AdamW(layer.parameters(), fused=True))
    assert hooks(layer) == 0 and not recwarn.list


class Data(optim.Optimizer):
    """Writes to `.data`, which leaves version counters as they were."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.01)


class Master(Data):
    """Trains a copy of the parameters and writes it back, as loss-scaling wrappers for 16 bits do."""

    def __init__(self, params):
        self.pairs = [(p, p.detach().clone()) for p in params]
        super().__init__([master for _, master in self.pairs])

    def step(self):
        for p, master in self.pairs:
            master.grad = p.grad
        super().step()
        for p, master in self.pairs:
            p.data.copy_(master)


def test_what_is_meant_so_gives_no_warning(recwarn):
    make = lambda: sk.SparseLinear(16, 16, density=0.5, block_size=4)  # noqa: E731
    layer = make()
    optimizer = optim.SGD(layer.parameters(), 0.1)
    backward(layer, ENOUGH)  # accumulation of gradients
    optimizer.step()
    train(layer, optimizer)
    for kind in (Data, Master):
        layer = make()
        train(layer, kind(list(layer.parameters())))
    seen = make()
    backward(seen, ENOUGH)  # saliency: there is no optimiser
    del seen
    frozen, head = make().requires_grad_(False), nn.Linear(16, 16)
    train(nn.Sequential(frozen, head), optim.SGD(head.parameters(), 0.1))
    with torch.no_grad():  # a rollout beside an optimiser that trains something else
        for _ in range(ENOUGH):
            frozen(torch.randn(4, 16))
    actor, critic = make(), make()  # the actor's loss gives the critic gradients, and each has its optimiser
    optimizers = [optim.Adam(actor.parameters()), optim.Adam(critic.parameters())]
    train(nn.Sequential(actor, critic), *optimizers)
    moved = make()
    backward(moved, PASSES)
    moved.zero_grad()
    moved.to(torch.float64)
    train(head, optim.SGD(head.parameters(), 0.1), steps=1)
    late = make()
    backward(late, PASSES)
    late.requires_grad_(False)  # frozen when it has become a suspect
    train(head, optim.SGD(head.parameters(), 0.1), steps=1)
    gone = make()
    backward(gone, PASSES)
    del gone, moved, late
    gc.collect()
    assert not _global_optimizer_post_hooks
    train(head, optim.SGD(head.parameters(), 0.1), steps=2)
    assert not [str(w.message) for w in recwarn if "sparse" in str(w.message)]


def test_a_compiled_model_is_watched_as_an_eager_one():
    model, optimizer = forgotten()
    with pytest.warns(UserWarning, match="never changed"):
        train(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer)


def test_a_watched_layer_can_be_copied_moved_and_made_in_inference_mode():
    layer = sk.SparseLinear(16, 16, density=0.5, block_size=4)
    backward(layer)
    assert hooks(copy.deepcopy(layer)) == 0
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.zero_grad()
        layer.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.inference_mode():
        sk.SparseLinear(16, 16, density=0.5, block_size=4)


@pytest.mark.parametrize(("layers", "named"), [(1, "layer '0' had"), (3, "layer '0' and of 2 more had")])
def test_an_optimiser_built_before_sparsify_is_told_of_at_its_first_step_and_never_again(layers, named):
    model, optimizer = before_sparsify(layers)
    first = warnings_of(lambda: train(model, optimizer, steps=1))
    assert len(first) == 1 and first[0].startswith("SGD") and named in first[0]
    assert warnings_of(lambda: train(model, optimizer, steps=2 * ENOUGH)) == []
    assert not any(map(hooks, model))
    optimizer.param_groups.clear()
    gc.collect()
    assert not _global_optimizer_post_hooks


def test_an_optimiser_that_trains_the_new_weights_too_is_left_in_peace():
    model, optimizer = before_sparsify(2)
    optimizer.add_param_group({"params": list(model.parameters())})
    head = nn.Linear(16, 16)
    assert warnings_of(lambda: train(model.append(head), optimizer, optim.SGD(head.parameters(), 0.1))) == []


def test_weights_that_were_frozen_or_whose_model_is_gone_are_nobody_s_worry():
    frozen = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False).append(nn.Linear(16, 8))
    optimizer = optim.SGD(frozen.parameters(), 0.1)
    sk.sparsify(frozen, density=0.5, block_size=4, exclude=["1"])
    gone, other = before_sparsify()
    del gone
    assert warnings_of(optimizer.step) + warnings_of(other.step) == []


def test_a_replaced_weight_leaves_no_hook_behind():
    model, optimizer = before_sparsify()
    assert len(_global_optimizer_post_hooks) == 1
    del optimizer
    assert not _global_optimizer_post_hooks
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)  # refuses weights that something else refers to
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
