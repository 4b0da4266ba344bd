#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test with ctest.
# usage: scripts/test.sh [PRESET [ROOMS]]   release (default), ci, asan, tsan or coverage; ROOMS, a
#                                           regular expression, runs only those: 'core|train'
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-release}

scripts/setup.sh
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset"
ctest --preset "$preset" ${2:+-R "^($2)\$"}
