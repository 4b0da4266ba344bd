#!/usr/bin/env bash
# A run that is killed (SIGKILL) again and again at random moments must end in the same model as one
# that was left alone: same weights, moments, trainer.json and losses, byte for byte. After every
# kill the newest checkpoint must verify and must not be older than the one before.
# usage: scripts/soak.sh [KILLS]     default 200. Needs a built program: $HGRN, default build/hgrn
# SEED=N  other moments (default 1)
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-200}
hgrn=${HGRN:-build/hgrn}
RANDOM=${SEED:-1}
[ -x "$hgrn" ] || { echo "soak: $hgrn is missing; build it, or set HGRN" >&2; exit 2; }

work=$(mktemp -d)
pid=
finish() {
  local code=$?
  [ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || true
  if [ "$code" -eq 0 ]; then rm -rf "$work"; else echo "soak: failed; all is kept in $work" >&2; fi
}
trap finish EXIT
trap 'exit 1' INT TERM
fail() { echo "soak: $*" >&2; exit 1; }

# Saves take a good part of the time, so that kills meet them. Dropout and resets are on: random
# numbers must come back as well.
"$hgrn" tokenize --tokenizer byte --out "$work/t" docs/*.md 2>/dev/null >/dev/null
cat > "$work/soak.json" <<EOF
{
  "model": {"vocab_size": 257, "hidden_size": 128, "num_hidden_layers": 2, "expand_ratio": 32,
            "intermediate_size": 256, "dropout": 0.1},
  "data": {"train": "$work/t_*.bin", "tokenizer": "byte", "seq_len": 32, "reset_at_eos": true},
  "optim": {"lr": 1e-3, "warmup_steps": 10, "schedule": "constant"},
  "train": {"steps": 1000000, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "log_every": 1,
            "eval_every": 0, "checkpoint_every": 3, "keep_checkpoints": 2, "monitor_every": 5,
            "sample_every": 7,
            "spike_zscore": 6, "spike_window": 32, "on_spike": "skip"}
}
EOF
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1  # small steps; more threads only wait for each other
train() {  # RUN [FLAG ...]
  exec "$hgrn" train --config "$work/soak.json" --device cpu --out "$work/$1" "${@:2}" 2>>"$work/$1.log" >/dev/null
}
newest() {  # the step of RUN's newest checkpoint; 0 before the first
  [ -n "$(find "$work/$1/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null)" ] || { echo 0; return; }
  "$hgrn" inspect "$work/$1" --verify >"$work/inspect" 2>&1 || return 1
  sed -n 's/.*: checkpoint of step \([0-9]*\)$/\1/p' "$work/inspect"
}

# How long a start and 20 steps take here and now: lives are up to that long, so that kills hit
# the start, steps and saves on a machine of any speed.
started=$SECONDS from=$(date +%s%N)
(train measured --steps 20) || fail "the program does not train; see $work/measured.log"
span_ms=$((($(date +%s%N) - from) / 1000000))

before=0 in_save=0 idle=0
for ((k = 1; k <= kills; ++k)); do
  train killed & pid=$!
  life_ms=$((RANDOM % (span_ms + 1)))
  sleep "$(printf '%d.%03d' $((life_ms / 1000)) $((life_ms % 1000)))"
  kill -9 "$pid" 2>/dev/null || fail "kill $k: the run had ended by itself; see $work/killed.log"
  { wait "$pid" && fail "kill $k: exit 0 after a kill"; } 2>/dev/null
  [ -z "$(find "$work/killed/checkpoints" -maxdepth 1 -name ".tmp-*-$pid-*" 2>/dev/null)" ] || in_save=$((in_save + 1))
  pid=
  step=$(newest killed) || fail "kill $k: $(cat "$work/inspect")"
  ! grep -q damaged "$work/inspect" 2>/dev/null || fail "kill $k: $(cat "$work/inspect")"
  [ "$step" -ge "$before" ] || fail "kill $k: the newest checkpoint is of step $step, it was $before"
  [ "$step" -gt "$before" ] || idle=$((idle + 1))
  before=$step
done
last=$((before + 10))
(train killed --steps "$last") || fail "the last start of the killed run failed; see $work/killed.log"
(train alone --steps "$last") || fail "the undisturbed run failed; see $work/alone.log"

folder=$(printf 'checkpoints/step-%08d' "$last")
for file in model.safetensors optimizer-00000-of-00001.safetensors trainer.json config.json; do
  cmp "$work/killed/$folder/$file" "$work/alone/$folder/$file" || fail "$file differs after $last steps"
done
for run in killed alone; do
  sed 's/"lr".*"skipped"/"skipped"/' "$work/$run/metrics.jsonl" > "$work/$run.metrics"  # but the times
done
[ "$(wc -l < "$work/alone.metrics")" -eq "$last" ] || fail "metrics.jsonl has not a line a step"
cmp "$work/killed.metrics" "$work/alone.metrics" || fail "the metrics differ"
echo "soak: $kills kills over $last steps ($in_save in a save, $idle before any progress;" \
  "lives of up to $span_ms ms):" \
  "the same model as without, $((SECONDS - started)) s"
