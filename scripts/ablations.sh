#!/usr/bin/env bash
# The paper's ablations on the 44M model with a small token budget: expand ratio 1 to 128 (Figure 2: the
# perplexity falls as the state grows), with and without lower bounds of the forget gates, and the language
# models' parameterisation in the WikiText model's sizes. Every run sees the same batches with the same
# schedule. Prints a table (perplexity on data.valid) and draws it.
#
# usage: scripts/ablations.sh --train GLOB --valid GLOB [--config FILE] [--out DIR] [--tokens N] [--minutes M]
#                             [--only NAME,NAME,...] [--set KEY=VALUE ...]
#   --tokens N    of each run (default 12e6)
#   --minutes M   after the first run starts none that would, as long as the longest so far, end later (default:
#                 no limit); the table says what is missing, a second call makes it: what is done stays
#   --only        some of: n1 n2 n4 n8 n16 n32 n64 n128 no_lower_bound llm
#   --config      default configs/wikitext103_44m.json
# Environment: HGRN (default build/hgrn), PYTHON (default python3).
# Result: OUT/result/{table.md,results.json,expand_ratio.svg,curves.svg}; default OUT: runs/ablations
set -euo pipefail
cd "$(dirname "$0")/.."
hgrn=${HGRN:-build/hgrn} python=${PYTHON:-python3}
config=configs/wikitext103_44m.json out=runs/ablations tokens=12e6 minutes="" train="" valid=""
# The ends of the curve first, so that a call cut short still shows its shape.
names=n128,n1,n16,n4,no_lower_bound,llm,n64,n8,n32,n2
sets=()
fail() { local code=$1; shift; echo "error: $*" >&2; exit "$code"; }
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/ablations.sh; exit 0 ;;
    --train | --valid | --config | --out | --tokens | --minutes | --only | --set)
      [ $# -ge 2 ] || fail 2 "$1 needs a value; --help shows them all" ;;&
    --train) train=$2 ;;
    --valid) valid=$2 ;;
    --config) config=$2 ;;
    --out) out=$2 ;;
    --tokens) tokens=$2 ;;
    --minutes) minutes=$2 ;;
    --only) names=$2 ;;
    --set) sets+=(--set "$2") ;;
    *) fail 2 "unknown flag $1; scripts/ablations.sh --help lists them" ;;
  esac
  shift 2
done
[ -x "$hgrn" ] || fail 3 "$hgrn is not there; build it, or set HGRN"
[ -n "$train" ] && [ -n "$valid" ] || fail 2 "--train and --valid name the shards"

# Keys by which a run differs from the config.
keys() {
  case $1 in
    n1 | n2 | n4 | n8 | n16 | n32 | n64 | n128) echo "model.expand_ratio=${1#n}" ;;
    no_lower_bound) echo "model.use_lower_bound=false" ;;
    # notation.md's first column; width, dropout and optimizer stay
    llm) echo "model.norm=rmsnorm model.norm_eps=1e-6 model.bias=false model.output_activation=silu" \
      "model.input_activation=none model.hidden_act=silu model.query_scale=rsqrt" \
      "model.scale_embedding=false model.initializer=normal" ;;
    *) fail 2 "--only: $1 is none of n1 n2 n4 n8 n16 n32 n64 n128 no_lower_bound llm" ;;
  esac
}
# One schedule for all: a tenth of the steps warm up, then a cosine to a tenth. A step of 32 sequences gives
# a small budget more updates than the config's 128.
schedule=$("$python" - "$config" "$tokens" "${sets[@]}" <<'P'
import json, sys
sys.path.insert(0, "tools")
from ablation_table import read_config
config, tokens, sets = read_config(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
given = dict(s.split("=", 1) for s in sets if s != "--set")
batch = int(given.get("train.global_batch", 32))
length = int(given.get("data.seq_len", config["data"].get("seq_len", 2048)))
steps = max(10, round(tokens / (batch * length)))
print(f"train.global_batch={batch} train.micro_batch={given.get('train.micro_batch', batch)} train.steps={steps} "
      f"optim.warmup_steps={steps // 10} optim.schedule=cosine optim.min_lr_ratio=0.1 "
      f"optim.lr={given.get('optim.lr', 1e-3)} train.eval_every={steps} train.log_every={max(1, steps // 200)}")
P
)

mkdir -p "$out/result"
IFS=, read -ra list <<<"$names"
for name in "${list[@]}"; do keys "$name" >/dev/null; done
began=$SECONDS longest=0 ran=0 skipped=()
for name in "${list[@]}"; do
  [ ! -f "$out/$name/done" ] || continue
  if [ -n "$minutes" ] && [ $ran -gt 0 ] &&
    awk "BEGIN { exit !($SECONDS - $began + $longest >= 60 * $minutes) }"; then
    skipped+=("$name")
    continue
  fi
  args=()
  for key in $schedule $(keys "$name"); do args+=(--set "$key"); done
  started=$SECONDS
  "$hgrn" train --config "$config" --out "$out/$name" --set "data.train=$train" --set "data.valid=$valid" \
    --set train.checkpoint_every=0 --set train.eval_tokens=1048576 "${args[@]}" "${sets[@]}"
  touch "$out/$name/done"
  ran=$((ran + 1))
  [ $((SECONDS - started)) -le $longest ] || longest=$((SECONDS - started))
done
[ ${#skipped[@]} -eq 0 ] || echo "not run within --minutes $minutes: ${skipped[*]}; the same command goes on with them" >&2
"$python" tools/ablation_table.py "$out" | tee "$out/result/table.md"
