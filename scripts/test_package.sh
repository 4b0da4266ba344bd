#!/usr/bin/env bash
# Builds the .deb and the tarball and uses them as a stranger would:
#   1. cmake --install into a folder; completions and manual are well formed; the example of
#      tools/example is compiled against the installed package (find_package(hgrn)) and run
#   2. the .deb into a fresh Debian made by debootstrap: --version, 20 steps of training, eval, the
#      library's example; dpkg -r leaves nothing behind
#   3. the tarball, unpacked anywhere: --version, plan
# usage: scripts/test_package.sh [BUILD_FOLDER]     default: build-static, configured if it is not
#                                                   there (CPU alone, dependencies linked statically)
# Part 2 is skipped with a message where root, debootstrap or a Debian mirror is missing.
# HGRN_MIRROR: a Debian mirror (default: the first of this machine's apt).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD build=${1:-build-static}
work=$(mktemp -d "${TMPDIR:-/tmp}/hgrn-package-XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
say() { echo "test_package: $*"; }
trap 'echo "test_package: line $LINENO failed" >&2' ERR
fail() { echo "test_package: $*" >&2; exit 1; }

if [ ! -f "$build/build.ninja" ] && [ ! -f "$build/Makefile" ]; then
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DHGRN_STATIC_DEPS=ON \
    -DHGRN_CUDA=OFF -DHGRN_TESTS=OFF >"$work/configure.log" || { cat "$work/configure.log" >&2; exit 1; }
fi
cmake --build "$build" >"$work/build.log" || { tail -30 "$work/build.log" >&2; exit 1; }
(cd "$build" && cpack) >"$work/cpack.log" 2>&1 || { cat "$work/cpack.log" >&2; exit 1; }
deb=$(ls "$root/$build"/packages/hgrn_*.deb) tgz=$(ls "$root/$build"/packages/hgrn-*.tar.gz)
[ "$(echo "$deb" | wc -l)" -eq 1 ] || fail "several .deb in $build/packages: remove the old ones"
say "$(basename "$deb"), $(du -h "$deb" | cut -f1); $(basename "$tgz"), $(du -h "$tgz" | cut -f1)"
say "depends: $(dpkg-deb -f "$deb" Depends)"

# ---- a model for all that follows: 20 steps on the documents
cat >"$work/config.json" <<'JSON'
{"model": {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 2, "expand_ratio": 32,
           "intermediate_size": 192},
 "data": {"train": "data_*.bin", "tokenizer": "byte", "seq_len": 128},
 "optim": {"lr": 4e-3, "warmup_steps": 5},
 "train": {"steps": 20, "global_batch": 4, "micro_batch": 4, "precision": "fp32", "eval_every": 0}}
JSON
cat >"$work/use.sh" <<'SH'
set -eu
cd "$1" # the folder with text and config
shift
"$@" --version
"$@" tokenize --tokenizer byte --out data text
"$@" train --config config.json --out run --device cpu
"$@" eval --checkpoint run --text text --json eval.json
"$@" inspect run --verify
SH

# ---- 1. cmake --install
cmake --install "$build" --prefix "$work/prefix" >/dev/null
prefix=$work/prefix
cat README.md docs/*.md >"$work/text"
sh "$work/use.sh" "$work" "$prefix/bin/hgrn" >"$work/use.log" 2>&1 || { cat "$work/use.log" >&2; exit 1; }
bash -n "$prefix/share/bash-completion/completions/hgrn"
# shellcheck disable=SC1091
completed=$(. "$prefix/share/bash-completion/completions/hgrn"
            COMP_WORDS=(hgrn train --conf) COMP_CWORD=2; _hgrn; echo "${COMPREPLY[*]}"
            COMP_WORDS=(hgrn sw) COMP_CWORD=1; _hgrn; echo "${COMPREPLY[*]}"
            COMP_WORDS=(hgrn eval --protocol c) COMP_CWORD=3; _hgrn; echo "${COMPREPLY[*]}"
            COMP_WORDS=(hgrn launch -- train --init) COMP_CWORD=4; _hgrn; echo "${COMPREPLY[*]}")
[ "$completed" = "--config
sweep
carry
--init-from" ] || fail "bash completes: $completed"
if command -v zsh >/dev/null; then zsh -n "$prefix/share/zsh/vendor-completions/_hgrn"; else say "no zsh: its completion is not checked"; fi
if command -v fish >/dev/null; then
  [ "$(fish -c "source '$prefix/share/fish/vendor_completions.d/hgrn.fish'; complete -C 'hgrn train --conf'" | cut -f1)" = --config ] ||
    fail "fish does not complete --config"
else say "no fish: its completion is not checked"; fi
if command -v groff >/dev/null; then
  groff -man -Tutf8 -ww -z "$prefix/share/man/man1/hgrn.1" 2>"$work/groff.log"
  [ ! -s "$work/groff.log" ] || { cat "$work/groff.log" >&2; exit 1; }
else say "no groff: the manual is not checked"; fi
for command in train eval generate tokenize plan inspect launch sweep; do
  grep -q "^.SS hgrn $command" "$prefix/share/man/man1/hgrn.1" || fail "the manual lacks $command"
done

cmake -S "$prefix/share/doc/hgrn/example" -B "$work/example" -DCMAKE_PREFIX_PATH="$prefix" \
  -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$work/example" >"$work/example.log" 2>&1 || { cat "$work/example.log" >&2; exit 1; }
"$work/example/hgrn_example" "$work/run" "the state of a layer" >"$work/example.out"
grep -q "by steps" "$work/example.out"
code=0
"$work/example/hgrn_example" /no/such x 2>/dev/null || code=$?
[ "$code" -eq 3 ] || fail "the example ends with $code where a checkpoint is missing"
# Nothing but the API leaves the library.
foreign=$(nm -DC --defined-only "$prefix"/lib*/*/libhgrn.so "$prefix"/lib/libhgrn.so 2>/dev/null |
  grep ' T ' | grep -v ' hgrn::api::' || true)
[ -z "$foreign" ] || fail "libhgrn.so exports more than its API: $foreign"
say "installed by cmake, completions, manual, example: good"

# ---- 3. the tarball
mkdir "$work/unpacked"
tar -xzf "$tgz" -C "$work/unpacked" --strip-components=1
"$work/unpacked/bin/hgrn" --version >/dev/null
(cd "$work" && "$work/unpacked/bin/hgrn" plan --config "$work/unpacked/share/hgrn/configs/hgrn2_150m.json" >/dev/null)
say "tarball: good"

# ---- 2. the .deb in a clean Debian
mirror=${HGRN_MIRROR:-$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
  sed -n 's/^deb \(\[[^]]*\] \)\?\(http[^ ]*debian\)\/\? .*/\2/p; s/^URIs: *\(http[^ ]*debian\)\/\?$/\1/p' | head -n 1 || true)}
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
if [ "$(id -u)" -ne 0 ]; then say "skipped: the .deb in a clean Debian needs root (chroot)"; exit 0; fi
if ! command -v debootstrap >/dev/null; then say "skipped: debootstrap is not installed"; exit 0; fi
if [ -z "$mirror" ]; then say "skipped: no Debian mirror is known; set HGRN_MIRROR"; exit 0; fi
clean=$work/debian
# What the .deb depends on comes with the base system, as far as these are plain packages; apt gets the
# rest, which a build with shared dependencies has.
depends=$(for name in $(dpkg-deb -f "$deb" Depends | tr ',' '\n' | sed 's/^ *//; s/[ |].*//'); do
  if apt-cache show "$name" 2>/dev/null | grep -qx "Package: $name"; then echo "$name"; fi
done | paste -sd,)
if ! debootstrap --variant=minbase --include="$depends" "$release" "$clean" "$mirror" >"$work/debootstrap.log" 2>&1; then
  if grep -qiE 'unshare|mknod|operation not permitted|failed getting release|couldn.t download' "$work/debootstrap.log"; then
    say "skipped: debootstrap cannot work here: $(tail -n 1 "$work/debootstrap.log")"
    exit 0
  fi
  tail -20 "$work/debootstrap.log" >&2
  fail "debootstrap failed"
fi
cp "$deb" "$clean/tmp/hgrn.deb"
mkdir "$clean/tmp/use"
cp "$work/config.json" "$work/text" "$work/use.sh" "$clean/tmp/use"
cp "$work/example/hgrn_example" "$clean/tmp/use"
in_clean() { chroot "$clean" env -i http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}" PATH=/usr/sbin:/usr/bin:/sbin:/bin OMP_NUM_THREADS=2 HOME=/root "$@"; }
if ! in_clean dpkg -i /tmp/hgrn.deb >"$work/dpkg.log" 2>&1; then
  cp /etc/resolv.conf "$clean/etc/resolv.conf"
  { in_clean apt-get update && in_clean apt-get install -y -f --no-install-recommends; } >>"$work/dpkg.log" 2>&1 ||
    { cat "$work/dpkg.log" >&2; exit 1; }
fi
in_clean sh /tmp/use/use.sh /tmp/use hgrn >"$work/clean.log" 2>&1 || { cat "$work/clean.log" >&2; exit 1; }
in_clean sh -c 'cd /tmp/use && ./hgrn_example run "the state"' >"$work/clean.out" 2>&1 || { cat "$work/clean.out" >&2; exit 1; }
# The same program and data give the same model here and there.
cmp "$work/run/checkpoints/step-00000020/model.safetensors" \
  "$clean/tmp/use/run/checkpoints/step-00000020/model.safetensors" ||
  say "note: the model differs from the one trained outside (another libm or BLAS kernel)"
in_clean dpkg -r hgrn >/dev/null 2>&1
[ ! -e "$clean/usr/bin/hgrn" ] || fail "dpkg -r leaves the program behind"
say "$(head -n 1 "$work/clean.log") in a clean Debian $release: installed, 20 steps, eval, example, removed: good"
