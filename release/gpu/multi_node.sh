#!/usr/bin/env bash
# Two nodes of eight GPUs: NOT RUN YET, for want of such machines.
#
#   bash release/gpu/multi_node.sh HEAD:6379 SHARED_FOLDER [NODES] [GPUS_PER_NODE]
#
# Ray already runs on all nodes (`ray start --head --num-gpus 8` there, `ray start --address
# HEAD:6379 --num-gpus 8` on the others), each with raypar and the cupy that fits its torch, and
# SHARED_FOLDER is mounted on all. In order: doctor, probe, a run, its resume on half of the
# devices, a report. Stops at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -lt 2 ]; then
  sed -n "2,9p" "$0" >&2
  exit 2
fi
ADDRESS=$1 SHARED=$2 NODES=${3:-2} PER_NODE=${4:-8}
ALL=$((NODES * PER_NODE))
OUT=${RAYPAR_GPU_OUT:-$SHARED/raypar-multi-node-$(date -u +%Y%m%d-%H%M%S)}
[ -d "$SHARED" ] && [ -w "$SHARED" ] || { echo "multi_node.sh: $SHARED is no folder that can be written" >&2; exit 2; }
mkdir -p "$OUT"
export RAY_ADDRESS=$ADDRESS PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "== $*"; }
found=$(python3 - <<'PY'
import ray
ray.init(address="auto", log_to_driver=False)
print(int(ray.cluster_resources().get("GPU", 0)), sum(n["Alive"] for n in ray.nodes()))
PY
)
read -r gpus nodes <<< "$(tail -n 1 <<< "$found")"
if [ "$gpus" -lt "$ALL" ] || [ "$nodes" -lt "$NODES" ]; then
  echo "multi_node.sh: Ray at $ADDRESS has $gpus GPUs on $nodes nodes; $ALL on $NODES are asked for:" \
       "give the numbers that are there as third and fourth argument" >&2
  exit 1
fi

train() {  # train DEVICES STEPS: on a cluster's GPUs, from the newest checkpoint of the run
  raypar train examples/gpt.yaml --resume \
    --set run.name=multi-node --set "run.storage_path=$OUT/runs" \
    --set mesh.device=gpu --set "mesh.num_workers=$1" --set "train.steps=$2" \
    --set checkpoint.every_steps=50
}

say doctor; raypar doctor --address "$ADDRESS" 2>&1 | tee "$OUT/doctor.txt"
say probe;  raypar probe --address "$ADDRESS" 2>&1 | tee "$OUT/probe.txt"
say "train on $ALL"; train "$ALL" 100 2>&1 | tee "$OUT/train.txt"
say "resume on $((ALL / 2))"; train $((ALL / 2)) 200 2>&1 | tee "$OUT/resume.txt"
say report; raypar report "$OUT/runs/multi-node" 2>&1 | tee "$OUT/report.txt"
echo "results: $OUT"
