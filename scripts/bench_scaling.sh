#!/usr/bin/env bash
# How training scales over the GPUs of this machine, in one command: tokens/s on 1, 2, 4 and 8 ranks (those that
# exist) for 150M, 385M and 1B at the paper's sequences a GPU, with ZeRO 0 and 1; what communication costs and
# how much of it is hidden; memory a GPU; the 150M model at a fixed global batch; losses of a run that goes on
# with fewer and with more ranks beside an undisturbed one's; and the time to get over a rank's death.
#
# usage: scripts/bench_scaling.sh [--ranks 1,2,...] [--parts weak,strong,resume,restart] [--steps N]
#                                 [--model NAME=CONFIG:MICRO_BATCH ...] [--data GLOB] [--device cuda|cpu]
#                                 [--set KEY=VALUE ...] [--seconds S] [--json FILE] [--out DIR]
#   --ranks     default: 1, 2, 4, 8, as many as there are GPUs; with --device cpu it must be given
#   --steps     steps timed of each kind (default 20)
#   --model     instead of the three; the first serves strong, resume and restart
#   --data      shards for resume and restart (default: made up)
#   --seconds   starts nothing that would begin later; prints what there is (default: no limit)
#   --json      default OUT/scaling.json; OUT default runs/scaling
# Environment: HGRN (default build/hgrn), HGRN_BENCH (default hgrn-bench beside it), PYTHON (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/bench_scaling.sh; exit 0 ;; esac
exec "${PYTHON:-python3}" tools/scaling.py "$@"
