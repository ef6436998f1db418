#!/usr/bin/env bash
# Run a command with torch.distributed's variables made from those of Open MPI (or of PMI); used by pretrain.sh.
#
#   mpirun ... bash launch/mpi/rank.sh python launch/pretrain_gpt.py ...
#
# DeepSpeed itself would import mpi4py for this.
set -euo pipefail

if [[ $# -eq 0 || "${1-}" == "-h" || "${1-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit 0
fi
RANK=${OMPI_COMM_WORLD_RANK:-${PMI_RANK-}}
WORLD_SIZE=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE-}}
LOCAL_RANK=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID-}}
LOCAL_WORLD_SIZE=${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS-}}
if [[ -z "$RANK" || -z "$WORLD_SIZE" || -z "$LOCAL_RANK" ]]; then
    echo "rank.sh: no OMPI_COMM_WORLD_RANK, _SIZE and _LOCAL_RANK; start it with mpirun" >&2
    exit 2
fi
export RANK WORLD_SIZE LOCAL_RANK
if [[ -n "$LOCAL_WORLD_SIZE" ]]; then
    export LOCAL_WORLD_SIZE LOCAL_SIZE="$LOCAL_WORLD_SIZE" # the second is DeepSpeed's name on CPUs
fi
: "${MASTER_ADDR:?set by launch/mpi/pretrain.sh}" "${MASTER_PORT:?set by launch/mpi/pretrain.sh}"
exec "$@"
