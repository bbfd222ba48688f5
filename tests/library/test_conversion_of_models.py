"""sparsify among optimisers, copies, other people's layers and torch's fused paths."""

import copy
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


class Wrapper:
    """As accelerate's: shows the groups of the optimiser inside."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapper, lambda o: [o]], ids=["plain", "wrapped", "list"])
def test_an_optimizer_that_was_built_before_trains_the_new_parameters(wrap):
    model = mlp()
    optimizer = torch.optim.Adam([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    sk.sparsify(model, density=0.3, block_size=8, exclude=["2"], optimizer=wrap(optimizer))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert set(optimizer.state) == set(model[2].parameters()) and optimizer.param_groups[0]["lr"] == 0.1
    rule, before = sk.SET(model, optimizer, update_every=1), model[0].weight.detach().clone()
    model(torch.randn(4, 64)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert rule.step() and not torch.equal(before, model[0].weight)


def test_a_sparse_layer_of_another_density_keeps_its_parameter_and_loses_its_state():
    model = sk.sparsify(mlp(), density=1.0, block_size=8)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    weight = model[0].weight
    sk.sparsify(model, density=0.3, block_size=8, optimizer=optimizer)
    assert model[0].weight is weight and weight not in optimizer.state


def test_an_optimizer_that_trains_replaced_parameters_is_told_once():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sk.sparsify(model, density=0.3, block_size=8)
    with pytest.warns(
        UserWarning, match="SGD, which took a step now, holds the weight that layer '0' and of 1 more had"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("keep", ["fresh", "random", "magnitude"])
@pytest.mark.parametrize("first", [lambda m: m, lambda m: sk.sparsify(m, density=1.0, block_size=8)])
def test_copies_stay_copies(keep, first):
    online = first(mlp())
    both = nn.ModuleDict({"online": online, "target": copy.deepcopy(online).requires_grad_(False)})
    sk.sparsify(both, density=0.3, block_size=8, keep=keep)
    x = torch.randn(3, 64)
    torch.testing.assert_close(both["online"](x), both["target"](x), rtol=0, atol=0)
    for index in (0, 2):
        pair = (both["online"][index], both["target"][index])
        assert torch.equal(*(layer.topology.block_rows for layer in pair))
        assert [layer.weight.requires_grad for layer in pair] == [True, False]
    optimizer = torch.optim.SGD(both["online"].parameters(), 0.1)
    sk.SET(both["online"], optimizer, followers=[both["target"]])


def test_layers_that_start_at_zero_are_no_copies():
    model = mlp()
    model.append(nn.Linear(64, 64)).append(nn.Linear(64, 64))
    for layer in (model[3], model[4]):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    sk.sparsify(model, density=0.3, block_size=8, keep="random")
    assert not torch.equal(model[3].topology.block_rows, model[4].topology.block_rows)


def test_a_model_without_a_layer_to_convert_says_so_and_lists_what_it_has():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 16), "mix": nn.Bilinear(8, 8, 8), "norm": nn.LayerNorm(8)})
    reasons = {layer.name: layer.reason for layer in sk.plan(model).layers}
    assert reasons == {"embedding": "it is of type Embedding", "mix": "it is of type Bilinear"}
    with pytest.warns(UserWarning, match="nothing became sparse.*it is of type Bilinear; it is of type Embedding"):
        sk.sparsify(model)


class Conv1D(nn.Module):
    """As transformers': y = x W + b, with W [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_of_transformers_becomes_sparse_where_transformers_is_in_use(monkeypatch):
    model = nn.Sequential(Conv1D(48, 32), Conv1D(16, 48))
    assert [layer.live for layer in sk.plan(model).layers] == [(), ()]
    utilities = types.ModuleType("transformers.pytorch_utils")
    utilities.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", utilities)
    x, dense = torch.randn(3, 32), copy.deepcopy(model)
    sk.sparsify(model, density=1.0, block_size=8)
    assert isinstance(model[0], sk.SparseLinear) and model[0].in_features == 32
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


def test_the_conv1d_that_transformers_has_becomes_sparse():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.pytorch_utils import Conv1D as Theirs

    model = nn.ModuleDict({"expand": Theirs(64, 32), "shrink": Theirs(32, 64)})
    x, dense = torch.randn(2, 3, 32), copy.deepcopy(model)
    assert [layer.shape for layer in sk.plan(model, 0.5, 8).layers] == [(64, 32), (32, 64)]
    sk.sparsify(model, density=1.0, block_size=8)
    for name, y in (("expand", x), ("shrink", torch.randn(2, 3, 64))):
        assert isinstance(model[name], sk.SparseLinear)
        torch.testing.assert_close(model[name](y), dense[name](y), rtol=1e-4, atol=1e-4)


def test_what_is_inside_of_a_layer_is_not_listed_beside_it():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    for model in (layer, nn.Sequential(layer)):
        assert [one.reason for one in sk.plan(model).layers] == ["its weight is computed from other parameters"]


def test_only_patterns_that_were_given_are_said_to_fit_nothing():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        sk.sparsify(nn.Sequential(nn.ReLU()), 0.3, 8)
    assert [str(one.message) for one in heard] == ["sparsify: nothing became sparse (no layer was found)"]


def test_a_layer_without_elements_stays_and_the_others_become_sparse():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 0), nn.Linear(0, 8), nn.Embedding(0, 8))
    reasons = [layer.reason for layer in sk.plan(model, 0.3, 8).layers]
    assert reasons == ["", "its weight is empty", "its weight is empty", "it is of type Embedding"]
    assert isinstance(sk.sparsify(model, 0.3, 8)[0], sk.SparseLinear)


def test_a_mask_with_values_settles_the_topology_of_a_model_on_meta():
    mask = torch.rand(4, 4) < 0.5
    mask[0, 0] = True
    model = sk.sparsify(nn.Sequential(nn.Linear(32, 32, device="meta")), 0.3, 8, keep=mask)
    assert model[0].weight.is_meta and model[0].topology.num_slots == int(mask.sum())


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = nn.Sequential(*sk.sparsify(mlp(), density=0.5, block_size=8), nn.Linear(32, 64))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    masks = (torch.ones(3, 3, dtype=torch.bool), torch.zeros(64, 32, dtype=torch.bool), "nothing")
    for mask in masks:
        with pytest.raises(ValueError, match="keep"):
            sk.sparsify(model, density=0.2, block_size=8, keep={"3": mask, "*": "magnitude"})
        assert list(model.modules()) == modules
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("place", ["sparsify", "by hand"])
def test_the_fused_path_of_an_encoder_layer_stands_back_and_comes_back(place, monkeypatch):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    fused = []
    own = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(1) or own(*a))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        layer(x)
        assert fused.pop()
        if place == "sparsify":
            sk.sparsify(layer, 0.5, 8)
        else:
            layer.linear1 = sk.SparseLinear.from_linear(layer.linear1, 0.5, 8)
        y = layer(x)
        assert not fused
        torch.testing.assert_close(sk.densify(layer)(x), y, rtol=1e-4, atol=1e-5)
        assert fused


def test_an_encoder_gets_its_nested_tensors_back():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    assert encoder.use_nested_tensor
    assert not sk.sparsify(encoder, 0.5).use_nested_tensor
    assert not sk.sparsify(encoder, 0.4).use_nested_tensor
    assert sk.densify(encoder).use_nested_tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("place", [(0, "linear1"), (1, "linear2")], ids=str)
def test_an_encoder_takes_padded_sequences_with_a_layer_that_was_placed_by_hand(place):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    layer, name = encoder.layers[place[0]], place[1]
    setattr(layer, name, sk.SparseLinear.from_linear(getattr(layer, name), 0.5, 8))
    dense = sk.densify(copy.deepcopy(encoder))
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    assert encoder.use_nested_tensor
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y, expected = (model(x, src_key_padding_mask=padding)[~padding] for model in (encoder, dense))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_a_layer_of_nested_tensors_has_the_values_and_gradients_of_their_parts(layout):
    layer, parts = sk.SparseLinear(32, 16, density=0.5, block_size=8), [torch.randn(n, 32) for n in (3, 1, 4)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout))
    assert y.is_nested and y.layout == layout
    sum(one.square().sum() for one in y.unbind()).backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    expected = layer(torch.cat(parts))
    torch.testing.assert_close(torch.cat(y.unbind()), expected)
    expected.square().sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad)


@pytest.mark.parametrize("block_size", [1, 8])
def test_the_flop_counter_counts_live_blocks(block_size):
    layer = sk.SparseLinear(64, 32, density=0.25, block_size=block_size)
    x = torch.randn(5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * layer.weight.numel()


@pytest.mark.parametrize("block_size", [1, 8])
def test_the_flop_counter_counts_groups_that_are_ragged_by_their_average(block_size):
    layer = sk.SparseLinear(64, 32, density=0.25, block_size=block_size, groups=2)
    x, group = torch.randn(6, 32, requires_grad=True), torch.tensor([0, 1, 1, 0, 1, 0])
    with FlopCounterMode(display=False) as counter:
        layer(x, group=group).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * layer.weight.numel()  # three tokens for each of the two groups
