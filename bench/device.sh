#!/bin/sh
# Usage: bench/device.sh OUT          on a GPU machine without a package index
#        bench/device.sh --wheels     before, here: wheels of what its image lacks, into out/wheels
# Under eight minutes, what is worth most first. A step that fails or takes too long stops no other;
# the exit code and the summary say which did. Leaves at most 12 files in OUT.
cd "$(dirname "$0")/.." || exit 2
wheels=out/wheels
needs="pydantic cyclopts jaxtyping rich jinja2"
if [ "${1:-}" = --wheels ]; then
  # Which Python the machine has need not be known.
  for version in ${WHEELS_PYTHON:-3.10 3.11 3.12 3.13}; do
    # shellcheck disable=SC2086
    "${PYTHON:-python3}" -m pip download --quiet --dest "$wheels" --only-binary=:all: \
      --python-version "$version" --platform manylinux_2_28_x86_64 \
      --platform manylinux2014_x86_64 --platform any $needs || exit 1
  done
  exit 0
fi
out=${1:?usage: bench/device.sh OUT | --wheels}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3}
site=$(mktemp -d) && trap 'rm -rf "$site"' EXIT
export PYTHONPATH=.:kernels:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 BENCH_RESULTS=$out/results
began=$(date +%s)
failed=
step() { # NAME SECONDS COMMAND …
  name=$1 limit=$2
  shift 2
  echo "== $name, after $(($(date +%s) - began)) s"
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ "$code" = 0 ] || { failed="$failed $name($code)"; echo "$name: failed ($code)"; }
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
}
bench() { step "bench-$1" "$2" "$python" -m bench --tested --uncompiled "$1"; }

# shellcheck disable=SC2086
[ -d "$wheels" ] && step wheels 40 "$python" -m pip install --quiet --no-index \
  --find-links "$wheels" --target "$site" $needs
# pytest-timeout and pytest-xdist may be missing there; neither is needed.
tests="$python -m pytest -q -o addopts=--import-mode=importlib -o timeout= \
  -W ignore::pytest.PytestConfigWarning"
"$python" -c 'import xdist' 2>/dev/null && parallel="-n 12" || parallel=
{ nvidia-smi; "$python" -m pip list; } >"$out/machine.log" 2>&1

step peaks 30 "$python" -m bench.harness.peaks "$out/peaks.json"
# Sparse tensor cores first: that the metadata is what silicon takes is known from the manual only.
# shellcheck disable=SC2086
step test-mma 45 $tests tests/kernels/test_sparse24_mma.py -k "on_a_gpu and 4096"
bench sparse24_mma 55
bench obs_sweep 50
bench score_and_mask 40
bench attention_entropy 35
for op in salience gram project; do bench $op 25; done
step block 75 "$python" -m bench.harness.device_block "$out/block.json" sparsegpt admm
left=$((450 - $(date +%s) + began))
# shellcheck disable=SC2086
[ "$left" -gt 20 ] && step test-kernels "$left" $tests $parallel tests/kernels

"$python" - "$out" <<'PYTHON'
import json, pathlib, shutil, sys
out = pathlib.Path(sys.argv[1])
for folder in (out / "results").glob("*/"):
    results = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("kernels.md", "roofline.png"):
        if (folder / name).is_file():
            shutil.copy(folder / name, out)
shutil.rmtree(out / "results", ignore_errors=True)
logs = sorted(out.glob("bench-*.log"))
(out / "bench.log").write_text("".join(f"== {log.stem}\n{log.read_text()}" for log in logs))
for log in logs:
    log.unlink()
PYTHON
echo "done after $(($(date +%s) - began)) s; failed:${failed:- nothing}"
[ -z "$failed" ]
