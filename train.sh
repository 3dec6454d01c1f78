#!/usr/bin/env bash
# Set everything up and run the main job:  bash train.sh [--nproc N] [flags of ttrl.py, see --help]
#   bash train.sh                                                    the embedded tiny model, a few minutes on a CPU
#   bash train.sh --model Qwen2.5-Math-1.5B --nproc 8                AIME 2024 on eight GPUs
# N is the number of processes; without it one for each GPU, or on a machine that has none one for each core, up to 4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

nproc='' flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --nproc) nproc=${2:?--nproc needs a number}; shift 2 ;;
        --nproc=*) nproc=${1#*=}; shift ;;
        *) flags+=("$1"); shift ;;
    esac
done

source setup.sh
if [ -z "$nproc" ]; then
    nproc=$("$PYTHON" -c 'import os, torch; print(torch.cuda.device_count() or min(os.cpu_count(), 4))')
fi
if [ "$nproc" = 1 ]; then
    exec "$PYTHON" ttrl.py ${flags[@]+"${flags[@]}"}
fi
# A wrong flag is said in one sentence here; from inside torchrun it would come with a page about failed processes.
plan=$("$PYTHON" ttrl.py --dry-run ${flags[@]+"${flags[@]}"}) || exit $?
case " ${flags[*]-} " in *" --help "* | *" -h "* | *" --dry-run "*) echo "$plan"; exit ;; esac
# Processes share a machine better than threads do: they meet once an update, threads at every matrix product.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$nproc" ttrl.py ${flags[@]+"${flags[@]}"}
