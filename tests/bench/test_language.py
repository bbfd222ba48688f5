import pandas
import pytest
import torch

import sparsekern as sk
from bench.language import __main__ as command
from bench.language import data, report
from bench.language.model import Shape, density, flops, live_weights
from bench.language.train import Arm, Settings, Yardstick, build, parse, rule_for, train

SHAPE = Shape(layers=1, width=64, context=16, heads=2)
SETTINGS = Settings(steps=6, sequences=2, evaluate_every=2, held_out_sequences=2)


@pytest.fixture
def text(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n" * 20)
    return data.read(tmp_path)


def test_the_split_is_fixed_and_loses_no_byte(text, tmp_path):
    again = data.read(tmp_path)
    assert again.digest == text.digest and again.held_out.equal(text.held_out) and again.train.equal(text.train)
    assert len(text.train) + len(text.held_out) == sum(path.stat().st_size for path in tmp_path.glob("*.py"))
    assert 0 < len(text.held_out) < len(text.train)


def test_a_sparse_arm_has_its_density_and_the_narrow_one_no_more_flops():
    shape = Shape(layers=1, width=256)
    sparse, narrow = build(parse("set-d0.1-b16-erk"), shape, 0), build(parse("dense-narrow"), shape, 0)
    assert density(sparse) == pytest.approx(0.1, abs=0.001)
    theirs, ours = (flops(m.shape, live_weights(m)) for m in (narrow, sparse))
    assert 0.8 * ours < theirs <= 1.001 * ours


@pytest.mark.parametrize(
    "name", ["dense", "set-d0.2-b16-erk", "rigl-d0.2-b4-uniform", "gmp-d0.2-b16-erk", "set-d0.2-b4-erk-balanced"]
)
def test_a_resumed_run_equals_a_straight_one(name, text, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    expected = pandas.read_csv(train(name, 0, text, SHAPE, SETTINGS, straight, straight))
    train(name, 0, text, SHAPE, SETTINGS, cut, cut, stop=3)
    resumed = pandas.read_csv(train(name, 0, text, SHAPE, SETTINGS, cut, cut))
    clocks = ["seconds", "dense_steps"]
    pandas.testing.assert_frame_equal(resumed.drop(columns=clocks), expected.drop(columns=clocks), rtol=0, atol=0)
    assert (resumed[clocks].diff().dropna() > 0).all(axis=None)
    ours, theirs = (torch.load(f / f"{name}-seed0.pt", weights_only=False)["model"] for f in (cut, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_rate_of_an_arm_is_the_best_of_its_short_runs(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "read", lambda: text)
    monkeypatch.setattr(command, "Shape", lambda: SHAPE)
    runs, results, rates = tmp_path / "runs", tmp_path / "results", (1e3, 1e-3, 1e-2)  # the first diverges
    command.main(command.Command(("dense",), steps=6, learning_rates=rates, trial_steps=4, runs=runs, results=results))
    tried = {r: pandas.read_csv(runs / f"rate{r:g}" / "dense-seed0.csv").bits_per_byte.iloc[-1] for r in rates[1:]}
    taken = pandas.read_csv(results / "equal-steps" / "dense-seed0.csv")
    assert taken.learning_rate.unique().tolist() == [min(tried, key=tried.get)]
    assert taken.step.iloc[-1] == 6 and "by learning rate" in capsys.readouterr().out


def test_bytes_are_those_of_weights_gradients_moments_and_topology(text, tmp_path):
    last = pandas.read_csv(train("static-d0.2-b4-erk", 0, text, SHAPE, SETTINGS, tmp_path, tmp_path)).iloc[-1]
    model = build(parse("static-d0.2-b4-erk"), SHAPE, 0)
    weights = list(model.parameters())
    index = sum(module.topology.nbytes for module in model.modules() if hasattr(module, "topology"))
    assert last.bytes == sum(4 * 4 * p.numel() + 4 for p in weights) + index  # Adam counts its steps in 4 bytes
    assert {"step", "seconds", "flops", "train_loss", "density", "learning_rate", "data_digest"} <= set(last.index)


def test_a_wrong_arm_is_an_error_that_says_what_an_arm_is():
    for name in ("sett-d0.1", "gmp-d0.1-b4-erk-balanced", "static-d0.1-b4-erk-drop0.5", "set-d0.1-b4-erk-rewires0"):
        with pytest.raises(ValueError, match=f"like 'set-d0.1-b16-erk'.*got '{name}'"):
            parse(name)


def test_an_arm_may_say_how_much_is_rewired_and_how_often():
    assert parse("set-d0.1-b16-erk") == Arm("set", 0.1, 16, "erk", drop=0.3, rewires=30)
    arm = parse("rigl-d0.2-b4-uniform-balanced-drop0.5-rewires10")
    assert arm == Arm("rigl", 0.2, 4, "uniform", balanced=True, drop=0.5, rewires=10)
    model = build(arm, SHAPE, 0)
    rule = rule_for(arm, model, torch.optim.SGD(model.parameters()), 100, 0)
    assert rule.update_every == 10 and rule.end_step == 75 and rule.drop_fraction(0.0) == 0.5


def test_a_balanced_arm_has_as_many_blocks_in_every_row():
    model = build(parse("set-d0.2-b4-uniform-balanced"), SHAPE, 0)
    layers = [module for module in model.modules() if isinstance(module, sk.SparseLinear)]
    counts = [layer.topology.mask().sum(-1) for layer in layers]
    assert len(counts) == 4 and all(count.amax() - count.amin() <= 1 for count in counts)


def test_the_equal_time_run_has_as_many_steps_as_fit_into_the_time_of_dense(text, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read", lambda: text)
    monkeypatch.setattr(command, "Shape", lambda: SHAPE)
    monkeypatch.setattr(Yardstick, "seconds", lambda self: 2.0)
    ticks = iter(range(10**6))
    monkeypatch.setattr("bench.language.train.now", lambda settings: float(next(ticks)))  # a step takes one second
    names = ("dense", "set-d0.2-b4-erk")
    command.main(command.Command(names, steps=6, learning_rates=(1e-3,), runs=tmp_path / "runs", results=tmp_path))
    last = pandas.read_csv(tmp_path / "equal-time" / "set-d0.2-b4-erk-seed0.csv").iloc[-1]
    assert last.step == 12 and last.dense_steps == 6 and last.seconds == 12
    assert not (tmp_path / "equal-time" / "dense-seed0.csv").exists()


def test_a_report_compares_at_equal_steps_and_at_equal_time_with_the_spread_of_seeds(tmp_path):
    for kind, name, seed, bits in (
        ("equal-steps", "dense", 0, 3.0),
        ("equal-steps", "set-d0.1-b16-erk", 0, 3.2),
        ("equal-steps", "set-d0.1-b16-erk", 1, 3.4),
        ("equal-time", "set-d0.1-b16-erk", 0, 2.8),
        ("equal-time", "set-d0.1-b16-erk", 1, 2.8),
    ):
        steps = 8 if kind == "equal-time" else 4
        curve = {"step": [1, steps], "bits_per_byte": [6.0, bits], "bytes": 1e6, "density": 1.0, "learning_rate": 1e-3}
        share = 1.0 if name == "dense" else 0.5
        rows = pandas.DataFrame(curve).assign(
            dense_steps=lambda c, s=share: c.step * s, flops=lambda c, s=share: c.step * s
        )
        (tmp_path / kind).mkdir(exist_ok=True)
        rows.to_csv(tmp_path / kind / f"{name}-seed{seed}.csv", index=False)
    report.main(tmp_path)
    assert (tmp_path / "language.md").read_text().splitlines()[2:] == [
        "| dense | 1 | 0.001 | 3.000 | 3.000 | 4 | 1.00 | 1.00 | 1.00 | 1.0 |",
        "| set-d0.1-b16-erk | 2 | 0.001 | 3.300 ± 0.141 | 2.800 ± 0.000 | 8 | 1.00 | 0.50 | 0.50 | 1.0 |",
    ]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("blocks.png", "curves.png"))
