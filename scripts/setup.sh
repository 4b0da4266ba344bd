#!/usr/bin/env bash
# Installs what hgrn is built from, with apt; asks nothing and does nothing if all is there.
# usage: scripts/setup.sh [PACKAGE ...]     extra packages to install as well
set -euo pipefail

packages=(g++ cmake ninja-build nlohmann-json3-dev libspdlog-dev libfmt-dev libcli11-dev catch2
          libopenblas-openmp-dev libxxhash-dev libpcre2-dev libutf8proc-dev libgloo-dev "$@")

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "setup: apt-get is missing; install by hand: ${missing[*]}" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: run as root, or install by hand: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
give_up() {
  tail -20 "$log" >&2
  echo "setup: apt-get could not install ${missing[*]}; see above" >&2
  exit 1
}
"${as_root[@]}" apt-get update >"$log" 2>&1 || give_up
# Gloo serves several CPU ranks, and the build does without it: a distribution may lack it.
for i in "${!missing[@]}"; do
  if [ "${missing[$i]}" = libgloo-dev ] && ! apt-cache show libgloo-dev >/dev/null 2>&1; then
    echo "setup: this distribution has no libgloo-dev: built without several CPU ranks" >&2
    unset "missing[$i]"
  fi
done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "setup: installing ${missing[*]}" >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1 || give_up
