"""What the tuner tries, in which order, and that it goes on where it stopped."""

import json
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from bench import contenders, tune  # noqa: E402
from sparsekern.backends.triton import tiles  # noqa: E402


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_tensor_descriptors_are_tried_from_hopper_on(monkeypatch, capability):
    monkeypatch.setattr(tune, "ON_GPU", True)
    monkeypatch.setattr(tune, "CAPABILITY", capability)
    for key in (key for key in tiles.DEFAULT if key[0] != "norms"):
        found = tune.candidates(*key)
        described = [tile for tile in found if tile.descriptors]
        assert described == (list(tiles.DESCRIPTORS.get(key, ())) if capability >= (9, 0) else [])
        assert len(set(found)) == len(found) and set(tiles.DEFAULT[key]) <= set(found)
    assert tune.TABLE == tiles.DEFAULT


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Entries that a run has measured, each in no time; `measured.stop_after` of them it is interrupted."""

    class Measured(list):
        stop_after = 10**6

        def note(self, *entry):
            if len(self) == self.stop_after:
                raise KeyboardInterrupt
            self.append(entry)

    found = Measured()

    def break_even(product, block_size, kind, tokens):
        found.note(product, block_size, kind, tokens)
        key = {"product": product, "block_size": block_size, "arithmetic": kind, "tokens": tokens}
        return key | {"density": 0.5}

    def tuned_tiles(product, block_size, kind, pool):
        found.note(product, block_size, kind, None)
        return tiles.DEFAULT[product, block_size, kind]

    def fastest_by_cuda(product, block_size, width, tokens):
        found.note(product, block_size, "half", tokens, width)
        key = {"product": product, "block_size": block_size, "arithmetic": "half", "tokens": tokens}
        return key | {"out_features": width, "in_features": width, "from": 0.02, "to": 0.1}

    monkeypatch.setattr(tune.cuda, "unavailable", lambda: None)
    monkeypatch.setattr(tune.cuda, "refuses", lambda device, dtype, block_size, features: None)
    monkeypatch.setattr(tune, "fastest_by_cuda", fastest_by_cuda)
    monkeypatch.setattr(tune, "break_even", break_even)
    monkeypatch.setattr(tune, "tuned_tiles", tuned_tiles)
    monkeypatch.setattr(tune.limits, "constants", lambda sizes: {})
    monkeypatch.setattr(sys, "argv", ["tune", "--folder", str(tmp_path)])
    return found


@pytest.mark.parametrize(
    ("gains", "between"),
    [
        ((0.9, 0.8, 0.7), (1, 0)),  # nowhere
        ((0.5, 2.0, 0.5), (0.15, 0.3)),  # half way, as gains are ratios
        ((1.1, 2.0, 1.5), (0.1, 0.4)),  # and not beyond what was measured
        ((2.0, 0.9, 1.5), (0.1, 0.1 + 0.1 * 0.868)),  # around the greatest gain alone
    ],
)
def test_kernels_win_between_the_densities_where_their_gain_is_one(gains, between):
    assert tune.winning((0.1, 0.2, 0.4), list(gains)) == pytest.approx(between, abs=1e-3)


def test_the_tuner_goes_on_where_it_stopped(measured, tmp_path):
    tune.main()
    whole = [*measured]
    (path,) = tmp_path.glob("*.json")
    complete = json.loads(path.read_text())
    path.unlink()
    measured.clear()
    for stop_after in (2, len(whole) // 2):
        measured.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            tune.main()
        assert measured == whole[:stop_after] and len(json.loads(path.read_text())["break_even"]) >= 2
    measured.stop_after = 10**6
    tune.main()
    assert measured == whole, "nothing is measured twice, and nothing is left out"
    assert json.loads(path.read_text()) == complete
    tune.main()
    assert measured == whole


def test_a_build_without_nvcc_keeps_the_rows_of_cuda_that_it_cannot_measure(measured, monkeypatch, tmp_path):
    tune.main()
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["cuda"]
    shapes = len(tune.CUDA_WIDTHS) * len(tune.CUDA_TOKENS)
    assert len(rows) == shapes * len(tune.cuda.BLOCK_SIZES) * len(tune.cost.PRODUCTS)
    for missing, kept in (("it was built without nvcc.", rows), (None, [])):
        monkeypatch.setattr(tune.cuda, "unavailable", lambda missing=missing: missing)
        monkeypatch.setattr(tune.results, "commit", lambda missing=missing: f"another, {missing}")
        assert tune.started(tmp_path)["cuda"] == kept


def test_kernels_that_fail_or_are_wrong_win_nowhere(monkeypatch):
    def wrong(problem, build, name):
        raise ValueError(f"{name} is wrong")

    monkeypatch.setattr(tune, "problem_of", lambda case: None)
    monkeypatch.setattr(tune, "times", lambda problem, product, build: 1.0 if build is contenders.by_cuda else 2.0)
    for right, between in ((lambda *_: None, (0.02, 0.2)), (wrong, (1.0, 0.0))):
        monkeypatch.setattr(contenders, "right", right)
        row = tune.fastest_by_cuda("dds", 16, 4096, 1024)
        assert (row["from"], row["to"]) == between


def test_the_tuner_begins_with_what_the_chooser_needs_most(measured):
    """Without a break-even of its own a device answers by the model; tiles only make it somewhat faster."""
    tune.main()
    first = [entry[3] for entry in measured]
    assert None not in first[: first.index(None)] and first[0] == tune.BREAK_EVEN_TOKENS[0]
    assert [entry[2] for entry in measured] == sorted((e[2] for e in measured), key=list(tune.ARITHMETICS).index)
