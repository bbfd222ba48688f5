"""Into how many parts the tokens of a gradient are split, in plain numbers."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from sparsekern.backends.triton.launch import l2_splits  # noqa: E402

H200 = 60 << 20  # bytes of L2
TENTH = 4096 * 4096 // 10  # weights at density .1


def test_one_part_stays_within_l2():
    both = 2 * (4096 + 4096)  # bytes of a token of 4096 x 4096 in bfloat16
    assert [l2_splits(tokens, both, TENTH, H200) for tokens in (256, 4096, 8192, 16384, 32768)] == [1, 1, 2, 4, 8]
    assert [l2_splits(16384, both, TENTH, l2) for l2 in (H200 // 2, 2 * H200)] == [8, 2]


def test_the_highest_bit_of_the_tokens_decides():
    both = 2 * (4096 + 4096)
    assert {l2_splits(tokens, both, TENTH, H200) for tokens in (16384, 20000, 32767)} == {4}


def test_parts_are_small_beside_the_operands():
    both, operands = 2 * (8192 + 8192), 16384 * 2 * (8192 + 8192)
    for weights in (8192**2 // 20, 8192**2 // 10, 8192**2 // 2, 8192**2):
        splits = l2_splits(16384, both, weights, H200)
        assert splits == 1 or splits * 4 * weights <= operands / 2
    assert l2_splits(16384, both, 8192**2 // 20, H200) == 8
    assert l2_splits(16384, both, 8192**2, H200) == 1


def test_parts_have_enough_tokens_and_are_at_most_32():
    assert l2_splits(0, 1024, 1, H200) == 1
    assert l2_splits(512, 1 << 30, 1, H200) == 2
    assert l2_splits(1 << 20, 1 << 20, 1, H200) == 32
