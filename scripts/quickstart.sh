#!/usr/bin/env bash
# From a bare Debian 12 or Ubuntu 24.04 machine to a language model that has learned some English:
# installs what is missing, builds, makes token shards from vim's help texts, trains
# configs/quickstart.json, evaluates it on held-out files and prints a sample.
# usage: scripts/quickstart.sh [--fresh]     --fresh: train again although runs/quickstart is done
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart
resume=auto
[ "${1:-}" = "--fresh" ] && resume=never

say() { printf '\n== %s\n' "$*"; }

say "1/5 dependencies"
scripts/setup.sh vim-runtime
echo "all there"

say "2/5 build (build/hgrn)"
cuda=OFF
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then cuda=AUTO; fi
cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DHGRN_CUDA="$cuda" >/dev/null
cmake --build build --target hgrn

say "3/5 data: the English help texts of vim (Debian package vim-runtime, Vim licence)"
mkdir -p data
texts=$(mktemp -d)
trap 'rm -rf "$texts"' EXIT
# One file in forty is held out for evaluation: other files, not other lines of the same ones.
dpkg -L vim-runtime | grep -E '/doc/[^/]*\.txt$' | LC_ALL=C sort > "$texts/all"
awk 'NR % 40 == 5' "$texts/all" > "$texts/valid"
awk 'NR % 40 != 5' "$texts/all" > "$texts/train"
xargs build/hgrn tokenize --tokenizer byte --out data/quickstart_train < "$texts/train"
xargs build/hgrn tokenize --tokenizer byte --out data/quickstart_valid < "$texts/valid"

say "4/5 training configs/quickstart.json (about a minute and a half on two cores)"
build/hgrn train --config configs/quickstart.json --out "$run" --resume "$resume"

say "5/5 result"
build/hgrn eval --checkpoint "$run" --data 'data/quickstart_valid_*.bin' --json "$run/eval.json"
echo
echo "validation loss (bits per byte) by step:"
# The learning curve, from the run's metrics.
awk -F'[:,]' '/"valid_loss"/ { step = $2; bits = $4 / log(2);
    bar = ""; for (i = 0; i < bits * 12; i++) bar = bar "#";
    printf "  %5d  %.3f  %s\n", step, bits, bar }' "$run/metrics.jsonl"
echo
echo "a sample:"
build/hgrn generate --checkpoint "$run" --prompt "The command " --tokens 300 --temperature 0.7 --seed 1
echo
echo "The run folder is $run: config.json, metrics.jsonl, log.txt, checkpoints/."
echo "Go on with: build/hgrn generate --checkpoint $run --prompt 'If you '"
