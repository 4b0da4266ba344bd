#!/usr/bin/env bash
# One loss curve against flash-linear-attention's: trains configs/curve_150m.json here and in fla,
# from the same initial weights on the same batches on the same card, and lays the curves over each
# other (docs/experiments.md).
#
# usage: scripts/compare_with_fla.sh [--config FILE] [--out DIR] [--steps N] [--fla-seconds S]
#                                    [--model fla|reference] [--set KEY=VALUE ...]
#   --out DIR        default runs/compare: DIR/hgrn and DIR/fla are run folders; what is small lies in
#                    DIR/result (metrics, SVGs, JSON)
#   --steps N        both stop after step N; the schedule spans the config's steps
#   --fla-seconds S  the peer stops after so long; the steps that both made are compared
#   --model          reference: the definition in fp64 on the CPU in fla's place (for a small config)
# Environment: HGRN (default build/hgrn), PYTHON (default python3, with torch, transformers and
# safetensors), PYTHONPATH with the folder that holds fla.
set -euo pipefail
cd "$(dirname "$0")/.."
hgrn=${HGRN:-build/hgrn} python=${PYTHON:-python3}
config=configs/curve_150m.json out=runs/compare model=fla
sets=() steps=() limit=()
usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"; }
while [ $# -gt 0 ]; do
  case $1 in
    --help|-h) usage; exit 0 ;;
    --config|--out|--model|--steps|--fla-seconds|--set)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --config) config=$2 ;;
    --out) out=$2 ;;
    --model) model=$2 ;;
    --steps) steps=(--steps "$2") ;;
    --fla-seconds) limit=(--seconds "$2") ;;
    --set) sets+=(--set "$2") ;;
    *) echo "error: unknown flag $1; scripts/compare_with_fla.sh --help lists them" >&2; exit 2 ;;
  esac
  shift 2
done
[ -x "$hgrn" ] || { echo "error: $hgrn is not there; build it, or set HGRN" >&2; exit 3; }
[ ! -e "$out" ] || { echo "error: $out is there already; remove it or give another --out" >&2; exit 2; }
mkdir -p "$out/result"

train=("$hgrn" train --config "$config" --out "$out/hgrn" "${sets[@]}" --set train.log_every=1)
"${train[@]}" --steps 0          # the checkpoint of step 0: where both begin
"${train[@]}" "${steps[@]}"
# The peer's part of a failure must not take ours with it: what there is is kept.
cp "$out/hgrn/metrics.jsonl" "$out/result/hgrn.jsonl"
"$python" tools/peers/fla_train.py --run "$out/hgrn" --out "$out/fla" --model "$model" \
  "${steps[@]}" "${limit[@]}" | tee "$out/result/$model.txt"
cp "$out/fla/metrics.jsonl" "$out/result/$model.jsonl"

"$python" tools/compare_curves.py "$out/hgrn" "$out/fla" --names hgrn "$model" --most 0.5 \
  --svg "$out/result/curve.svg" --json "$out/result/curve.json" \
  --note "$(basename "$config"), $(date -u +%F)" | tee "$out/result/curve.md"
echo "kept: $out/result"
