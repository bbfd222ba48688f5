"""The kernels that rewire a whole model at once: integer for integer what the torch path does, by emulation on a CPU.

On a GPU (marker gpu) the same cases run on the device itself.
"""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from emulation import Launches, constant
from torch import Tensor

from sparsekern.backends import cpu, cuda
from sparsekern.layout import Layout, build_index
from sparsekern.rewire import on_device
from sparsekern.rewire.growth import best_candidates, float_bits
from sparsekern.rewire.hash import stream
from sparsekern.rewire.on_device import Growth, LayerTensors, ModelEvent, ModelTables, rewire_model
from sparsekern.rewire.select import places, random_candidates, relative_sizes, weakest, weakest_of_all
from sparsekern.topology import Topology

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANDOM_CASES = 240


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch):
    """The truth is what torch computes, not the C++ of a CPU."""
    monkeypatch.setattr(cpu, "_C", None)
    monkeypatch.setattr(cpu, "_import_error", "a test is without it", raising=False)
    monkeypatch.setattr("sparsekern.layout._C", None)


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def bytes_of(tensor: Tensor) -> Tensor:
    own = tensor.cpu().reshape(-1)
    if tensor.is_cuda and tensor.is_floating_point():  # torch's masked_fill_ changes the bits of a NaN that it leaves
        own = own.masked_fill(own.isnan(), torch.nan)
    return own.view(torch.uint8)


@dataclass
class Case:
    """One layer, and what an event does with it. Both paths change clones of it."""

    layouts: list[Layout]  # its own, then those of followers
    shape: tuple[int, int]
    weight: Tensor
    tensors: list[tuple[Tensor, float]]  # beside the weight
    gradient: Tensor | None
    live: list[int]
    counts: list[int]
    scores: Tensor | None = None
    growth: Tensor | None = None

    def clone(self) -> "Case":
        layouts = [Layout(*(t.clone() for t in layout[:3]), *layout[3:]) for layout in self.layouts]
        tensors = [(t.clone(), fresh) for t, fresh in self.tensors]
        gradient = None if self.gradient is None else self.gradient.clone()
        return replace(self, layouts=layouts, weight=self.weight.clone(), tensors=tensors, gradient=gradient)

    def to(self, device: str) -> "Case":
        def move(tensor):
            return None if tensor is None else tensor.to(device)

        layouts = [Layout(*(t.to(device) for t in layout[:3]), *layout[3:]) for layout in self.layouts]
        tensors = [(t.to(device), fresh) for t, fresh in self.tensors]
        moved = {name: move(getattr(self, name)) for name in ("weight", "gradient", "scores", "growth")}
        return replace(self, layouts=layouts, tensors=tensors, **moved)

    def results(self) -> dict[str, Tensor]:
        """Everything that an event may change, as integers."""
        found = {"weight": self.weight, "gradient": self.gradient}
        found |= {f"tensor {i}": tensor for i, (tensor, _) in enumerate(self.tensors)}
        for copy, layout in enumerate(self.layouts):
            found |= {f"{name} of copy {copy}": getattr(layout, name) for name in ("block_rows", "block_cols", "index")}
        return {name: bytes_of(tensor) for name, tensor in found.items() if tensor is not None}

    def torch_path(self, growth: Growth, start: int) -> int:
        """What the rules do by torch operations; returns how many blocks moved."""
        if not any(self.counts) and growth is not Growth.MARK_DEAD:
            return 0
        layout, scores = self.layouts[0], self.norms() if self.scores is None else self.scores
        slots = weakest(scores, layout, self.live, self.counts)
        if growth is Growth.MARK_DEAD:
            return self.mark_dead((layout.block_rows < 0).index_fill_(0, slots, True))
        rows, cols = places(self.keys(growth, start), layout, self.counts)
        kept = rows < 0
        rows = torch.where(kept, layout.block_rows[slots], rows)
        cols = torch.where(kept, layout.block_cols[slots], cols)
        gradient = [] if self.gradient is None else [(self.gradient, 0.0)]
        for tensor, fresh in [(self.weight, 0.0), *gradient, *self.tensors]:
            tensor.index_copy_(0, slots, tensor[slots].masked_fill_(~kept[:, None, None], fresh))
        for copy in self.layouts:
            copy.block_rows.index_copy_(0, slots, rows.to(copy.block_rows.dtype))
            copy.block_cols.index_copy_(0, slots, cols.to(copy.block_cols.dtype))
            copy.index.copy_(build_index(copy))
        return int((~kept).sum())

    def mark_dead(self, dead: Tensor) -> int:
        """Returns how many died."""
        died = int((dead & (self.layouts[0].block_rows >= 0)).sum())
        gradient = [] if self.gradient is None else [(self.gradient, 0.0)]
        for tensor, fresh in [(self.weight, 0.0), *gradient, *self.tensors]:
            tensor.masked_fill_(dead[:, None, None], fresh)
        for copy in self.layouts:
            copy.block_rows.masked_fill_(dead, -1)
            copy.block_cols.masked_fill_(dead, -1)
            copy.index.copy_(build_index(copy))
        return died

    def real(self) -> Tensor:
        """Boolean [num_slots, B, B]: what is no padding of a live block."""
        own = self.layouts[0]
        lane = torch.arange(own.block_size, device=self.weight.device)

        def inside(blocks, count, size):
            return lane < (size // own.groups - blocks.long() % (count // own.groups) * own.block_size)[:, None]

        rows = inside(own.block_rows, own.num_rows, self.shape[0])
        cols = inside(own.block_cols, own.num_cols, self.shape[1])
        return rows[:, :, None] & cols[:, None, :] & (own.block_rows >= 0)[:, None, None]

    def norms(self) -> Tensor:
        return torch.where(self.real(), self.weight, 0).abs().sum(dim=(1, 2), dtype=torch.float32)

    def keys(self, growth: Growth, start: int) -> Tensor:
        if growth is Growth.BY_HASH:
            return random_candidates(self.layouts[0], max(self.counts), start)
        if growth is Growth.BY_KEYS:
            return self.growth
        table = self.growth + 0.0
        return best_candidates(
            self.layouts[0], max(self.counts), lambda strip, _: float_bits(table[:, strip].flatten(1))
        )


def make(
    draw: random.Random,
    grid,
    block,
    live,
    dead=0,
    dtype=torch.float32,
    tensors=2,
    kind="norm",
    growth=Growth.BY_HASH,
    counts=None,
    in_order=False,
    copies=1,
) -> Case:
    """A layer on a grid (block rows, block columns, of one group); `dead` slots more than live ones, anywhere."""
    rows, cols = grid
    groups = len(live)
    random_numbers = torch.Generator().manual_seed(draw.randrange(2**31))
    chosen = [torch.randperm(rows * cols, generator=random_numbers)[:n] for n in live]
    block_rows = torch.cat([p // cols + g * rows for g, p in enumerate(chosen)] + [torch.full((dead,), -1)])
    block_cols = torch.cat([p % cols + g * cols for g, p in enumerate(chosen)] + [torch.full((dead,), -1)])
    if in_order:  # every place has its slot, in row-major order; the missing ones are dead
        place = torch.arange(groups * rows * cols)
        alive = torch.zeros(len(place), dtype=torch.bool)
        alive[torch.cat([p + g * rows * cols for g, p in enumerate(chosen)])] = True
        block_rows = torch.where(alive, place // cols, -1)
        block_cols = torch.where(alive, place // (rows * cols) * cols + place % cols, -1)
    else:
        order = torch.randperm(len(block_rows), generator=random_numbers)
        block_rows, block_cols = block_rows[order], block_cols[order]
    coordinates = draw.choice([torch.int16, torch.int32])
    block_rows, block_cols = block_rows.to(coordinates), block_cols.to(coordinates)
    layout = Layout(block_rows, block_cols, torch.empty(0), rows * groups, cols * groups, groups, block, False)
    layout = layout._replace(index=build_index(layout))
    slots = len(block_rows)

    def values(dtype):  # multiples of 1/64, whose sums are exact in any order
        return torch.randint(-64, 65, (slots, block, block), generator=random_numbers).div(64).to(dtype)

    def rarely(share):
        return torch.rand(slots, generator=random_numbers) < share

    weight, scores = values(dtype), None
    if kind == "zeros":
        weight[rarely(0.5)] = 0
    elif kind == "nan":
        weight[rarely(0.2), 0, 0] = torch.nan
    elif kind == "smooth":
        scores = torch.randn(slots, generator=random_numbers)
    elif kind == "equal":
        scores = torch.full((slots,), 0.7)
    elif kind == "given":
        scores = torch.randint(-3, 4, (slots,), generator=random_numbers).float()
        for extreme in (torch.nan, -torch.inf, torch.inf, -0.0):
            scores[rarely(0.05)] = extreme
    # one column or row of padding, where that is not the whole block
    shape = tuple(
        groups * (count * block - draw.choice([0, block // 2, block - 1] if block > 1 else [0])) for count in grid
    )
    others = [(values(draw.choice(DTYPES)), draw.choice([0.0, 0.375])) for _ in range(tensors)]
    if counts is None:
        counts = [draw.choice([0, n, draw.randint(0, n), int(0.3 * n)]) for n in live]
    table = None
    if growth in (Growth.BY_SCORES, Growth.BY_KEYS):
        size = (groups, rows, cols)
        table = torch.rand(size, generator=random_numbers).mul(draw.choice([3, 50, 1e9])).round()
        for extreme in (torch.inf, torch.nan, -1.0, -0.0):
            table[torch.rand(size, generator=random_numbers) < 0.1] = extreme
    if growth is Growth.BY_KEYS:
        scored = table + 0.0
        most = max(1, rows * cols - min(live))
        counts = [min(count, most) for count in counts]
        table = best_candidates(layout, most, lambda strip, _: float_bits(scored[:, strip].flatten(1)))
    elif not growth.marks:
        counts = [min(count, rows * cols - n) for count, n in zip(counts, live, strict=True)]
    layouts = [layout] + [Layout(*(t.clone() for t in layout[:3]), *layout[3:]) for _ in range(copies - 1)]
    gradient = draw.choice([None, values(dtype)])
    return Case(layouts, shape, weight, others, gradient, list(live), counts, scores, table)


def event_of(cases: list[Case], streams: list[int] | None = None, number: int = 0, **more) -> ModelEvent:
    """What happens to all layers."""
    counts, live = ([n for case in cases for n in getattr(case, name)] for name in ("counts", "live"))
    given = {name: [getattr(case, name) for case in cases] for name in ("scores", "growth")}
    gradients = [case.gradient for case in cases]
    return ModelEvent(counts, live, streams or len(cases) * [0], number, gradients, **given, **more)


def check(cases: list[Case], growth: Growth = Growth.BY_HASH, events: int = 1, device: str = "cpu") -> None:
    """Run both paths for some events and compare all integers."""
    ours, theirs = [case.clone().to(device) for case in cases], [case.clone().to(device) for case in cases]
    layers = [LayerTensors(c.layouts, c.shape, c.weight, [(c.weight, 0.0), *c.tensors], growth) for c in ours]
    tables = ModelTables(layers)
    for event in range(events):
        starts = [stream(7, i, event) for i in range(len(cases))]
        rewire_model(tables, tables.event_table(event_of(ours, [stream(7, i) for i in range(len(cases))], event)))
        moved = [case.torch_path(growth, start) for case, start in zip(theirs, starts, strict=True)]
        assert tables.stats[:, 0].tolist() == moved
        for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            expected = other.results()
            for name, found in own.results().items():
                assert torch.equal(found, expected[name]), f"event {event}, layer {i}: {name} differs"
        if growth is Growth.MARK_DEAD:  # as many slots are live as the next event is told
            for case in (*ours, *theirs):
                case.live = [n - k for n, k in zip(case.live, case.counts, strict=True)]
                case.counts = [min(k, n) for n, k in zip(case.live, case.counts, strict=True)]


def prune(cases: list[Case], targets: list[int], device: str = "cpu") -> None:
    """Mark the weakest of all layers, by both paths, until each target is met in turn; compare all integers."""
    ours, theirs = [case.clone().to(device) for case in cases], [case.clone().to(device) for case in cases]
    growth = Growth.MARK_DEAD_OF_ALL
    tables = ModelTables(
        [LayerTensors(c.layouts, c.shape, c.weight, [(c.weight, 0.0), *c.tensors], growth) for c in ours]
    )
    for target in targets:
        rewire_model(tables, tables.event_table(event_of(ours, target=target)))
        scores = [c.norms() if c.scores is None else c.scores for c in theirs]
        means = [score / c.real().sum((1, 2)).clamp(min=1) for c, score in zip(theirs, scores, strict=True)]
        dead = weakest_of_all(means, [c.layouts[0] for c in theirs], target)
        died = [case.mark_dead(mask) for case, mask in zip(theirs, dead, strict=True)]
        assert tables.stats[:, 0].tolist() == died
        assert tables.stats[:, 2].tolist() == [int((c.layouts[0].block_rows >= 0).sum()) for c in theirs]
        for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            expected = other.results()
            for name, found in own.results().items():
                assert torch.equal(found, expected[name]), f"target {target}, layer {i}: {name} differs"


def random_pruning(number: int) -> tuple[list[Case], list[int]]:
    cases = random_model(number, Growth.MARK_DEAD_OF_ALL)[0]
    draw = random.Random(-1 - number)
    layouts = [case.layouts[0] for case in cases]
    sizes = relative_sizes(layouts)
    most = sum(size * sum(case.live) for size, case in zip(sizes, cases, strict=True))
    # more than is live; what is live; less; as in a run, less and less
    targets = [draw.choice([most + 1, most, most - 1, 0]), *(draw.randint(0, most) for _ in range(2))]
    return cases, sorted(targets, reverse=draw.random() < 0.8)


def random_model(number: int, growth: Growth | None = None) -> tuple[list[Case], Growth, int]:
    draw = random.Random(number)
    growths = [Growth.BY_HASH, Growth.BY_HASH, Growth.BY_SCORES, Growth.BY_KEYS, Growth.MARK_DEAD]
    growth = growth or draw.choice(growths)
    cases = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        groups, grid = draw.choice([1, 1, 3, 5]), (draw.randint(1, 40), draw.randint(1, 70))
        most = grid[0] * grid[1]
        live = [draw.randint(0, most) for _ in range(groups)]
        live[0] = max(live[0], 1)
        in_order = growth.marks and draw.random() < 0.3
        cases.append(
            make(
                draw,
                grid,
                draw.choice([1, 1, 2, 4, 8]),
                live,
                draw.choice([0, 0, 1, 30, 700]),
                draw.choice(DTYPES),
                draw.randint(0, 3),
                draw.choice(["norm", "zeros", "nan", "given", "smooth", "equal"]),
                growth,
                in_order=in_order,
                copies=draw.choice([1, 1, 2]),
            )
        )
    # keys and scores are good for one event
    return cases, growth, draw.choice([1, 2]) if growth in (Growth.BY_HASH, Growth.MARK_DEAD) else 1


@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_random_models_are_rewired_integer_for_integer_as_by_torch(launches, first):
    for number in range(first, first + 20):
        check(*random_model(number))


@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_the_weakest_of_random_models_are_marked_dead_integer_for_integer_as_by_torch(launches, first):
    for number in range(first, first + 20):
        prune(*random_pruning(number))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_size_is_pruned_as_by_torch(launches, dtype):
    draw = random.Random(4)
    blocks = (1, 2, 4, 8, 16, 32, 64, 128)
    cases = [make(draw, (9, 5), block, [12], 3, dtype, growth=Growth.MARK_DEAD_OF_ALL) for block in blocks]
    live = sum(12 * block**2 for block in blocks)
    prune(cases, [live // 2, live // 20])


@pytest.mark.parametrize("kind", ["norm", "zeros", "equal"])
def test_slots_of_many_tiles_are_pruned_as_by_torch(launches, kind):
    """Ties go over tiles and layers: there are 512 slots to a tile."""
    draw = random.Random(8)
    cases = [
        make(draw, (60, 60), block, [live], 40, kind=kind, growth=Growth.MARK_DEAD_OF_ALL)
        for block, live in ((1, 3000), (2, 1500), (1, 600))
    ]
    prune(cases, [7000, 5000, 100])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_size_is_rewired_as_by_torch(launches, dtype):
    draw = random.Random(1)
    check([make(draw, (9, 5), block, [12], i % 3, dtype) for i, block in enumerate((1, 2, 4, 8, 16, 32, 64, 128))])


@pytest.mark.parametrize("kind", ["norm", "zeros", "smooth"])
def test_a_large_grid_is_rewired_as_by_torch(launches, kind):
    check([make(random.Random(2), (128, 200), 1, [2560], 40, kind=kind, counts=[768])], events=2)


def test_padding_and_dead_slots_do_not_count_in_a_norm(launches):
    case = make(random.Random(0), (6, 6), 4, [20], dead=5, tensors=0, counts=[7])
    case.shape = (22, 21)
    case.weight[case.layouts[0].block_rows < 0] = 9
    edge = case.layouts[0].block_cols == 5
    assert edge.any()
    case.weight[edge, :, 1:] = torch.nan
    check([case])


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("layers", [1, 28])
def test_an_event_takes_eight_launches_whatever_the_number_of_layers(monkeypatch, layers, copies):
    launches = Launches(monkeypatch, run=False)
    cases = [make(random.Random(i), (8, 8), 16, [20], copies=copies) for i in range(layers)]
    tables = ModelTables([LayerTensors(c.layouts, c.shape, c.weight, c.tensors) for c in cases])
    uploads, others = [], Others()
    upload = on_device._upload
    monkeypatch.setattr(on_device, "_upload", lambda *args: uploads.append(args) or upload(*args))
    uploads.clear()
    event = tables.event_table(event_of(cases))
    with others:
        rewire_model(tables, event)
    assert launches.names == list(cuda.KERNELS["rewire"])
    assert others.names == ["zero_"] and len(uploads) == 1, "beside six kernels: clear the workspace, upload the event"


class Others(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the torch operations inside that would be a launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("empty", "slice"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_an_event_says_when_it_dropped_a_nan(launches):
    cases = [make(random.Random(3), (6, 6), 8, [20], kind=kind) for kind in ("nan", "norm")]
    tables = ModelTables([LayerTensors(c.layouts, c.shape, c.weight, c.tensors) for c in cases])
    rewire_model(tables, tables.event_table(event_of(cases)))
    assert tables.stats[:, 1].tolist() == [1, 0]


def test_the_tables_have_the_layout_and_the_numbers_of_the_kernels():
    ours = {
        "sizeof(Layer)": on_device._LAYER.itemsize,
        "sizeof(List)": on_device._LIST.itemsize,
        "sizeof(Tensor)": on_device._TENSOR.itemsize,
        "sizeof(Coordinates)": on_device._COORDINATES.itemsize,
        "sizeof(Tile)": on_device._TILE.itemsize,
        "sizeof(LayerEvent)": on_device._EVENT_BYTES,
        "sizeof(Segment)": on_device._SEGMENT_BYTES,
        "sizeof(Selection)": on_device._SELECTION_BYTES,
        "sizeof(Threshold)": on_device._THRESHOLD_BYTES,
        "TILE_WORDS * 32": on_device.TILE_PLACES,
        "MARK_DEAD": Growth.MARK_DEAD,
        "MARK_DEAD_OF_ALL": Growth.MARK_DEAD_OF_ALL,
    }
    fields = "weight", "num_tensors", "first_segment"
    ours |= {f"offsetof(Layer, {name})": on_device._LAYER.fields[name][1] for name in fields}
    ours |= {name: getattr(on_device, name) for name in ("THREADS", "ITEMS", "MAX_TENSORS", "MAX_COPIES", "DIGITS")}
    ours |= {f"GROW_{growth.name}": growth for growth in Growth if not growth.marks}
    ours |= {f"ELEMENT_{str(dtype)[6:].upper()}": number for dtype, number in on_device.TYPES.items()}
    parts = "OF_SLOTS", "OF_PLACES", "MOVE", "FILL", "PAIRS", "ROW_ORDER", "COL_ORDER"
    ours |= {part: getattr(on_device, f"_{part}") for part in parts}
    assert ours == {expression: constant("rewire", expression) for expression in ours}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 2, 2, dtype=torch.float64)}, "float64"),
        ({"weight": torch.zeros(3, 2, 4)[:, :, ::2]}, "not contiguous"),
        ({"tensors": 13 * [(torch.zeros(3, 2, 2), 0.0)]}, "13 tensors"),
        ({"tensors": [(torch.zeros(2, 2, 2), 0.0)]}, "another shape"),
        ({"layouts": [Topology.random((6, 6), 1.0, 2).layout]}, "a full store, which cannot move"),
    ],
)
def test_a_layer_that_the_kernels_do_not_take_is_refused_by_a_sentence(change, message):
    rows = torch.tensor([0, 1, 2])
    layout = Layout(rows, rows, torch.empty(0, dtype=torch.int32), 3, 3, 1, 2, False)
    layer = replace(LayerTensors([layout], (6, 6), torch.zeros(3, 2, 2), [], name="head"), **change)
    with pytest.raises(ValueError, match=f"rewire_model: layer 'head' has .*{message}"):
        ModelTables([layer])


needs_gpu = pytest.mark.skipif(bool(cuda.unavailable()), reason=f"backend 'cuda': {cuda.unavailable()}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_random_models_are_rewired_on_a_gpu_as_by_torch(first):
    for number in range(first, first + 20):
        cases, growth, events = random_model(number)
        check(cases, growth, events, "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_the_weakest_of_random_models_are_marked_dead_on_a_gpu_as_by_torch(first):
    for number in range(first, first + 20):
        prune(*random_pruning(number), "cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block", [1, 16, 64, 128])
def test_a_large_layer_is_rewired_on_a_gpu_as_by_torch(block):
    side = 2048 // block
    live = side * side // 10
    check([make(random.Random(block), (side, side), block, [live], counts=[3 * live // 10])], events=2, device="cuda")


@pytest.mark.gpu
@needs_gpu
def test_a_captured_event_replays_with_another_stream_of_the_hash():
    case = make(random.Random(5), (32, 32), 16, [200], counts=[60]).to("cuda")
    other = case.clone()
    layer = LayerTensors(case.layouts, case.shape, case.weight, [(case.weight, 0.0), *case.tensors])
    tables = ModelTables([layer])

    def event(number):
        return tables.event_table(event_of([case], [stream(7)], number))

    table = event(0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        rewire_model(tables, table)  # kernels load at their first launch
    torch.cuda.synchronize()
    other.torch_path(Growth.BY_HASH, stream(7, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rewire_model(tables, table)
    for number in (1, 2, 3):
        table.copy_(event(number))
        graph.replay()
        other.torch_path(Growth.BY_HASH, stream(7, number))
        for name, found in case.results().items():
            assert torch.equal(found, other.results()[name]), name
