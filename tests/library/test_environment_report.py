"""python -m sparsekern: what a bug report needs, and why a backend is not there."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern.__main__ import report
from sparsekern.backends import cpu, cuda
from sparsekern.choose import BACKENDS

ROOT = Path(__file__).parent.parent.parent


def line(name: str) -> str:
    (found,) = [text for text in report().splitlines() if text.startswith(name + " ")]
    return found.removeprefix(name).strip()


def test_it_runs_as_a_command():
    run = subprocess.run([sys.executable, "-m", "sparsekern"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"sparsekern         {sk.__version__} at " in run.stdout
    assert "backend reference  ready" in run.stdout


def test_versions_threads_and_devices_are_those_of_this_process():
    assert line("python").startswith(platform.python_version())
    assert line("torch").startswith(torch.__version__)
    assert line("devices").startswith("cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert line("threads") == f"1 of {os.cpu_count()} logical cores"
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"cupy-cuda13x": "14.0"}[name])
    monkeypatch.setattr("importlib.metadata.PackageNotFoundError", KeyError)
    assert line("triton") == "not installed"
    assert line("cupy") == "14.0"


def test_every_backend_has_a_line():
    for name, module in BACKENDS.items():
        assert line(f"backend {name}") == (module.unavailable() or "ready")


def test_a_package_without_its_native_modules_says_that_none_was_built(tmp_path):
    shutil.copytree(ROOT / "sparsekern", tmp_path / "sparsekern", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    # the finder of an editable install would find the native module of the checkout for this copy
    command = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
    command += "from sparsekern.backends import cpu; print(cpu.unavailable())"
    run = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "without its C++ module (none was built); install it again with a C++ compiler" in run.stdout


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "sparsekern was installed without its C++ module")
    assert line("backend cpu") == "sparsekern was installed without its C++ module"
    assert line("instructions").startswith("none in sparsekern, ")


def test_the_cuda_kernels_that_were_built_are_named_with_their_architectures(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "FATBIN", tmp_path)
    assert line("cuda kernels") == "none were built"
    files = list(cuda.KERNELS)
    missing = ", ".join(f"{name}.fatbin" for name in files)
    assert line("backend cuda").startswith(f"sparsekern was built without {missing}; install it again with nvcc")
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "built")
    cuda.FATBIN.mkdir()
    for name in files:
        (cuda.FATBIN / f"{name}.fatbin").touch()
    assert line("cuda kernels") == f"{', '.join(files)} for sm_80, sm_90a, compute_80"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert line("backend cuda") == "torch sees no NVIDIA GPU."


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_the_instruction_set_in_use_is_named():
    assert line("instructions").startswith(f"{cpu.instruction_set()} in sparsekern, ")


def test_a_forced_backend_is_reported(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    assert line("forced backend") == "reference (SPARSEKERN_BACKEND)"


def install(site: Path, package: bool) -> None:
    """What pip leaves in a site folder: with the package in it, or without, as for an editable install."""
    info = site / "sparsekern-0.0.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsekern\nVersion: 0.0.9\n")
    if package:
        (site / "sparsekern").mkdir()


def test_a_checkout_that_shadows_the_installed_package_is_warned_about(monkeypatch, tmp_path):
    install(tmp_path, package=True)
    monkeypatch.syspath_prepend(tmp_path)
    warning = report().splitlines()[-1]
    here = Path(sk.__file__).parent
    assert warning.startswith(f"warning: {here} shadows the package installed at {tmp_path / 'sparsekern'}")
    assert warning.endswith("or install the checkout with pip install -e .")


def test_an_editable_install_shadows_nothing(monkeypatch, tmp_path):
    before = report()
    install(tmp_path, package=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert report() == before
