import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports modules of smaller rank only.
RANK = {"topology": 0, "backends": 1, "choose": 2, "operators": 3, "products": 4, "layer": 5, "linear": 6, "conv": 6}
RANK |= {"convert": 7, "summary": 8, "load": 8, "rewire": 7, "rewire.optimizer_state": 8, "rewire.rule": 10}
RANK |= {
    "rewire.growth": 5,
    "rewire.hash": 0,
    "rewire.arguments": 8,
    "rewire.schedule": 9,
    "rewire.scores": 8,
    "rewire.select": 9,
    "rewire.on_device": 10,
}
RANK |= {"rewire.drop_and_grow": 11, "rewire.gmp": 11, "rewire.density": 1, "table": 0}
RANK |= {"integrations": 11.5, "integrations.sparse_policy": 11}
RANK |= {"untrained": 0, "devices": 0, "cost": 1, "vendor": 1.5}

# The same of rl. A room's modules may import one another; a file in no room is named by itself.
RL_RANK = {"": 0, "config": 0, "seeds": 0, "checkpoint": 0, "envs": 1, "agents": 1, "treatments": 2}
RL_RANK |= {"evaluate": 3, "metrics": 3, "reporting": 3, "algorithms": 4, "run": 5, "report": 5, "sweep": 6}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), f"{path} has a relative import"
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def rank(module: str) -> int:
    first, second = (*module.split("."), "")[:2]
    return RANK.get(f"{first}.{second}", RANK.get(first, 12))


def files(*folders: str) -> list:
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@pytest.mark.parametrize("path", files("sparsekern"))
def test_imports_point_one_way(path):
    own = ".".join(path.relative_to(ROOT / "sparsekern").with_suffix("").parts)
    for name in imported(path):
        room, _, module = name.partition(".")
        assert room not in ("rl", "tests", "bench"), f"{own} imports {name}"
        if room == "sparsekern" and not module.startswith("_"):  # _version and the native modules are everybody's
            # the Triton backend is a package of files that may import one another
            inside = own.startswith("backends.triton") and module.startswith("backends.triton")
            assert rank(module) < rank(own) or rank(own) == 12 or inside, f"{own} imports {name}"


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
