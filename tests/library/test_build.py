"""setup.py, with stand-ins for the compilers: they make empty files, or fail."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="pybind11, which a build needs, is not installed")
pytest.importorskip("setuptools", minversion="77", reason="a build by hand needs setuptools 77 or newer")

ROOT = Path(__file__).parent.parent.parent
MAKES_FILES = '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
FAILS = "#!/bin/sh\necho 'no kernel image' >&2\nexit 4\n"


def build(folder: Path, nvcc: str | None, choice: str = "auto") -> tuple[int, str, set[str]]:
    """Status, what was said, and the names of the files in the package, without what follows a dot."""
    tools, earlier = folder / "tools", folder / "lib" / "sparsekern" / "fatbin" / "earlier.fatbin"
    tools.mkdir()
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    for name, script in {"c++": MAKES_FILES, "nvcc": nvcc}.items():
        if script is not None:
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
    compiler = str(tools / "c++")
    environment = os.environ | {"CC": compiler, "CXX": compiler, "LDSHARED": f"{compiler} -shared"}
    environment |= {"LDCXXSHARED": f"{compiler} -shared", "PATH": f"{tools}:/usr/bin:/bin", "SPARSEKERN_CUDA": choice}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        folder / "lib",
        "--build-temp",
        folder / "o",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    names = {path.name.partition(".")[0] for path in (folder / "lib").rglob("*") if path.is_file()}
    return done.returncode, done.stderr, names


def test_an_nvcc_that_fails_costs_the_kernels_and_neither_native_module(tmp_path):
    status, said, names = build(tmp_path, FAILS)
    assert status == 0 and names == {"_C", "_cuda"}
    assert "rewire.cu was not compiled, and the package works without it" in said


def test_an_nvcc_that_works_makes_a_file_of_each_source(tmp_path):
    status, _, names = build(tmp_path, MAKES_FILES)
    assert status == 0 and names == {"_C", "_cuda", *(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))}


@pytest.mark.parametrize(("nvcc", "message"), [(FAILS, "asks for the CUDA kernels, but Command"), (None, "nvcc, the")])
def test_whoever_asks_for_the_kernels_is_told_that_they_cannot_be_built(tmp_path, nvcc, message):
    status, said, _ = build(tmp_path, nvcc, "1")
    assert status and message in said


def test_without_kernels_none_of_an_earlier_build_are_shipped(tmp_path):
    assert build(tmp_path, MAKES_FILES, "0") == (0, "", {"_C", "_cuda"})


def test_a_source_distribution_has_all_that_a_build_needs(tmp_path):
    options = ["egg_info", "--egg-base", tmp_path, "sdist", "--formats", "tar", "--dist-dir", tmp_path]
    subprocess.run([sys.executable, "setup.py", "-q", *options], cwd=ROOT, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "README.md"} <= names
