#!/usr/bin/env bash
# Perplexity by position far beyond the length of a training sequence: cuts texts of a shard, evaluates
# each by itself with a carried state, and draws the mean by position (docs/experiments.md).
#
# usage: scripts/long_context.sh --checkpoint DIR --data LABEL=SHARD ... [--length N] [--pieces N] [--across LABEL]
#                                [--out DIR] [--trained-at T] [--device D]
#   --data LABEL=SHARD  a shard with an end-of-text token before each document; repeatable
#   --length N          tokens a piece (default 65536)
#   --pieces N          at most so many of a shard (default 12)
#   --across LABEL      pieces of that shard run across its documents, which are too short alone
# Environment: HGRN (default build/hgrn), PYTHON (default python3), EOS (default 50256).
# Result: OUT/{position.svg,position.json,position.md}; default OUT: runs/long_context
set -euo pipefail
cd "$(dirname "$0")/.."
hgrn=${HGRN:-build/hgrn} python=${PYTHON:-python3} eos=${EOS:-50256}
checkpoint="" length=65536 most=12 out=runs/long_context trained=2048 device=auto
data=() across=" "
fail() { local code=$1; shift; echo "error: $*" >&2; exit "$code"; }
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/long_context.sh; exit 0 ;;
    --checkpoint | --data | --length | --pieces | --across | --out | --trained-at | --device)
      [ $# -ge 2 ] || fail 2 "$1 needs a value; --help shows them all" ;;&
    --checkpoint) checkpoint=$2 ;;
    --data) data+=("$2") ;;
    --length) length=$2 ;;
    --pieces) most=$2 ;;
    --across) across+="$2 " ;;
    --out) out=$2 ;;
    --trained-at) trained=$2 ;;
    --device) device=$2 ;;
    *) fail 2 "unknown flag $1; scripts/long_context.sh --help lists them" ;;
  esac
  shift 2
done
[ -x "$hgrn" ] || fail 3 "$hgrn is not there; build it, or set HGRN"
[ -n "$checkpoint" ] && [ ${#data[@]} -gt 0 ] || fail 2 "--checkpoint and --data are needed"

# A run folder's newest checkpoint is checked byte by byte at each opening; once is enough here.
newest=$(ls -d "$checkpoint"/checkpoints/step-* 2>/dev/null | LC_ALL=C sort | tail -1 || true)
[ -z "$newest" ] || checkpoint=$newest
groups=()
for part in "${data[@]}"; do
  label=${part%%=*} shard=${part#*=} flags=()
  case $across in *" $label "*) flags=(--across) ;; esac
  mkdir -p "$out/$label"
  rm -f "$out/$label"/*.bin "$out/$label"/*.jsonl
  "$python" tools/position_ppl.py cut "$shard" --out "$out/$label/piece" --length "$length" --most "$most" \
    --eos "$eos" "${flags[@]}"
  for piece in "$out/$label"/piece_*.bin; do
    "$hgrn" eval --checkpoint "$checkpoint" --data "$piece" --protocol carry --device "$device" \
      --per-token "${piece%.bin}.jsonl" >/dev/null
  done
  groups+=("$label=$out/$label/piece_*.jsonl")
done
"$python" tools/position_ppl.py "${groups[@]}" --trained-at "$trained" --svg "$out/position.svg" \
  --json "$out/position.json" --note "$(basename "$(dirname "$(dirname "$checkpoint")")"), $(date -u +%F)" |
  tee "$out/position.md"
