#!/usr/bin/env bash
# Runs the tests of the native CPU module with csrc compiled for the address and undefined-behaviour sanitizers.
# `bash tests/sanitize.sh [pytest arguments]`; PYTHON and CXX name the interpreter and the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
test $# -gt 0 || set -- tests/library/test_cpu_kernels.py tests/library/test_cpu_rewire.py tests/library/test_native_arguments.py tests/library/test_quick_on_cpu.py
python=${PYTHON:-python} cxx=${CXX:-g++} library=build/sanitize/lib
SPARSEKERN_SANITIZE=1 SPARSEKERN_CUDA=0 "$python" setup.py -q build --build-base build/sanitize --build-lib "$library"
preload=
for runtime in libasan.so libubsan.so libstdc++.so; do # the sanitizers must come before what Python loads by itself
  preload+=${preload:+:}$("$cxx" -print-file-name="$runtime")
done
export LD_PRELOAD=$preload PYTHONPATH=$library
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 # Python and torch leak at exit, on purpose
"$python" -P -c "import sparsekern._C as m; assert m.__file__.startswith('$PWD/$library'), m.__file__"
exec "$python" -P -m pytest -q -p no:cacheprovider --capture=sys "$@" # so that reports are seen
