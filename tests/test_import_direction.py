import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports modules of smaller rank only.
RANK = {
    "topology": 0,
    "backends": 1,
    "choose": 2,
    "quick": 2.5,
    "products": 3,
    "growth": 4,
    "layer": 5,
    "linear": 6,
    "conv": 6,
}
RANK |= {"convert": 7, "summary": 8, "rewire": 7, "rewire.rewire": 8, "rewire.optimizer_state": 8, "rewire.rule": 9}
RANK |= {"rewire.drop_and_grow": 10, "rewire.gmp": 10, "rewire.density": 1, "table": 0}
RANK |= {"devices": 0, "cost": 1, "vendor": 1.5}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as a.b."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), f"{path} has a relative import"
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def rank(module: str) -> int:
    first, second = (*module.split("."), "")[:2]
    return RANK.get(f"{first}.{second}", RANK.get(first, 11))


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
            assert rank(module) < rank(own) or rank(own) == 11 or inside, f"{own} imports {name}"


@pytest.mark.parametrize("path", files("rl"))
def test_rl_uses_only_public_names_of_sparsekern(path):
    public = ast.literal_eval((ROOT / "sparsekern/__init__.py").read_text().partition("__all__ = ")[2])
    for name in imported(path):
        room, *rest = name.split(".")
        assert room not in ("tests", "bench"), f"{path} imports {name}"
        assert room != "sparsekern" or rest == [] or rest[0] in public, f"{path} imports {name}"
