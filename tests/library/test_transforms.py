"""Modes, tracers, fake tensors, subclasses and torch.func's transforms give what the dense layer gives."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk

BLOCKS = pytest.mark.parametrize("block_size", [1, 8])


def layers(block_size=8, groups=1):
    """A sparse layer in float64 and the dense layer of the same function."""
    layer = sk.SparseLinear(24, 32, density=0.4, block_size=block_size, groups=groups).double()
    return layer, layer.to_linear()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@BLOCKS
@pytest.mark.parametrize("groups", [1, 2])
def test_transforms_agree_with_the_dense_layer(block_size, groups):
    sparse, dense = layers(block_size, groups)
    x, t = torch.randn(2, 5, 24).double()
    for transform in (
        lambda f: grad(lambda x: f(x).square().sum())(x),
        lambda f: vmap(f)(x),
        lambda f: vmap(f, in_dims=1, out_dims=1)(torch.stack((x, t), 1)),
        lambda f: vmap(vmap(f))(torch.stack((x, t))),
        lambda f: jvp(f, (x,), (t,)),
        lambda f: jvp(lambda x: vmap(f)(x).square(), (x,), (t,)),
        lambda f: jacrev(f)(x[0]),
        lambda f: jacfwd(f)(x[0]),
        lambda f: hessian(lambda x: f(x).pow(3).sum())(x[0]),
        lambda f: vmap(grad(lambda x: f(x).square().sum()))(x),
        lambda f: vjp(f, x)[1](f(x))[0],
        lambda f: torch.autograd.functional.jacobian(f, x[0], vectorize=True),
    ):
        close(transform(sparse), transform(dense))
        with torch.no_grad():
            close(vmap(sparse)(x), vmap(dense)(x))


@BLOCKS
def test_gradients_of_the_weight_by_example_are_those_of_the_dense_layer_s_live_blocks(block_size):
    sparse, dense = layers(block_size)
    x = torch.randn(6, 24).double()

    def by_example(layer):
        values = dict(layer.named_parameters())
        loss = lambda values, x: functional_call(layer, values, (x[None],)).pow(3).sum()  # noqa: E731
        return vmap(grad(loss), in_dims=(None, 0))(values, x)

    found, truth = by_example(sparse), by_example(dense)
    close(found["bias"], truth["bias"])
    for example, gradient in zip(found["weight"], truth["weight"], strict=True):
        close(example, gathered(gradient, sparse))


def gathered(gradient, layer):
    from sparsekern.backends.reference import gather

    return gather(gradient[None].contiguous(), layer.topology.layout)


@BLOCKS
def test_forward_mode_differentiates_by_input_weight_and_bias(block_size):
    sparse, dense = layers(block_size)
    x, dx = torch.randn(2, 5, 24).double()
    d_weight, d_bias = torch.randn_like(sparse.weight), torch.randn_like(sparse.bias)

    def tangent(layer, weight_tangent):
        def f(x, weight, bias):
            return functional_call(layer, {"weight": weight, "bias": bias}, (x,))

        return jvp(f, (x, layer.weight, layer.bias), (dx, weight_tangent, d_bias))

    direction = copy.deepcopy(sparse)
    with torch.no_grad():
        direction.weight.copy_(d_weight)
    close(tangent(sparse, d_weight), tangent(dense, direction.to_dense()))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, dx)
        close(forward_ad.unpack_dual(sparse(dual)).tangent, forward_ad.unpack_dual(dense(dual)).tangent)


@BLOCKS
def test_a_batch_of_gradients_goes_through_one_backward(block_size):
    plain = sk.SparseLinear(24, 32, density=0.4, block_size=block_size)  # float32: the C++ kernels' own
    heads = sk.SparseLinear(48, 64, density=0.4, block_size=block_size, groups=2)
    ids = torch.tensor([1, 0, 0, 1, 1])
    for layer, x, forward in (
        (plain, torch.randn(5, 24), plain),
        (plain, torch.randn(2, 5, 24), plain),
        (heads, torch.randn(5, 24), lambda x: heads(x, group=ids)),
    ):
        leaves, batch = (x.requires_grad_(), layer.weight, layer.bias), torch.randn(3, *x.shape[:-1], 32)
        found = torch.autograd.grad(forward(x), leaves, batch, is_grads_batched=True)
        one_by_one = [torch.autograd.grad(forward(x), leaves, dy) for dy in batch]
        for together, single in zip(found, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(together, torch.stack(single), rtol=1e-5, atol=1e-5)


def test_the_product_of_two_dense_matrices_is_bilinear_too():
    layer, _ = layers()
    dy, x, d_dy, dx = torch.randn(5, 32), torch.randn(5, 24), torch.randn(5, 32), torch.randn(5, 24)
    product = lambda dy, x: sk.sdd(dy, x, layer.topology)  # noqa: E731
    value, tangent = jvp(product, (dy, x), (d_dy, dx))
    torch.testing.assert_close(value, product(dy, x))
    torch.testing.assert_close(tangent, product(d_dy, x) + product(dy, dx))
    batch = torch.randn(3, 5, 32)
    torch.testing.assert_close(
        vmap(product, in_dims=(0, None))(batch, x), torch.stack([product(dy, x) for dy in batch])
    )


def test_an_ensemble_of_copies_runs_under_vmap_with_a_warning_of_what_it_takes():
    model = nn.Sequential(layers()[0], nn.ReLU())
    members = [copy.deepcopy(model) for _ in range(3)]
    for member in members:
        member[0].reset_parameters()
    parameters, buffers = stack_module_state(members)
    x = torch.randn(5, 24).double()
    with pytest.warns(UserWarning, match="computes with the topology of the module that is called"):
        y = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)
    close(y, torch.stack([member(x) for member in members]))


def test_an_ensemble_called_through_a_module_of_the_meta_device_is_refused():
    model = nn.Sequential(layers()[0])
    parameters, buffers = stack_module_state([copy.deepcopy(model) for _ in range(2)])
    base, x = copy.deepcopy(model).to("meta"), torch.randn(5, 24).double()
    with pytest.raises(ValueError, match="but the topology is on meta"):
        vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)


def test_ragged_groups_run_under_transforms():
    layer, _ = layers(groups=2)
    x, ids = torch.randn(3, 7, 12).double(), torch.tensor([1, 0, 0, 1, 1, 0, 1])
    offsets = torch.tensor([0, 2, 7])

    def by_offsets(x):
        return sk.dds(x, layer.weight, layer.topology, layer.bias, transpose=True, token_offsets=offsets)

    close(vmap(by_offsets)(x), torch.stack([by_offsets(rows) for rows in x]))
    found = grad(lambda x: layer(x, group=ids).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    layer(leaf, group=ids).square().sum().backward()
    close(found, leaf.grad)
    tangent = jvp(by_offsets, (x[0],), (x[1],))[1]
    close(tangent, by_offsets(x[1]) - by_offsets(torch.zeros_like(x[1])))


@pytest.mark.parametrize("density", [0.4, 1.0])
@BLOCKS
def test_a_tensor_that_was_kept_from_a_transform_is_taken_when_that_is_over(block_size, density):
    layer, kept = sk.SparseLinear(24, 32, density=density, block_size=block_size), []
    x = torch.randn(5, 24)
    grad(lambda x: kept.append(x.clone()) or x.sum())(x)
    with torch.no_grad():
        close(layer(kept[0]), layer(x))
    found, truth = (torch.autograd.grad(layer(x).square().sum(), layer.weight) for x in (kept[0], x))
    close(found, truth)


@pytest.mark.parametrize("wants_gradient", [False, True])
@BLOCKS
def test_traces_hold_the_product(block_size, wants_gradient):
    layer = layers(block_size)[0].requires_grad_(wants_gradient)
    x, other = torch.randn(2, 5, 24).double()
    with torch.set_grad_enabled(wants_gradient):
        traced = torch.jit.trace(layer, x, check_trace=False)
        graph = make_fx(layer)(x)
    close(traced(other), layer(other))
    close(graph(other), layer(other))
    assert "sparsekern::dds" in str(traced.graph) and "sparsekern.dds" in graph.code
    if wants_gradient:
        traced(other).sum().backward()
        gradient, layer.weight.grad = layer.weight.grad, None
        layer(other).sum().backward()
        close(gradient, layer.weight.grad)


@BLOCKS
def test_fake_tensors_have_the_shapes_of_real_ones(block_size):
    layer = sk.SparseLinear(24, 32, density=0.4, block_size=block_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(5, 24, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == (5, 32) and x.grad.shape == (5, 24) and layer.weight.grad.shape == layer.weight.shape


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_products_of_forward_and_backward():
    layer, _ = layers()
    with Names() as mode:
        layer(torch.randn(5, 24).double().requires_grad_()).sum().backward()
    assert mode.names.count("dds") == 2 and mode.names.count("sdd") == 1


class Wrapped(torch.Tensor):
    """A subclass that notes what is done to it."""

    seen = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_subclass_sees_the_product():
    layer, _ = layers()
    x = torch.randn(5, 24).double()
    y = layer(x.as_subclass(Wrapped))
    assert isinstance(y, Wrapped) and any("sparsekern.dds" in name for name in Wrapped.seen)
    close(y.as_subclass(torch.Tensor), layer(x))


def test_rigl_says_that_a_transform_hides_the_gradient_from_it():
    model = nn.Sequential(layers()[0])
    rule = sk.RigL(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1)
    with pytest.raises(RuntimeError, match="cannot be scored inside torch.func"):
        grad(lambda x: model(x).sum())(torch.randn(5, 24).double())
    assert rule.step() is True
