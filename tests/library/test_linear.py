from functools import partial

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_topology, topologies
from torch import nn
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.rewire.growth import GrowthScores


@given(topologies(), st.booleans(), st.integers(0, 5))
def test_a_layer_equals_linear_with_its_dense_matrix(topology, bias, tokens):
    out, into = topology.shape
    layer = sk.SparseLinear(into, out, bias, topology=topology, dtype=torch.float64)
    x = torch.randn(tokens, 2, into, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("growth", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_output_is_contiguous_as_that_of_linear(backend, block_size, groups, growth):
    layer = sk.SparseLinear(30, 18, density=0.3, block_size=block_size, groups=groups)
    layer.growth = GrowthScores(layer.topology) if growth else None
    for x in (torch.ones(4, 6, 30), torch.ones(6, 4, 30).transpose(0, 1), torch.ones(4, 60)[:, ::2], torch.ones(30)):
        assert layer(x).is_contiguous()
    assert layer(torch.randn(5, 30 // groups), group=torch.zeros(5, dtype=torch.int64)).is_contiguous()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (0,), ()])
def test_group_ids_send_each_token_through_its_group(block_size, shape):
    layer = sk.SparseLinear(4 * 10, 4 * 6, density=0.4, block_size=block_size, groups=4, dtype=torch.float64)
    group = torch.randint(0, 3, shape).to(torch.int32)  # the last group stays empty
    x = torch.randn(*shape, 10, dtype=torch.float64, requires_grad=True)
    dense = layer.to_dense().requires_grad_()
    blocks = torch.stack([dense[6 * g : 6 * g + 6, 10 * g : 10 * g + 10] for g in range(4)])
    expected = torch.einsum("...oi,...i->...o", blocks[group.long()], x) + layer.bias.view(4, 6)[group.long()]
    y, dy = layer(x, group=group), torch.randn(*shape, 6, dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dx, dw, db = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    expected_dx, dense_dw, expected_db = torch.autograd.grad(expected, (x, dense, layer.bias), dy)
    per_group = torch.stack([dense_dw[6 * g : 6 * g + 6, 10 * g : 10 * g + 10] for g in range(4)])
    expected_dw = torch.from_numpy(oracle.gather_blocks(per_group.numpy(), layer.topology))
    for actual, truth in ((dx, expected_dx), (dw, expected_dw), (db, expected_db)):
        torch.testing.assert_close(actual, truth, rtol=0, atol=1e-12)


def test_equal_groups_give_the_same_with_and_without_group_ids():
    layer = sk.SparseLinear(3 * 8, 3 * 4, density=0.5, block_size=4, groups=3, dtype=torch.float64)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    by_ids = layer(x, group=torch.arange(3).expand(5, 3))
    torch.testing.assert_close(by_ids.flatten(1), layer(x.flatten(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "ids", [[], [2], [0, 0, 2, 2], [2, 1, 2, 0, 1], [3, 0, 3, 0, 3, 0]], ids=["none", "one", "sorted", "mixed", "turns"]
)
def test_tokens_are_ordered_by_group_in_cpp_as_torch_orders_them(ids):
    group = torch.tensor(ids, dtype=torch.int64).repeat_interleave(2)[::2]  # with a stride
    layer = sk.SparseLinear(4 * 3, 4 * 5, density=0.5, block_size=1, groups=4, dtype=torch.float64)
    x = torch.randn(len(ids), 3, dtype=torch.float64, requires_grad=True)
    y = layer(x, group=group)
    by_torch = torch.vmap(lambda x: layer(x, group=group))(x[None])[0]  # a transform takes torch's sort
    torch.testing.assert_close(y, by_torch, rtol=0, atol=1e-12)
    (dx,), (expected,) = torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(by_torch.square().sum(), x)
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1, 3, 0]), r"0\.\.2, got 0\.\.3"),
        (torch.tensor([0, -1, 2, 0]), r"0\.\.2, got -1\.\.2"),
        (torch.tensor([0, 1, 2]), r"\(4,\), got \(3,\)"),
        (torch.zeros(4, 1, dtype=torch.long), r"\(4,\), got \(4, 1\)"),
        (torch.zeros(4), "integers, got torch.float32"),
    ],
)
def test_wrong_group_ids_are_refused(ids, message):
    layer = sk.SparseLinear(3 * 8, 3 * 4, density=0.5, block_size=4, groups=3)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(4, 8), group=ids)


@pytest.mark.parametrize("arguments", [{"density": 0.0}, {"density": 1.5}, {"block_size": 12}, {"groups": 3}])
def test_impossible_arguments_are_refused(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{name}.*{arguments[name]}"):
        sk.SparseLinear(64, 64, **arguments)


def test_device_0_is_a_gpu_and_not_no_device():
    makers = (nn.Linear, partial(sk.SparseLinear, density=0.5), partial(sk.SparseConv2d, kernel_size=3, density=0.5))
    for make in makers:
        if torch.cuda.is_available():
            assert make(64, 64, device=0).weight.device == torch.device("cuda", 0)
        else:
            with pytest.raises((RuntimeError, AssertionError)):
                make(64, 64, device=0)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_tensor_with_the_negative_bit_has_its_own_sign(block_size, density):
    layer = sk.SparseLinear(16, 24, density=density, block_size=block_size)
    x = torch._neg_view(torch.randn(8, 16)).requires_grad_()
    dy = torch._neg_view(torch.randn(8, 24))
    assert x.is_neg() and dy.is_neg()
    plain = x.detach().resolve_neg().requires_grad_()
    (y,) = results = [layer(x)]
    results += torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    expected = torch.nn.functional.linear(plain, layer.to_dense(), layer.bias)
    torch.testing.assert_close(y, expected)
    expected = layer(plain)
    expected = [expected, *torch.autograd.grad(expected, (plain, layer.weight, layer.bias), dy.resolve_neg())]
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_arguments_mean_what_they_mean_to_linear():
    layer = sk.SparseLinear(64, 32, False, "cpu", torch.bfloat16, density=1, block_size=8)
    assert (layer.in_features, layer.out_features, layer.bias, layer.weight.dtype) == (64, 32, None, torch.bfloat16)
    assert layer.density == 1 and layer.weight.shape == (32, 8, 8)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).shape == (2, 32)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_the_representation_names_sizes_density_and_blocks():
    text = repr(sk.SparseLinear(64, 32, density=0.25, block_size=8, groups=2))
    assert "in_features=64, out_features=32, bias=True" in text
    assert "4 x 8 blocks of 8, density=0.25, groups=2" in text


def test_a_topology_decides_over_density():
    topology = random_topology((4, 8), 8, seed=3)
    layer = sk.SparseLinear(64, 32, density=0.9, topology=topology)
    assert torch.equal(layer.topology.mask(), topology.mask()) and layer.block_size == 8
