"""Memory that nobody has filled is never followed, and casts never reach the coordinates."""

import copy

import pytest
import torch
from oracle import live_blocks
from torch import nn

import sparsekern as sk

LAYERS = pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3, "block_size": 8},
        {"density": 0.3, "block_size": 1},
        {"density": 0.4, "block_size": 4, "groups": 2},
        {"density": 1.0, "block_size": 8},
    ],
    ids=["block 8", "block 1", "groups", "full"],
)


def assert_usable(layer, live):
    topology = layer.topology
    assert len(set(live_blocks(topology))) == live == topology.num_slots
    layer.reset_parameters()
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-4, atol=1e-5)


@LAYERS
def test_a_layer_of_the_meta_device_draws_a_topology_when_it_gets_memory(options):
    live = sk.SparseLinear(64, 64, **options).topology.num_live
    with torch.device("meta"):
        layer = sk.SparseLinear(64, 64, **options)
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 64)
    used = [torch.randint(-(2**31), 2**31 - 1, layer.topology.index.shape, dtype=torch.int32) for _ in range(20)]
    del used  # a heap that holds nonsense
    assert_usable(layer.to_empty(device="cpu"), live)


@LAYERS
def test_a_layer_of_the_meta_device_is_shown_and_summed_up(options):
    layer = sk.SparseLinear(64, 64, **options)
    with torch.device("meta"):
        drawn = sk.SparseLinear(64, 64, **options)
    assert repr(drawn) == repr(layer) and str(sk.summary(drawn)) == str(sk.summary(layer))


@LAYERS
def test_skip_init_makes_a_usable_layer(options):
    live = sk.SparseLinear(64, 64, **options).topology.num_live
    assert_usable(torch.nn.utils.skip_init(sk.SparseLinear, 64, 64, **options), live)


@LAYERS
def test_to_empty_keeps_the_topology_of_a_layer_that_has_one(options):
    layer = sk.SparseLinear(64, 64, **options)
    blocks = live_blocks(layer.topology)
    layer.to_empty(device="cpu")
    assert live_blocks(layer.topology) == blocks
    assert_usable(layer, len(blocks))


@LAYERS
def test_a_checkpoint_fills_a_layer_of_the_meta_device(options):
    source, x = sk.SparseLinear(64, 64, **options), torch.randn(3, 64)
    for assign in (False, True):
        target = sk.SparseLinear(64, 64, **options, device="meta")
        if not assign:
            target.to_empty(device="cpu")
        target.load_state_dict(source.state_dict(), assign=assign)
        torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


@LAYERS
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.type(torch.float64), torch.float64),
        (lambda m: m.type(torch.bfloat16), torch.bfloat16),
        (nn.Module.half, torch.float16),
        (nn.Module.bfloat16, torch.bfloat16),
        (nn.Module.double, torch.float64),
        (lambda m: m.to(torch.float64), torch.float64),
    ],
    ids=["type", "type bfloat16", "half", "bfloat16", "double", "to"],
)
def test_casts_change_the_weight_and_not_the_coordinates(options, cast, dtype):
    layer = sk.SparseLinear(64, 64, **options)
    plain, blocks = copy.deepcopy(layer), live_blocks(layer.topology)
    layer = cast(layer)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.topology.block_rows.dtype == torch.int16 and layer.topology.index.dtype == torch.int32
    assert live_blocks(layer.topology) == blocks
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x.to(dtype)).float(), plain(x), rtol=0.05, atol=0.05)


def test_shared_memory_takes_the_topology_along():
    layer = sk.SparseLinear(64, 64, density=0.3, block_size=8)
    layer.share_memory()
    assert layer.topology.block_rows.is_shared() and layer.topology.index.is_shared()
    assert layer(torch.randn(3, 64)).isfinite().all()


def test_layers_save_train_and_export_where_another_device_is_the_default():
    layer, padded = (sk.SparseLinear(size, size, density=0.5, block_size=8) for size in (32, 30))
    full = sk.SparseLinear(16, 16, density=1.0, block_size=4)
    rules = [
        sk.RigL(layer, torch.optim.SGD(layer.parameters(), 0.1), update_every=1),
        sk.GMP(full, torch.optim.SGD(full.parameters(), 0.1), end_step=2, update_every=1),
    ]
    with torch.device("meta"):  # which stands in for a GPU
        for _ in range(2):
            layer(torch.ones(3, 32, device="cpu")).sum().backward()
            full(torch.ones(3, 16, device="cpu")).sum().backward()
            assert all(rule.step() for rule in rules)
        assert layer.to_bsr().device.type == "cpu" and padded.to_scipy().shape == (30, 30)
        states = [copy.deepcopy(module.state_dict()) for module in (layer, padded, full)]
    for state, module in zip(states, (layer, padded, full), strict=True):
        module.load_state_dict(state)
        assert sk.plan_from(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_are_built_in_any_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        layer = sk.SparseLinear(32, 32, density=0.5, block_size=8)
        conv = sk.SparseConv2d(4, 8, 3, density=0.5, block_size=4)
        model = sk.sparsify(nn.Sequential(nn.Linear(32, 32)), density=0.5, block_size=8, keep="fresh")
        rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1)
        for module, x in ((layer, torch.randn(3, 32)), (conv, torch.randn(2, 4, 6, 6)), (model, torch.randn(3, 32))):
            y = module(x)
            y.sum().backward()
            assert y.dtype == dtype and all(p.grad.dtype == dtype for p in module.parameters())
        assert rule.step()
        model = sk.sparsify(nn.Sequential(nn.Linear(32, 32)), density=1.0, block_size=8)
        rule = sk.RigL(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1)
        model(torch.randn(3, 32)).sum().backward()
        rule.step()
    finally:
        torch.set_default_dtype(torch.float32)


def test_inference_mode_builds_and_runs_layers():
    with torch.inference_mode():
        layer = sk.SparseLinear(32, 32, density=0.5, block_size=8)
        x = torch.randn(3, 32)
        torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-4, atol=1e-5)
