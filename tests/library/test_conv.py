"""SparseConv2d against nn.Conv2d: every option, gradients, dead slots, torch.compile, conversions."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import BLOCK_SIZES
from torch import nn

import sparsekern as sk
from sparsekern import conv
from sparsekern.backends import cpu

PAIR = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))


@st.composite
def convolutions(draw):
    """The arguments of a convolution that fits on 9 x 8 pixels."""
    groups = draw(st.sampled_from([1, 2, 3]))
    options = {
        "in_channels": groups * draw(st.integers(1, 4)),
        "out_channels": groups * draw(st.integers(1, 5)),
        "kernel_size": draw(PAIR),
        "stride": draw(PAIR),
        "padding": draw(st.sampled_from([0, 1, (2, 1), (0, 2), "same", "valid"])),
        "dilation": draw(PAIR),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    if options["padding"] == "same":
        options["stride"] = 1
    return options


TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}  # float32: sums of some hundred terms, in another order


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


@pytest.fixture(autouse=True, params=["im2col", "dense"])
def path(request, monkeypatch):
    """Run every test on both paths, whichever is the faster one."""
    monkeypatch.setattr(sk.SparseConv2d, "_im2col_pays", lambda self, x: request.param == "im2col")


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(
    convolutions(), st.sampled_from(BLOCK_SIZES[:6]), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([*TOLERANCE])
)
def test_outputs_and_gradients_are_those_of_conv2d(options, block_size, density, dtype):
    layer = sk.SparseConv2d(**options, density=density, block_size=block_size, dtype=dtype)
    conv = layer.to_conv2d()
    assert type(conv) is nn.Conv2d
    x = torch.randn(2, options["in_channels"], 9, 8, dtype=dtype, requires_grad=True)
    try:
        expected = conv(x)
    except RuntimeError:  # the kernel is larger than the padded picture
        assume(False)
    y = layer(x)
    close(y, expected)
    dy = torch.randn_like(y)
    sparse = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    dense = torch.autograd.grad(expected, [x, *conv.parameters()], dy)
    close(sparse[0], dense[0])
    with torch.no_grad():
        conv.weight.copy_(dense[1])
    gathered = sk.SparseConv2d.from_conv2d(conv, block_size=block_size, keep=layer.topology.mask()).weight
    close(sparse[1], gathered.detach())  # both have their slots in row-major order
    if options["bias"]:
        close(sparse[2], dense[2])


def test_a_picture_without_batch_axis_is_accepted():
    layer = sk.SparseConv2d(4, 8, 3, density=0.5, block_size=4)
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    assert layer(x).shape == (8, 4, 3)


def test_an_empty_batch_gives_an_empty_batch():
    for density in (0.5, 1.0):
        layer = sk.SparseConv2d(4, 8, 3, density=density, block_size=4)
        y = layer(torch.randn(0, 4, 6, 5))
        assert y.shape == (0, 8, 4, 3)


@pytest.mark.parametrize("block_size", [1, 4])
def test_channels_last_input_gives_the_same(block_size):
    layer = sk.SparseConv2d(8, 8, 3, padding=1, density=0.3, block_size=block_size)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_pictures_come_out_in_the_memory_format_that_conv2d_gives_them(padding_mode):
    layer = sk.SparseConv2d(8, 12, 3, padding=1, padding_mode=padding_mode, density=0.3, block_size=4)
    pictures = torch.randn(2, 8, 6, 6)
    for x in (pictures, pictures.contiguous(memory_format=torch.channels_last), pictures[0], pictures[:, :, ::2]):
        assert layer(x).stride() == layer.to_conv2d()(x).stride()
    layer(pictures).view(2, -1)  # as classifiers of pictures do before their linear layers


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("full", [True, False])
def test_dead_slots_have_exactly_no_gradient(block_size, groups, full):
    layer = sk.SparseConv2d(8, 8, 3, groups=groups, density=1.0, block_size=block_size)
    dead = torch.arange(layer.topology.num_slots) % 3 == 0
    with torch.no_grad():
        layer.weight[dead] = 0
        layer.topology.block_rows[dead] = -1
        layer.topology.block_cols[dead] = -1
        if not full:
            layer.topology.leave_full_store()
    assert layer.topology.full == full
    layer(torch.randn(2, 8, 6, 6)).square().sum().backward()
    gradient = layer.weight.grad
    assert (gradient[dead] == 0).all() and (gradient[~dead] != 0).any(dim=(1, 2)).all()


def test_padding_lanes_stay_zero_through_training():
    layer = sk.SparseConv2d(3, 5, 3, density=0.6, block_size=4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(3):
        layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    padding = ~layer.lanes().expand_as(layer.weight)
    assert padding.any() and (layer.weight[padding] == 0).all() and (layer.weight.grad[padding] == 0).all()


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_it_compiles_as_one_graph_and_rewiring_recompiles_nothing(density):
    layer = sk.SparseConv2d(4, 8, 3, padding="same", groups=2, density=density, block_size=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            layer.zero_grad()
            y = layer(x)
            y.square().sum().backward()
            expected = layer.weight.grad.clone()
            layer.zero_grad()
            torch.testing.assert_close(compiled(x), y)
            compiled(x).square().sum().backward()
            torch.testing.assert_close(layer.weight.grad, expected)
            with torch.no_grad():  # move a block, as a rule does
                free = (~layer.topology.mask()).nonzero()
                if len(free):
                    group, row, col = free[0].tolist()
                    slot = int((layer.topology.block_rows // (layer.topology.grid[0] // 2) == group).nonzero()[0])
                    layer.topology.block_rows[slot] = group * layer.topology.grid[0] // 2 + row
                    layer.topology.block_cols[slot] = group * layer.topology.grid[1] // 2 + col
                    layer.topology.rebuild()


@pytest.mark.skipif(bool(cpu.unavailable()), reason="without the C++ kernels the dense path is always the faster one")
def test_im2col_is_taken_where_it_pays_compiled_too(monkeypatch):
    monkeypatch.undo()
    calls = []
    real = conv.dds
    monkeypatch.setattr(conv, "dds", lambda *args, **options: calls.append(len(calls)) or real(*args, **options))
    x = torch.randn(1, 8, 4, 4)
    for channels, density, expected in ((512, 0.1, 1), (512, 0.9, 0), (32, 0.1, 0)):
        layer = sk.SparseConv2d(8, channels, 3, density=density, block_size=8)
        layer(x)
        assert len(calls) == expected, (channels, density)
        calls.clear()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        calls.clear()


def test_rules_rewire_convolutions():
    model = nn.Sequential(sk.SparseConv2d(8, 16, 3, density=0.3, block_size=4), nn.ReLU(), nn.Flatten())
    optimizer = torch.optim.Adam(model.parameters())
    for rule_type in (sk.SET, sk.RigL):
        rule = rule_type(model, optimizer, update_every=2)
        before = model[0].topology.mask()
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 8, 6, 6)).square().mean().backward()
            optimizer.step()
            rule.step()
        after = model[0].topology.mask()
        assert after.sum() == before.sum() and not torch.equal(after, before)


def test_autocast_runs_in_the_low_precision():
    for density in (0.3, 1.0):
        layer = sk.SparseConv2d(8, 16, 3, density=density, block_size=4)
        x = torch.randn(2, 8, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@given(convolutions(), st.sampled_from([1, 4, 16]))
def test_from_conv2d_and_back_at_density_one_is_the_same_layer(options, block_size):
    conv = nn.Conv2d(**options).eval().requires_grad_(False)
    layer = sk.SparseConv2d.from_conv2d(conv, 1.0, block_size)
    back = layer.to_conv2d()
    assert torch.equal(back.weight, conv.weight) and repr(back) == repr(conv)
    assert not back.weight.requires_grad and not layer.training and not back.training
    assert (back.bias is None) == (conv.bias is None)


def test_from_conv2d_takes_a_mask_of_the_weights_shape():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    mask = torch.rand_like(conv.weight) < 0.2
    layer = sk.SparseConv2d.from_conv2d(conv, block_size=1, keep=mask)
    assert torch.equal(layer.to_conv2d().weight, conv.weight * mask)
    assert layer.topology.num_live == mask.sum()


def test_initial_values_follow_the_real_fan_in():
    layer = sk.SparseConv2d(64, 64, 3, density=0.1, block_size=16)
    y = layer(torch.randn(8, 64, 8, 8)) - layer.bias.view(-1, 1, 1)
    rows = (layer.fan_in() > 0).repeat_interleave(16)
    assert y[:, rows].std().item() == pytest.approx(3**-0.5, rel=0.1)  # as nn.Conv2d's: variance 1 / 3 of the input's


def test_a_checkpoint_brings_its_topology():
    saved = sk.SparseConv2d(8, 8, 3, density=0.3, block_size=4)
    layer = sk.SparseConv2d(8, 8, 3, density=0.8, block_size=4)
    layer.load_state_dict(saved.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(layer(x), saved(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "in_channels must be divisible by groups"),
        ({"padding": "full"}, "Invalid padding string 'full'"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"block_size": 5}, "block_size must be a power of two from 1 to 128, got 5"),
    ],
)
def test_arguments_that_are_not_allowed_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sk.SparseConv2d(8, 8, 3, **arguments)


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (2, 4), (2, 4, 6)])
def test_a_picture_of_another_shape_is_refused_with_both_shapes(shape):
    layer = sk.SparseConv2d(4, 8, 3)
    with pytest.raises(ValueError, match=r"x must be \[N, 4, H, W\] or \[4, H, W\], got \("):
        layer(torch.randn(shape))


def test_a_picture_smaller_than_the_kernel_is_refused():
    with pytest.raises(RuntimeError):
        sk.SparseConv2d(4, 8, 5, block_size=4, density=0.5)(torch.randn(2, 4, 3, 3))


def test_repr_names_the_options():
    assert "4, 8, kernel_size=(3, 3), stride=(1, 1), padding='same'" in repr(sk.SparseConv2d(4, 8, 3, padding="same"))


@pytest.mark.parametrize(("density", "block_size", "groups"), [(1.0, 1, 1), (0.4, 1, 2), (0.5, 4, 1), (1.0, 4, 1)])
def test_the_dense_path_has_the_gradients_of_the_product_by_im2col(density, block_size, groups):
    conv = sk.SparseConv2d(4, 6, 3, groups=groups, density=density, block_size=block_size)
    with torch.no_grad():  # a dead slot, as GMP leaves them
        conv.topology.block_rows[1], conv.topology.block_cols[1], conv.weight[1] = -1, -1, 0
        conv.topology.rebuild()
    x = torch.randn(3, 4, 7, 7, requires_grad=True)

    def gradients():
        y = conv(x)
        first = torch.autograd.grad(y.square().mean(), (x, conv.weight, conv.bias), create_graph=True)
        return y, *first, *torch.autograd.grad(first[1].square().sum(), (x, conv.weight))

    with sk.use("dense"):
        dense = gradients()
    with sk.use("reference"):
        by_im2col = gradients()
    assert not dense[2][1].any()
    for ours, truth in zip(dense, by_im2col, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


def test_dense_can_be_forced_in_float64_which_cpp_does_not_copy():
    layer = sk.SparseLinear(32, 32, density=0.5, block_size=4, dtype=torch.float64)
    conv = sk.SparseConv2d(4, 8, 3, density=0.5, block_size=4, dtype=torch.float64)
    x, picture = torch.randn(3, 32, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with sk.use("dense"):
        found = [
            *torch.autograd.grad(layer(x).sum(), layer.weight),
            *torch.autograd.grad(conv(picture).sum(), conv.weight),
        ]
    with sk.use("reference"):
        truth = [
            *torch.autograd.grad(layer(x).sum(), layer.weight),
            *torch.autograd.grad(conv(picture).sum(), conv.weight),
        ]
    torch.testing.assert_close(found, truth)
