#!/usr/bin/env bash
# What a change of a CUDA kernel has to pass on a card before anyone believes it: the checks of tools/*_check.cu
# against fp64, the tests of the operations, and compute-sanitizer over the smallest shapes of every kernel. Several
# at once; prints a table.
#
# usage: scripts/check_kernels.sh [--log DIR] [--limit SECONDS] [--jobs J] [NAME ...]
#   --log     folder for the output of each check (default: a temporary one, kept where a check fails)
#   --limit   of each check (default 300)
#   --jobs    checks at a time (default 8)
#   NAME      only checks whose name holds one of these
# Programs: cmake --build --preset release --target hgru2_check glu_gemm_check hgrn_tests
# Environment: HGRN_BUILD (default build), the folder that holds them; they may have been built on another machine.
# SANITIZER (default compute-sanitizer).
set -euo pipefail
cd "$(dirname "$0")/.."
build=${HGRN_BUILD:-build} sanitizer=${SANITIZER:-compute-sanitizer} log="" limit=300 jobs=8 only=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/check_kernels.sh; exit 0 ;;
    --log | --limit | --jobs) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --log) log=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    -*) echo "error: unknown flag $1; scripts/check_kernels.sh --help lists them" >&2; exit 2 ;;
    *) only+=("$1"); shift ;;
  esac
done
find_program() {  # in the build folder, or where CMake puts tests
  for path in "$build/$1" "$build/tests/$1"; do [ ! -x "$path" ] || { realpath "$path"; return; }; done
  echo "error: $build/$1 is not there; cmake --build --preset release --target $1, or set HGRN_BUILD" >&2
  exit 3
}
hgru2=$(find_program hgru2_check) glu=$(find_program glu_gemm_check) tests=$(find_program hgrn_tests)
command -v "$sanitizer" >/dev/null ||
  { echo "error: $sanitizer is not there; it comes with the CUDA Toolkit (bin/), or set SANITIZER" >&2; exit 3; }
nvidia-smi -L >/dev/null 2>&1 || { echo "error: nvidia-smi shows no GPU; this wants one" >&2; exit 3; }
temporary=""
[ -n "$log" ] || log=$(mktemp -d) temporary=$log
mkdir -p "$log"

names=() commands=()
add() { names+=("$1"); shift; commands+=("$(printf '%q ' "$@")"); }
under_sanitizer() {  # NAME COMMAND ...
  local name=$1 tool
  shift
  for tool in memcheck racecheck initcheck synccheck; do
    add "$name, $tool" "$sanitizer" --tool $tool --error-exitcode 9 --print-limit 20 "$@"
  done
}
add "hgru2 against fp64" "$hgru2" accuracy
add "hgru2 against fp64, without the Hopper kernels" env HGRN_HGRU2_SM90=0 "$hgru2" accuracy
under_sanitizer "hgru2, small" "$hgru2" small
under_sanitizer "hgru2 without the Hopper kernels, small" env HGRN_HGRU2_SM90=0 "$hgru2" small
if nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -q '^9\.'; then
  add "products with the GLU, models' shapes" "$glu" accuracy
  under_sanitizer "products with the GLU, small" "$glu" small
fi
add "operations" "$tests" "[ops]"
under_sanitizer "operations, odd and even widths" "$tests" "[small]~[gpu]"
under_sanitizer "one token" "$tests" "[small][gpu]"

check() {  # NUMBER: runs it and leaves a row of the table
  local n=$1 code=0 out began took result=passed
  out=$log/$(printf '%02d' "$n").txt
  began=$(date +%s%N)
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} timeout -k 5 "$limit" bash -c "${commands[n]}" >"$out" 2>&1 || code=$?
  took=$((($(date +%s%N) - began) / 100000000))
  case $code in
    0) ;;
    124 | 137) result="FAILED: not over after $limit s" ;;
    9) result="FAILED: $(grep -aE 'SUMMARY' "$out" | tail -1 | sed 's/^=* *//')" ;;
    *) result="FAILED: code $code" ;;
  esac
  [ $code -ne 0 ] || ! grep -aqE 'No test cases matched|No tests ran' "$out" || result="FAILED: no test of that name"
  printf '| %s | %s | %d.%d |\n' "${names[n]}" "$result" $((took / 10)) $((took % 10)) >"$out.row"
}
chosen=()
for n in "${!names[@]}"; do
  wanted=$((${#only[@]} == 0))
  for part in ${only[@]+"${only[@]}"}; do case ${names[n]} in *"$part"*) wanted=1 ;; esac; done
  [ "$wanted" -eq 0 ] || chosen+=("$n")
done
[ ${#chosen[@]} -gt 0 ] || { echo "error: no check has such a name; they are: $(printf '%s; ' "${names[@]}")" >&2; exit 2; }
for n in "${chosen[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
  check "$n" &
done
wait
printf '| check | result | s |\n|---|---|---|\n'
failed=0
for n in "${chosen[@]}"; do
  row=$log/$(printf '%02d' "$n").txt.row
  cat "$row"
  grep -q FAILED "$row" && failed=$((failed + 1)) || true
done
for n in "${chosen[@]}"; do
  out=$log/$(printf '%02d' "$n").txt
  ! grep -q FAILED "$out.row" || { echo "== ${names[n]}: $out"; tail -20 "$out"; }
done
echo "check_kernels: $((${#chosen[@]} - failed)) passed, $failed failed"
[ "$failed" -gt 0 ] || [ -z "$temporary" ] || rm -rf "$temporary"
[ "$failed" -eq 0 ]
