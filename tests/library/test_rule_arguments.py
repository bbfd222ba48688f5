"""What a rule takes: wrapped optimisers, several, wrapped followers. What it refuses, before anything is touched."""

import copy
import importlib.util
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import sparsekern as sk

RULES = {
    "SET": partial(sk.SET, update_every=1),
    "RigL": partial(sk.RigL, update_every=1),
    "GMP": partial(sk.GMP, update_every=1, end_step=4, final_density=0.1),
}


def build(layers=2):
    return nn.Sequential(*(sk.SparseLinear(32, 32, density=0.4, block_size=4) for _ in range(layers)))


class Shown(optim.Optimizer):
    """As accelerate's AcceleratedOptimizer: an Optimizer that never called its own __init__."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def state_dict(self):
        return self.optimizer.state_dict()


class Dressed:
    """As Lightning's LightningOptimizer: takes the class and the attributes of what it wraps."""

    def __init__(self, optimizer):
        self.__class__ = type("Dressed" + type(optimizer).__name__, (Dressed, type(optimizer)), {})
        self.__dict__.update(vars(optimizer))
        self._optimizer = optimizer

    def step(self):
        self._optimizer.step()


class Lookahead(optim.Optimizer):
    """As timm's: slow weights beside the wrapped optimiser's state."""

    def __init__(self, optimizer):
        self._base_optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state = {p: {"slow": p.detach().clone()} for g in self.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self):
        self._base_optimizer.step()
        for p, state in self.state.items():
            state["slow"].lerp_(p, 0.5)
            p.copy_(state["slow"])


def train(model, optimizer, rule, steps=2):
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        rule.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wrap", [Shown, Dressed, lambda o: Shown(Dressed(o))], ids=["shown", "dressed", "both"])
def test_a_wrapped_optimiser_trains_as_the_bare_one_does(rule, wrap):
    results = []
    for dress in (lambda o: o, wrap):
        torch.manual_seed(3)
        model = build()
        inner = optim.Adagrad(model.parameters(), 0.1, initial_accumulator_value=0.5)
        wrapped = dress(inner)
        train(model, wrapped, RULES[rule](model, wrapped), 3)
        results.append([*model.state_dict().values(), *(inner.state[p]["sum"] for p in model.parameters())])
    assert all(map(torch.equal, *results))


def test_the_state_of_a_wrapper_follows_too():
    model = build(1)
    optimizer = Lookahead(optim.Adam(model.parameters()))
    rule = sk.SET(model, optimizer, update_every=2)
    before = model[0].topology.block_rows.clone(), model[0].topology.block_cols.clone()
    train(model, optimizer, rule, 2)
    moved = (model[0].topology.block_rows != before[0]) | (model[0].topology.block_cols != before[1])
    slow = optimizer.state[model[0].weight]["slow"]
    assert moved.any() and not slow[moved].any() and slow[~moved].any(dim=(1, 2)).all()


def test_a_state_loaded_through_a_wrapper_is_noticed():
    model, saved = build(), build()
    optimizer = Shown(optim.Adam(model.parameters()))
    rule = sk.SET(model, optimizer, update_every=10)
    other = optim.Adam(saved.parameters())
    for m, o in ((model, optimizer), (saved, other)):
        train(m, o, sk.Static(m))
    rule.step()
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(other.state_dict())
    rule.step()


@pytest.mark.parametrize("rule", RULES)
def test_several_optimisers_share_the_layers_of_one_rule(rule):
    model = build()
    optimizers = [optim.Adam(model[0].parameters()), Shown(optim.SGD(model[1].parameters(), 0.1, momentum=0.9))]
    rule = RULES[rule](model, optimizers)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        rule.step()
    for layer, optimizer, name in zip(model, optimizers, ("exp_avg", "momentum_buffer"), strict=True):
        state = optimizer.state[layer.weight][name]
        assert state.shape == layer.weight.shape
        fresh = ~layer.weight.any(dim=(1, 2))
        assert fresh.any() and not state[fresh].any()


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("rule", RULES)
def test_muon_may_train_what_is_dense(rule):
    model = nn.Sequential(*build(), nn.Linear(32, 8, bias=False))
    muon, adam = optim.Muon([model[2].weight]), optim.AdamW(model[:2].parameters())
    assert RULES[rule](model, [muon, adam]).optimizer == [muon, adam]
    dense = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 8, bias=False))
    optimizers = [optim.Muon([dense[1].weight]), optim.AdamW([dense[0].weight])]
    assert isinstance(sk.sparsify(dense, 0.5, exclude=["1"], optimizer=optimizers)[0], sk.SparseLinear)
    held = optim.Muon([nn.Parameter(torch.randn(4, 4))])
    with pytest.raises(ValueError, match="reset_state: the state of Muon is not element-wise"):
        sk.reset_state(held, held.param_groups[0]["params"][0], torch.ones(4, 4, dtype=torch.bool))


def test_reset_state_takes_wrapped_optimisers_and_lists():
    model = build()
    optimizers = [Shown(optim.Adam(model[0].parameters())), optim.Adam(model[1].parameters())]
    model(torch.randn(8, 32)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    sk.reset_state(optimizers, model[0], torch.ones((), dtype=torch.bool))
    assert not optimizers[0].state[model[0].weight]["exp_avg"].any()
    assert optimizers[1].state[model[1].weight]["exp_avg"].any()


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerates_optimiser_is_taken():
    from accelerate import Accelerator

    model = build()
    model, optimizer = Accelerator(cpu=True).prepare(model, optim.AdamW(model.parameters()))
    rule = sk.SET(model, optimizer, update_every=2)
    train(model, optimizer, rule)
    assert rule.events == 1


@pytest.mark.parametrize("wrap", [AveragedModel, torch.compile, lambda m: AveragedModel(nn.Sequential(m)[0])])
def test_a_wrapped_copy_can_be_a_follower(wrap):
    model = build()
    average = wrap(copy.deepcopy(model))
    optimizer = optim.Adam(model.parameters())
    rule = sk.SET(model, optimizer, update_every=1, followers=[average])
    train(model, optimizer, rule, 3)
    assert [path for path, module in average.named_modules() if isinstance(module, sk.SparseLinear)]
    inside = [m for m in average.modules() if isinstance(m, sk.SparseLinear)]
    for layer, copied in zip(model, inside, strict=True):
        assert all(map(torch.equal, layer.topology.layout[:3], copied.topology.layout[:3]))


def test_an_average_over_rewires_is_that_of_the_dense_matrices():
    model = build(1)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = optim.SGD(model.parameters(), 0.1)
    rule = sk.SET(model, optimizer, update_every=1, followers=[average])
    average.update_parameters(model)  # the first takes the weights over
    dense = average.module[0].to_dense()
    for _ in range(4):
        train(model, optimizer, rule, 1)
        now = model[0].to_dense()
        live = model[0].topology.mask()[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
        dense = torch.where(live, dense, 0).lerp(now, 0.5)  # what a dropped block had is forgotten
        average.update_parameters(model)
        torch.testing.assert_close(average.module[0].to_dense(), dense)


def test_factored_state_inside_of_lists_and_objects_is_refused_before_any_layer_changes():
    class Factors:
        def __init__(self):
            self.left = (torch.zeros(4, 4),)

    for hidden in ([torch.zeros(4, 4)], {"block": {"shampoo": Factors()}}, (torch.zeros(4, 4), None)):
        model = build()
        optimizer = optim.Adam(model.parameters())
        rule = sk.SET(model, optimizer, update_every=1)
        optimizer.state[model[1].weight]["GG"] = hidden
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"Adam keeps 'GG' as \w+ with tensors in it.*factored"):
            rule.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def expand(tensor):
    return torch.full((1, 1, 1), 0.1).expand_as(tensor)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, state: setattr(w, "grad", expand(w)), "step: the gradient of layer '1' has strides .0, 0, 0., "),
        (
            lambda w, state: setattr(w, "grad", w.grad.to_sparse()),
            "step: the gradient of layer '1' is torch.sparse_coo",
        ),
        (lambda w, state: state.update(exp_avg=expand(w)), "Adam keeps 'exp_avg' with strides .0, 0, 0., so its elem"),
    ],
    ids=["gradient", "sparse gradient", "state"],
)
def test_what_cannot_be_reset_element_by_element_is_refused_before_any_layer_changes(kind, change, message):
    model = build()
    optimizer = optim.Adam(model.parameters())
    rule = RULES[kind](model, optimizer)
    model(torch.randn(3, 32)).sum().backward()
    optimizer.step()
    change(model[1].weight, optimizer.state[model[1].weight])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rule.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_harmless_entries_of_an_optimisers_state_are_no_obstacle():
    model = build()
    optimizer = optim.Adam(model.parameters())
    optimizer.state[model[0].weight].update(name="w", flags=[True, None], count=[torch.tensor(1.0)])
    assert sk.SET(model, optimizer, update_every=1).step()


def normed(model, parametrize):
    parametrize(model[1])
    return model


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_norm_of_a_sparse_weight_warns_that_it_sees_the_store(norm):
    with pytest.warns(UserWarning, match=r"slots \[num_slots, B, B\], and not W.*spectral_norm.*normalise the store"):
        norm(build(1)[0])


def sharing(model):
    follower = copy.deepcopy(model)
    follower[1].weight = model[1].weight
    return follower


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "no optimiser": (lambda m, o: sk.SET(m, None), "SET: optimizer must be a torch optimiser.*got NoneType"),
    "a string for an optimiser": (lambda m, o: sk.RigL(m, "adam"), "RigL: optimizer must be.*got str"),
    "a list with a hole": (lambda m, o: sk.SET(m, [o, None]), "SET: optimizer must be.*got NoneType"),
    "an empty list": (lambda m, o: sk.SET(m, []), "SET: optimizer is an empty list"),
    "a scheduler": (
        lambda m, o: sk.SET(m, optim.lr_scheduler.ConstantLR(optim.LBFGS(m.parameters()))),
        "LBFGS is not element-wise",
    ),
    "one optimiser of two": (
        lambda m, o: sk.SET(m, [optim.SGD(m[0].parameters())]),
        "optimiser does not hold the weight of layer '1'.*freeze",
    ),
    "no model": (lambda m, o: sk.SET(None, o), "SET: model must be a torch.nn.Module, got NoneType"),
    "a follower for a list": (lambda m, o: sk.SET(m, o, followers=copy.deepcopy(m)), "list of modules, got Sequential"),
    "a follower that is none": (lambda m, o: sk.SET(m, o, followers=[None]), "list of modules, got NoneType in it"),
    "itself for a follower": (
        lambda m, o: RULES["GMP"](m, o, followers=[m]),
        "GMP: layer '0' of a follower is that of",
    ),
    "one follower twice": (lambda m, o: sk.SET(m, o, followers=2 * [copy.deepcopy(m)]), "SET: .*give each copy.* once"),
    "a follower of shared weights": (lambda m, o: sk.SET(m, o, followers=[sharing(m)]), "or shares its weight"),
    "no followers": (lambda m, o: sk.SET(m, o, followers=None), "list of modules, got NoneType"),
    "a negative seed": (lambda m, o: sk.SET(m, o, seed=-1), "seed must be an integer from 0.*got -1"),
    "a seed of 65 bits": (lambda m, o: sk.RigL(m, o, seed=2**64), f"seed must be.*got {2**64}"),
    "half a seed": (lambda m, o: sk.SET(m, o, seed=0.5), "seed must be.*got 0.5"),
    "coverage": (lambda m, o: sk.SET(m, o, coverage="yes"), "coverage must be True or False, got 'yes'"),
    "compact": (lambda m, o: RULES["GMP"](m, o, compact=None), "compact must be True or False, got None"),
    "a fraction of words": (
        lambda m, o: sk.SET(m, o, "a third"),
        "drop_fraction must be a finite number, got 'a third'",
    ),
    "no fraction": (lambda m, o: sk.SET(m, o, None), "drop_fraction must be a finite number, got None"),
    "a density of words": (lambda m, o: RULES["GMP"](m, o, final_density="0.1"), "final_density must be.*got '0.1'"),
    "no density": (lambda m, o: RULES["GMP"](m, o, final_density=NAN), "final_density must be.*got nan"),
    "a scope": (lambda m, o: RULES["GMP"](m, o, scope=None), "scope must be 'global' or 'layer', got None"),
    "weight_norm": (
        lambda m, o: sk.SET(normed(m, parametrizations.weight_norm), optim.SGD(m.parameters())),
        r"weight of layer '1' is computed anew from other parameters \(WeightNorm\)",
    ),
    "spectral_norm": (
        lambda m, o: sk.SET(normed(m, parametrizations.spectral_norm), optim.SGD(m.parameters())),
        r"layer '1'.*SpectralNorm.*normalise the slots \[num_slots, B, B\], and not W",
    ),
    "a norm by a hook": (
        lambda m, o: sk.SET(normed(m, nn.utils.spectral_norm), optim.SGD(m.parameters())),
        "layer '1' is computed anew from other parameters .by a hook",
    ),
}
for argument in ("update_every", "start_step", "end_step"):
    for value in (NAN, INF, "10", True, torch.tensor(10)):
        for rule in RULES:
            REFUSED[f"{rule} {argument} {value}"] = (
                lambda m, o, rule=rule, argument=argument, value=value: RULES[rule](m, o, **{argument: value}),
                f"{rule}: {argument} must be a finite number, got ",
            )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_nonsense_is_refused_by_name_and_leaves_model_and_optimiser_as_they_were(case):
    create, message = REFUSED[case]
    model = build()
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=message):
        create(model, optimizer)
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert all(layer.growth is None for layer in model)


@pytest.mark.parametrize("clock", [NAN, INF, -INF, "5", True, torch.tensor(5)], ids=repr)
def test_a_clock_that_is_no_finite_number_is_refused_and_not_taken_over(clock):
    model = build()
    rule = sk.SET(model, optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="SET.step: clock must be a finite number, got"):
        rule.step(clock=clock)
    assert rule.clock == 0


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    model = build()
    rule = sk.SET(model, optim.SGD(model.parameters(), 0.1), np.float32(0.5), np.int64(2), seed=np.int64(2**62))
    assert [rule.step(), rule.step(clock=np.float64(2))] == [False, True]


@pytest.mark.parametrize("rule", RULES)
def test_numbers_of_numpy_leave_a_state_that_can_be_loaded(rule, tmp_path):
    import numpy as np

    model = build()
    optimizer = optim.SGD(model.parameters(), 0.1)
    times = {"update_every": np.int64(2), "start_step": np.float32(0), "end_step": np.int64(9)}
    rules = [RULES[rule](model, optimizer, **times) for _ in range(2)]
    for clock in (np.float64(1), np.int64(2), np.int32(3)):
        model(torch.randn(8, 32)).square().mean().backward()
        rules[0].step(clock=clock)
    assert rules[0].events == 1
    torch.save(rules[0].state_dict(), tmp_path / "rule.pt")
    rules[1].load_state_dict(torch.load(tmp_path / "rule.pt", weights_only=True))
    assert rules[1].clock == 3 and rules[1].events == 1


def test_a_rule_that_finds_its_ranks_apart_has_attached_nothing(monkeypatch):
    def apart(self):
        raise RuntimeError("ranks differ")

    monkeypatch.setattr(sk.RigL, "_check_ranks", apart)
    model = build()
    optimizer = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError):
        sk.RigL(model, optimizer)
    assert not optimizer._optimizer_load_state_dict_post_hooks and all(layer.growth is None for layer in model)


@pytest.mark.parametrize("state", [None, {}, {"clock": 1}, "state"], ids=repr)
def test_the_state_of_something_else_is_refused_and_changes_nothing(state):
    model = build()
    rule = sk.RigL(model, optim.SGD(model.parameters(), 0.1))
    before = rule.state_dict()
    with pytest.raises(ValueError, match="RigL.load_state_dict: this is no state of a RigL; it lacks.*armed"):
        rule.load_state_dict(state)
    assert rule.state_dict() == before


def test_the_state_of_another_rule_is_refused():
    model = build()
    rules = [rule(model, optim.SGD(model.parameters(), 0.1)) for rule in (sk.SET, sk.RigL)]
    with pytest.raises(ValueError, match="it lacks armed"):
        rules[1].load_state_dict(rules[0].state_dict())
    assert rules[1].clock == 0


@pytest.mark.parametrize(
    ("layer", "mask", "message"),
    [
        (lambda m: m[0], torch.ones(1), "mask must be a boolean tensor, got torch.float32"),
        (lambda m: m[0], [True], "mask must be a boolean tensor, got list"),
        (lambda m: nn.ReLU(), torch.ones(1, dtype=torch.bool), r"module with a weight, or a parameter, got ReLU\(\)"),
        (lambda m: None, torch.ones(1, dtype=torch.bool), "module with a weight, or a parameter, got None"),
    ],
)
def test_reset_state_refuses_what_it_cannot_reset(layer, mask, message):
    model = build()
    with pytest.raises(ValueError, match=f"reset_state: .*{message}"):
        sk.reset_state(optim.SGD(model.parameters(), 0.1), layer(model), mask)
    with pytest.raises(ValueError, match="reset_state: optimizer must be a torch optimiser.*got NoneType"):
        sk.reset_state(None, model[0], torch.ones(1, dtype=torch.bool))


def test_reset_state_takes_a_transposed_mask():
    model = build(1)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(3, 32)).sum().backward()
    optimizer.step()
    sk.reset_state(optimizer, model[0], torch.ones(32, 32, dtype=torch.bool).t())
    assert not optimizer.state[model[0].weight]["momentum_buffer"].any()
