#!/usr/bin/env bash
# The paper's WikiText-103 result (Table 5: 44.66 M parameters, perplexity 23.10 valid, 23.73 test): fetches
# and tokenizes the set, trains configs/wikitext103_44m.json, evaluates, and prints what came out beside
# the paper. 50,000 updates of 65,536 tokens are 3.28 G tokens (docs/experiments.md has the time).
# Run again after a stop, it goes on where it was.
#
# usage: scripts/reproduce_wikitext103.sh [--from DIR] [--tokenizer DIR] [--data DIR] [--out DIR]
#                                         [--minutes M] [--config FILE] [--set KEY=VALUE ...]
#        scripts/reproduce_wikitext103.sh --train GLOB[=WEIGHT] ... --label TEXT ...
#   --from DIR       a folder with wiki.{train,valid,test}.raw (or the zip) instead of fetching
#   --tokenizer DIR  a folder with GPT-2's encoder.json and vocab.bpe instead of fetching them
#   --data DIR       where shards go and are (default: data)
#   --out DIR        run folder (default: runs/wikitext103_44m)
#   --minutes M      stop after M minutes of training with a checkpoint and exit code 75
#   --train, --label train on other shards (GPT-2 tokens, best in WikiText's conventions and with a token
#                    at each line's end: tools/wikitext_style.py, hgrn tokenize --line-end-token). The result
#                    then says "trained on TEXT, not on WikiText-103" and compares with nothing
# Environment: HGRN (default build/hgrn), PYTHON (default python3).
# Result: OUT/result.json, OUT/result.md, OUT/curve.svg.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
hgrn=${HGRN:-build/hgrn} python=${PYTHON:-python3} get=${GET_WIKITEXT103:-scripts/get_wikitext103.sh}
config=configs/wikitext103_44m.json data=data out=runs/wikitext103_44m from="" tokenizer="" minutes="" label=""
sets=() train=()
fail() { local code=$1; shift; echo "error: $*" >&2; exit "$code"; }
absolute() { case $1 in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac; }
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/reproduce_wikitext103.sh; exit 0 ;;
    --from | --tokenizer | --data | --out | --minutes | --config | --set | --train | --label)
      [ $# -ge 2 ] || fail 2 "$1 needs a value; --help shows them all" ;;&
    --from) from=$(absolute "$2") ;;
    --tokenizer) tokenizer=$(absolute "$2") ;;
    --data) data=$(absolute "$2") ;;
    --out) out=$(absolute "$2") ;;
    --config) config=$(absolute "$2") ;;
    --minutes) minutes=$2 ;;
    --set) sets+=(--set "$2") ;;
    --train) train+=("$2") ;;
    --label) label=$2 ;;
    *) fail 2 "unknown flag $1; scripts/reproduce_wikitext103.sh --help lists them" ;;
  esac
  shift 2
done
[ ${#train[@]} -eq 0 ] || [ -n "$label" ] || fail 2 "--train needs --label: the result must say what the model was trained on"
[ ${#train[@]} -gt 0 ] || [ -z "$label" ] || fail 2 "--label goes with --train"
[ -x "$hgrn" ] || fail 3 "$hgrn is not there; build it (cmake --preset release && cmake --build --preset release), or set HGRN"

# ---- data: $data/wikitext103_{train,valid,test}_*.bin
have() { compgen -G "$data/wikitext103_$1_*.bin" >/dev/null; }
if ! { have valid && have test && { have train || [ ${#train[@]} -gt 0 ]; }; }; then
  [ -x "$get" ] || fail 3 "$get is missing"
  "$get" --out "$data" ${from:+--from "$from"} ${tokenizer:+--tokenizer "$tokenizer"}
fi
have test || fail 3 "no $data/wikitext103_test_*.bin; $get makes them"
[ -n "$tokenizer" ] || [ ! -d "$data/gpt2" ] || tokenizer=$data/gpt2

source='"'$data'/wikitext103_train_*.bin"'
if [ ${#train[@]} -gt 0 ]; then  # the mixture as JSON
  source=""
  for part in "${train[@]}"; do
    path=${part%=*} weight=1
    [ "$path" = "$part" ] || weight=${part##*=}
    source+=${source:+, }'{"path": "'$(absolute "$path")'", "weight": '$weight'}'
  done
  source="[$source]"
else
  have train || fail 3 "no $data/wikitext103_train_*.bin: the training set is missing; --from names a folder that has wiki.train.raw"
fi

# ---- train; a run that is done is not trained again
code=0
${minutes:+timeout --preserve-status --signal=TERM "${minutes}m"} "$hgrn" train --config "$config" --out "$out" \
  --set "data.train=$source" --set "data.valid=$data/wikitext103_valid_*.bin" \
  ${tokenizer:+--set "data.tokenizer=$tokenizer"} "${sets[@]}" || code=$?
[ "$code" -ne 75 ] || echo "stopped; the same command goes on from here" >&2
[ "$code" -eq 0 ] || exit "$code"

# ---- evaluate: blocks of 512 with a token at each line's end as the paper does, and with carried state
texts=$from
[ -n "$texts" ] || texts=$data/download/wikitext-103-raw
for set in valid test; do
  what=(--data "$data/wikitext103_${set}_*.bin")
  [ ! -f "$texts/wiki.$set.raw" ] || [ -z "$tokenizer" ] ||
    what=(--text "$texts/wiki.$set.raw" --line-end-token --tokenizer "$tokenizer")
  for protocol in blocks carry; do
    echo "== WikiText-103 $set, $protocol"
    "$hgrn" eval --checkpoint "$out" "${what[@]}" --protocol $protocol --seq-len 512 \
      --json "$out/eval_${set}_$protocol.json"
  done
done
"$python" tools/wikitext_result.py "$out" --label "$label" | tee "$out/result.md"
