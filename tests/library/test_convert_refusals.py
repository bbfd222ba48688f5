"""What conversions refuse: the message names the argument and its value, and nothing has changed."""

import copy
import re

import pytest
import torch
from torch import nn

import sparsekern as sk

NAN = float("nan")


def model() -> nn.Sequential:
    """Dense layers around one that is sparse already, so that both ways of converting are at stake."""
    sparse = sk.SparseLinear(32, 32, density=0.5, block_size=8)
    return nn.Sequential(nn.Linear(24, 32), sparse, nn.Linear(32, 24), nn.Conv2d(8, 8, 3))


def grouped() -> sk.SparseLinear:
    return sk.SparseLinear(24, 40, density=0.5, block_size=4, groups=2)  # 5 x 3 blocks in each group


def mask(*shape: int, live: bool = True, **options) -> torch.Tensor:
    return torch.full(shape, live, dtype=torch.bool, **options)


def refuses(module: nn.Module, call, *words: str) -> None:
    """The call raises a sentence with these words, and leaves modules, Parameters and values as they were."""
    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert dict(module.named_modules()) == modules
    after = dict(module.named_parameters())
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)
    assert module.state_dict().keys() == before.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def named(value: object) -> str:
    return re.sub(r"\s+", " ", f"{tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.40}")


# Models. Of each bad value the words that the message must say besides the argument's name.

OPTIONS = [
    *(("density", bad, repr(bad)) for bad in (0, -0.1, 1.1, NAN, float("inf"), "0.1", None, True, [0.1, 0.2])),
    ("density", {}, "empty"),
    ("density", {3: 0.1}, "got 3"),
    ("density", {"0": 0.1, "*": "x"}, "'x'"),
    ("density", {"0": 0.1, "*": NAN}, "nan"),
    *(("block_size", bad, repr(bad)) for bad in (0, None, 3, True, 256, -8, 8.0, "8", [8])),
    ("block_size", {}, "empty"),
    ("block_size", {None: 8}, "got None"),
    ("block_size", {"0": 8, "*": 0}, "got 0"),
    *(("distribution", bad, repr(bad)) for bad in ("erdos", None, 3, ["erk"])),
    *(("exclude", bad, repr(bad)) for bad in ("head*", None, 3)),
    ("exclude", ["0", 3], "got 3"),
    ("exclude", [None], "got None"),
    *(("modules", bad, repr(bad)) for bad in ("Linear", None, 3, nn.ReLU, nn.ConvTranspose2d)),
    ("modules", [nn.Linear, 3], "got 3"),
    ("modules", [[nn.Linear]], "[<class"),
    ("modules", nn.Linear(2, 3), "Linear(in_features=2, out_features=3"),
    *(("keep", bad, repr(bad)) for bad in (None, 3, "largest", ["fresh"])),
    ("keep", {}, "empty"),
    ("keep", {3: "fresh"}, "got 3"),
    ("keep", {"0": "fresh"}, "'1'"),
    ("keep", {"2": 3, "*": "fresh"}, "got 3"),
    ("keep", {"2": mask(3, 3), "*": "fresh"}, "(3, 3)"),
    ("keep", {"2": mask(24, 32, live=False), "*": "fresh"}, "False everywhere"),
    ("keep", {"2": mask(24, 32).float(), "*": "fresh"}, "torch.float32"),
    ("keep", {"2": mask(24, 32, device="meta"), "*": "fresh"}, "on meta"),
    ("keep", {"2": mask(24, 32).to_sparse(), "*": "fresh"}, "torch.sparse_coo"),
    ("keep", {"1": mask(4, 3), "*": "fresh"}, "(4, 3)"),
    ("keep", {"1": mask(32, 32, device="meta"), "*": "fresh"}, "on meta"),
]


@pytest.mark.parametrize(("argument", "bad", "value"), OPTIONS, ids=[f"{a} {named(bad)}" for a, bad, _ in OPTIONS])
def test_sparsify_names_what_is_wrong_and_changes_nothing(argument, bad, value):
    made = model()
    options = {"density": 0.3, "block_size": 8} | {argument: bad}
    refuses(made, lambda: sk.sparsify(made, **options), argument, value)
    if argument != "keep":
        refuses(made, lambda: sk.plan(made, **options), argument, value)


def test_sparsify_refuses_a_plan_of_counts_that_a_later_layer_cannot_have():
    made = model()
    plan = sk.plan(made, 0.3, 8)
    *others, last = [layer for layer in plan.layers if layer.live]
    for live in ((13,), (-1,), (3, 3)):
        bad = sk.convert.Plan((*others, sk.convert.LayerPlan(last.name, last.shape, last.groups, 8, live)))
        refuses(made, lambda bad=bad: sk.sparsify(made, bad), "density", str(list(live)))


@pytest.mark.parametrize("single", [nn.Linear, nn.Conv2d])
def test_modules_may_be_a_single_type(single):
    planned = sk.plan(model(), 0.3, 8, modules=single)
    assert str(planned) == str(sk.plan(model(), 0.3, 8, modules=(single,)))
    becomes = {"0", "1", "2"} if single is nn.Linear else {"1", "3"}  # the layer that is sparse already always
    assert {layer.name for layer in planned.layers if layer.live} == becomes


@pytest.mark.parametrize("call", ["plan", "sparsify", "densify"])
@pytest.mark.parametrize("bad", [None, 3, "model", nn.Linear, [nn.Linear(3, 3)], torch.ones(3)], ids=named)
def test_what_is_no_model_is_refused(call, bad):
    with pytest.raises(ValueError, match=f"model must be a torch.nn.Module, got {type(bad).__name__}"):
        getattr(sk, call)(bad)


def test_densify_that_fails_at_one_layer_changes_none(monkeypatch):
    made = sk.sparsify(model(), 0.3, 8, modules=(nn.Linear, nn.Conv2d))

    def fail(layer):
        raise ValueError("to_conv2d: no memory")

    monkeypatch.setattr(sk.SparseConv2d, "to_conv2d", fail)
    refuses(made, lambda: sk.densify(made), "no memory")


# Single layers


DENSITIES = [0, -0.1, 1.1, NAN, 2, "0.1", None, True, {}, {"*": 0.1}]
LISTS = [
    *((bad, repr(bad)) for bad in ([], [0.1], [0.1, 0.2, 0.3], [3], [3, -1], [3, 16])),
    ([0.1, 1.5], "1.5"),
    ([0.1, NAN], "nan"),
    ([True, True], "True"),
    (["a", "b"], "'a'"),
]


@pytest.mark.parametrize(("bad", "value"), [*((bad, repr(bad)) for bad in DENSITIES), *LISTS], ids=named)
def test_set_density_names_a_bad_density_and_changes_nothing(bad, value):
    layer = grouped()
    refuses(layer, lambda: layer.set_density(bad), "density", value)


@pytest.mark.parametrize(
    ("keep", "value"),
    [
        (None, "None"),
        (3, "3"),
        ("largest", "'largest'"),
        ([[True]], "[[True]]"),
        (mask(5, 3), "(5, 3)"),
        (mask(40, 24), "(40, 24)"),
        (mask(2, 5, 4), "(2, 5, 4)"),
        (mask(0), "(0,)"),
        (mask(2, 5, 3, live=False), "False everywhere"),
        (mask(2, 20, 12, live=False), "False everywhere"),
        (mask(2, 5, 3).long(), "torch.int64"),
        (mask(2, 5, 3, device="meta"), "on meta"),
        (mask(2, 5, 3).to_sparse(), "torch.sparse_coo"),
    ],
    ids=named,
)
def test_set_density_names_a_bad_keep_and_changes_nothing(keep, value):
    layer = grouped()
    refuses(layer, lambda: layer.set_density(0.3, keep=keep), "keep", value)


CONVERSIONS = {
    "from_linear": (sk.SparseLinear.from_linear, lambda: nn.Linear(16, 16)),
    "from_conv2d": (sk.SparseConv2d.from_conv2d, lambda: nn.Conv2d(4, 16, 2)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        *(("density", bad) for bad in (*DENSITIES, [], [0.1, 0.2], [-1], [17])),
        *(("block_size", bad) for bad in (0, None, 3, True, 256, "8", [8])),
        *(("keep", bad) for bad in (None, 3, "largest", mask(3, 3), mask(0), mask(4, 4, live=False))),
    ],
    ids=named,
)
def test_from_linear_and_from_conv2d_name_what_is_wrong(name, argument, bad):
    convert, make = CONVERSIONS[name]
    dense = make()
    if isinstance(bad, torch.Tensor):
        value = str(tuple(bad.shape)) if bad.shape != (4, 4) else "False everywhere"
    else:
        value = repr(bad)
    refuses(dense, lambda: convert(dense, **({"density": 0.3, "block_size": 4} | {argument: bad})), argument, value)


@pytest.mark.parametrize(
    "bad",
    [
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv1d(4, 4, 3),
        nn.Conv3d(4, 4, 3),
        nn.Bilinear(4, 4, 4),
        nn.Embedding(4, 4),
        sk.SparseLinear(8, 8, block_size=4),
        nn.Linear,
        nn.Conv2d,
        torch.ones(4, 4),
        "linear",
        None,
    ],
    ids=lambda bad: type(bad).__name__,
)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_only_the_layer_of_the_name_is_converted(name, bad):
    want = {"from_linear": "nn.Linear", "from_conv2d": "nn.Conv2d"}[name]
    with pytest.raises(TypeError, match=f"wants an {want} to convert, got {type(bad).__name__}"):
        CONVERSIONS[name][0](bad)


@pytest.mark.parametrize(("name", "lazy"), [("from_linear", nn.LazyLinear(3)), ("from_conv2d", nn.LazyConv2d(3, 3))])
def test_a_lazy_layer_has_no_shape_to_convert(name, lazy):
    with pytest.raises(ValueError, match=f"{type(lazy).__name__} is lazy and has no shape yet; run it once"):
        CONVERSIONS[name][0](lazy)


@pytest.mark.parametrize(
    ("grid", "value"),
    [
        (mask(2, 2), "(2, 2)"),
        (mask(4, 6), "(4, 6)"),
        (mask(1, 3, 4), "(3, 4)"),
        (mask(2, 3, 5), "(3, 5)"),
        (mask(3), "(3,)"),
        (mask(3, 5).int(), "torch.int32"),
        ([[True]], "list"),
        (None, "NoneType"),
    ],
    ids=named,
)
def test_from_mask_refuses_a_grid_of_another_shape_by_its_shape(grid, value):
    with pytest.raises(ValueError, match=rf"from_mask: .*{re.escape(value)}"):
        sk.Topology.from_mask(grid, (24, 40), 8)


def test_from_mask_takes_a_grid_of_two_axes_for_one_group():
    grid = torch.rand(3, 5) < 0.5
    assert torch.equal(sk.Topology.from_mask(grid, (24, 40), 8).mask(), grid[None])


# Saved models


def saved(**changes: object) -> dict:
    """The state of a sparse model with entries of its first topology changed; "missing" takes one away."""
    torch.manual_seed(0)
    state = dict(sk.sparsify(model(), 0.3, 8).state_dict())
    for name, value in changes.items():
        state[f"0.topology.{name}"] = value
    return {key: value for key, value in state.items() if not isinstance(value, str) or value != "missing"}


GEOMETRY = "0.topology._extra_state must be 5 integers"
STATES = {
    "None": (None, ("state_dict", "NoneType")),
    "a number": (3, ("state_dict", "int")),
    "a path": ("model.pt", ("state_dict", "str")),
    "a list": ([1], ("state_dict", "list")),
    "nothing": ({}, ("state_dict", "no sparse layer")),
    "a dense state": (nn.Linear(3, 3).state_dict(), ("state_dict", "no sparse layer")),
    "keyed by a number": (saved() | {3: torch.ones(2)}, ("state_dict", "names as keys, got 3")),
    "no rows": (saved(block_rows="missing"), ("'0'", "0.topology.block_rows")),
    "no columns": (saved(block_cols="missing"), ("'0'", "0.topology.block_cols")),
    "geometry None": (saved(_extra_state=None), (GEOMETRY, "None")),
    "geometry a text": (saved(_extra_state="32 x 24"), (GEOMETRY, "'32 x 24'")),
    "geometry short": (saved(_extra_state=torch.tensor([32, 24])), (GEOMETRY, "tensor([32, 24])")),
    "geometry float": (saved(_extra_state=torch.ones(5)), (GEOMETRY, "tensor([1., 1., 1., 1., 1.])")),
    "geometry on meta": (saved(_extra_state=torch.ones(5, device="meta").long()), (GEOMETRY, "meta")),
    "block size 0": (saved(_extra_state=torch.tensor([32, 24, 0, 1, 0])), ("'0'", "block_size", "got 0")),
    "groups 0": (saved(_extra_state=torch.tensor([32, 24, 8, 0, 0])), ("'0'", "groups=0")),
    "groups negative": (saved(_extra_state=torch.tensor([32, 24, 8, -1, 0])), ("'0'", "groups=-1")),
    "shape negative": (saved(_extra_state=torch.tensor([-32, 24, 8, 1, 0])), ("'0'", "out_features=-32")),
    "rows None": (saved(block_rows=None), ("'0'", "block_rows", "NoneType")),
    "rows float": (saved(block_rows=torch.ones(4)), ("'0'", "block_rows", "torch.float32")),
    "rows short": (saved(block_rows=torch.ones(1).long()), ("'0'", "block_rows", "(1,)")),
    "rows outside": (saved(block_rows=torch.tensor([9]), block_cols=torch.tensor([0])), ("'0'", "(9, 0)", "4 x 3")),
    "a block twice": (saved(block_rows=torch.zeros(2).int(), block_cols=torch.zeros(2).int()), ("'0'", "two slots")),
    "rows on meta": (
        saved(block_rows=torch.zeros(2, device="meta").int(), block_cols=torch.zeros(2, device="meta").int()),
        ("0.topology.block_rows", "meta"),
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_load_and_plan_from_name_what_is_wrong_with_a_state_and_change_nothing(case):
    state, words = STATES[case]
    made = model()
    refuses(made, lambda: sk.plan_from(state), *words)
    refuses(made, lambda: sk.load(made, state), *words)
