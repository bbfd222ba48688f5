"""What shapes, block sizes, densities and coordinates must be."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
GEOMETRY = "(out_features, in_features, block_size, groups)"


def live_count(density: float, num_blocks: int) -> int:
    """Number of live blocks that a density in (0, 1] asks for: max(1, round(density * num_blocks))."""
    if isinstance(density, bool) or not isinstance(density, numbers.Real) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    return max(1, round(density * num_blocks))


def live_counts(density: float | Sequence[float | int], num_blocks: int, groups: int) -> list[int]:
    """Live blocks of each group: of one density for all, or of a list of densities (float) or counts (int).

    A count may be 0, as GMP may leave a group; a density stands for one block or more.
    """
    if not isinstance(density, list | tuple):
        return [live_count(density, num_blocks)] * groups
    if len(density) != groups:
        raise ValueError(
            f"density: {groups} groups want as many densities or live counts, got {len(density)}: {density}"
        )
    counts = [value if is_count(value) else live_count(value, num_blocks) for value in density]
    if not all(0 <= count <= num_blocks for count in counts):
        raise ValueError(f"density: live counts must be from 0 to {num_blocks} blocks in each group, got {density}")
    return counts


def is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_block_size(block_size: int) -> None:
    if not is_count(block_size) or block_size not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"block_size must be a power of two from 1 to 128, got {block_size!r}")


def check_geometry(shape: tuple[int, int], block_size: int, groups: int) -> None:
    check_block_size(block_size)
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"shape must be (out_features, in_features), got {shape!r}")
    if not is_count(groups):
        raise ValueError(f"groups must be a positive integer, got groups={groups!r}")
    for name, size in zip(("out_features", "in_features"), shape, strict=True):
        if not is_count(size):
            raise ValueError(f"{name} must be a positive multiple of groups, got {name}={size!r}, groups={groups}")
        if size <= 0 or groups <= 0 or size % groups:
            raise ValueError(f"{name} must be a positive multiple of groups, got {name}={size}, groups={groups}")
        if size // block_size >= 2**31 - groups:  # the index is of int32
            raise ValueError(f"{name} must be under 2**31 blocks of {block_size}, got {name}={size}")


def saved_geometry(name: str, extra: object) -> tuple[int, ...]:
    """(out_features, in_features, block_size, groups) as `Topology.get_extra_state` gave them."""
    if not isinstance(extra, Tensor) or extra.shape != (5,) or extra.dtype not in INTEGERS or extra.is_meta:
        raise ValueError(f"{name} must be 5 integers, {GEOMETRY} and full, got {extra!r}")
    return tuple(extra.tolist()[:4])


def check_blocks(block_rows: Tensor, block_cols: Tensor, grid: tuple[int, int], groups: int) -> None:
    """Refuse coordinates that are no topology; native kernels would follow them outside of their memory."""
    for name, coordinates in (("block_rows", block_rows), ("block_cols", block_cols)):
        check_integers(name, coordinates)
        if coordinates.layout != torch.strided or coordinates.is_nested:
            raise ValueError(
                f"Topology: {name} must be dense, got {coordinates.layout}, nested={coordinates.is_nested}"
            )
    if block_rows.dim() != 1 or block_rows.shape != block_cols.shape:
        shapes = f"{tuple(block_rows.shape)} and {tuple(block_cols.shape)}"
        raise ValueError(f"Topology: block_rows and block_cols must be of one length, got shapes {shapes}")
    if block_rows.device != block_cols.device:
        devices = f"{block_rows.device} and {block_cols.device}"
        raise ValueError(f"Topology: block_rows and block_cols must be on one device, got {devices}")
    if block_rows.device.type == "meta":
        return
    rows, cols = block_rows.long(), block_cols.long()
    outside = (rows < 0) | (rows >= grid[0]) | (cols < 0) | (cols >= grid[1])
    outside |= rows // (grid[0] // groups) != cols // (grid[1] // groups)
    outside &= (rows != -1) | (cols != -1)
    if outside.any():
        slot = int(outside.int().argmax())
        block = (int(rows[slot]), int(cols[slot]))
        raise ValueError(
            f"Topology: slot {slot} has block {block}, outside the {grid[0]} x {grid[1]} blocks in {groups} groups"
        )
    places = torch.sort(rows[rows >= 0] * grid[1] + cols[rows >= 0]).values
    twice = places[1:][places.diff() == 0]
    if len(twice):
        raise ValueError(f"Topology: block {divmod(int(twice[0]), grid[1])} is live in two slots")


def check_integers(name: str, coordinates: object) -> None:
    if not isinstance(coordinates, Tensor) or coordinates.dtype not in INTEGERS:
        got = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise ValueError(f"Topology: {name} must be a tensor of integers, got {got}")


def check_balance(where: str, balance: object) -> None:
    if balance is not None and balance != "rows":
        raise ValueError(f"{where}: balance must be 'rows' or None, got {balance!r}")
