"""What is compiled: two native modules in plain C++ and, where nvcc is, the kernels of csrc/cuda.

sparsekern._C holds the CPU kernels, sparsekern._cuda the launches on a GPU, whose driver is looked up at run time. A
CUDA kernel becomes sparsekern/fatbin/<name>.fatbin, which that driver loads. Nothing sees a torch header, so the build
needs no torch; and what cannot be built does not cost the rest.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPP_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"]
# Machine code for Ampere and for Hopper, and PTX for whatever comes later.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
]
SANITIZE = os.environ.get("SPARSEKERN_SANITIZE") == "1"  # set by tests/sanitize.sh
if SANITIZE:
    CPP_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class BuildNative(build_ext):
    def initialize_options(self):
        super().initialize_options()
        self.parallel = True  # both modules at once: each is one slow file and some others

    def run(self):
        super().run()
        folder = Path("" if self.inplace else self.build_lib, "sparsekern", "fatbin")
        for built in folder.glob("*.fatbin"):  # of an earlier build, whose launches may have been others
            built.unlink()
        if wants_cuda():
            self.build_kernels(folder)

    def build_kernels(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            target = folder / f"{source.stem}.fatbin"
            try:
                subprocess.run(["nvcc", *NVCC_FLAGS, "-fatbin", str(source), "-o", str(target)], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("SPARSEKERN_CUDA") == "1":
                    raise SystemExit(f"SPARSEKERN_CUDA=1 asks for the CUDA kernels, but {error}") from None
                say(f"{source} was not compiled, and the package works without it: {error}")

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
    """What is missing to compile the CUDA kernels, or None."""
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
        raise SystemExit(f"SPARSEKERN_CUDA=1 asks for the CUDA kernels, but {problem}")
    return choice != "0" and not problem


def extension(name: str, room: str) -> Extension:
    return Extension(
        f"sparsekern.{name}",
        sources=sorted(map(str, Path("csrc", room).glob("*.cpp"))),
        # a source distribution takes these along, so the kernels too, which setuptools knows nothing of
        depends=sorted(
            str(file)
            for ending in ("*.h", "*.cu")
            for folder in ("csrc", f"csrc/{room}")
            for file in Path(folder).glob(ending)
        ),
        include_dirs=[pybind11.get_include()],
        language="c++",
        optional=True,  # setup then accepts that it is missing
    )


wants_cuda()  # a wrong choice is told before anything is compiled
setup(ext_modules=[extension("_C", "cpu"), extension("_cuda", "cuda")], cmdclass={"build_ext": BuildNative})
