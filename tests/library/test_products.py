import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import BLOCK_SIZES, BOUND, random_topology, topologies
from torch.autograd import gradcheck, gradgradcheck

import sparsekern as sk
from sparsekern import choose

DTYPES = tuple(BOUND)


def numpy(tensor):
    return tensor.detach().double().flatten(0, -2).numpy()


def operands(topology, tokens, dtype, ragged=False, seed=0):
    """x, dy, weight (zero in padding, as a layer keeps it), bias, and token offsets if ragged."""
    generator = torch.Generator().manual_seed(seed)
    groups = topology.groups if ragged else 1
    out, into = (size // groups for size in topology.shape)
    x, dy, bias = (
        torch.randn(*s, generator=generator).to(dtype) for s in ((tokens, into), (tokens, out), topology.shape[:1])
    )
    shape = (topology.groups, *(size // topology.groups for size in topology.shape))
    weight = oracle.gather_blocks(torch.randn(shape, generator=generator).numpy(), topology)
    cuts = torch.randint(0, tokens + 1, (topology.groups - 1,), generator=generator).sort().values.tolist()
    offsets = torch.tensor([0, *cuts, tokens]) if ragged else None
    return x, dy, torch.from_numpy(weight).to(dtype), bias, offsets


def check_products(topology, tokens, dtype, ragged=False, seed=0):
    """Compare y = x Wᵀ + b with all its gradients, and x W, with NumPy in float64 on the same rounded operands."""
    x, dy, weight, bias, offsets = operands(topology, tokens, dtype, ragged, seed)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = sk.dds(x, weight, topology, bias, transpose=True, token_offsets=offsets)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        back = sk.dds(dy, weight, topology, token_offsets=offsets)
        blocks = sk.sdd(dy, x, topology, offsets)
    ends = None if offsets is None else offsets.tolist()
    spread = np.zeros((topology.groups, tokens), bool)  # which tokens read which group's bias
    for g in range(topology.groups):
        spread[g, slice(*ends[g : g + 2]) if ragged else slice(None)] = True

    def expected(size):
        nx, ndy, nb = (size(numpy(t[None] if t.dim() == 1 else t)) for t in (x, dy, bias))
        dense = size(oracle.dense_weight(weight, topology))
        nb = nb.reshape(topology.groups, -1)
        biases = spread.T @ nb if ragged else nb.reshape(1, -1)
        columns = np.concatenate(
            [spread[g] @ d for g, d in enumerate([ndy] * len(nb) if ragged else np.split(ndy, len(nb), 1))]
        )
        return {
            "y": oracle.dds(nx, dense, True, ends) + biases,
            "dx": oracle.dds(ndy, dense, False, ends),
            "dw": oracle.gather_blocks(oracle.outer(ndy, nx, topology.groups, ends), topology),
            "db": columns,
        }

    truth, size = expected(lambda a: a), expected(np.abs)
    for name, actual in {"y": y, "dx": dx, "dw": dw, "db": db}.items():
        assert actual.dtype == dtype
        assert oracle.error(actual, truth[name], size[name]) < BOUND[dtype], name
    assert torch.equal(back, dx) and torch.equal(blocks, dw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_products_and_gradients_match_float64_at_every_block_size(backend, block_size, dtype):
    check_products(random_topology((3, 4), block_size, dead=1), 37, dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_products_of_padded_groups_match_float64(backend, block_size, dtype, ragged):
    padding = (block_size // 2, min(3, block_size - 1))
    check_products(random_topology((3, 4), block_size, 3, padding=padding, dead=1), 29, dtype, ragged)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_products_match_float64_for_any_number_of_tokens(backend, block_size, tokens, ragged):
    check_products(random_topology((4, 3), block_size, 2), tokens, torch.float32, ragged)


@pytest.mark.parametrize(("live", "dead"), [(0.0, 0), (0.0, 2), (1.0, 0), (1.0, 3)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_products_of_an_empty_and_of_a_full_topology_match_float64(backend, block_size, live, dead):
    check_products(random_topology((3, 4), block_size, live=live, dead=dead), 5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_products_of_many_blocks_match_float64(backend, block_size, dtype):
    side = max(2, 256 // block_size)
    check_products(random_topology((side, side), block_size, live=0.15), 300, dtype)


def test_products_match_float64_for_any_topology(backend):
    @given(topologies(), st.integers(0, 9), st.booleans(), st.integers(0, 99))
    def check(topology, tokens, ragged, seed):
        check_products(topology, tokens, torch.float32, ragged, seed)

    check()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_full_store_in_order_gives_the_dense_product(backend, block_size, groups):
    topology = sk.Topology.random((groups * 6 * block_size, groups * 5 * block_size), 1.0, block_size, groups)
    check_products(topology, 11, torch.float32)


LAYOUTS = {
    "3-D": lambda x: x.view(2, 3, -1),
    "1-D": lambda x: x[0],
    "no tokens in 3-D": lambda x: x.view(2, 3, -1)[:, :0],
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other feature": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(6, -1),
    "one value": lambda x: x[:1, :1].expand(6, x.shape[1]),
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(6, -1),
    "flipped axes": lambda x: x.view(2, 3, -1).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("groups", [1, 2])
def test_products_take_any_strides_and_leading_axes(backend, block_size, layout, groups):
    topology = random_topology((3, 4), block_size, groups, padding=(0, block_size // 2))
    x, dy, weight, bias, _ = operands(topology, 6, torch.float32)
    arranged_x, arranged_dy = (LAYOUTS[layout](t).requires_grad_() for t in (x, dy))
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    bias = bias.repeat_interleave(2)[::2]
    y = sk.dds(arranged_x, weight, topology, bias, transpose=True)
    flat = sk.dds(
        arranged_x.detach().reshape(-1, x.shape[1]).clone(), weight.detach().contiguous(), topology, bias.clone(), True
    )
    assert y.shape == (*arranged_x.shape[:-1], topology.shape[0])
    torch.testing.assert_close(y.reshape(flat.shape), flat, rtol=0, atol=1e-5)
    dx, dw = torch.autograd.grad(y, (arranged_x, weight), arranged_dy)
    flat_dy, flat_x = (t.detach().reshape(-1, t.shape[-1]).clone() for t in (arranged_dy, arranged_x))
    assert dx.shape == arranged_x.shape
    torch.testing.assert_close(dx.reshape(flat_x.shape), sk.dds(flat_dy, weight.detach(), topology), rtol=0, atol=1e-5)
    torch.testing.assert_close(dw, sk.sdd(flat_dy, flat_x, topology), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("block_size", "groups"), [(1, 1), (2, 2), (4, 1)])
def test_gradients_of_first_and_second_order_are_those_of_the_formula(block_size, groups, ragged):
    topology = random_topology((2, 3), block_size, groups, live=0.6, padding=(0, block_size // 2))
    x, dy, weight, bias, offsets = operands(topology, 3, torch.float64, ragged)
    lanes = torch.from_numpy(oracle.gather_blocks(np.ones_like(oracle.dense_weight(weight, topology)), topology))
    x, dy, weight, bias = (t.requires_grad_() for t in (x, dy, weight, bias))

    def forward(x, weight, bias):
        return sk.dds(x, weight * lanes, topology, bias, True, offsets)

    def backward(dy, weight):
        return sk.dds(dy, weight * lanes, topology, token_offsets=offsets)

    def blocks(dy, x):
        return sk.sdd(dy, x, topology, offsets)

    for product, inputs in ((forward, (x, weight, bias)), (backward, (dy, weight)), (blocks, (dy, x))):
        assert gradcheck(product, inputs)
        assert gradgradcheck(product, inputs)


def test_a_gradient_without_strides_of_its_own_reaches_both_factors(backend):
    topology = random_topology((3, 4), 4, dead=1)
    x, dy, *_ = (t.requires_grad_() for t in operands(topology, 6, torch.float32)[:2])
    ones = sk.dds(dy, torch.ones(topology.num_slots, 4, 4), topology)
    d_dy, d_x = torch.autograd.grad(sk.sdd(dy, x, topology).sum(), (dy, x))  # sum's gradient is one expanded number
    torch.testing.assert_close(d_x, ones, rtol=0, atol=1e-5)
    torch.testing.assert_close((d_dy * dy).sum(), (d_x * x).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "groups"), [((2, 3), 1), ((1,), 2), ((4,), 2)], ids=str)
@pytest.mark.parametrize(("block_size", "density"), [(1, 1.0), (4, 0.5)])
@pytest.mark.parametrize("trained", [True, False])
def test_results_may_be_written_in_place(backend, shape, groups, block_size, density, trained):
    topology = sk.Topology.random((12 * groups, 16 * groups), density, block_size, groups)
    x, dy, weight, bias, _ = operands(topology, math.prod(shape), torch.float32)
    x, dy = x.view(*shape, -1), dy.view(*shape, -1).requires_grad_(trained)
    weight.requires_grad_(trained)
    factor = torch.tensor(2.0, requires_grad=True)
    for product in (lambda: sk.dds(x, weight, topology, bias, transpose=True), lambda: sk.sdd(dy, x, topology)):
        leaves = (factor, weight, dy)
        found, truth = (
            torch.autograd.grad(y.square().sum(), [t for t in leaves if t.requires_grad], allow_unused=True)
            for y in (product().mul_(factor), product() * factor)
        )
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_second_backward_accumulates(backend):
    topology = random_topology((3, 4), 4)
    x, dy, weight, _, _ = operands(topology, 6, torch.float32)
    weight.requires_grad_()
    for _ in range(2):
        sk.dds(x, weight, topology, transpose=True).backward(dy)
    assert torch.equal(weight.grad, 2 * sk.sdd(dy, x, topology))


def test_only_the_gradients_that_are_asked_for_are_computed(backend):
    topology = random_topology((3, 4), 4)
    x, dy, weight, bias, _ = operands(topology, 6, torch.float32)
    for asked in (x, weight, bias):
        y = sk.dds(*(t.detach().requires_grad_(t is asked) for t in (x, weight)), topology, bias.detach(), True)
        assert y.requires_grad == (asked is not bias)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("block_size", [1, 8])
def test_infinities_pass_through_live_blocks_only(backend, block_size, value):
    if backend != "cpu":
        pytest.skip("the reference multiplies by the zeros of dead blocks, as masked dense layers do")
    topology = sk.Topology(torch.tensor([0, 2]), torch.tensor([1, 0]), (3 * block_size, 2 * block_size), block_size)
    weight = torch.ones(2, block_size, block_size)
    x = torch.ones(4, 2 * block_size)
    x[1, -1] = value
    y = sk.dds(x, weight, topology, transpose=True)
    assert y.isfinite().logical_not().nonzero().tolist() == [[1, j] for j in range(block_size)]
    dw = sk.sdd(torch.ones(4, 3 * block_size), x, topology)
    assert dw.isfinite().logical_not().nonzero().tolist() == [[0, i, block_size - 1] for i in range(block_size)]


@pytest.mark.parametrize("ragged", [False, True])
def test_the_bias_gradient_of_many_16_bit_tokens_is_summed_in_float32(backend, ragged):
    topology = random_topology((2, 2), 4, groups=2)
    x, _, weight, bias, _ = operands(topology, 4096, torch.bfloat16, ragged)
    offsets = torch.tensor([0, 4096, 4096]) if ragged else None
    bias.requires_grad_()
    y = sk.dds(x, weight, topology, bias, True, offsets)
    y.backward(torch.ones_like(y))
    assert bias.grad.view(2, -1)[0].tolist() == [4096] * 8


def test_int32_token_offsets_serve_as_well_as_int64(backend):
    topology = random_topology((2, 3), 4, groups=3)
    x, dy, weight, bias, offsets = operands(topology, 9, torch.float32, ragged=True)
    gradients = []
    for ends in (offsets, offsets.int()):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        gradients.append(torch.autograd.grad(sk.dds(*leaves[:2], topology, leaves[2], True, ends), leaves, dy))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


TOPOLOGY = random_topology((3, 4), 4, groups=2, live=1.0, dead=1)  # shape (24, 32), 25 slots


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, b: sk.dds(x[:, :-1], w, TOPOLOGY, transpose=True), r"\(24, 32\) wants 32 features.*\(5, 31\)"),
        (lambda x, w, b: sk.dds(x, w, TOPOLOGY), r"\(24, 32\) wants 24 features.*\(5, 32\)"),
        (lambda x, w, b: sk.dds(x, w, TOPOLOGY, None, True, torch.tensor([0, 2, 5])), r"16 features.*\(5, 32\)"),
        (lambda x, w, b: sk.dds(x.half(), w, TOPOLOGY, transpose=True), "float16 and torch.float32"),
        (lambda x, w, b: sk.dds(x, w, TOPOLOGY, b.double(), True), "float32 and torch.float64"),
        (lambda x, w, b: sk.dds(x.cfloat(), w.cfloat(), TOPOLOGY, transpose=True), "floating-point.*torch.complex64"),
        (lambda x, w, b: sk.sdd(x.long()[:, :24], x.long(), TOPOLOGY), "floating-point.*torch.int64"),
        (lambda x, w, b: sk.dds(x, w.to("meta"), TOPOLOGY, transpose=True), "cpu and meta"),
        (lambda x, w, b: sk.dds(x.to("meta"), w.to("meta"), TOPOLOGY, transpose=True), "on meta, but.* on cpu"),
        (lambda x, w, b: sk.dds(x, w[1:], TOPOLOGY, transpose=True), r"\(25, 4, 4\), got \(24, 4, 4\)"),
        (lambda x, w, b: sk.dds(x, w, TOPOLOGY, b[1:], True), r"24 biases, got \(23,\)"),
        (lambda x, w, b: sk.dds(x[:, :24], w, TOPOLOGY, b), "transpose is False"),
        (
            lambda x, w, b: sk.dds(x[:, 16:], w, TOPOLOGY, None, True, torch.tensor([0, 5])),
            r"2 groups want 3 token offsets, got \(2,\)",
        ),
        (lambda x, w, b: sk.sdd(x, x, TOPOLOGY), r"24 features.*\(5, 32\)"),
        (lambda x, w, b: sk.sdd(x[:, :24], x[:, :24], TOPOLOGY), r"32 features.*\(5, 24\)"),
        (lambda x, w, b: sk.sdd(x[:4, :24], x, TOPOLOGY), r"\(4,\) tokens.*\(5,\)"),
        (lambda x, w, b: sk.sdd(x[:, :24].half(), x, TOPOLOGY), "float16 and torch.float32"),
        (
            lambda x, w, b: sk.sdd(x[:, :12], x[:, :16], TOPOLOGY, torch.tensor([0, 5])),
            r"2 groups want 3 token offsets, got \(2,\)",
        ),
        (lambda x, w, b: sk.dds(x[:, 16:], w, TOPOLOGY, None, True, torch.tensor([0, 2, 4])), r"0 to 5.*\[0, 2, 4\]"),
        (lambda x, w, b: sk.dds(x[:, 16:], w, TOPOLOGY, None, True, torch.tensor([0, 6, 5])), r"0 to 5.*\[0, 6, 5\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused_with_both_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 32), torch.randn(25, 4, 4), torch.randn(24))


def test_an_unknown_backend_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'abacus' is unknown; there are reference, dense"), sk.use("abacus"):
        pass


def test_a_forced_backend_that_cannot_answer_says_so():
    layer = sk.SparseLinear(8, 8, density=0.5, block_size=4, dtype=torch.float64)
    if choose.BACKENDS["cpu"].unavailable():
        with pytest.raises(RuntimeError, match="'cpu' was asked for, but.*compiler"), sk.use("cpu"):
            pass
    else:
        with sk.use("cpu"), pytest.raises(RuntimeError, match="float32 and bfloat16 on a CPU, got torch.float64"):
            layer(torch.randn(2, 8, dtype=torch.float64))
