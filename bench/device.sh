#!/bin/sh
# Usage: bench/device.sh OUT
# On a GPU machine without a package index: test the kernels compiled, measure them, and leave at
# most 8 files in OUT. Meant to end within ten minutes; a failing step does not hide the next.
out=${1:?usage: bench/device.sh OUT}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
status=0
step() {
  name=$1 limit=$2
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ "$code" = 0 ] || { status=1; echo "$name: failed ($code)"; }
  tail -n 15 "$out/$name.log"
  return "$code"
}
rm -rf bench/results/*nvidia*
# pytest-timeout and pytest-xdist may be missing there; neither is needed.
plain="-o addopts=--import-mode=importlib -o timeout= -W ignore::pytest.PytestConfigWarning"
# shellcheck disable=SC2086
if step test-kernels 240 "$python" -m pytest -q $plain tests/kernels; then tested=--tested; else tested=; fi
nvidia-smi >>"$out/test-kernels.log" 2>&1
# What matters most comes first, in case time runs out.
step bench 280 "$python" -m bench $tested attention_entropy score_and_mask gram column_energy \
  salience project obs_sweep selection packed_mask probability_entropy
machine=$(ls -td bench/results/*nvidia*/ 2>/dev/null | head -n 1)
if [ -n "$machine" ]; then
  cp "$machine/roofline.png" "$out/"
  "$python" - "$machine" "$out/results.json" <<'PYTHON'
import json, pathlib, sys
folder, target = map(pathlib.Path, sys.argv[1:])
results = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
target.write_text(json.dumps(results, indent=1) + "\n")
PYTHON
fi
exit $status
