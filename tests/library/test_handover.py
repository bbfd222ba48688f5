"""sparsify(model, optimizer=...): new Parameters take the places of the old ones; copies stay copies."""

import copy
import warnings

import pytest
import torch
from torch import nn, optim

import sparsekern as sk


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Wrapper:
    """As accelerate's and Lightning's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("given", [lambda o: o, Wrapper, lambda o: [Wrapper(o)]], ids=["plain", "wrapped", "list"])
def test_new_parameters_take_the_places_of_the_old_ones_without_state(given):
    model = mlp()
    groups = [{"params": [model[2].weight, model[0].bias]}, {"params": [model[0].weight, model[2].bias], "lr": 0.5}]
    optimizer = optim.Adam(groups, lr=1e-2)
    train(model, optimizer)
    kept = optimizer.state[model[2].weight]["exp_avg"]
    sk.sparsify(model, density=0.5, block_size=8, exclude=["2"], optimizer=given(optimizer))
    places = [[model[2].weight, model[0].bias], [model[0].weight, model[2].bias]]
    for group, expected in zip(optimizer.param_groups, places, strict=True):
        assert list(map(id, group["params"])) == list(map(id, expected))
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert set(optimizer.state) == set(model[2].parameters()) and optimizer.state[model[2].weight]["exp_avg"] is kept
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, steps=60)
    assert not torch.equal(model[0].weight, before)
    assert sk.SET(model, optimizer, update_every=1).step()


def test_names_of_parameters_stay_with_them():
    model = mlp()
    model[2].bias = nn.Parameter(torch.zeros(32))
    optimizer = optim.Adam(model.named_parameters(), lr=1e-2)
    sk.sparsify(model, density=0.5, block_size=8, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], map(id, group["params"]), strict=True)) == {
        name: id(p) for name, p in model.named_parameters()
    }


def test_a_bias_that_two_layers_shared_is_trained_in_both():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    optimizer = optim.SGD(model.named_parameters(), 0.1)
    sk.sparsify(model, density=0.5, block_size=8, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert sorted(map(id, group["params"])) == sorted(map(id, model.parameters()))
    assert len(group["param_names"]) == 4


def test_a_layer_that_is_sparse_already_keeps_its_parameter_and_loses_its_state():
    model = sk.sparsify(mlp(), density=1.0, block_size=8)
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer)
    weight = model[0].weight
    sk.sparsify(model, density=0.3, block_size=8, optimizer=optimizer)
    assert model[0].weight is weight and not optimizer.state
    train(model, optimizer)


class Keeping(optim.SGD):
    """Keeps a list of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, params):
        super().__init__(params, 0.1)
        self.parts = {0: [list(self.param_groups[0]["params"])]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: optim.SGD(m[0].parameters(), 0.1), "does not hold the weight of layer '2'"),
        (lambda m: Keeping(m.parameters()), "Keeping also keeps '0.weight' in its attribute 'parts'"),
        (lambda m: optim.LBFGS(m.parameters()), "state of LBFGS is not element-wise"),
        (lambda m: m.parameters(), "must be a torch optimiser.*got generator"),
        (lambda m: [], "empty list"),
    ],
    ids=["another", "keeping", "lbfgs", "parameters", "empty"],
)
def test_an_optimiser_that_cannot_take_the_new_parameters_is_refused_before_anything_changes(make, message):
    model = mlp()
    optimizer = make(model)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        sk.sparsify(model, density=0.5, block_size=8, optimizer=optimizer)
    assert list(model.modules()) == modules
    if isinstance(optimizer, optim.Optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(any(p is own for own in model.parameters()) for p in held)


def test_a_frozen_layer_needs_no_optimiser():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = optim.SGD(model[2].parameters(), 0.1)
    sk.sparsify(model, density=0.5, block_size=8, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[2].parameters()]


# An online network and its copy


def online_and_target(make) -> nn.ModuleDict:
    online = make()
    return nn.ModuleDict({"online": online, "target": copy.deepcopy(online).requires_grad_(False).eval()})


def same_topology(one, other):
    return all(torch.equal(getattr(one.topology, n), getattr(other.topology, n)) for n in ("block_rows", "block_cols"))


@pytest.mark.parametrize("keep", ["fresh", "random"])
@pytest.mark.parametrize("start", ["dense", "sparse"])
def test_an_online_network_and_its_copy_stay_equal(keep, start):
    make = mlp if start == "dense" else lambda: sk.sparsify(mlp(), density=0.9, block_size=8)
    model = online_and_target(make)
    # 0.3 of 144 blocks: of the copies of one layer, one gets a block more by the plan's rounding
    plan = sk.plan(model, density=0.3, block_size=8, distribution="uniform")
    assert len({layer.live for layer in plan.layers}) > 2
    sk.sparsify(model, plan, keep=keep)
    x = torch.randn(4, 64)
    assert torch.equal(model["online"](x), model["target"](x))
    for index in (0, 2):
        online, target = model["online"][index], model["target"][index]
        assert same_topology(online, target)
        assert online.weight.requires_grad and not target.weight.requires_grad and not target.training
        assert online.weight.data_ptr() != target.weight.data_ptr()
    sk.SET(model["online"], optim.SGD(model["online"].parameters(), 0.1), followers=[model["target"]])


def test_convolutions_and_groups_stay_equal_to_their_copies():
    model = online_and_target(lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.ReLU()))
    sk.sparsify(model, density=0.3, block_size=4, modules=[nn.Conv2d], keep="fresh")
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(model["online"](x), model["target"](x))


def test_layers_of_other_weights_density_or_keep_are_no_copies():
    model = online_and_target(mlp)
    with torch.no_grad():
        model["target"][0].weight[-1, -1] += 1
    sk.sparsify(model, density={"online.2": 0.3, "target.2": 0.6, "*": 0.3}, block_size=8, keep="fresh")
    assert not same_topology(model["online"][0], model["target"][0])
    assert model["target"][2].topology.num_live > model["online"][2].topology.num_live
    model = online_and_target(mlp)
    sk.sparsify(model, density=0.3, block_size=8, keep={"target*": "random", "*": "fresh"})
    assert not same_topology(model["online"][0], model["target"][0])


def test_a_bias_that_a_dense_layer_uses_too_stays_with_its_state():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].bias = model[0].bias
    model[0].gain = nn.Parameter(torch.ones(3))  # which no sparse layer has
    optimizer = optim.Adam(model.parameters())
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()
    shared = model[1].bias
    sk.sparsify(model, 0.5, block_size=8, exclude=["1"], optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert model[1].bias is shared and model[0].bias is not shared
    assert held >= {id(p) for p in model.parameters()}
    assert optimizer.state[shared]["exp_avg"].any() and model[0].bias not in optimizer.state


@pytest.mark.parametrize("rule", [sk.SET, sk.RigL])
def test_a_rule_goes_on_after_its_layers_got_another_topology_with_the_optimiser(rule):
    model = nn.Sequential(sk.SparseLinear(32, 32, density=0.5, block_size=8))
    optimizer = optim.Adam(model.parameters())
    rule = rule(model, optimizer, update_every=2)

    def train():
        model.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        rule.step()

    for _ in range(3):
        train()
    sk.sparsify(model, 0.25, block_size=8, optimizer=optimizer)
    for _ in range(4):
        train()
    assert rule.events == 3 and rule.stats()["0"]["live"] == 4
    sk.sparsify(model, 0.25, block_size=8, keep="fresh")
    with pytest.raises(RuntimeError, match="still holds the state of the old blocks"):
        train()
