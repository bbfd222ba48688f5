#!/usr/bin/env bash
# bash bench/gpu.sh OUTDIR: everything that this project wants to know of an NVIDIA GPU, unattended, in ten minutes.
#
# This script only schedules. Stages run in the order of their importance; each has its own limit, writes its results as
# soon as it has them, ends with a line of its time and result, and may fail without stopping the next. The limits
# together are no more than the time there is; the sanitizers get what is left of it. OUTDIR gets results.json,
# results.md and results.png (the report of bench.report), <device>.json (the measured table, also in
# sparsekern/devices) and log.txt. Libraries that are not installed are reported with their reason. A second run goes on
# tuning where the first one stopped.
#
# SPARSEKERN_REHEARSE=1 rehearses it on a machine without a GPU: tiny sizes, interpreted kernels, a minute or two.
# SPARSEKERN_SECONDS=570 is the time for everything; PYTHON=python3 the interpreter.
set -u
out=$(mkdir -p "${1:?usage: bash bench/gpu.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
rehearse=${SPARSEKERN_REHEARSE:-}
deadline=$((SECONDS + ${SPARSEKERN_SECONDS:-570}))
report_seconds=20
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg
[ -n "$rehearse" ] && export TRITON_INTERPRET=1
exec > >(tee "$out/log.txt") 2>&1

patience=1 # of a rehearsal, whose interpreter is slow
[ -n "$rehearse" ] && patience=10
time_left() { echo $((deadline - report_seconds - SECONDS)); }
# stage NAME LIMIT COMMAND...: run it for at most LIMIT seconds, and never into the time that the report needs
stage() {
  local name=$1 limit=$(($2 * patience)) left began=$SECONDS result=ok
  left=$(time_left)
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "== $name: skipped, no time is left"
    return
  fi
  echo "== $*"
  timeout -k 5 "$limit" "$@" || result="failed with status $?"
  [ "$result" = "failed with status 124" ] && result="out of time"
  echo "== $name: $result, $((SECONDS - began)) of $limit s"
}
cases=full
[ -n "$rehearse" ] && cases=smoke
# bench NAME LIMIT ARGUMENT...: suites of bench/, which begin no case when four fifths of their time are over; loading
# the plugin of hypothesis, which none of them needs, takes seconds
bench() {
  stage "$1" "$2" "$python" -W ignore -m pytest -q -p no:cacheprovider -p no:hypothesispytest --device cuda \
    --cases $cases --results "$out/results.json" --seconds $(($2 * patience * 4 / 5)) "${@:3}"
}
# gpu_tests NAME LIMIT FILE...
gpu_tests() { stage "$1" "$2" "$python" -m pytest -q -m gpu -p no:cacheprovider "${@:3}"; }
# sanitize TOOL SHARE TEST...: GPU tests in 1 / SHARE of the time that is left, each allocation by itself, so that one
# past its end is seen
sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== $1: skipped, compute-sanitizer is not installed"
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" $(($(time_left) / $2 / patience)) compute-sanitizer --tool "$1" \
    --error-exitcode 9 --target-processes all "$python" -m pytest -q -x -m gpu -p no:cacheprovider "${@:3}"
}

tuned_into=sparsekern/devices
[ -n "$rehearse" ] && tuned_into=$out
# without it, the package is pure Python
[ -z "$rehearse" ] && stage install 50 "$python" -m pip install -q --no-deps --no-build-isolation -e .
stage environment 15 "$python" -m sparsekern

# compile in four processes at once; nothing is timed meanwhile
if [ -z "$rehearse" ]; then
  warming=()
  for block in 64 128 32 16; do
    bench "warming $block" 40 bench/bench_products.py bench/bench_gradients.py --cases quick --benchmark-disable \
      -k "block$block-" &
    warming+=($!)
  done
  wait "${warming[@]}"
fi

models=tests/gpu/test_rewire_on_device.py rules=tests/gpu/test_rules_on_device.py
made=tests/gpu/test_cuda_products.py
[ -z "$rehearse" ] && gpu_tests "tests of products" 50 tests/gpu/test_gpu.py tests/library/test_cost.py
[ -z "$rehearse" ] && gpu_tests "tests of rewiring" 35 "$models" "$rules"
[ -z "$rehearse" ] && gpu_tests "tests of CUDA products" 30 "$made"
stage tune 70 "$python" -W ignore -m bench.tune --seconds 55 --folder "$tuned_into"
[ -z "$rehearse" ] && cp sparsekern/devices/nvidia*.json "$out"
bench limits 20 bench/bench_limits.py bench/bench_captured.py
bench gradients 40 bench/bench_gradients.py
bench products 40 bench/bench_products.py
bench rivals 60 bench/bench_rivals.py
bench training 40 bench/bench_layer.py bench/bench_memory.py bench/bench_rewire.py bench/bench_overhead.py
[ -z "$rehearse" ] && bench "RL update" 20 bench/bench_sac.py # its layers of block 1 have no kernels to rehearse
bench GEMM 10 bench/bench_gemm.py
# twenty random models each and whole rules: all 480 models would take minutes here
few=("$models::test_random_models_are_rewired_on_a_gpu_as_by_torch[0]"
  "$models::test_the_weakest_of_random_models_are_marked_dead_on_a_gpu_as_by_torch[0]"
  "$made::test_random_layers_match_float64_on_a_gpu[0]" "$rules")
sanitize memcheck 2 "${few[@]}" tests/gpu/test_gpu.py -k "by_torch or float64 or products or norms"
sanitize racecheck 1 "${few[@]}"
report_seconds=0
stage report 20 "$python" -m bench.report "$out/results.json"
ls -l "$out"
echo "== $SECONDS s in all"
