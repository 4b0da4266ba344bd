#!/usr/bin/env bash
# Whether the pages are right: their links lead somewhere, and their commands run and print what the
# page says, on the CPU in a copy of the tree. How blocks are marked: tools/check_docs.py --help.
# usage: scripts/check_docs.sh [BUILD] [--links] [--verbose] [PAGE ...]     BUILD: build, with hgrn in it
set -euo pipefail
cd "$(dirname "$0")/.."
build=build
if [ $# -gt 0 ] && [ -d "$1" ]; then
  build=$1
  shift
fi
scripts/setup.sh python3
[ -x "$build/hgrn" ] || {
  echo "check_docs: $build/hgrn is missing; build it first: cmake --preset release && cmake --build --preset release" >&2
  exit 2
}
python3 tools/check_docs.py --build "$build" "$@"
