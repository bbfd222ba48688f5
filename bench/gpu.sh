#!/usr/bin/env bash
# bash bench/gpu.sh OUTDIR: everything that this project wants to know of an NVIDIA GPU, unattended, in ten minutes.
#
# Stages run in the order of their importance; each has its own limit, writes its results as soon as it has them, and
# may fail without stopping the next. OUTDIR gets results.json, results.md, speedup.png, <device>.json (the measured
# table, also in sparsekern/devices) and log.txt. Baselines that are not installed are reported with their reason.
#
# SPARSEKERN_REHEARSE=1 rehearses it on a machine without a GPU: tiny sizes, interpreted kernels, less than a minute.
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

# stage LIMIT COMMAND...: run it for at most LIMIT seconds, and never into the time that the report needs
stage() {
  local limit=$1 left=$((deadline - report_seconds - SECONDS)) began=$SECONDS
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
bench() { # bench LIMIT STAGE...: it stops by itself before it would be stopped
  stage "$1" "$python" -W ignore -m bench.gpu "${@:2}" --out "$out" --seconds $(($1 * 4 / 5))
}

if [ -n "$rehearse" ]; then
  blocks=16 first="stk" then="" last="" tuned_into=$out
else
  blocks="64 128 32 16" first="torch_bsr stk" then="torch_csr semi_structured torchao blksprs cupy_csr"
  last=torch_bsr_tuned tuned_into=sparsekern/devices
  stage 60 "$python" -m pip install -q --no-deps --no-build-isolation -e . # where this fails, it is pure Python
fi
stage 30 "$python" -m sparsekern

# compile in four processes at once; nothing is timed meanwhile
warming=()
for block in $blocks; do
  bench 45 warm --block "$block" &
  warming+=($!)
done
wait "${warming[@]}"

bench 30 limits
for block in $blocks; do bench 40 main --block "$block"; done
for name in $first; do bench 25 baselines --only $name; done
bench 30 training
stage 110 "$python" -W ignore -m bench.tune --seconds 90 --folder "$tuned_into"
[ -n "$rehearse" ] || cp sparsekern/devices/nvidia*.json "$out"
stage 80 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py
[ -n "$rehearse" ] || bench 30 main --block 64 # again, with the tuned tiles and the measured break-evens
for name in $then; do bench 20 baselines --only $name; done
bench 30 float32
bench 30 sizes
for name in $last; do bench 40 baselines --only $name; done
report_seconds=0
stage 25 "$python" -m bench.gpu report --out "$out"
ls -l "$out"
echo "== $SECONDS s in all"
