"""The counter-based hash (splitmix64) behind every random choice of a rule: no generator, the same on every device."""

from torch import Tensor

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def stream(*keys: int) -> int:
    """One 64-bit starting point for a sequence of keys, such as (seed, layer, step)."""
    state = 0
    for key in keys:
        state = _mix((state + key * _GAMMA + _GAMMA) & _MASK)
    return state


def uniform_hash(start: int, positions: Tensor) -> Tensor:
    """31 random bits for each int64 position: high bits of splitmix64(start + position), the same on every device."""
    z = (positions * _signed(_GAMMA)).add_(_signed(start))  # in place from here on: a layer has many positions
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return _shift(z.bitwise_xor_(_shift(z, 31)), 33)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)
