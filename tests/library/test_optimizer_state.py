import copy
from functools import partial

import pytest
import torch
from oracle import random_topology
from torch import nn, optim

import sparsekern as sk
from sparsekern.backends.reference import densify, gather


class Lion(optim.Optimizer):
    """An element-wise optimiser that torch does not have: the sign of an interpolated momentum."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_(torch.sign(0.9 * momentum + 0.1 * p.grad), alpha=-group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


ADAM = {"lr": 0.02, "weight_decay": 0.1}
OPTIMIZERS = {
    "SGD": partial(optim.SGD, lr=0.1, weight_decay=0.1),
    "SGD momentum": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD nesterov": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "Adam": partial(optim.Adam, **ADAM),
    "Adam amsgrad": partial(optim.Adam, amsgrad=True, **ADAM),
    "AdamW foreach": partial(optim.AdamW, foreach=True, **ADAM),
    "AdamW fused": partial(optim.AdamW, fused=True, amsgrad=True, **ADAM),
    "NAdam": partial(optim.NAdam, decoupled_weight_decay=True, **ADAM),
    "RAdam": partial(optim.RAdam, **ADAM),
    "Adamax": partial(optim.Adamax, **ADAM),
    "Adagrad": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.5),
    "Adagrad fused": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.5, fused=True),
    "Adadelta": partial(optim.Adadelta, lr=0.1),
    "RMSprop centered": partial(optim.RMSprop, lr=0.02, centered=True, momentum=0.9),
    "Rprop": partial(optim.Rprop, lr=0.03),
    "ASGD": partial(optim.ASGD, lr=0.1, t0=2),
    "Lion": Lion,
}
# What a fresh optimiser holds where that is not zero.
FRESH = {"sum": 0.5, "step_size": 0.03}

RULES = {
    "SET": partial(sk.SET, update_every=3, drop_fraction=0.4),
    "GMP": partial(sk.GMP, update_every=3, end_step=18, final_density=0.1),
}


def state_of(optimizer, param) -> dict:
    return {k: v for k, v in optimizer.state[param].items() if torch.is_tensor(v) and v.shape == param.shape}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_with_rewires_equals_a_masked_dense_layer_bit_for_bit(kind, rule):
    layer = sk.SparseLinear(32, 40, topology=random_topology((5, 4), 8, live=0.7), bias=False)
    dense = nn.Parameter(densify(layer.weight.detach(), layer.topology.layout))
    optimizer, reference = OPTIMIZERS[kind]([layer.weight]), OPTIMIZERS[kind]([dense])
    rule = RULES[rule](layer, optimizer)
    events, ident = 0, id(layer.weight)
    for _ in range(21):
        gradient = torch.randn_like(dense)
        layer.weight.grad = gather(gradient, layer.topology.layout)
        dense.grad = densify(layer.weight.grad, layer.topology.layout)
        optimizer.step()
        reference.step()
        before = layer.topology.mask()
        events += rule.step()
        stays = (before & layer.topology.mask()).repeat_interleave(8, 1).repeat_interleave(8, 2)
        with torch.no_grad():
            dense.masked_fill_(~stays, 0)
            for name, value in state_of(reference, dense).items():
                value.masked_fill_(~stays, FRESH.get(name, 0))
        assert id(optimizer.param_groups[0]["params"][0]) == ident
        layout = layer.topology.layout
        assert torch.equal(densify(layer.weight.detach(), layout), dense)
        ours, theirs = state_of(optimizer, layer.weight), state_of(reference, dense)
        assert ours.keys() == theirs.keys()
        live = layer.topology.block_rows >= 0
        for name in ours:
            assert torch.equal(ours[name][live], gather(theirs[name], layout)[live]), name
        assert not layer.weight[~live].any()
    assert events >= 6


@pytest.mark.parametrize("rule", RULES)
def test_a_rewire_before_the_first_step_and_without_gradients_leaves_a_fresh_optimiser(rule):
    layer = sk.SparseLinear(32, 40, topology=random_topology((5, 4), 8, live=0.7))
    optimizer = optim.Adagrad(layer.parameters(), initial_accumulator_value=0.5)
    rule = RULES[rule](layer, optimizer)
    assert [rule.step() for _ in range(3)] == [False, False, True]
    layer(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert [rule.step() for _ in range(3)] == [False, False, True]
    assert layer.weight.grad is None
    layer(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["sum"].shape == layer.weight.shape


def test_a_rewire_resets_the_gradient_of_the_rewired_slots_only():
    layer = sk.SparseLinear(32, 40, topology=random_topology((5, 4), 8, live=0.5))
    rule = sk.SET(layer, optim.SGD(layer.parameters(), 0.1), update_every=1)
    layer(torch.randn(4, 32)).square().sum().backward()
    before, rows, cols = layer.weight.grad.clone(), layer.topology.block_rows.clone(), layer.topology.block_cols.clone()
    rule.step()
    rewired = (rows != layer.topology.block_rows) | (cols != layer.topology.block_cols)
    assert rewired.any() and not layer.weight.grad[rewired].any()
    assert torch.equal(layer.weight.grad[~rewired], before[~rewired])


def test_two_parameter_groups_keep_their_own_fresh_values():
    model = nn.ModuleList(sk.SparseLinear(16, 16, density=0.5, block_size=4) for _ in range(2))
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model, (0.01, 0.02), strict=True)]
    optimizer = optim.Rprop(groups)
    rule = sk.SET(model, optimizer, update_every=1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    p = [layer.topology.mask() for layer in model]
    optimizer.state[model[0].weight]["step_size"].fill_(9)
    optimizer.state[model[1].weight]["step_size"].fill_(9)
    rule.step()
    for layer, lr, before in zip(model, (0.01, 0.02), p, strict=True):
        assert not torch.equal(layer.topology.mask(), before)
        steps = optimizer.state[layer.weight]["step_size"]
        assert set(steps.flatten().tolist()) == {9.0, torch.tensor(lr).item()}


@pytest.mark.parametrize("kind", ["Adafactor", "LBFGS", "SparseAdam", "Muon"])
def test_optimisers_that_are_not_element_wise_are_refused(kind):
    layer = sk.SparseLinear(16, 16, density=0.5, block_size=4)
    optimizer = object.__new__(getattr(optim, kind))  # Muon would refuse the parameters before we do
    optimizer.param_groups = [{"params": list(layer.parameters())}]
    with pytest.raises(ValueError, match=f"{kind}.*not element-wise.*AdamW"):
        sk.SET(layer, optimizer)


@pytest.mark.parametrize(
    "state", [torch.zeros(8, 4), torch.zeros(8, 4, 4, dtype=torch.uint8), torch.zeros(8)], ids=["row", "8-bit", "scale"]
)
def test_factored_and_quantised_state_is_refused_with_what_to_do(state):
    layer = sk.SparseLinear(16, 16, density=0.5, block_size=4)
    optimizer = optim.Adam(layer.parameters())
    optimizer.state[layer.weight]["compressed"] = state
    before = copy.deepcopy(layer.state_dict())
    rule = sk.SET(layer, optimizer, update_every=1)
    with pytest.raises(ValueError, match="'compressed'.*factored or quantised.*AdamW"):
        rule.step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_reset_state_makes_chosen_elements_fresh():
    model = nn.ModuleDict({"sparse": sk.SparseLinear(14, 15, density=0.5, block_size=4), "dense": nn.Linear(4, 3)})
    optimizer = optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {name: optimizer.state[p]["sum"] for name, p in model.named_parameters()}
    neurons = torch.zeros(15, 14, dtype=torch.bool)
    neurons[5] = True
    sk.reset_state(optimizer, model["sparse"], neurons)
    rows = torch.full((15, 14), 1.5).masked_fill(neurons, 0.5)
    layout = model["sparse"].topology.layout
    padded = torch.full((1, 16, 16), 1.5)
    padded[0, :15, :14] = rows
    live = (layout.block_rows >= 0)[:, None, None]
    assert torch.equal(state["sparse.weight"], torch.where(live, gather(padded, layout), 1.5))
    sk.reset_state(optimizer, model["dense"].bias, torch.tensor([True, False, False]))
    assert state["dense.bias"].tolist() == [0.5, 1.5, 1.5]
    assert (state["dense.weight"] == 1.5).all() and (state["sparse.bias"] == 1.5).all()
    with pytest.raises(ValueError, match=r"Adagrad does not hold.*\(3, 4\)"):
        sk.reset_state(optimizer, nn.Linear(4, 3), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask.*\(3, 5\).*\(3, 4\)"):
        sk.reset_state(optimizer, model["dense"], torch.ones(3, 5, dtype=torch.bool))
