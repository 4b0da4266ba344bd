#!/usr/bin/env bash
# Runs the fuzzers that lie beside this script in bin/ (or in $BIN), each from its seeds in corpus/
# and with its dictionary in dict/. Prints a line a fuzzer; exit 1 if one found something.
# usage: run.sh SECONDS [JOBS]     JOBS processes a fuzzer (default 1)
# AT_ONCE=N  fuzzers at a time (default: all)
# OUT=DIR    keeps crashing inputs, the logs of the processes that met them, and corpus.tar.gz (the
#            seeds and all that covers more than they do)
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
seconds=${1:?usage: run.sh SECONDS [JOBS]} jobs=${2:-1}
bin=${BIN:-$here/bin} at_once=${AT_ONCE:-5}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# timeout has a process group of its own, so it is told by its parent's number.
trap 'for p in $(jobs -p); do pkill -P "$p"; kill "$p"; done 2>/dev/null; exit 1' INT TERM

# AddressSanitizer's shadow does not fit beside every layout that a kernel with much randomisation
# gives; without it the programs always start.
fixed=()
if setarch -R true 2>/dev/null; then fixed=(setarch -R); fi

# One process until the time is over; it starts anew behind each crash.
worker() {  # FORMAT NUMBER
  local format=$1 log crashes=0 failed=0 n=0 left
  local end=$((SECONDS + seconds)) dict=()
  [ -f "$here/dict/$format.dict" ] && dict=(-dict="$here/dict/$format.dict")
  while left=$((end - SECONDS)); [ "$left" -gt 0 ] && [ "$crashes" -lt 20 ] && [ "$failed" -lt 50 ]; do
    log=$work/logs/$format-$2-$((n++)).log
    if timeout -k 10 $((left + 120)) nice -n 19 ${fixed[@]+"${fixed[@]}"} "$bin/fuzz_$format" \
        -max_total_time="$left" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$work/crashes/$format-" ${dict[@]+"${dict[@]}"} \
        "$work/found/$format" "$here/corpus/$format" >"$log" 2>&1; then
      rm -f "$log.failed"
      return
    fi
    if grep -q 'Test unit written' "$log"; then
      crashes=$((crashes + 1))
    else
      mv "$log" "$log.failed"  # did not start, or ended in a way that names no input
      failed=$((failed + 1))
      sleep 0.1
    fi
  done
}

report() {  # FORMAT
  local format=$1 units crashes coverage failed
  units=$(cat "$work/logs/$format"-*.log 2>/dev/null |
    awk '/stat::number_of_executed_units/ { n += $2 } END { printf "%d", n }')
  crashes=$(find "$work/crashes" -name "$format-*" | wc -l)
  failed=$(find "$work/logs" -name "$format-*.failed" | wc -l)
  coverage=$(cat "$work/logs/$format"-*.log 2>/dev/null |
    awk '/ cov: / { for (i = 1; i < NF; i++) if ($i == "cov:" && $(i+1) > c) c = $(i+1) } END { printf "%d", c }')
  printf 'fuzz_%-14s %12d executions  %3d crashes  %5d new inputs  %6d edges\n' \
    "$format" "$units" "$crashes" "$(find "$work/found/$format" -type f | wc -l)" "$coverage"
  [ "$failed" -eq 0 ] || printf '  %d starts failed; the first: %s\n' "$failed" \
    "$(cat "$(find "$work/logs" -name "$format-*.failed" | sort | head -1)" | grep -m1 -iE 'error|failed' || echo '(no message)')"
  [ "$units" -gt 0 ] && [ "$crashes" -eq 0 ]
}

formats=(config shard safetensors manifest trainer_state tokenizer bpe shard_json)
mkdir -p "$work/logs" "$work/crashes"
for format in "${formats[@]}"; do
  mkdir -p "$work/found/$format"
  [ -x "$bin/fuzz_$format" ] || { echo "run.sh: $bin/fuzz_$format is missing" >&2; exit 2; }
done
bad=0
for ((i = 0; i < ${#formats[@]}; i += at_once)); do
  for format in "${formats[@]:i:at_once}"; do
    for ((j = 0; j < jobs; ++j)); do worker "$format" "$j" & done
  done
  wait
  for format in "${formats[@]:i:at_once}"; do report "$format" || bad=1; done
done

if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  for crash in "$work/crashes"/*; do
    [ -e "$crash" ] || continue
    mkdir -p "$OUT/crashes" "$OUT/logs"
    cp "$crash" "$OUT/crashes/"
    grep -l "$(basename "$crash")" "$work/logs"/* | head -1 | xargs -I{} cp {} "$OUT/logs/"
  done
  for format in "${formats[@]}"; do
    mkdir -p "$work/corpus/$format"
    ${fixed[@]+"${fixed[@]}"} "$bin/fuzz_$format" -merge=1 -rss_limit_mb=2048 "$work/corpus/$format" \
      "$here/corpus/$format" "$work/found/$format" >/dev/null 2>&1 || true
  done
  tar -C "$work" -czf "$OUT/corpus.tar.gz" corpus
fi
exit "$bad"
