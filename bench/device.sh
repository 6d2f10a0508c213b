#!/bin/sh
# Usage: bench/device.sh OUT
# On a GPU machine without a package index: test the kernels compiled, measure them, and leave logs
# and results in OUT. Meant to end within ten minutes; a failing step does not hide the next.
out=${1:?usage: bench/device.sh OUT}
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0
step() {
  name=$1
  shift
  timeout 180 "$@" >"$out/$name.log" 2>&1 || { status=1; echo "$name: failed"; }
  tail -n 15 "$out/$name.log"
}
nvidia-smi >"$out/nvidia-smi.log" 2>&1
step test-kernels python -m pytest -q tests/kernels
step test-gpu python -m pytest -q -m gpu tests --ignore tests/kernels
step bench python -m bench column_energy gram obs_sweep
machine=$(ls -t bench/results | head -n 1)
[ -n "$machine" ] && cp "bench/results/$machine"/*.json "$out/"
exit $status
