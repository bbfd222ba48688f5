"""The two native modules and nothing else: sparsekern._C, the CPU kernels, and sparsekern._cuda, launches on a GPU.

Both are plain C++: the driver of a GPU is looked up at run time. Neither sees a torch header, so the build needs no
torch; and a module that cannot be built does not cost the other one.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPP_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"]
SANITIZE = os.environ.get("SPARSEKERN_SANITIZE") == "1"  # set by tests/sanitize.sh
if SANITIZE:
    CPP_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class BuildNative(build_ext):
    def build_extension(self, ext):
        try:
            if not self.compiler_takes():
                raise RuntimeError("no C++ compiler works here")
            openmp = ["-fopenmp"] if self.compiler_takes("-fopenmp") else []
            if not openmp:
                say("the compiler does not take -fopenmp, so the CPU kernels will use one thread")
            sanitizers = [flag for flag in CPP_FLAGS if flag.startswith("-fsanitize")]
            ext.extra_compile_args, ext.extra_link_args = CPP_FLAGS + openmp, openmp + sanitizers
            super().build_extension(ext)
        except Exception as error:
            if SANITIZE:
                raise
            say(f"{ext.name} was not built, and the package works without it: {error}")

    def compiler_takes(self, *flags: str) -> bool:
        """Whether a C++ program compiles and links with the flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "main.cpp")
            source.write_text("#include <vector>\nint main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=list(flags))
                self.compiler.link_executable(objects, "main", folder, extra_postargs=list(flags), target_lang="c++")
            except Exception:
                return False
        return True


def say(sentence: str) -> None:
    print(f"sparsekern: {sentence}", file=sys.stderr)


def cuda_problem() -> str | None:
    """What is missing to build kernels in CUDA, or None."""
    if not any(Path("csrc/cuda").glob("*.cu")):
        return "this version of sparsekern has no CUDA sources (csrc/cuda/*.cu)"
    if shutil.which("nvcc") is None:
        return "nvcc, the CUDA compiler, is not on the PATH"
    return None


def wants_cuda() -> bool:
    choice, problem = os.environ.get("SPARSEKERN_CUDA", "auto"), cuda_problem()
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"SPARSEKERN_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and problem:
        raise SystemExit(f"SPARSEKERN_CUDA=1 asks for kernels in CUDA, but {problem}")
    return choice != "0" and not problem


def extension(name: str, room: str) -> Extension:
    return Extension(
        f"sparsekern.{name}",
        sources=sorted(map(str, Path("csrc", room).glob("*.cpp"))),
        depends=sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc", room).glob("*.h")])),
        include_dirs=[pybind11.get_include()],
        language="c++",
        optional=True,  # setup then accepts that it is missing
    )


# Kernels in CUDA join sparsekern._cuda, `if wants_cuda()`, with a build step for .cu files, once there are some.
wants_cuda()
setup(ext_modules=[extension("_C", "cpu"), extension("_cuda", "cuda")], cmdclass={"build_ext": BuildNative})
