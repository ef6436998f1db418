#!/usr/bin/env bash
# Train on one or several hosts under Open MPI's mpirun. Python needs no mpi4py: MPI only starts the processes.
#
#   launch/mpi/pretrain.sh MPIRUN OPTIONS -- ARGUMENTS OF pretrain_gpt.py
#   launch/mpi/pretrain.sh -np 16 --hostfile hosts -- --deepspeed_config ds_configs/zero1_bf16.json ...
#
# Start one process a GPU. The host file is Open MPI's ("NAME slots=8"). Every host needs the repository and the
# Python environment under the same paths.
#
# Environment: SCRIPT (launch/pretrain_gpt.py), PYTHON (python), MASTER_PORT (29500), MASTER_ADDR (first host of
# --hostfile or --host, else this one). These and NCCL_*, GLOO_*, TORCH_*, DS_*, CUDA_*, OMP_NUM_THREADS, PATH,
# PYTHONPATH and LD_LIBRARY_PATH reach all processes; send others with mpirun's -x.
# Check the cluster first:  SCRIPT=launch/check_cluster.py launch/mpi/pretrain.sh -np 16 --hostfile hosts --
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "pretrain.sh: $*" >&2
    exit 2
}

if [[ $# -eq 0 || "${1-}" == "-h" || "${1-}" == "--help" ]]; then
    usage
    exit 0
fi
options=()
while [[ $# -gt 0 && "$1" != "--" ]]; do
    options+=("$1")
    shift
done
[[ $# -gt 0 ]] || fail "-- is missing between mpirun's options and the script's arguments; see --help"
shift

# Open MPI gives rank 0 to the first slot of the first host.
first_host() {
    local index value
    for ((index = 0; index + 1 < ${#options[@]}; index++)); do
        value=${options[index + 1]}
        case ${options[index]} in
        -hostfile | --hostfile | -machinefile | --machinefile | -default-hostfile | --default-hostfile)
            [[ -r "$value" ]] || fail "${options[index]} $value: cannot be read"
            sed 's/#.*//' "$value" | awk 'NF {print $1; exit}'
            return
            ;;
        -H | -host | --host)
            value=${value%%,*}
            echo "${value%%:*}"
            return
            ;;
        esac
    done
    echo 127.0.0.1
}

command -v mpirun >/dev/null || fail "mpirun is not installed; install Open MPI, or use launch/no_ssh or launch/pdsh"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
script=${SCRIPT:-launch/pretrain_gpt.py}
[[ -f "$repository/$script" ]] || fail "SCRIPT $script: no such file in $repository"
MASTER_ADDR=${MASTER_ADDR:-$(first_host)}
MASTER_PORT=${MASTER_PORT:-29500}
export MASTER_ADDR MASTER_PORT

sent=()
while IFS= read -r name; do
    case $name in
    MASTER_ADDR | MASTER_PORT | OMP_NUM_THREADS | PATH | PYTHONPATH | LD_LIBRARY_PATH | VIRTUAL_ENV) sent+=(-x "$name") ;;
    NCCL_* | GLOO_* | TORCH_* | DS_* | CUDA_*) sent+=(-x "$name") ;;
    esac
done < <(compgen -e)

exec mpirun "${sent[@]}" "${options[@]}" bash "$repository/launch/mpi/rank.sh" \
    "${PYTHON:-python}" "$repository/$script" "$@"
