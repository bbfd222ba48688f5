import shutil

import oracle
import pytest
import torch
from oracle import random_topology
from torch import nn
from torch.library import opcheck

import sparsekern as sk


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("block_size", [1, 4])
def test_registered_operators_keep_the_rules_of_torch(block_size, ragged):
    topology = random_topology((3, 4), block_size, 2, dead=1)
    out, into = topology.shape[0] // (2 if ragged else 1), topology.shape[1] // (2 if ragged else 1)
    x, dy = torch.randn(5, into, requires_grad=True), torch.randn(5, out, requires_grad=True)
    weight = torch.randn(topology.num_slots, block_size, block_size, requires_grad=True)
    bias = torch.randn(topology.shape[0], requires_grad=True)
    offsets = torch.tensor([0, 2, 5]) if ragged else None
    ops, layout = torch.ops.sparsekern, topology.layout
    opcheck(ops.dds, (x, weight, bias, offsets, *layout, True))
    opcheck(ops.dds, (dy, weight, None, offsets, *layout, False))
    opcheck(ops.sdd, (dy, x, offsets, *layout))
    keys = torch.full((2, 3), -1) if block_size == 1 else torch.full((2, 3, 4), -1.0)
    opcheck(ops.score_growth, (dy.detach(), x.detach(), offsets, *layout, torch.tensor(True), keys))


def gradients(layer, x, *group):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x, *group)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("kind", ["plain", "groups", "ragged"])
def test_one_graph_serves_ten_rewires_and_equals_eager(kind):
    groups = 1 if kind == "plain" else 3
    layer = sk.SparseLinear(groups * 14, groups * 12, density=0.4, block_size=4, groups=groups)
    x, group = torch.randn(9, groups * 14), ()
    if kind == "ragged":
        x, group = torch.randn(9, 14), (torch.tensor([2, 0, 0, 2, 2, 0, 2, 0, 0]),)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for rewire in range(11):
        for ours, eager in zip(gradients(compiled, x, *group), gradients(layer, x, *group), strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)
        oracle.rewire_at_random(layer.topology, rewire)
        with torch.no_grad():
            layer.weight.mul_(layer.lanes())
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_a_model_trains_under_inductor_as_in_eager_while_a_rule_rewires():
    def train(compile):
        torch.manual_seed(0)
        model = nn.Sequential(sk.SparseLinear(32, 24, density=0.3, block_size=8), nn.ReLU(), nn.Linear(24, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rule = sk.RigL(model, optimizer, update_every=2, drop_fraction=0.5)
        forward = torch.compile(model, fullgraph=True) if compile else model
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(9):
                optimizer.zero_grad()
                forward(torch.randn(7, 32)).square().mean().backward()
                optimizer.step()
                rule.step()
        assert rule.events == 4
        return model

    eager, compiled = train(False), train(True)
    assert torch.equal(eager[0].topology.block_cols, compiled[0].topology.block_cols)
    torch.testing.assert_close(compiled[0].weight, eager[0].weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_computes_in_bfloat16_and_gives_float32_gradients(compile):
    layer = sk.SparseLinear(32, 24, density=0.4, block_size=8)
    twin = sk.SparseLinear(32, 24, topology=layer.topology, dtype=torch.bfloat16)
    twin.load_state_dict({k: v.bfloat16() if v.is_floating_point() else v for k, v in layer.state_dict().items()})
    x = torch.randn(5, 32)
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compile else layer
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    expected = twin(x.bfloat16())
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert layer.weight.grad.dtype == torch.float32 and torch.equal(layer.weight.grad, twin.weight.grad.float())


def test_autocast_leaves_float64_alone_as_linear_does():
    layer = sk.SparseLinear(32, 24, density=0.4, block_size=8, dtype=torch.float64)
    x = torch.randn(5, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.nn.functional.linear(x, layer.to_dense()).dtype == torch.float64


def test_functional_call_takes_parameters_from_outside():
    topology = random_topology((3, 4), 8)
    layer, other = (sk.SparseLinear(32, 24, topology=topology) for _ in range(2))
    x = torch.randn(5, 32)
    assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), x), other(x))


def test_export_keeps_the_products_in_the_graph():
    layer = sk.SparseLinear(30, 24, density=0.4, block_size=8)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (torch.randn(5, 30),), dynamic_shapes=({0: tokens},))
    assert "sparsekern.dds" in str(program.graph)
    x = torch.randn(11, 30)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-6)
