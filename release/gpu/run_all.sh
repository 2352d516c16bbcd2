#!/usr/bin/env bash
# Everything that is measured on one GPU, in parts of less than ten minutes each.
#
#   bash release/gpu/run_all.sh [PART...]         all parts, or those named; run_all.sh --list tells them
#   bash release/gpu/run_all.sh --smoke [PART...] the same on the CPU with tiny sizes, to try the scripts
#
# The machine needs torch for CUDA 12 or 13 with the cupy that fits, and nothing from any registry:
# what else raypar imports comes from a folder of bundles (RAYPAR_GPU_BUNDLES), which may hold
#   *.whl               wheels of pure or matching Python packages: unpacked, first on PYTHONPATH
#   *.tar.xz            the same as archives, for example of Ray
#   libnccl.so.2.xz     NCCL 2.30 or newer, which lets several ranks share the GPU: first to be loaded
# release/gpu/README.md says how such bundles are made. Environment:
#   RAYPAR_GPU_BUNDLES  that folder; default: none
#   RAYPAR_GPU_OUT      where results go; default: release/results/<date>-<GPU>
#   PYTHON              default: python3
# Each part writes one JSON file; at the end README.md in that folder is their table. A part that
# fails does not end the others; the exit code is 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
DEVICE=cuda SMOKE=() LIMIT=600
ALL=(names env conformance abort equivalence graphs device overhead fidelity
     gpt-1024 gpt-2048 llama-1024 llama-2048 ray)
PARTS=()
for word in "$@"; do
  case $word in
    --list) printf '%s\n' "${ALL[@]}"; exit 0 ;;
    --smoke) DEVICE=cpu SMOKE=(--smoke) ;;
    *) case " ${ALL[*]} " in
         *" $word "*) PARTS+=("$word") ;;
         *) echo "run_all.sh: no part '$word'; there are: ${ALL[*]}" >&2; exit 2 ;;
       esac ;;
  esac
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=("${ALL[@]}")

# A relative folder is of this checkout. What is unpacked stays for the next call.
unpack() {
  local from=$1 to=${TMPDIR:-/tmp}/raypar-gpu-bundles file
  mkdir -p "$to/site" "$to/nccl"
  for file in "$from"/*.whl; do
    [ -e "$file" ] && { [ -e "$to/$(basename "$file").done" ] || { "$PYTHON" -m zipfile -e "$file" "$to/site" &&
      touch "$to/$(basename "$file").done"; } || return 1; }
  done
  for file in "$from"/*.tar.xz; do
    [ -e "$file" ] && { [ -e "$to/$(basename "$file").done" ] || { tar -xJf "$file" -C "$to/site" &&
      touch "$to/$(basename "$file").done"; } || return 1; }
  done
  # Ray's servers are programs, and a zip archive does not keep that they may be run.
  find "$to/site/ray" -type f \( -name raylet -o -name gcs_server -o -name 'redis-*' \) -exec chmod +x {} + 2>/dev/null
  if [ -e "$from/libnccl.so.2.xz" ]; then
    [ -e "$to/nccl/libnccl.so.2" ] || xz -dc "$from/libnccl.so.2.xz" > "$to/nccl/libnccl.so.2" || return 1
    export LD_LIBRARY_PATH="$to/nccl${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    # torch and cupy bring an NCCL of their own, which their wheels would find first.
    [ "$DEVICE" = cpu ] || export LD_PRELOAD="$to/nccl/libnccl.so.2${LD_PRELOAD:+:$LD_PRELOAD}"
  fi
  export PYTHONPATH="$to/site${PYTHONPATH:+:$PYTHONPATH}"
}
if [ -n "${RAYPAR_GPU_BUNDLES:-}" ]; then
  [ -d "$RAYPAR_GPU_BUNDLES" ] || { echo "run_all.sh: RAYPAR_GPU_BUNDLES=$RAYPAR_GPU_BUNDLES is no folder" >&2; exit 2; }
  unpack "$RAYPAR_GPU_BUNDLES" || { echo "run_all.sh: a bundle of $RAYPAR_GPU_BUNDLES cannot be unpacked" >&2; exit 2; }
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=${NCCL_MAX_CTAS:-2}
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
# What was measured elsewhere on this machine is not looked at.
export RAYPAR_CACHE_DIR=${RAYPAR_CACHE_DIR:-$(mktemp -d)}

slug() {
  if [ "$DEVICE" = cpu ]; then echo smoke; return; fi
  "$PYTHON" - <<'PY' || echo gpu
import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-"))
PY
}
if [ -z "${RAYPAR_GPU_OUT:-}" ]; then
  if [ "$DEVICE" = cpu ]; then RAYPAR_GPU_OUT=$(mktemp -d); else RAYPAR_GPU_OUT=release/results/$(date -u +%F)-$(slug); fi
fi
OUT=$RAYPAR_GPU_OUT
mkdir -p "$OUT"

run() {  # run SCRIPT ARGUMENTS...: one script under the part's limit
  timeout -k 10 "$LIMIT" "$PYTHON" "release/gpu/$1.py" --device "$DEVICE" "${SMOKE[@]}" --out "$OUT" "${@:2}"
}
speed() {  # speed SHAPE: several ranks never share the GPU here, so NCCL is not held back
  if [ "$DEVICE" = cpu ]; then run speed; else ( unset NCCL_MAX_CTAS; run speed --shape "$1" ); fi
}
part() {
  case $1 in
    names | env | conformance | abort | device | overhead) run "$1" ;;
    equivalence) run check --plans 0,2,5,7 ;;
    graphs) if [ "$DEVICE" = cpu ]; then run check --engine compiled
            else run check --engine cuda_graph --plans 0,2,5 --models gpt,cnn; fi ;;
    fidelity) if [ -e "$OUT/calibration.json" ]; then run fidelity --calibration "$OUT/calibration.json"
              else run fidelity; fi ;;
    gpt-1024) speed gpt2-350m-1024 ;;
    gpt-2048) speed gpt2-350m-2048 ;;
    llama-1024) speed llama-1.3b-1024 ;;
    llama-2048) speed llama-1.3b-2048 ;;
    ray) run ray_train ;;
  esac
}

failed=()
for name in "${PARTS[@]}"; do
  echo "== $name"
  began=$SECONDS
  part "$name" 2>&1 | tee "$OUT/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed+=("$name (exit code $code)")
  echo "== $name: $((SECONDS - began)) s"
done
"$PYTHON" release/gpu/table.py "$OUT"
echo "results: $OUT"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
