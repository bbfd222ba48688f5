import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# A module imports modules of earlier lines only. A folder's name stands for all its files.
ORDER = (
    "geometry layout devices table untrained rewire.hash",
    "agreement",
    "topology",
    "backends.contract rewire.density",
    "backends.reference backends.cpu backends.triton backends.cuda",
    "backends.dense",
    "choose",
    "quick",
    "routes",
    "operators",
    "products dense_copy rewire.growth",
    "layer",
    "linear conv",
    "initialise rewire.optimizer_state",
    "handover planning",
    "convert",
    "summary load rewire.arguments rewire.scores",
    "rewire.schedule rewire.select rewire.ranks rewire.watch",
    "rewire.on_device rewire.rule",
    "rewire.device_rule",
    "rewire.drop_and_grow rewire.gmp",
    "integrations.sparse_policy",
    "integrations",
    "__init__ __main__ rewire.__init__ backends.__init__",
)
RANK = {module: rank for rank, line in enumerate(ORDER) for module in line.split()}
PACKAGES = ("backends.triton", "backends.cuda", "choose")  # whose files may import one another

# The same of rl. A room's modules may import one another; a file in no room is named by itself.
RL_ORDER = (
    "config seeds checkpoint",
    "envs agents",
    "treatments",
    "episodes metrics reporting",
    "evaluators",
    "algorithms",
    "run report",
    "sweep evaluate play",
)
RL_RANK = {"": 0} | {room: rank for rank, line in enumerate(RL_ORDER) for room in line.split()}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), f"{path} has a relative import"
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def place(module: str) -> str:
    """The entry of ORDER that a dotted name belongs to: a file, or the folder around it."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in (2, 1)]
    return next((name for name in names if name in RANK), module)


def files(*folders: str) -> list:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", files("sparsekern"))
def test_imports_point_one_way(path):
    own = ".".join(path.relative_to(ROOT / "sparsekern").with_suffix("").parts)
    for name in imported(path):
        room, _, module = name.partition(".")
        assert room not in ("rl", "tests", "bench"), f"{own} imports {name}"
        if (
            room == "sparsekern" and module and not module.startswith("_")
        ):  # _version and the native modules are everybody's
            here, there = place(own), place(module)
            assert here in RANK, f"{own} is in no line of ORDER"
            assert there in RANK, f"{own} imports {name}, which is in no line of ORDER"
            assert RANK[there] < RANK[here] or here == there in PACKAGES, f"{own} imports {name}"


@pytest.mark.parametrize("path", files("rl"))
def test_rl_uses_only_public_names_of_sparsekern(path):
    public = ast.literal_eval((ROOT / "sparsekern/__init__.py").read_text().partition("__all__ = ")[2])
    for name in imported(path):
        room, *rest = name.split(".")
        assert room not in ("tests", "bench"), f"{path} imports {name}"
        assert room != "sparsekern" or rest == [] or rest[0] in public, f"{path} imports {name}"


@pytest.mark.parametrize("path", files("rl"))
def test_rooms_of_rl_import_one_way(path):
    own = path.relative_to(ROOT / "rl").with_suffix("").parts[0].removesuffix("__init__")
    for name in imported(path):
        room, _, module = name.partition(".")
        other = module.partition(".")[0]
        if room == "rl" and other != own:
            assert other in RL_RANK and RL_RANK[other] < RL_RANK[own], f"{path} imports {name}"
