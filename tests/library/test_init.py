"""sk.init_: a rule for dense matrices gives a sparse layer's output the dense layer's scale."""

import pytest
import torch
from torch import nn

import sparsekern as sk

RULES = pytest.mark.parametrize(
    ("function", "options", "scale"),
    [
        (nn.init.xavier_uniform_, {}, 1.0),  # the deviation of a square dense layer's output, of inputs of deviation 1
        (nn.init.kaiming_normal_, {"nonlinearity": "relu"}, 2**0.5),
        (nn.init.orthogonal_, {"gain": 2**0.5}, 2**0.5),
    ],
    ids=["xavier", "kaiming", "orthogonal"],
)


@RULES
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_output_has_the_dense_layer_s_deviation(function, options, scale, block_size, groups):
    layer = sk.SparseLinear(groups * 512, groups * 512, density=0.2, block_size=block_size, groups=groups)
    nn.init.zeros_(layer.bias)
    assert sk.init_(layer, function, **options) is layer
    assert layer(torch.randn(512, groups * 512)).std().item() == pytest.approx(scale, rel=0.06)


@RULES
def test_a_convolution_takes_the_fans_of_its_kernel(function, options, scale):
    sparse, dense = sk.SparseConv2d(64, 64, 3, density=0.3, block_size=8), nn.Conv2d(64, 64, 3)
    for layer in (sparse, dense):
        nn.init.zeros_(layer.bias)
    function(dense.weight, **options)
    sk.init_(sparse, function, **options)
    x = torch.randn(8, 64, 8, 8)
    assert sparse(x).std().item() == pytest.approx(dense(x).std().item(), rel=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_dead_slots_stay_zero(dtype):
    layer = sk.SparseLinear(20, 28, density=0.5, block_size=16, dtype=dtype)
    sk.init_(layer, nn.init.orthogonal_)
    assert not layer.weight[~layer.lanes().expand_as(layer.weight)].any() and layer.weight.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(4, 4), nn.init.xavier_uniform_), "layer must be a SparseLinear or SparseConv2d, got Linear"),
        ((sk.SparseLinear(16, 16), "xavier"), "function must be callable.*got 'xavier'"),
    ],
)
def test_what_is_no_sparse_layer_or_no_rule_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        sk.init_(*arguments)


def test_a_function_that_fills_nothing_in_place_is_refused_and_changes_nothing():
    layer = sk.SparseLinear(32, 16, block_size=8)
    before = layer.weight.detach().clone()

    def returns_another(weight):
        return torch.zeros_like(weight)

    with pytest.raises(ValueError, match=r"fill a tensor \[16, 32\] in place, but returns_another left NaN"):
        sk.init_(layer, returns_another)
    assert torch.equal(layer.weight, before)
