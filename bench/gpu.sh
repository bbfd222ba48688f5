#!/usr/bin/env bash
# bash bench/gpu.sh OUTDIR: everything that this project wants to know of an NVIDIA GPU, unattended, in ten minutes.
#
# This script only schedules. Stages run in the order of their importance; each has its own limit, writes its results as
# soon as it has them, and may fail without stopping the next. OUTDIR gets results.json, results.md and results.png (the
# report of bench.report), <device>.json (the measured table, also in sparsekern/devices) and log.txt. Libraries that are
# not installed are reported with their reason. A second run goes on tuning where the first one stopped.
#
# SPARSEKERN_REHEARSE=1 rehearses it on a machine without a GPU: tiny sizes, interpreted kernels, a minute or two.
# SPARSEKERN_SECONDS=570 is the time for everything; PYTHON=python3 the interpreter.
set -u
out=$(mkdir -p "${1:?usage: bash bench/gpu.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
rehearse=${SPARSEKERN_REHEARSE:-}
deadline=$((SECONDS + ${SPARSEKERN_SECONDS:-570}))
report_seconds=25
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg
[ -n "$rehearse" ] && export TRITON_INTERPRET=1
exec > >(tee "$out/log.txt") 2>&1

patience=1 # of a rehearsal, whose interpreter is slow
[ -n "$rehearse" ] && patience=5
# stage LIMIT COMMAND...: run it for at most LIMIT seconds, and never into the time that the report needs
stage() {
  local limit=$(($1 * patience)) left=$((deadline - report_seconds - SECONDS)) began=$SECONDS
  shift
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "== skipped, no time is left: $*"
    return
  fi
  echo "== $*"
  timeout -k 5 "$limit" "$@" || echo "== failed with status $? (124: its $limit s were over)"
  echo "== took $((SECONDS - began)) s"
}
cases=full
[ -n "$rehearse" ] && cases=smoke
# bench LIMIT ARGUMENT...: suites of bench/, which begin no case when four fifths of their time are over; loading the
# plugin of hypothesis, which none of them needs, takes seconds
bench() {
  stage "$1" "$python" -W ignore -m pytest -q -p no:cacheprovider -p no:hypothesispytest --device cuda --cases $cases \
    --results "$out/results.json" --seconds $(($1 * patience * 4 / 5)) "${@:2}"
}
sanitize() { # sanitize LIMIT TOOL TEST...: GPU tests, each allocation by itself, so that one past its end is seen
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== compute-sanitizer is not installed: no $2"
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" compute-sanitizer --tool "$2" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -m gpu -p no:cacheprovider "${@:3}"
}

tuned_into=sparsekern/devices
[ -n "$rehearse" ] && tuned_into=$out
[ -z "$rehearse" ] && stage 40 "$python" -m pip install -q --no-deps --no-build-isolation -e . # else it is pure Python
stage 30 "$python" -m sparsekern

# compile in four processes at once; nothing is timed meanwhile
if [ -z "$rehearse" ]; then
  warming=()
  for block in 64 128 32 16; do
    bench 45 bench/bench_products.py bench/bench_gradients.py --cases quick --benchmark-disable -k "block$block-" &
    warming+=($!)
  done
  wait "${warming[@]}"
fi

[ -z "$rehearse" ] && stage 60 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu/test_gpu.py tests/library/test_cost.py
[ -z "$rehearse" ] && stage 40 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu/test_rewire_on_device.py tests/gpu/test_rules_on_device.py
[ -z "$rehearse" ] && stage 40 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu/test_cuda_products.py
bench 25 bench/bench_limits.py bench/bench_captured.py
stage 80 "$python" -W ignore -m bench.tune --seconds 65 --folder "$tuned_into"
[ -z "$rehearse" ] && cp sparsekern/devices/nvidia*.json "$out"
bench 45 bench/bench_gradients.py
bench 60 bench/bench_products.py
bench 100 bench/bench_rivals.py
bench 40 bench/bench_layer.py bench/bench_memory.py bench/bench_rewire.py bench/bench_overhead.py
[ -z "$rehearse" ] && bench 20 bench/bench_sac.py # its layers of block 1 have no kernels to rehearse
bench 15 bench/bench_gemm.py
# twenty random models and whole rules: all 240 models would take minutes here
rewiring=("tests/gpu/test_rewire_on_device.py::test_random_models_are_rewired_on_a_gpu_as_by_torch[0]" tests/gpu/test_rules_on_device.py)
for tool in memcheck racecheck; do
  sanitize 40 $tool "${rewiring[@]}"
  sanitize 40 $tool "tests/gpu/test_cuda_products.py::test_random_layers_match_float64_on_a_gpu[0]"
  sanitize 40 $tool tests/gpu/test_gpu.py -k "products or norms"
done
report_seconds=0
stage 25 "$python" -m bench.report "$out/results.json"
ls -l "$out"
echo "== $SECONDS s in all"
