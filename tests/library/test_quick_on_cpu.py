"""The short way of a product on a CPU: the bits of the long way, taken by what fits together, and by nothing else."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsekern as sk
from sparsekern import choose, products, quick, routes
from sparsekern.backends import cpu
from sparsekern.layout import Layout

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=str(cpu.unavailable()))

IDS = torch.tensor([2, 0, 0, 1, 2, 2])


def layer_and_x(block_size=4, tokens=(6,), groups=1, dtype=torch.float32):
    layer = sk.SparseLinear(96, 192, density=0.1, block_size=block_size, groups=groups, dtype=dtype)
    return layer, torch.randn(*tokens, 96, dtype=dtype)


def step(layer, x, group=None) -> list[torch.Tensor]:
    """Output, and gradients of x, weight and bias."""
    x = x.detach().requires_grad_()
    y = layer(x) if group is None else layer(x, group=group)
    leaves = [x, layer.weight] if layer.bias is None else [x, layer.weight, layer.bias]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))]


def by_the_long_way(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(quick, "is_open", lambda: False)
        return call()


def by_the_short_way(monkeypatch, call):
    """Fails where any product goes the long way."""
    with monkeypatch.context() as patch:
        patch.setattr(products, "_check", None)
        patch.setattr(cpu, "dds", None)
        patch.setattr(cpu, "sdd", None)
        return call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    "tokens,groups,group", [((6,), 1, None), ((2, 3), 1, None), ((1,), 3, None), ((6,), 3, IDS), ((3, 2), 3, IDS)]
)
def test_a_step_has_the_bits_of_the_long_way(dtype, block_size, tokens, groups, group, monkeypatch):
    layer, x = layer_and_x(block_size, tokens, groups, dtype)
    if group is not None:
        x, group = x[..., : 96 // groups], group.view(tokens)
    expected = by_the_long_way(monkeypatch, lambda: step(layer, x, group))
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is full of NaN
    try:
        found = by_the_short_way(monkeypatch, lambda: step(layer, x, group))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_step_of_a_full_store_has_the_bits_of_the_long_way(dtype, tokens, pruned, monkeypatch):
    layer = sk.SparseLinear(96, 192, density=1.0, block_size=1, dtype=dtype)
    if pruned:
        dead = torch.rand(96 * 192) < 0.1
        layer.topology.mark_dead(dead)
        layer.weight.data[dead] = 0
        assert layer.topology.full and layer.topology.num_live < 96 * 192
    x = torch.randn(*tokens, 96, dtype=dtype)
    expected = by_the_long_way(monkeypatch, lambda: step(layer, x))
    found = by_the_short_way(monkeypatch, lambda: step(layer, x))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not pruned or not found[2][dead].any()


@pytest.mark.parametrize("density,block_size", [(0.1, 4), (1.0, 1)])
def test_a_forward_saves_no_more_than_the_operands(density, block_size):
    layer = sk.SparseLinear(96, 192, density=density, block_size=block_size)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda _: None):
        layer(torch.randn(2, 3, 96, requires_grad=True))
    assert saved == [(2, 3, 96), layer.weight.shape]


def test_rows_that_lie_apart_and_layers_without_bias_go_the_short_way(monkeypatch):
    layer = sk.SparseLinear(48, 96, bias=False, density=0.25, block_size=4)
    x = torch.randn(6, 100)[:, 10:58]
    expected = by_the_long_way(monkeypatch, lambda: step(layer, x))
    found = by_the_short_way(monkeypatch, lambda: layer(x).detach())
    assert torch.equal(found, expected[0])


def test_gradients_of_gradients_are_those_of_the_long_way(monkeypatch):
    layer, x = layer_and_x(dtype=torch.float32)
    x.requires_grad_()

    def twice():
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, layer.weight])

    for one, other in zip(twice(), by_the_long_way(monkeypatch, twice), strict=True):
        torch.testing.assert_close(one, other)


def test_a_rewire_between_forward_and_backward_is_refused():
    layer, x = layer_and_x()
    optimizer = torch.optim.SGD(layer.parameters())
    rule = sk.SET(layer, optimizer, update_every=1)
    y = layer(x).sum()
    rule.step()
    with pytest.raises(RuntimeError, match="the topology was rewired"):
        y.backward()


@pytest.mark.parametrize("around", ["forced", "autocast", "fake", "functorch"])
def test_whoever_casts_forces_or_watches_sends_it_the_long_way(around, monkeypatch):
    layer, x = layer_and_x()
    taken = []
    own = cpu.quick_dds
    monkeypatch.setattr(cpu, "quick_dds", lambda *operands: taken.append(1) or own(*operands))
    if around == "forced":
        with sk.use("reference"):
            layer(x)
    elif around == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    elif around == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(x)
    else:
        torch.func.grad(lambda x: layer(x).sum())(x)
    assert taken == []
    layer(x)
    assert taken == [1]


class Subclass(torch.Tensor):
    pass


def layer_of_single_weights():
    return sk.SparseLinear(96, 192, density=1.0, block_size=1), torch.randn(6, 96)


def wrong_operands(layer, x) -> dict[str, dict]:
    weight, bias, layout = layer.weight.detach(), layer.bias.detach(), layer.topology.layout
    offsets = torch.tensor([0, 1, 3, 6])
    meta = Layout(*(tensor.to("meta") for tensor in layout.tensors), *layout.geometry)
    ragged = {"x": x[:, :32].contiguous(), "token_offsets": offsets}
    return {
        "x of one axis": {"x": x[0]},
        "x of other features": {"x": x[:, :40]},
        "x with features apart": {"x": torch.randn(96, 6).t()},
        "x of three axes that lie apart": {"x": torch.randn(3, 6, 96).transpose(0, 1)},
        "x in float64": {"x": x.double()},
        "x of a subclass": {"x": x.as_subclass(Subclass)},
        "x on meta": {"x": x.to("meta")},
        "x sparse": {"x": x.to_sparse()},
        "x no tensor": {"x": x.tolist()},
        "weight in another dtype": {"weight": weight.bfloat16()},
        "weight flat": {"weight": weight.flatten()},
        "weight of fewer slots": {"weight": weight[1:]},
        "weight with gaps": {"weight": weight.repeat_interleave(2, 0)[::2]},
        "weight of a subclass": {"weight": weight.as_subclass(Subclass)},
        "weight on meta": {"weight": weight.to("meta")},
        "bias without transpose": {"x": torch.randn(6, 192), "transpose": False},
        "bias short": {"bias": bias[1:]},
        "bias of two axes": {"bias": bias[None]},
        "bias with gaps": {"bias": torch.randn(384)[::2]},
        "bias a number": {"bias": 1.0},
        "transpose a number": {"transpose": 1},
        "offsets that fall": ragged | {"token_offsets": torch.tensor([0, 3, 1, 6])},
        "offsets that end early": ragged | {"token_offsets": torch.tensor([0, 1, 3, 5])},
        "offsets of two axes": ragged | {"token_offsets": offsets[None]},
        "offsets in int16": ragged | {"token_offsets": offsets.short()},
        "offsets with gaps": ragged | {"token_offsets": torch.tensor([0, 9, 1, 9, 3, 9, 6, 9])[::2]},
        "offsets a list": ragged | {"token_offsets": [0, 1, 3, 6]},
        "layout on meta": {"layout": meta},
        "layout cut short": {"layout": tuple(layout)[:7]},
        "layout of other blocks": {"layout": layout._replace(block_size=3)},
        "layout of an int64 index": {"layout": layout._replace(index=layout.index.long())},
    }


@pytest.mark.parametrize("what", list(wrong_operands(*layer_and_x(groups=3))))
def test_operands_that_do_not_fit_are_left_to_the_long_way(what):
    layer, x = layer_and_x(groups=3)
    right = {"layout": layer.topology.layout, "x": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
    right |= {"transpose": True, "token_offsets": None, "threads": 1}
    assert cpu._C.quick_dds(**right) is not None
    assert cpu._C.quick_dds(**right | wrong_operands(layer, x)[what]) is None


OF_SINGLE_WEIGHTS = wrong_operands(*layer_of_single_weights()).keys() - {
    "x with features apart", "x of three axes that lie apart", "weight with gaps", "bias with gaps", "layout cut short",
    "layout of other blocks", "layout of an int64 index",
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(OF_SINGLE_WEIGHTS))
def test_operands_that_do_not_fit_a_full_store_are_left_to_the_long_way(what):
    layer, x = layer_of_single_weights()
    right = {"layout": layer.topology.layout, "x": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
    right |= {"transpose": True, "token_offsets": None}
    assert quick.dds(**right) is not None
    assert quick.dds(**right | wrong_operands(layer, x)[what]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda dy, x, layout: {"dy": dy[:, 1:]},
        lambda dy, x, layout: {"dy": dy[1:]},
        lambda dy, x, layout: {"dy": dy.bfloat16()},
        lambda dy, x, layout: {"dy": dy.as_subclass(Subclass)},
        lambda dy, x, layout: {"x": x.t().contiguous().t()},
        lambda dy, x, layout: {"x": x.to("meta")},
        lambda dy, x, layout: {"token_offsets": torch.tensor([0, 6])},
        lambda dy, x, layout: {"layout": layout._replace(block_rows=layout.block_rows.to("meta"))},
    ],
)
def test_gradients_that_do_not_fit_are_left_to_the_long_way(wrong):
    layer, x = layer_and_x(groups=3)
    dy, layout = torch.randn(6, 192), layer.topology.layout
    right = {"layout": layout, "dy": dy, "x": x, "token_offsets": None, "threads": 1}
    assert torch.equal(cpu._C.quick_sdd(**right), cpu.sdd(dy, x, layout))
    assert cpu._C.quick_sdd(**right | wrong(dy, x, layout)) is None


def test_the_long_way_still_says_what_is_wrong():
    layer, x = layer_and_x()
    with pytest.raises(ValueError, match="wants 96 features in the last axis, got \\(6, 40\\)"):
        layer(x[:, :40])
    with pytest.raises(TypeError, match="topology must be a sparsekern.Topology, got NoneType"):
        sk.dds(x, layer.weight, None, transpose=True)


def test_a_layer_that_dense_multiplies_faster_does_not_go_the_short_way():
    sparse, nearly_dense = (sk.SparseLinear(96, 192, density=density, block_size=1) for density in (0.1, 0.9))
    few, many = torch.randn(2, 3, 96), torch.randn(20, 30, 96)
    with torch.no_grad():
        for layer, x, short in ((sparse, many, True), (nearly_dense, many, False), (nearly_dense, few, True)):
            y = routes.quick_dds(x, layer.weight, layer.bias, None, layer.topology.layout, True)
            assert (y is not None) == short
            backend = choose.backend_for("dds", x.flatten(0, 1), layer.topology.layout)
            assert (backend is cpu) == short  # of few tokens, copying the blocks would cost more than it saves
