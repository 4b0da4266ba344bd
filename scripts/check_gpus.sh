#!/usr/bin/env bash
# The tests that want several GPUs (tests/train/test_gpu_ranks.cpp, and the collectives of tests/ops/test_comm.cpp),
# one after another, each with a time limit; prints a table. In a minute or two on two GPUs.
#
# usage: scripts/check_gpus.sh [--log DIR] [--limit SECONDS] [NAME ...]
#   --log     folder for the output of each test (default: a temporary one, kept where a test fails)
#   --limit   of each test (default 90)
#   NAME      only tests whose name holds one of these
# Environment: HGRN (default build/hgrn), HGRN_TESTS (default tests/hgrn_tests beside it). The programs may have
# been built on another machine.
set -euo pipefail
cd "$(dirname "$0")/.."
export HGRN=${HGRN:-$PWD/build/hgrn}
HGRN=$(realpath "$HGRN")
tests=${HGRN_TESTS:-$(dirname "$HGRN")/tests/hgrn_tests}
log="" limit=90
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/check_gpus.sh; exit 0 ;;
    --log | --limit) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --log) log=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    -*) echo "error: unknown flag $1; scripts/check_gpus.sh --help lists them" >&2; exit 2 ;;
    *) break ;;
  esac
done
for program in "$HGRN" "$tests"; do
  [ -x "$program" ] || { echo "error: $program is not there; build it, or set HGRN and HGRN_TESTS" >&2; exit 3; }
done
temporary=""
[ -n "$log" ] || log=$(mktemp -d) temporary=$log
mkdir -p "$log"

mapfile -t names < <(grep -hoP 'TEST_CASE\("\K(gpus|comm): [^"]+' tests/ops/test_comm.cpp tests/train/test_gpu_ranks.cpp)
[ "${#names[@]}" -gt 10 ] || { echo "error: the sources name no tests" >&2; exit 3; }
failed=0 skipped=0 passed=0 n=0
printf '| test | result | s |\n|---|---|---|\n'
for name in "${names[@]}"; do
  n=$((n + 1))
  if [ $# -gt 0 ]; then
    wanted=0
    for part in "$@"; do case $name in *"$part"*) wanted=1 ;; esac; done
    [ "$wanted" -eq 1 ] || continue
  fi
  out=$log/$(printf '%02d' "$n").txt
  began=$(date +%s%N) code=0
  timeout -k 5 "$limit" "$tests" "${name//,/\\,}" >"$out" 2>&1 || code=$?
  took=$((($(date +%s%N) - began) / 100000000))
  result=passed
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    result="FAILED: not over after $limit s"
  elif [ "$code" -ne 0 ]; then
    result="FAILED: code $code"
  elif grep -qE '^ *skipped: |test cases: 1 \| 1 passed' "$out"; then # the latter: it had nothing to check
    result=skipped
  elif ! grep -q 'All tests passed' "$out"; then
    result="FAILED: no test of that name"
  fi
  case $result in passed) passed=$((passed + 1)) ;; skipped) skipped=$((skipped + 1)) ;; *) failed=$((failed + 1)) ;; esac
  printf '| %s | %s | %d.%d |\n' "$name" "$result" $((took / 10)) $((took % 10))
done
echo
grep -hE '^ *(bf16|fp32|ZeRO|rank [0-9]+ killed|skipped)' "$log"/*.txt | sed 's/^ */  /' | sort -u || true
if [ "$failed" -gt 0 ]; then
  for out in "$log"/*.txt; do grep -q 'FAILED' "$out" && { echo "== $out"; tail -40 "$out"; }; done || true
elif [ -n "$temporary" ]; then
  rm -rf "$temporary"
fi
echo "check_gpus: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
