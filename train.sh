#!/usr/bin/env bash
# Set everything up and run the main job:  bash train.sh [--nproc N] [flags of ttrl.py, see --help]
#   bash train.sh                                        the embedded tiny model, a few minutes on a CPU
#   bash train.sh --model Qwen2.5-Math-1.5B --nproc 8    AIME 2024 on eight GPUs
# N is the number of processes; without it one for each GPU, or without GPUs one for each core, up to 4.
# Relative paths, such as --data FILE, are relative to the caller's folder.
set -euo pipefail

nproc='' flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --nproc) nproc=${2-none}; shift $(($# > 1 ? 2 : 1)) ;;
        --nproc=*) nproc=${1#*=}; shift ;;
        *) flags+=("$1"); shift ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ''
case $nproc in *[!0-9]* | 0) refuse "--nproc is the number of processes, 1 or more, not $nproc" ;; esac
ttrl=("$PYTHON" "$checkout/ttrl.py" ${flags[@]+"${flags[@]}"})
if [ -z "$nproc" ]; then
    count='import os, torch; print(torch.cuda.device_count() or min(os.cpu_count(), 4))'
    nproc=$(cd "$checkout" && "$PYTHON" -c "$count")
fi
if [ "$nproc" = 1 ]; then
    exec "${ttrl[@]}"
fi
# A wrong flag is one sentence here; from inside torchrun it would come with a page about failed processes.
plan=$(WORLD_SIZE=$nproc LOCAL_WORLD_SIZE=$nproc "${ttrl[@]}" --dry-run) || exit $?
case " ${flags[*]-} " in *" --help "* | *" -h "* | *" --dry-run "*) echo "$plan"; exit ;; esac
# Processes share a machine better than threads do: they meet once an update, threads at every matrix product.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# `python -m torch.distributed.run`, but the caller's folder is not searched for modules. The processes
# meet at the loopback address: the default, the host name, may not resolve offline, and then they would hang.
torchrun='import sys; sys.path.pop(0); from torch.distributed.run import main; main()'
exec "$PYTHON" -c "$torchrun" --standalone --local-addr 127.0.0.1 --nproc-per-node "$nproc" "${ttrl[@]:1}"
