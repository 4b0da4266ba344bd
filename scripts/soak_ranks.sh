#!/usr/bin/env bash
# Kills ranks at random while a run of several CPU ranks goes on, again and again, and then compares:
# the model at the end must be, bit for bit, that of the run which nobody disturbed.
# usage: scripts/soak_ranks.sh [KILLS] [RANKS] [SEED]      (default: 200 kills, 2 ranks, seed 1)
# Wants build/hgrn with Gloo. The data are this repository's documents.
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-200} ranks=${2:-2} seed=${3:-1}
hgrn=$PWD/build/hgrn
[ -x "$hgrn" ] || { echo "soak_ranks: build/hgrn is missing; run scripts/test.sh first" >&2; exit 1; }
dir=$(mktemp -d "${TMPDIR:-/tmp}/hgrn-soak-XXXXXX")
trap 'rm -rf "$dir"' EXIT
RANDOM=$seed
export OMP_NUM_THREADS=1 HGRN_BUCKET_ELEMENTS=1500 HGRN_JOIN_TIMEOUT=60

cat docs/*.md README.md >"$dir/text"
"$hgrn" tokenize --tokenizer byte --out "$dir/train" "$dir/text" 2>/dev/null >/dev/null
# Long enough for all kills: a kill comes every half second or so, a step takes some milliseconds.
steps=$((kills * 12 + 40))
cat >"$dir/config.json" <<JSON
{"model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
           "intermediate_size": 24, "dropout": 0.1},
 "data": {"train": "$dir/train_*.bin", "seq_len": 16},
 "optim": {"lr": 1e-2, "warmup_steps": 5},
 "train": {"steps": $steps, "global_batch": 12, "micro_batch": 1, "precision": "fp32",
           "log_every": 0, "eval_every": 0, "checkpoint_every": 3, "keep_checkpoints": 2}}
JSON
run() { # OUT LOG MAX_RESTARTS
  "$hgrn" launch --nproc-per-node "$ranks" --max-restarts "$3" -- \
    train --config "$dir/config.json" --out "$dir/$1" --device cpu >"$dir/$2" 2>&1
}
rank_of() { # PID: its rank, where it is one of this run's ranks
  tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | sed -n 's/^RANK=//p'
}

run whole whole.log 0 || { cat "$dir/whole.log" >&2; exit 1; }
run broken broken.log 1000000 &
launcher=$!
trap 'kill -9 $launcher 2>/dev/null || true; rm -rf "$dir"' EXIT
done_kills=0
while [ "$done_kills" -lt "$kills" ] && kill -0 "$launcher" 2>/dev/null; do
  sleep "0.$((RANDOM % 6))$((RANDOM % 10))"
  mapfile -t pids < <(pgrep -P "$launcher" -f "train --config $dir/config.json" || true)
  # The launcher runs in a subshell of ours: look one level deeper.
  for p in $(pgrep -P "$launcher" || true); do
    mapfile -t -O "${#pids[@]}" pids < <(pgrep -P "$p" || true)
  done
  victims=()
  for p in "${pids[@]}"; do [ -n "$(rank_of "$p")" ] && victims+=("$p"); done
  [ "${#victims[@]}" -eq 0 ] && continue
  kill -9 "${victims[$((RANDOM % ${#victims[@]}))]}" 2>/dev/null && done_kills=$((done_kills + 1))
done
code=0
wait "$launcher" || code=$?
if [ "$code" -ne 0 ]; then
  tail -20 "$dir/broken.log" >&2
  echo "soak_ranks: the disturbed run ended with code $code" >&2
  exit 1
fi
last=$(printf 'checkpoints/step-%08d' "$steps")
for file in model.safetensors $(cd "$dir/whole/$last" && ls optimizer-*); do
  cmp "$dir/whole/$last/$file" "$dir/broken/$last/$file"
done
restarts=$(grep -c 'launch: restart' "$dir/broken.log" || true)
echo "soak_ranks: $done_kills kills of $ranks ranks, $restarts restarts, $steps steps: the same model bit for bit"
[ "$done_kills" -eq "$kills" ] || { echo "soak_ranks: the run ended before $kills kills" >&2; exit 1; }
