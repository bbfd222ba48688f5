"""An event of all layers at once by the kernels of csrc/cuda/rewire.cu: at most eight launches for the whole model.

`ModelTables` are built once for a rule and again when something has moved in memory, see `tables_for`; `event_table`
says what one event does; `rewire_model` does it. Nothing synchronises, and all addresses but the workspace's are in the
tables, so a CUDA graph may hold `rewire_model`: write another event into the same tensor with `copy_` before a replay.

An event costs the host little: C++ writes its table and makes prepared launches (csrc/cuda/rewire_event.h, launch.h).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from sparsekern.agreement import tell_shown
from sparsekern.backends import cuda
from sparsekern.layout import Layout

try:
    from sparsekern import _cuda
except ImportError:  # backends/cuda says so, to whoever asks for it
    _cuda = None

THREADS, ITEMS, TILE_PLACES = 512, 64, 1024  # as in csrc/cuda/rewire.h, like what follows
MAX_TENSORS, MAX_COPIES = 12, 4
DIGITS = 2**16
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Growth(IntEnum):
    """What is done with the slots that are dropped; the same numbers as in csrc/cuda/rewire.h."""

    BY_HASH = 0
    BY_SCORES = 1
    BY_KEYS = 2
    MARK_DEAD = 3
    MARK_DEAD_OF_ALL = 4  # then all layers have it

    @property
    def marks(self) -> bool:
        return self in (Growth.MARK_DEAD, Growth.MARK_DEAD_OF_ALL)


@dataclass(frozen=True)
class LayerTensors:
    """One layer as the kernels see it: addresses that stay the same from event to event."""

    layouts: Sequence[Layout]
    """The layer's own, then each follower's."""
    shape: tuple[int, int]
    """(out_features, in_features), unpadded."""
    weight: Tensor
    """[num_slots, B, B], for the norms."""
    tensors: Sequence[tuple[Tensor, float]]
    """What is reset in rewired slots, with fresh values: weight, state, followers' weights; not the gradient."""
    growth: Growth = Growth.BY_HASH
    name: str = ""
    """For messages."""

    def addresses(self) -> list[tuple]:
        """All that the tables say of the layer; equal as long as they are good for it."""
        layouts = [
            (*(t.data_ptr() for t in l.tensors), l.block_rows.dtype, l.num_slots, *l.geometry) for l in self.layouts
        ]
        tensors = [(t.data_ptr(), t.dtype, fresh) for t, fresh in self.tensors]
        return [(self.shape, self.weight.data_ptr(), self.weight.dtype, self.growth), *layouts, *tensors]


@dataclass
class ModelEvent:
    """What one event does with all layers. Groups are those of the first layer, then those of the second, and so on."""

    counts: Sequence[int] | np.ndarray
    """int64, slots to drop in each group: at most as many as are live, and, to grow, as there are dead places. No
    matter for MARK_DEAD_OF_ALL."""
    live: Sequence[int] | np.ndarray
    """int64, live blocks of each group."""
    streams: Sequence[int] | np.ndarray
    """uint64 of each layer: the hash's stream of what is the same at every event, for Growth.BY_HASH; see
    `sparsekern.rewire.hash.stream`."""
    number: int = 0
    """Of the event, the last key of the hash's stream."""
    gradients: Sequence[Tensor | None] | None = None
    """Like the weights; rewired slots become zero."""
    scores: Sequence[Tensor | None] | None = None
    """float32 [num_slots] of each layer to drop by; without it, the L1 norms of the weight."""
    growth: Sequence[Tensor | None] | None = None
    """float32 [groups, rows, cols] for BY_SCORES; int64 [groups, any] in descending order for BY_KEYS."""
    target: int = 0
    """For MARK_DEAD_OF_ALL: live blocks of all layers after the event, in elements of the model's smallest block."""


_LIST = [(name, "u8") for name in ("histogram", "starts", "items", "chosen", "bounds", "selected")]
_LIST = np.dtype(_LIST + [(name, "i4") for name in ("log_buckets", "ties", "tie_shift", "capacity")])
_TENSOR = np.dtype([("data", "u8"), ("fresh", "u4"), ("element_bytes", "i4")])
_COORDINATES = np.dtype([("rows", "u8"), ("cols", "u8"), ("index", "u8")])
_OF_ALL = ("uppers", "lowers", "at_threshold", "threshold", "all_tickets")
_WORK = "row_bits col_bits row_counts col_counts row_offsets col_offsets dead_counts tickets keys".split() + [*_OF_ALL]
_NUMBERS = (
    "num_tensors num_copies weight_type growth short_coordinates slots num_rows num_cols groups block group_rows "
    "group_cols row_words col_words last_rows last_cols log_threads_per_slot slot_tiles place_tiles move_tiles "
    "first_segment slot_size first_slot_tile all_score_tiles all_slot_tiles num_layers"
).split()
_LAYER = np.dtype(
    [("drop", _LIST), ("grow", _LIST), *((name, "u8") for name in _WORK), ("weight", "u8"), ("stats", "u8")]
    + [("tensors", _TENSOR, MAX_TENSORS), ("copies", _COORDINATES, MAX_COPIES), *((name, "i4") for name in _NUMBERS)]
)
_EVENT_BYTES, _SEGMENT_BYTES = 48, 16  # which C++ writes, of the kernels' own structures
_TILE = np.dtype([("layer", "i4"), ("part", "i4"), ("number", "i4"), ("of", "i4")])
_SELECTION_BYTES, _THRESHOLD_BYTES = 16, 16
_PARAMETERS = ("layers", "tiles", "workspace", "events")

_OF_SLOTS, _OF_PLACES, _MOVE, _FILL, _PAIRS, _ROW_ORDER, _COL_ORDER = range(7)


@dataclass
class ModelTables:
    """The layers of a model, on their device.

    Raises:
        ValueError: a layer is not what the kernels take; the message says which and why.
    """

    layers: Sequence[LayerTensors]
    stats: Tensor = field(init=False)
    """int32 [layers, 3]: blocks that moved or died at the last event; 1 since a NaN was seen, until the caller clears
    it; live blocks after the event."""

    def __post_init__(self):
        if problem := next(filter(None, map(_problem_of_full_store, self.layers)), None) or refusal(self.layers):
            raise ValueError(f"rewire_model: {problem}")
        self._addresses = [layer.addresses() for layer in self.layers]
        device = self.layers[0].weight.device
        self.stats = torch.zeros(len(self.layers), 3, dtype=torch.int32, device=device)
        self._records = np.zeros(len(self.layers), _LAYER)
        segment = 0
        for i, (record, layer) in enumerate(zip(self._records, self.layers, strict=True)):
            _describe(record, layer)
            record["stats"], record["first_segment"] = self.stats.data_ptr() + 12 * i, segment
            segment += layer.layouts[0].groups
        of_all = [layer.growth is Growth.MARK_DEAD_OF_ALL for layer in self.layers]
        assert all(of_all) or not any(of_all), "slots of all layers are ranked together, or of none"
        if all(of_all):
            _describe_all(self._records)
        self._records["num_layers"], self._num_segments = len(self.layers), segment
        self._cleared_bytes, self._workspace_bytes = _lay_out(self._records)
        self._layer_bytes = self._records.tobytes()
        self._layer_table = _on(device, self._records)
        # each kernel's launch, ready, and its tiles
        self._launches = []
        for kernel in cuda.KERNELS["rewire"]:
            if len(tiles := _tiles(self._records, self.layers, kernel)):
                launch = cuda.prepare("rewire", kernel, len(tiles), THREADS, _PARAMETERS, device)
                self._launches.append((launch, _on(device, tiles)))
        self.hold(self.layers)

    def hold(self, layers: Sequence[LayerTensors]) -> None:
        """Take these objects for the layers, which lie where the tables say."""
        self.layers = layers
        self._layouts = [layout for layer in layers for layout in layer.layouts]
        self._full_layouts = [layout for layout in self._layouts if layout.full]
        written = [tensor for layer in layers for tensor, _ in layer.tensors]
        self._written = [*written, *(tensor for layout in self._layouts for tensor in layout.tensors)]

    def event_table(self, event: ModelEvent) -> Tensor:
        """One event on the device, uint8; the tensors in it must live until it has run.

        Raises:
            ValueError: a gradient is not what the kernels take.
        """
        device = self.stats.device
        table = _staged(len(self.layers) * _EVENT_BYTES + self._num_segments * _SEGMENT_BYTES, device)
        refused = _cuda.write_event(
            table=table,
            layers=self._layer_bytes,
            counts=np.asarray(event.counts, np.int64),
            live=np.asarray(event.live, np.int64),
            streams=np.asarray(event.streams, np.uint64),
            number=event.number,
            gradients=event.gradients,
            scores=event.scores,
            growth=event.growth,
            target=event.target,
        )
        if refused >= 0:
            layer, gradient = self.layers[refused], event.gradients[refused]
            raise ValueError(
                f"rewire_model: layer {layer.name!r} has a gradient of {gradient.dtype} with strides "
                f"{gradient.stride()} at {gradient.data_ptr():#x}; the kernels take the weight's "
                f"{layer.weight.dtype}, contiguous, at 16 bytes"
            )
        return _upload(table, device)

    def describe(self, layers: Sequence[LayerTensors]) -> bool:
        """Whether these are the layers, and nothing of them has moved in memory."""
        return self._addresses == [layer.addresses() for layer in layers]


def tables_for(layers: Sequence[LayerTensors], held: ModelTables | None) -> ModelTables:
    """The tables that are held, where they are still good for the layers; else new ones."""
    if held is None or not held.describe(layers):
        return ModelTables(layers)
    held.hold(layers)  # another object may have the memory of an earlier one
    return held


def rewire_model(tables: ModelTables, event: Tensor) -> None:
    """Do what `tables.event_table` has prepared: select, move, reset and index the blocks of all layers."""
    device = tables.stats.device
    workspace = torch.empty(tables._workspace_bytes, dtype=torch.uint8, device=device)
    workspace[: tables._cleared_bytes].zero_()
    layers = tables._layer_table
    if event.data_ptr() % 16:
        raise ValueError(f"rewire_model: the event must lie at 16 bytes, got {event.data_ptr():#x}")
    with cuda.current(device) as stream:
        for launch, tiles in tables._launches:
            launch(tokens=0, stream=stream, layers=layers, tiles=tiles, workspace=workspace, events=event)
    # torch is told what the kernels have written, so that a backward that needs the old values raises
    torch.autograd.graph.increment_version(tables._written)
    _cuda.stamp(layouts=tables._layouts)
    for layout in tables._full_layouts:
        tell_shown(layout)


def refusal(layers: Iterable[LayerTensors]) -> str | None:
    """What the kernels do not take of layers but their gradients, as a sentence; for these see `takes_gradient`."""
    smallest, elements = math.inf, 0
    for layer in layers:
        if problem := _problem(layer):
            return f"layer {layer.name!r} {problem}"
        if layer.growth is Growth.MARK_DEAD_OF_ALL:
            smallest = min(smallest, layer.layouts[0].block_size ** 2)
            elements += layer.layouts[0].num_slots * layer.layouts[0].block_size ** 2
    if (total := int(elements / smallest)) >= 2**31:
        return f"all layers have {total} elements of the smallest block; the kernels take 2**31 - 1"
    return None


def takes_gradient(gradient: Tensor | None, weight: Tensor) -> bool:
    """Whether the kernels can reset slots of it; C++ looks at the same, see `ModelTables.event_table`."""
    return gradient is None or gradient.dtype == weight.dtype and _is_whole(gradient)


def _problem_of_full_store(layer: LayerTensors) -> str | None:
    """That the layer has one and the kernels cannot mark it, as a sentence; rules see to it beforehand."""
    bits = all(layout.index.numel() for layout in layer.layouts)
    if not layer.layouts[0].full or (layer.growth.marks and bits):
        return None
    return (
        f"layer {layer.name!r} has the blocks of a full store, which cannot move; "
        "the kernels mark them dead in bits that it must hold"
    )


def _problem(layer: LayerTensors) -> str | None:
    """What the kernels cannot take of a layer, as the end of a sentence."""
    own, tensors = layer.layouts[0], [layer.weight, *(tensor for tensor, _ in layer.tensors)]
    if wrong := [t.dtype for t in tensors if t.dtype not in TYPES]:
        return f"has tensors of {wrong[0]}; the kernels take float32, float16 and bfloat16"
    if not all(map(_is_whole, tensors)):
        return "has a weight or a state tensor that is not contiguous, or not aligned to 16 bytes"
    if any(t.shape != layer.weight.shape or t.device != layer.weight.device for t in tensors):
        return "has state tensors of another shape, or on another device, than its weight"
    if len(layer.tensors) > MAX_TENSORS or len(layer.layouts) > MAX_COPIES:
        return (
            f"has {len(layer.tensors)} tensors to reset and {len(layer.layouts)} copies; "
            f"the kernels take at most {MAX_TENSORS} and {MAX_COPIES}"
        )
    if own.num_rows * own.num_cols // own.groups >= 2**31:
        return f"has {own.num_rows * own.num_cols // own.groups} places for blocks; the kernels take less than 2**31"
    kinds = {(layout.full, layout.num_slots, layout.block_rows.dtype) for layout in layer.layouts}
    if len(kinds) > 1:
        return "has a follower with another number of slots, or other coordinates"
    return None


def _is_whole(tensor: Tensor) -> bool:
    """Whether the kernels may read and write vectors of it."""
    return tensor.layout is torch.strided and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _describe(record: np.void, layer: LayerTensors) -> None:
    """All of a layer's record but what lies in the workspace."""
    own, weight, growth = layer.layouts[0], layer.weight, layer.growth
    record["weight"] = weight.data_ptr()
    for row, (tensor, fresh) in zip(record["tensors"], layer.tensors, strict=False):
        row["data"], row["element_bytes"], row["fresh"] = tensor.data_ptr(), tensor.element_size(), _bits(tensor, fresh)
    for row, layout in zip(record["copies"], layer.layouts, strict=False):
        index = layout.index.data_ptr() if layout.index.numel() else 0
        row["rows"], row["cols"], row["index"] = layout.block_rows.data_ptr(), layout.block_cols.data_ptr(), index
    rows, cols, block = own.num_rows // own.groups, own.num_cols // own.groups, own.block_size
    places, slots = rows * cols, own.num_slots
    vectors = block * block * weight.element_size() // 16
    numbers = {
        "num_tensors": len(layer.tensors), "num_copies": len(layer.layouts), "weight_type": TYPES[weight.dtype],
        "growth": growth, "short_coordinates": own.block_rows.dtype == torch.int16, "slots": slots,
        "num_rows": own.num_rows, "num_cols": own.num_cols, "groups": own.groups, "block": block,
        "group_rows": rows, "group_cols": cols, "row_words": -(-cols // 32), "col_words": -(-rows // 32),
        "last_rows": layer.shape[0] // own.groups - (rows - 1) * block,
        "last_cols": layer.shape[1] // own.groups - (cols - 1) * block,
        "log_threads_per_slot": min(9, _log2(max(1, vectors // 4))),
        "slot_tiles": -(-slots // THREADS), "move_tiles": min(-(-slots // (4 * THREADS)), 264),
    }  # fmt: skip
    has_places = growth in (Growth.BY_HASH, Growth.BY_SCORES)
    numbers["place_tiles"] = -(-own.num_rows * numbers["row_words"] * 32 // TILE_PLACES) if has_places else 0
    for name, value in numbers.items():
        record[name] = value
    # about four items in a bucket, were keys uniform, and half as many buckets again for those that tie
    drop, grow = record["drop"], record["grow"]
    drop["log_buckets"] = _log_buckets(slots / own.groups, own.groups)
    drop["ties"], drop["capacity"] = 1 << max(5, drop["log_buckets"] - 1), slots
    drop["tie_shift"] = max(0, _log2(slots) - _log2(int(drop["ties"])))
    most = min(slots, places)
    if growth is Growth.BY_HASH:
        grow["log_buckets"] = _log_buckets(_wanted(most), own.groups)
        grow["capacity"] = own.groups * min(places, most + most // 2 + 1024)
    elif growth is Growth.BY_SCORES:
        grow["log_buckets"], grow["capacity"] = _log_buckets(places, own.groups), own.groups * places
        grow["ties"] = 1 << max(5, grow["log_buckets"] - 1)
        grow["tie_shift"] = max(0, _log2(places) - _log2(int(grow["ties"])))


def _describe_all(records: np.ndarray) -> None:
    """What MARK_DEAD_OF_ALL needs to know of each layer among all."""
    sizes = records["block"].astype(np.int64) ** 2
    sizes //= sizes.min()
    tiles = records["slot_tiles"]
    records["slot_size"], records["first_slot_tile"] = sizes, np.cumsum(tiles) - tiles
    records["all_slot_tiles"] = tiles.sum()
    records["all_score_tiles"] = _score_tiles(records).sum()


def _score_tiles(records: np.ndarray) -> np.ndarray:
    return -(-records["slots"] // (THREADS >> records["log_threads_per_slot"]))


def _lay_out(records: np.ndarray) -> tuple[int, int]:
    """Give every list and bitmap its offset in the workspace; return the bytes that begin as zero, and all bytes."""
    used = 0

    def take(owner: np.void | np.ndarray, name: str, count: int, size: int = 4) -> None:
        nonlocal used
        owner[name] = used
        used += -(-count * size // 256) * 256

    def buckets(record: np.void, name: str) -> int:
        return int(record["groups"]) * ((1 << int(record[name]["log_buckets"])) + int(record[name]["ties"]))

    def lists(record: np.void) -> list[str]:
        return [] if of_all else ["drop", "grow"] if record["place_tiles"] else ["drop"]

    of_all = records[0]["growth"] == Growth.MARK_DEAD_OF_ALL
    for name, count in (("uppers", DIGITS), ("lowers", DIGITS), ("all_tickets", 3)) if of_all else ():
        take(records, name, count)

    for record in records:
        for name in lists(record):
            take(record[name], "histogram", buckets(record, name))
            take(record[name], "bounds", 2)
        take(record, "row_bits", int(record["num_rows"]) * int(record["row_words"]))
        take(record, "col_bits", int(record["num_cols"]) * int(record["col_words"]))
        take(record, "row_counts", int(record["num_rows"]))
        take(record, "col_counts", int(record["num_cols"]))
        take(record, "dead_counts", int(record["slot_tiles"]))
        take(record, "tickets", 4)
    cleared = used
    if of_all:
        take(records, "at_threshold", int(records[0]["all_slot_tiles"]) + 1)
        take(records, "threshold", 1, _THRESHOLD_BYTES)
    for record in records:
        for name in lists(record):
            take(record[name], "starts", buckets(record, name) + 1)
            take(record[name], "items", int(record[name]["capacity"]), 8)
            take(record[name], "chosen", int(record["slots"]))
        for name in ("drop", "grow"):
            take(record[name], "selected", int(record["groups"]), _SELECTION_BYTES)
        take(record, "row_offsets", int(record["num_rows"]) + 1)
        take(record, "col_offsets", int(record["num_cols"]) + 1)
        take(record, "keys", int(record["slots"]))
    return cleared, used


def _tiles(records: np.ndarray, layers: Sequence[LayerTensors], kernel: str) -> np.ndarray:
    """The tiles of a kernel over all layers; parts that end with a serial step come first."""
    tiles = []

    def add(layer: int, part: int, count: int) -> None:
        tile = np.zeros(count, _TILE)
        tile["layer"], tile["part"], tile["number"], tile["of"] = layer, part, np.arange(count), count
        tiles.append(tile)

    # an event moves 30% of the slots, seldom more: ranking takes half as many blocks as all would
    ranks = [min(-(-int(record["slots"]) // (2 * ITEMS)), 1056) for record in records]
    all_bytes = sum(_bytes(layer) for layer in layers)
    for i, record in enumerate(records):
        of_all = record["growth"] == Growth.MARK_DEAD_OF_ALL
        slots = {"score": int(_score_tiles(records)[i]), "rank": 0 if of_all else ranks[i]}
        if kernel in ("score", "count", "scatter", "rank") or kernel == "assign" and of_all:
            add(i, _OF_SLOTS, slots.get(kernel, int(record["slot_tiles"])))
        elif kernel == "assign":
            add(i, _MOVE, int(record["move_tiles"]))
        elif not layers[i].layouts[0].full:
            add(i, _PAIRS, int(record["slot_tiles"]))
    for i, (record, layer) in enumerate(zip(records, layers, strict=True)):
        if kernel in ("count", "scatter") or kernel == "score" and record["growth"] == Growth.BY_SCORES:
            add(i, _OF_PLACES, int(record["place_tiles"]))
        elif kernel == "rank" and record["place_tiles"]:
            add(i, _OF_PLACES, ranks[i])
        if kernel == ("index" if layer.growth.marks else "assign"):
            enough = _bytes(layer) // (4 * 16 * THREADS)
            add(i, _FILL, max(1, min(enough, 792 * _bytes(layer) // max(1, all_bytes))))
        if kernel == "index" and record["block"] > 1 and not layer.layouts[0].full:
            add(i, _ROW_ORDER, int(record["num_rows"]) // ITEMS + 1)
            add(i, _COL_ORDER, int(record["num_cols"]) // ITEMS + 1)
    return np.concatenate(tiles) if tiles else np.zeros(0, _TILE)


def _wanted(count: int) -> int:
    """How many of the best hashes to look at for `count` dead places: 13 standard deviations more than needed."""
    return count + count // 4 + 256


def _log_buckets(items: float, groups: int) -> int:
    return max(5, min(_log2(max(1, int(items / 4))), _log2(max(1, 2**17 // groups))))


def _log2(value: int) -> int:
    """Rounded up."""
    return max(0, int(value) - 1).bit_length()


def _bits(tensor: Tensor, value: float) -> int:
    """The bits of a value in the tensor's type; a 16-bit number twice."""
    one = torch.tensor([value], dtype=tensor.dtype, device="cpu")
    if one.element_size() == 4:
        return one.view(torch.int32).item() & 0xFFFFFFFF
    return (one.view(torch.int16).item() & 0xFFFF) * 0x10001


def _bytes(layer: LayerTensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor, _ in layer.tensors)


def _staged(num_bytes: int, device: torch.device) -> Tensor:
    """Memory of the host, uint8, from which a device copies while the host goes on.

    It is of torch's caching allocator for pinned memory, which gives none away before the copies from it are done.
    """
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def _upload(staged: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    return staged.to(device, non_blocking=True)


def _on(device: torch.device, records: np.ndarray) -> Tensor:
    """The bytes of an array, on the device."""
    staged = _staged(records.nbytes, device)
    return _upload(staged.copy_(torch.from_numpy(records.view(np.uint8))), device)
