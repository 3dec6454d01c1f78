#!/usr/bin/env bash
# Set everything up and run the main job:  bash train.sh [--nproc N] [flags of ttrl.py, see --help]
#   bash train.sh                                                    the embedded tiny model, a few minutes on a CPU
#   bash train.sh --model Qwen2.5-Math-1.5B --nproc 8                AIME 2024 on eight GPUs
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

nproc= flags=()
while [ $# -gt 0 ]; do
    case $1 in
        --nproc) nproc=${2:?--nproc needs a number}; shift 2 ;;
        --nproc=*) nproc=${1#*=}; shift ;;
        *) flags+=("$1"); shift ;;
    esac
done

cd "$folder"
source setup.sh
if [ "${nproc:-1}" = 1 ]; then
    exec "$PYTHON" ttrl.py ${flags[@]+"${flags[@]}"}
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$nproc" ttrl.py ${flags[@]+"${flags[@]}"}
