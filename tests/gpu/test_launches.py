"""Prepared launches without a GPU: helpers/launched.py in a process of its own, whose libcuda.so.1 is libcuda.c."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HELPERS = ROOT / "tests" / "helpers"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(find_spec("sparsekern._cuda") is None, reason="sparsekern was installed without sparsekern._cuda")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_prepared_launches_pass_what_tritons_launcher_passes(tmp_path):
    import triton.backends.nvidia

    # Triton's own code is linked with all the functions it names, though it calls few
    own = (HELPERS / "libcuda.c").read_text()
    theirs = (Path(triton.backends.nvidia.__path__[0]) / "driver.c").read_text()
    others = set(re.findall(r"\b(cu[A-Z]\w*)\(", theirs)) - set(re.findall(r"^int (\w+)", own, re.MULTILINE))
    source = tmp_path / "libcuda.c"
    source.write_text(own + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(others)))
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": f"{ROOT}:{HELPERS}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "without_cuda"]
    run = subprocess.run(
        [*command, HELPERS / "launched.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{run.stdout[-8000:]}\n{run.stderr[:3000]}"
