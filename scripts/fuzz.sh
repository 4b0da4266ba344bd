#!/usr/bin/env bash
# Builds the fuzzers of tests/fuzz (clang, libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer)
# and runs each for SECONDS, two at a time.
# usage: scripts/fuzz.sh [SECONDS]        default 60; OUT=DIR keeps what crashes
#        scripts/fuzz.sh --bundle DIR     makes a folder that runs on another machine:
#                                         DIR/run.sh SECONDS JOBS
set -euo pipefail
cd "$(dirname "$0")/.."
fuzz=tests/fuzz portable=OFF build=build-fuzz
if [ "${1:-}" = "--bundle" ]; then
  bundle=${2:?usage: scripts/fuzz.sh --bundle DIR}
  portable=ON build=build-fuzz-portable
fi

# Debian packs libFuzzer and the sanitizers' runtimes apart from clang; Ubuntu does as well.
scripts/setup.sh clang libclang-rt-dev
cmake -S $fuzz -B $build -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DHGRN_FUZZ_PORTABLE=$portable >/dev/null
cmake --build $build

if [ -n "${bundle:-}" ]; then
  mkdir -p "$bundle/bin"
  cp $build/fuzz_* "$bundle/bin/"
  cp -r $fuzz/corpus $fuzz/dict $fuzz/run.sh "$bundle/"
  du -sh "$bundle"
  exit 0
fi
BIN=$build AT_ONCE=2 $fuzz/run.sh "${1:-60}" 1
