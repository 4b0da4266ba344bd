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
# Without an end of its own: how many steps fit between the kills depends on the machine.
cat >"$dir/config.json" <<JSON
{"model": {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8,
           "intermediate_size": 24, "dropout": 0.1},
 "data": {"train": "$dir/train_*.bin", "seq_len": 16},
 "optim": {"lr": 1e-2, "warmup_steps": 5, "schedule": "constant"},
 "train": {"steps": 1000000, "global_batch": 12, "micro_batch": 1, "precision": "fp32",
           "log_every": 0, "eval_every": 0, "checkpoint_every": 3, "keep_checkpoints": 2}}
JSON
run() { # OUT LOG MAX_RESTARTS [TRAIN FLAG ...]
  exec "$hgrn" launch --nproc-per-node "$ranks" --max-restarts "$3" -- \
    train --config "$dir/config.json" --out "$dir/$1" --device cpu "${@:4}" >"$dir/$2" 2>&1
}
fail() { # LOG WORDS
  tail -20 "$dir/$1" >&2
  echo "soak_ranks: $2" >&2
  exit 1
}
rank_of() { # PID: its rank, where it is one of this run's ranks
  { tr '\0' '\n' <"/proc/$1/environ" | sed -n 's/^RANK=//p'; } 2>/dev/null # it may have ended
}
restarts() { grep -c 'launch: restart' "$dir/broken.log" || true; }
newest() { # the step of the disturbed run's newest checkpoint; 0 before the first
  { find "$dir/broken/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null || true; echo 0; } |
    sed 's/.*step-0*//' | sort -n | tail -1
}

# How long a start and 30 steps take here and now: a kill comes within that time after the one before.
from=$(date +%s%N)
(run measured measured.log 0 --steps 30) || fail measured.log "the program does not train"
span_ms=$((($(date +%s%N) - from) / 1000000))

run broken broken.log 1000000 &
launcher=$!
trap 'kill -9 $launcher 2>/dev/null || true; rm -rf "$dir"' EXIT
done_kills=0 before=-1
while [ "$done_kills" -lt "$kills" ]; do
  pause=$((RANDOM % (span_ms + 1)))
  sleep "$(printf '%d.%03d' $((pause / 1000)) $((pause % 1000)))"
  kill -0 "$launcher" 2>/dev/null || fail broken.log "the launcher ended after $done_kills kills"
  victims=()
  for p in $(pgrep -P "$launcher" || true); do [ -n "$(rank_of "$p")" ] && victims+=("$p"); done
  [ "${#victims[@]}" -eq 0 ] && continue
  before=$(restarts)
  kill -9 "${victims[$((RANDOM % ${#victims[@]}))]}" 2>/dev/null && done_kills=$((done_kills + 1))
done
# The ranks are well again when they were started once more and the next checkpoint has come; then a signal must
# save and end them all.
until [ "$(restarts)" -gt "$before" ]; do
  kill -0 "$launcher" 2>/dev/null || fail broken.log "the launcher ended after the last kill"
  sleep 0.05
done
stop_after=$(newest)
until [ "$(newest)" -gt "$stop_after" ]; do
  kill -0 "$launcher" 2>/dev/null || fail broken.log "the launcher ended after the last kill"
  sleep 0.05
done
kill -TERM "$launcher"
code=0
wait "$launcher" || code=$?
[ "$code" -eq 75 ] || fail broken.log "the disturbed run ended with code $code"

last=$(($(newest) + 5))
(run broken last.log 0 --steps "$last") || fail last.log "the last start of the disturbed run failed"
(run whole whole.log 0 --steps "$last") || fail whole.log "the undisturbed run failed"
folder=$(printf 'checkpoints/step-%08d' "$last")
for file in model.safetensors $(cd "$dir/whole/$folder" && ls optimizer-*); do
  cmp "$dir/whole/$folder/$file" "$dir/broken/$folder/$file"
done
echo "soak_ranks: $done_kills kills of $ranks ranks, $(restarts) restarts, $last steps (a kill within $span_ms ms):" \
  "the same model bit for bit"
