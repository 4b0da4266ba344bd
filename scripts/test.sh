#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test with ctest.
# usage: scripts/test.sh [PRESET [ROOMS]]   release (default), ci, asan, tsan or coverage; ROOMS, a
#                                           regular expression, builds and runs only the tests of
#                                           those: 'core|train'
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-release}

scripts/setup.sh
cmake --preset "$preset" -DHGRN_TEST_ROOMS="${2:-}" >/dev/null
cmake --build --preset "$preset"
ctest --preset "$preset" ${2:+-R "^($2)\$"}
