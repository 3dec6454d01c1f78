#!/usr/bin/env bash
# Set everything up and run the main job:  bash train.sh [--nproc N] [flags of ttrl.py, see --help]
#   bash train.sh                                        the embedded tiny model, a few minutes on a CPU
#   bash train.sh --model Qwen2.5-Math-1.5B --nproc 8    AIME 2024 on eight GPUs
# N is the number of processes. The default is one per GPU, or without GPUs one per core, up to 4.
# Relative paths, such as --data FILE, are relative to the caller's folder.
# On several nodes, run the same line on each. HOST is the address of one node, --out a folder that all share:
#   bash train.sh --nnodes 2 --rdzv-endpoint HOST:29400 --max-restarts 3 --out /shared/run ...
# These flags, and --local-addr, are torchrun's.
set -euo pipefail

nproc='' nnodes=1 endpoint='' address='' restarts=0 flags=()
while [ $# -gt 0 ]; do
    case $1 in
        *=*) value=${1#*=} words=1 ;;
        *) value=${2-none} words=$(($# > 1 ? 2 : 1)) ;;
    esac
    case ${1%%=*} in
        --nproc) nproc=$value ;;
        --nnodes) nnodes=$value ;;
        --rdzv-endpoint) endpoint=$value ;;
        --local-addr) address=$value ;;
        --max-restarts) restarts=$value ;;
        *) flags+=("$1"); words=1 ;;
    esac
    shift "$words"
done

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ''
case $nproc in *[!0-9]* | 0) refuse "--nproc is the number of processes, 1 or more, not $nproc" ;; esac
case $nnodes in *[!0-9]* | 0 | '') refuse "--nnodes is the number of nodes, 1 or more, not $nnodes" ;; esac
case $restarts in *[!0-9]* | '') refuse "--max-restarts is a number, 0 or more, not $restarts" ;; esac
[ "$nnodes" = 1 ] || [ -n "$endpoint" ] || refuse "--nnodes $nnodes needs --rdzv-endpoint HOST:PORT"
ttrl=("$PYTHON" "$checkout/ttrl.py" ${flags[@]+"${flags[@]}"})
if [ -z "$nproc" ]; then
    count='import os, torch; print(torch.cuda.device_count() or min(os.cpu_count(), 4))'
    nproc=$(cd "$checkout" && "$PYTHON" -c "$count")
fi
if [ "$nproc $nnodes $restarts" = '1 1 0' ]; then
    exec "${ttrl[@]}"
fi
# Processes scale better than threads: they synchronize once per update, threads at every matrix product.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$nnodes" = 1 ]; then
    # Use the loopback address. The default is the host name, which may not resolve offline and then hangs.
    meet=(--standalone --local-addr "${address:-127.0.0.1}")
else
    # This node's address: that of the interface which leads to HOST, whatever its name resolves to elsewhere.
    route='import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.connect((sys.argv[1], 9))
print(s.getsockname()[0])'
    host=${endpoint%:*}
    address=${address:-$("$PYTHON" -I -c "$route" "$host" 2>/dev/null)} \
        || refuse "--rdzv-endpoint $endpoint: $host cannot be reached; give the IP address of a node"
    case $host:$address in
        127.* | localhost:*) ;;
        *:127.*) refuse "--rdzv-endpoint $endpoint: $host is $address here; give the IP address of a node" ;;
    esac
    # A rank 0 that comes back has another store. Agents that share the rendezvous' would not hear of it.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    meet=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --local-addr "$address")
fi
# Report a wrong flag here in one sentence; torchrun would add a page about failed processes.
plan=$(WORLD_SIZE=$((nnodes * nproc)) LOCAL_WORLD_SIZE=$nproc "${ttrl[@]}" --dry-run) || exit $?
case " ${flags[*]-} " in *" --help "* | *" -h "* | *" --dry-run "*) echo "$plan"; exit ;; esac
# Like `python -m torch.distributed.run`, but without searching the caller's folder for modules, and with the
# exit code of a signal or of the first rank that failed instead of a page.
torchrun='import sys; sys.path.pop(0)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
except ChildFailedError as failed:
    code = failed.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)'
exec "$PYTHON" -c "$torchrun" "${meet[@]}" --max-restarts "$restarts" --nproc-per-node "$nproc" "${ttrl[@]:1}"
