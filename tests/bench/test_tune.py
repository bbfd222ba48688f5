"""What the tuner tries."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from bench import tune  # noqa: E402
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
