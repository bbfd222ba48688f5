"""Conversions: single layers from and to dense, and plan, sparsify, densify, plan_from for whole models."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import BLOCK_SIZES
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsekern as sk


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 32))


# One layer


@given(
    out=st.integers(1, 70),
    into=st.integers(1, 70),
    block_size=st.sampled_from(BLOCK_SIZES),
    density=st.floats(0.01, 1.0),
    keep=st.sampled_from(["magnitude", "random"]),
)
def test_from_linear_keeps_the_values_of_its_live_blocks_and_nothing_else(out, into, block_size, density, keep):
    linear = nn.Linear(into, out)
    layer = sk.SparseLinear.from_linear(linear, density, block_size, keep)
    rows, cols = -(-out // block_size), -(-into // block_size)
    assert layer.topology.num_live == max(1, round(density * rows * cols))
    grid = layer.topology.mask()[0].numpy()
    mask = torch.from_numpy(np.kron(grid, np.ones((block_size, block_size), dtype=bool))[:out, :into])
    assert torch.equal(layer.to_dense(), linear.weight.detach() * mask)
    assert torch.equal(layer.weight.detach()[~layer.lanes().expand_as(layer.weight)].abs().sum(), torch.tensor(0.0))
    assert torch.equal(layer.bias, linear.bias)


@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), block_size=st.sampled_from([1, 4, 16]))
def test_magnitude_keeps_the_blocks_of_largest_l1_norm(grid, block_size):
    linear = nn.Linear(grid[1] * block_size, grid[0] * block_size)
    layer = sk.SparseLinear.from_linear(linear, 0.4, block_size)
    w = linear.weight.detach().double().abs().numpy()
    norms = w.reshape(grid[0], block_size, grid[1], block_size).sum(axis=(1, 3))
    live = layer.topology.mask()[0].numpy()
    assert live.all() or norms[live].min() >= norms[~live].max() - 1e-4


def test_fresh_draws_weight_and_bias_anew_by_the_sparse_fan_in():
    linear = nn.Linear(256, 256)
    layer = sk.SparseLinear.from_linear(linear, 0.25, 16, "fresh")
    assert torch.isin(layer.weight.detach(), linear.weight.detach()).float().mean() < 0.01
    assert not torch.equal(layer.bias, linear.bias)
    fan_in = layer.fan_in()
    for row, width in enumerate(fan_in.tolist()):
        values = layer.weight.detach()[layer.topology.block_rows == row]
        assert 0.9 < values.abs().max() * width**0.5 <= 1.0


def test_a_mask_of_elements_makes_the_masked_layer_exactly():
    linear = nn.Linear(40, 24)
    mask = torch.rand(24, 40) < 0.05
    layer = sk.SparseLinear.from_linear(linear, block_size=8, keep=mask)
    assert torch.equal(layer.to_dense(), linear.weight.detach() * mask)
    assert layer.topology.num_live == mask.view(3, 8, 5, 8).any(3).any(1).sum()


def test_a_mask_of_blocks_makes_the_layer_with_these_blocks():
    linear = nn.Linear(40, 24)
    grid = torch.rand(3, 5) < 0.5
    layer = sk.SparseLinear.from_linear(linear, block_size=8, keep=grid)
    assert torch.equal(layer.topology.mask()[0], grid)
    assert torch.equal(layer.to_dense(), linear.weight.detach() * torch.kron(grid, torch.ones(8, 8)).bool())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_from_linear_and_to_linear_preserve_dtype_bias_requires_grad_and_mode(dtype):
    linear = nn.Linear(32, 32, bias=False, dtype=dtype).eval()
    linear.weight.requires_grad_(False)
    layer = sk.SparseLinear.from_linear(linear, 1.0)
    back = layer.to_linear()
    for module in (layer, back):
        assert module.weight.dtype == dtype and module.bias is None
        assert not module.weight.requires_grad and not module.training
    assert torch.equal(back.weight, linear.weight)
    frozen_bias = nn.Linear(32, 32)
    frozen_bias.bias.requires_grad_(False)
    layer = sk.SparseLinear.from_linear(frozen_bias)
    assert layer.weight.requires_grad and not layer.bias.requires_grad and layer.training


def test_from_linear_shares_no_memory_with_the_linear():
    linear = nn.Linear(16, 16)
    layer = sk.SparseLinear.from_linear(linear, 1.0, 1)
    before = linear.weight.detach().clone()
    with torch.no_grad():
        layer.weight.fill_(7)
        layer.to_dense().fill_(9)
        layer.to_linear().weight.fill_(9)
    assert torch.equal(linear.weight, before) and (layer.weight == 7).all()


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_to_linear_computes_the_same_function_with_and_without_groups(block_size):
    for groups in (1, 3):
        layer = sk.SparseLinear(60, 36, density=0.3, block_size=block_size, groups=groups)
        x = torch.randn(5, 60)
        torch.testing.assert_close(layer.to_linear()(x), layer(x))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize(("block_size", "groups"), [(1, 1), (4, 1), (16, 2)])
def test_to_bsr_and_to_scipy_hold_the_same_matrix(block_size, groups):
    layer = sk.SparseLinear(64, 32, density=0.3, block_size=block_size, groups=groups)
    dense = layer.to_dense()
    bsr = layer.to_bsr()
    assert bsr.layout == torch.sparse_bsr and torch.equal(bsr.to_dense(), dense)
    matrix = layer.to_scipy()
    assert matrix.format == ("csr" if block_size == 1 else "bsr")
    assert np.array_equal(matrix.toarray(), dense.numpy())


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_exports_leave_dead_slots_out():
    layer = sk.SparseLinear(64, 64, density=0.5, block_size=16)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.topology.block_rows[2] = -1
        layer.topology.block_cols[2] = -1
        layer.topology.rebuild()
    assert layer.to_bsr().values().shape[0] == 7
    assert layer.to_scipy().nnz == 7 * 256
    assert np.array_equal(layer.to_scipy().toarray(), layer.to_dense().numpy())


def test_to_scipy_of_a_padded_layer_is_a_csr_matrix_of_the_real_shape():
    layer = sk.SparseLinear(3 * 10, 3 * 7, density=0.8, block_size=4, groups=3)
    matrix = layer.to_scipy()
    assert matrix.format == "csr" and matrix.shape == (21, 30)
    assert np.array_equal(matrix.toarray(), layer.to_dense().numpy())


def test_to_scipy_of_a_bfloat16_layer_is_float32():
    layer = sk.SparseLinear(32, 32, density=0.5, dtype=torch.bfloat16)
    assert layer.to_scipy().dtype == np.float32


def test_to_bsr_of_a_padded_layer_says_what_to_use():
    with pytest.raises(ValueError, match=r"to_bsr: shape \(7, 10\) .* no multiple of block_size 4; use to_scipy\(\)"):
        sk.SparseLinear(10, 7, block_size=4).to_bsr()


def test_to_cupy_without_cupy_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupyx.scipy.sparse", None)
    with pytest.raises(RuntimeError, match=r"to_cupy: cupy is not installed; pip install 'sparsekern\[cupy\]'"):
        sk.SparseLinear(32, 32).to_cupy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"block_size": 12}, "block_size must be a power of two from 1 to 128, got 12"),
        ({"keep": "largest"}, "keep must be a boolean mask or one of magnitude, random, fresh, got 'largest'"),
        ({"keep": torch.ones(32, 48, dtype=bool)}, r"mask must be boolean of shape \(1, 48, 32\).*got torch.bool of"),
        ({"keep": torch.ones(48, 32)}, "got torch.float32"),
    ],
)
def test_from_linear_refuses_what_is_not_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        sk.SparseLinear.from_linear(nn.Linear(32, 48), **arguments)


def test_set_density_keeps_live_blocks_and_grows_zeros_at_random_places():
    layer = sk.SparseLinear(64, 64, density=0.2, block_size=4)
    before, old = layer.to_dense(), layer.topology.mask()
    layer.set_density(0.5)
    assert torch.equal(layer.to_dense(), before)
    grown = layer.topology.mask() & ~old
    assert layer.topology.num_live == 128 and grown.sum() == 128 - 51
    assert grown[0].any(1).sum() > 12, "growth crowds into few rows"
    layer.set_density(0.1)
    assert layer.topology.num_live == 26 and not (layer.topology.mask() & ~old).any()


def test_a_rule_notices_that_a_layer_took_another_density_under_its_optimiser():
    layer = sk.SparseLinear(64, 64, density=0.5)
    optimizer = torch.optim.Adam(layer.parameters())
    rule = sk.SET(layer, optimizer)
    layer(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    rule.step()
    layer.set_density(0.25)
    assert layer.weight.grad is None
    with pytest.raises(RuntimeError, match="SET.step: weights of another topology were loaded"):
        rule.step()


# Whole models


def test_plan_is_a_dry_run_and_sparsify_carries_it_out():
    model = mlp()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plan = sk.plan(model, density=0.25, block_size=8)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    assert sk.sparsify(model, plan) is model
    for layer in plan.layers:
        assert model.get_submodule(layer.name).topology.live_per_group() == list(layer.live)


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_sparsify_hits_the_density_of_the_whole_model_exactly(distribution, block_size):
    model = sk.sparsify(mlp(), 0.2, block_size, distribution)
    layers = [model[i].topology for i in (0, 2, 4)]
    blocks = sum(t.num_blocks for t in layers)
    assert sum(t.num_live for t in layers) == round(0.2 * blocks)


def test_erk_makes_small_layers_denser_and_uniform_does_not():
    erk, uniform = sk.plan(mlp(), 0.2, 1).layers, sk.plan(mlp(), 0.2, 1, "uniform").layers
    assert erk[0].density < erk[1].density < erk[2].density
    assert [layer.density for layer in uniform] == pytest.approx([0.2] * 3, abs=1e-3)


def test_each_group_of_a_sparse_layer_counts_as_a_layer_of_its_own():
    model = nn.ModuleDict(
        {"trunk": nn.Linear(128, 128), "heads": sk.SparseLinear(3 * 128, 3 * 32, density=1.0, block_size=4, groups=3)}
    )
    counts = sk.plan(model, 0.1, 4).layers
    trunk, heads = (layer.live for layer in counts)
    assert len(heads) == 3 and max(heads) - min(heads) <= 1
    assert trunk[0] / heads[0] == pytest.approx((32 + 32) / (32 + 8), rel=0.05)
    assert sum(trunk) + sum(heads) == round(0.1 * (32 * 32 + 3 * 32 * 8))


def test_a_layer_that_is_sparse_already_stays_the_same_module_with_a_new_topology():
    heads = sk.SparseLinear(3 * 32, 3 * 8, density=1.0, block_size=4, groups=3)
    heads.bias.requires_grad_(False)
    before, old_weight = heads.to_dense(), heads.weight
    model = sk.sparsify(nn.Sequential(heads), 0.25)
    assert model[0] is heads and heads.weight is old_weight
    assert heads.topology.live_per_group() == [4, 4, 4] and heads.weight.shape == (12, 4, 4)
    dense = heads.to_dense()
    assert torch.equal(dense, before * (dense != 0)) and not heads.bias.requires_grad
    y = heads(torch.randn(5, 32), group=torch.tensor([2, 0, 0, 1, 2]))
    y.sum().backward()
    assert heads.weight.grad.shape == (12, 4, 4)


def test_densify_after_sparsify_at_density_one_is_the_same_model():
    model = mlp()
    x = torch.randn(7, 64)
    y = model(x)
    torch.testing.assert_close(sk.sparsify(model, 1.0)(x), y)
    assert sk.densify(model) is model
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    assert torch.equal(model(x), y)


def test_densify_computes_what_the_sparse_model_computes():
    model = sk.sparsify(
        nn.Sequential(nn.Conv2d(4, 16, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32)),
        0.3,
        4,
        modules=(nn.Linear, nn.Conv2d),
    )
    x = torch.randn(3, 4, 4, 4)
    y = model(x)
    assert isinstance(model[0], sk.SparseConv2d) and isinstance(model[3], sk.SparseLinear)
    dense = sk.densify(model)
    assert type(dense[0]) is nn.Conv2d and type(dense[3]) is nn.Linear
    torch.testing.assert_close(dense(x), y)


def test_a_model_that_is_one_linear_comes_back_as_a_sparse_layer():
    layer = sk.sparsify(nn.Linear(64, 64), 0.5)
    assert isinstance(layer, sk.SparseLinear)
    assert isinstance(sk.densify(layer), nn.Linear)


def test_convolutions_are_left_alone_unless_asked_for():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(64, 64))
    for modules, taken in ((nn.Linear, "1"), (nn.Conv2d, "0")):
        reasons = {layer.name: layer.reason for layer in sk.plan(model, modules=[modules]).layers}
        assert reasons.pop(taken) == ""
        assert list(reasons.values()) == [
            f"it is of type {type(model[1 - int(taken)]).__name__}, which modules does not name"
        ]


def test_the_table_shows_each_layer_and_why_it_stays():
    model = nn.ModuleDict(
        {
            "body": nn.Linear(64, 64),
            "head": nn.Linear(64, 64),
            "logits": nn.Linear(64, 7),
            "tied": nn.Linear(64, 64),
            "embedding": nn.Embedding(64, 64),
            "attention": nn.MultiheadAttention(64, 4),
            "normed": parametrizations.weight_norm(nn.Linear(64, 64)),
            "pruned": prune.random_unstructured(nn.Linear(64, 64), "weight", 0.5),
        }
    )
    model["tied"].weight = model["embedding"].weight
    plan = sk.plan(model, density={"[!p]*": 0.25, "pruned": 0.5}, exclude=["head*"])
    assert {layer.name: layer.reason for layer in plan.layers} == {
        "body": "",
        "head": "excluded",
        "logits": "blocks of 16 would pad it by 129%",
        "tied": "its weight is tied, another module holds it too",
        "embedding": "it is of type Embedding",
        "attention": "it is of type MultiheadAttention with a matrix in_proj_weight",
        "attention.out_proj": "it is of type NonDynamicallyQuantizableLinear, whose weight other code may read",
        "normed": "its weight is computed from other parameters",
        "pruned": "its weight is computed from other parameters",
    }
    lines = str(plan).splitlines()
    assert lines[0].split() == ["layer", "shape", "block", "size", "density", "live", "of", "becomes"]
    assert lines[1].split() == ["body", "64", "x", "64", "16", "0.2500", "4", "16", "sparse"]
    assert lines[3].endswith("stays: blocks of 16 would pad it by 129%")
    assert lines[-1].startswith("1 of 9 layers sparse, 4 of 16 blocks live: density 0.2500 of these")
    assert repr(plan) == str(plan)
    sparse = sk.sparsify(model, plan)
    assert [name for name, m in sparse.named_modules() if isinstance(m, sk.SparseLinear)] == ["body"]


def test_padding_up_to_a_quarter_is_accepted():
    model = nn.Sequential(nn.Linear(64, 13), nn.Linear(64, 12))  # 16 / 13 = 1.23, 16 / 12 = 1.33
    assert [layer.reason for layer in sk.plan(model).layers] == ["", "blocks of 16 would pad it by 33%"]


def test_padding_is_counted_per_group():
    model = nn.Sequential(sk.SparseConv2d(8, 32, 3, density=1.0, block_size=1), nn.Conv2d(8, 32, 3, groups=4))
    plan = sk.plan(model, block_size=16, modules=[nn.Conv2d])
    assert [layer.reason for layer in plan.layers] == ["", "blocks of 16 would pad it by 256%"]  # 8 x 18 as 16 x 32


def test_patterns_give_density_and_block_size_by_the_first_that_fits():
    model = mlp()
    sk.sparsify(model, {"0": 0.5, "*": 0.25}, {"4": 4, "[02]": 16})
    assert (model[0].topology.num_live, model[0].block_size) == (12, 16)
    assert (model[2].topology.num_live, model[2].block_size) == (round(0.25 * 18), 16)
    assert (model[4].topology.num_live, model[4].block_size) == (24, 4)


def test_layers_that_no_pattern_fits_stay():
    reasons = [layer.reason for layer in sk.plan(mlp(), {"[02]": 0.5}, {"[04]": 16}).layers]
    assert reasons == ["", "no block size is given for it", "no density is given for it"]


def test_a_module_under_two_names_is_replaced_under_both():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    sk.sparsify(model, 0.5)
    assert isinstance(model["a"][0], sk.SparseLinear) and model["a"][0] is model["b"][0]


@pytest.mark.parametrize("batch", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])])
def test_a_transformer_encoder_still_runs_in_evaluation_mode(batch):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        y = sk.sparsify(encoder, 0.5)(x, src_key_padding_mask=batch)
        dense = sk.densify(encoder)(x, src_key_padding_mask=batch)
    keep = slice(None) if batch is None else ~batch
    torch.testing.assert_close(y[keep], dense[keep])


def test_keep_goes_to_every_layer_or_by_pattern():
    model = mlp()
    mask = torch.rand(96, 64) < 0.1
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    sk.sparsify(model, 0.25, 1, keep={"0": mask, "2": "magnitude", "*": "fresh"})
    assert torch.equal(model[0].to_dense(), weights[0] * mask)
    assert torch.isin(model[2].weight.detach(), weights[1]).all()
    assert torch.isin(model[4].weight.detach(), weights[2]).float().mean() < 0.1


def test_the_sparsified_model_trains():
    model = sk.sparsify(mlp(), 0.3, 8, keep="fresh")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, target = torch.randn(64, 64), torch.randn(64, 32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_plan_from_rebuilds_a_saved_model_without_its_plan(tmp_path):
    def build():
        return nn.ModuleDict(
            {
                "body": mlp(),
                "conv": nn.Conv2d(16, 32, 3, groups=2),
                "heads": sk.SparseLinear(2 * 32, 2 * 16, density=1.0, block_size=8, groups=2),
            }
        )

    saved = sk.sparsify(build(), 0.2, {"body*": 16, "conv": 4}, exclude=["body.4"], modules=[nn.Linear, nn.Conv2d])
    with torch.no_grad():  # groups of different counts, as rewiring across layers may leave them
        saved["heads"].set_density([3, 5])
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    plan = sk.plan_from(state)
    assert [layer.name for layer in plan.layers] == ["body.0", "body.2", "conv", "heads"]
    model = sk.sparsify(build(), plan)
    model.load_state_dict(state)
    for (name, value), other in zip(saved.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    x = torch.randn(3, 64)
    assert torch.equal(model["body"](x), saved["body"](x))


def test_plan_from_a_single_layer_has_the_empty_name():
    layer = sk.SparseLinear(64, 32, density=0.5)
    plan = sk.plan_from(layer.state_dict())
    assert [(p.name, p.shape, p.block_size, p.live) for p in plan.layers] == [("", (32, 64), 16, (4,))]
    sk.sparsify(nn.Linear(64, 32), plan).load_state_dict(layer.state_dict())


def test_a_model_made_on_meta_is_sparsified_and_filled_from_a_checkpoint():
    saved = sk.sparsify(mlp(), 0.2)
    state = saved.state_dict()
    with torch.device("meta"):
        model = sk.sparsify(mlp(), sk.plan_from(state))
    model.to_empty(device="cpu").load_state_dict(state)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), saved(x))


def test_plan_from_a_dense_checkpoint_is_refused():
    with pytest.raises(ValueError, match="plan_from: the state_dict holds no sparse layer"):
        sk.plan_from(mlp().state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"block_size": 3}, "block_size must be a power of two from 1 to 128, got 3"),
        ({"distribution": "er"}, "plan: distribution must be one of uniform, erk, got 'er'"),
        ({"exclude": "head*"}, r"plan: exclude must be a list of patterns, got the text 'head\*'"),
        ({"modules": [nn.Conv1d]}, "plan: modules may hold nn.Linear and nn.Conv2d, got .*Conv1d"),
        ({"keep": {"0": "fresh"}}, "sparsify: no pattern of keep fits layer '2'; end with '\\*'"),
        ({"keep": "best"}, "keep must be a boolean mask or one of magnitude, random, fresh, got 'best'"),
    ],
)
def test_sparsify_refuses_what_is_not_allowed_and_leaves_the_model_as_it_is(arguments, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        sk.sparsify(model, **arguments)
    assert all(type(model[i]) is nn.Linear for i in (0, 2, 4))


def test_a_plan_of_another_model_is_refused_before_anything_changes():
    plan = sk.plan(mlp())
    with pytest.raises(ValueError, match="the plan has layer '4', which the model does not have"):
        sk.sparsify(mlp()[:4], plan)
    with pytest.raises(ValueError, match="the plan has layer '0', which the model has as ReLU"):
        sk.sparsify(nn.Sequential(nn.ReLU(), *mlp()[1:]), plan)
    other = mlp()
    other[4] = nn.Linear(48, 16)
    with pytest.raises(ValueError, match=r"layer '4' has shape \(16, 48\) in 1 groups, the plan \(32, 48\) in 1"):
        sk.sparsify(other, plan)
    assert type(other[0]) is nn.Linear
    with pytest.raises(ValueError, match="layer '0' has block_size 8, the plan 16"):
        sk.sparsify(sk.sparsify(mlp(), block_size=8), plan)


@pytest.mark.parametrize("argument", ["exclude", "density", "block_size"])
def test_a_pattern_that_fits_no_layer_is_warned_about(argument):
    value = {"exclude": ["haed*"], "density": {"haed*": 0.5, "*": 0.1}, "block_size": {"haed*": 4, "*": 16}}[argument]
    with pytest.warns(UserWarning, match=rf"plan: {argument} pattern 'haed\*' fits no layer"):
        sk.plan(mlp(), **{argument: value})


def test_a_lazy_layer_has_no_shape_to_plan_for():
    with pytest.raises(ValueError, match="plan: layer '0' is lazy and has no shape yet; run the model once"):
        sk.plan(nn.Sequential(nn.LazyLinear(32)))


def test_a_sparse_layer_that_stays_is_planned_with_its_own_density():
    model = nn.Sequential(sk.SparseLinear(64, 64, density=0.25, block_size=8), nn.Linear(64, 64))
    plan = sk.plan(model, 0.5, block_size=8, exclude=["0"])
    assert [layer.density for layer in plan.layers] == [0.25, 0.5]
    assert "0.3750 of all layers listed" in str(plan)
