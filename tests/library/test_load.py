"""load: a sparse model out of a dense one and a saved state, or nothing changed."""

import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk


def build() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.BatchNorm1d(96), nn.Linear(96, 64)),
            "conv": nn.Conv2d(16, 32, 3, groups=2),
            "heads": sk.SparseLinear(2 * 32, 2 * 16, density=1.0, block_size=8, groups=2),
        }
    )


def saved() -> dict:
    model = sk.sparsify(build(), 0.3, {"body*": 16, "*": 4}, exclude=["heads"], modules=(nn.Linear, nn.Conv2d))
    model["heads"].set_density([3, 5])
    return model.state_dict()


def assert_equal(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def test_a_dense_model_becomes_the_sparse_one_that_was_saved(tmp_path):
    torch.save(saved(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    model = build()
    assert sk.load(model, state) is model
    assert type(model["body"][0]) is sk.SparseLinear and type(model["conv"]) is sk.SparseConv2d
    assert_equal(model.state_dict(), state)
    x = torch.randn(5, 64)
    assert torch.equal(sk.load(build(), state)["body"](x), model["body"](x))


def test_a_model_that_is_one_layer_comes_back_sparse():
    state = sk.SparseLinear(64, 32, density=0.5).state_dict()
    assert_equal(sk.load(nn.Linear(64, 32), state).state_dict(), state)


def test_a_sparse_model_takes_the_topology_of_another():
    state = saved()
    assert_equal(sk.load(sk.load(build(), saved()), state).state_dict(), state)


def test_dead_slots_of_a_pruned_model_are_loaded():
    model = sk.SparseLinear(64, 64, density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = sk.GMP(model, optimizer, final_density=0.7, end_step=2, update_every=1, compact=False)
    rule.step(), rule.step()
    assert model.topology.num_live < model.topology.num_slots
    assert_equal(sk.load(nn.Linear(64, 64), model.state_dict()).state_dict(), model.state_dict())


def test_a_tied_weight_need_only_be_there_under_one_name():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(40, 32), "body": nn.Linear(32, 32), "head": nn.Linear(32, 40)})
        model["head"].weight = model["embed"].weight
        return model

    state = sk.sparsify(tied(), 0.5).state_dict()
    del state["head.weight"]
    model = sk.load(tied(), state)
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["head"].weight, state["embed.weight"])


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


BAD = {
    "a key is missing": (lambda s: without(s, "body.2.running_mean"), "Missing key.*body.2.running_mean"),
    "a weight is missing": (lambda s: without(s, "body.0.weight"), "body.0.weight"),
    "a key is unexpected": (lambda s: s | {"head.bias": torch.zeros(3)}, "Unexpected key.*head.bias"),
    "a dense tensor is of another shape": (lambda s: s | {"body.2.bias": torch.zeros(95)}, "size mismatch for body.2"),
    "a sparse bias is of another shape": (
        lambda s: s | {"body.3.bias": torch.zeros(65)},
        "body.3.bias must have shape",
    ),
    "slots are too few": (lambda s: s | {"heads.weight": s["heads.weight"][:7]}, "heads.weight has 7 slots"),
    "a block is out of range": (
        lambda s: s | {"conv.topology.block_cols": s["conv.topology.block_cols"] + 1000},
        "outside",
    ),
    "a layer is not the model's": (
        lambda s: s | {"tail.topology." + k: v for k, v in sk.SparseLinear(64, 64).topology.state_dict().items()},
        "layer 'tail', which the model does not have",
    ),
    "the state is dense": (lambda s: build()["body"].state_dict(), "no sparse layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_state_that_does_not_fit_changes_nothing(case):
    spoil, message = BAD[case]
    state = spoil(saved())
    model = build()
    modules, before = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        sk.load(model, state)
    assert dict(model.named_modules()) == modules
    assert_equal(model.state_dict(), before)


def test_arguments_of_the_wrong_type_are_named():
    with pytest.raises(ValueError, match="load: model must be a torch.nn.Module, got OrderedDict"):
        sk.load(saved(), build())
    with pytest.raises(ValueError, match="load: state_dict must be a mapping of names to tensors, got str"):
        sk.load(build(), "model.pt")


def test_no_warning_is_heard():
    state = saved()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.load(build(), state)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_or_a_group_that_gmp_pruned_away_is_loaded(groups):
    def dense():
        return nn.Sequential(nn.Linear(32, 32), sk.SparseLinear(32, 32, density=1.0, block_size=8, groups=groups))

    model = sk.sparsify(dense(), 1.0, block_size=8)
    with torch.no_grad():
        rows, _ = model[1].topology.layout.coordinates()
        model[1].weight[rows < 4 // groups] = 1e-6  # the first group, which may be all
    rule = sk.GMP(model, torch.optim.SGD(model.parameters(), 0.1), final_density=0.2, end_step=1, update_every=1)
    rule.step()
    alive = model[1].topology.mask().flatten(1).sum(1).tolist()
    assert alive[0] == 0 and model[0].topology.num_live > 0
    loaded = sk.load(dense(), model.state_dict())
    x = torch.randn(5, 32)
    assert torch.equal(loaded(x), model(x))
    for keep in ("fresh", "magnitude"):
        planned = sk.sparsify(dense(), sk.plan_from(model.state_dict()), keep=keep)
        assert planned[1].topology.mask().flatten(1).sum(1).tolist() == alive
        planned(x).sum().backward()
        planned.load_state_dict(model.state_dict())
        assert torch.equal(planned(x), model(x))
