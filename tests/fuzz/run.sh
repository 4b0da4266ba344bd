#!/usr/bin/env bash
# Runs the fuzzers that lie beside this script in bin/ (or in $BIN), each from its seeds in corpus/
# and with its dictionary in dict/. Ends with a table, a row a fuzzer; exit 1 if one found something
# or did not run.
# usage: run.sh SECONDS [JOBS]     JOBS processes a fuzzer (default 1)
# FORMATS=...  these alone, separated by spaces (default: all)
# AT_ONCE=N    fuzzers at a time (default: all)
# OUT=DIR      keeps crashing inputs and the logs of the processes that met them
# CORPUS=FILE  writes a .tar.gz of the seeds and of all that covers more than they do
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
seconds=${1:?usage: run.sh SECONDS [JOBS]} jobs=${2:-1}
read -ra formats <<<"${FORMATS:-config shard safetensors manifest trainer_state tokenizer bpe shard_json}"
bin=${BIN:-$here/bin} at_once=${AT_ONCE:-${#formats[@]}}
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
  local TIMEFORMAT='%U %S'  # of CPU, summed up in the table
  while left=$((end - SECONDS)); [ "$left" -gt 0 ] && [ "$crashes" -lt 20 ] && [ "$failed" -lt 50 ]; do
    log=$work/logs/$format-$2-$((n++)).log
    if { time timeout -k 10 $((left + 120)) nice -n 19 ${fixed[@]+"${fixed[@]}"} \
        "$bin/fuzz_$format" -max_total_time="$left" -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -artifact_prefix="$work/crashes/$format-" \
        ${dict[@]+"${dict[@]}"} "$work/found/$format" "$here/corpus/$format" >"$log" 2>&1
        } 2>>"$work/cpu/$format"; then
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

report() {  # FORMAT: its row of the table
  local format=$1 units crashes coverage failed
  units=$(cat "$work/logs/$format"-*.log 2>/dev/null |
    awk '/stat::number_of_executed_units/ { n += $2 } END { printf "%d", n }')
  crashes=$(find "$work/crashes" -name "$format-*" | wc -l)
  failed=$(find "$work/logs" -name "$format-*.failed" | wc -l)
  coverage=$(cat "$work/logs/$format"-*.log 2>/dev/null |
    awk '/ cov: / { for (i = 1; i < NF; i++) if ($i == "cov:" && $(i+1) > c) c = $(i+1) } END { printf "%d", c }')
  printf '%-18s %14d %9d %8d %12d %9d\n' "fuzz_$format" "$units" \
    "$(awk '{ s += $1 + $2 } END { printf "%d", s }' "$work/cpu/$format")" "$coverage" \
    "$(find "$work/found/$format" -type f | wc -l)" "$crashes"
  [ "$failed" -eq 0 ] || printf '  %d starts failed; the first: %s\n' "$failed" \
    "$(cat "$(find "$work/logs" -name "$format-*.failed" | sort | head -1)" | grep -m1 -iE 'error|failed' || echo '(no message)')"
  [ "$units" -gt 0 ] && [ "$crashes" -eq 0 ]
}

mkdir -p "$work/logs" "$work/crashes" "$work/cpu"
for format in "${formats[@]}"; do
  mkdir -p "$work/found/$format"
  [ -x "$bin/fuzz_$format" ] || { echo "run.sh: $bin/fuzz_$format is missing" >&2; exit 2; }
done
for ((i = 0; i < ${#formats[@]}; i += at_once)); do
  for format in "${formats[@]:i:at_once}"; do
    for ((j = 0; j < jobs; ++j)); do worker "$format" "$j" & done
  done
  wait
done

bad=0
printf '%-18s %14s %9s %8s %12s %9s\n' fuzzer executions "CPU s" edges "new inputs" crashes
for format in "${formats[@]}"; do report "$format" || bad=1; done

if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  for crash in "$work/crashes"/*; do
    [ -e "$crash" ] || continue
    mkdir -p "$OUT/crashes" "$OUT/logs"
    cp "$crash" "$OUT/crashes/"
    grep -l "$(basename "$crash")" "$work/logs"/* | head -1 | xargs -I{} cp {} "$OUT/logs/"
  done
fi
if [ -n "${CORPUS:-}" ]; then
  for format in "${formats[@]}"; do
    mkdir -p "$work/corpus/$format"
    ${fixed[@]+"${fixed[@]}"} "$bin/fuzz_$format" -merge=1 -rss_limit_mb=2048 "$work/corpus/$format" \
      "$here/corpus/$format" "$work/found/$format" >/dev/null 2>&1 || true
  done
  tar -C "$work" -czf "$CORPUS" corpus
fi
exit "$bad"
