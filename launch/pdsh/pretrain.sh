#!/usr/bin/env bash
# Train on several hosts with DeepSpeed's launcher, which starts the others through pdsh and ssh.
#
#   launch/pdsh/pretrain.sh HOSTFILE [--] ARGUMENTS OF pretrain_gpt.py
#
# HOSTFILE has one line a host: "NAME slots=NUMBER OF GPUS"; run this on the first of them. Every host needs the
# repository and the Python environment under the same paths, and ssh without a password from here.
# Variables are sent when they start with NCCL (GPUs), PYTHON or UCX, or stand in ./.deepspeed_env or ~/.deepspeed_env
# (NAME=VALUE lines). DeepSpeed puts arguments into single quotes for the way: none may hold one itself.
#
# Environment: SCRIPT (launch/pretrain_gpt.py), PYTHON (python), MASTER_ADDR (the first host), MASTER_PORT (29500).
# Check the cluster first:  SCRIPT=launch/check_cluster.py launch/pdsh/pretrain.sh HOSTFILE -- --expect-world 16
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "pretrain.sh: $*" >&2
    exit 2
}

if [[ "${1-}" == "-h" || "${1-}" == "--help" ]]; then
    usage
    exit 0
fi
[[ $# -ge 1 ]] || fail "HOSTFILE is missing; see --help"
hostfile=$1
shift
if [[ "${1-}" == "--" ]]; then shift; fi

[[ -r "$hostfile" ]] || fail "HOSTFILE $hostfile: cannot be read"
command -v pdsh >/dev/null || fail "pdsh is not installed; install it, or use launch/no_ssh, launch/mpi or launch/slurm"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
script=${SCRIPT:-launch/pretrain_gpt.py}
[[ -f "$repository/$script" ]] || fail "SCRIPT $script: no such file in $repository"

launch=(--hostfile "$hostfile" --launcher pdsh --master_port "${MASTER_PORT:-29500}")
if [[ -n "${MASTER_ADDR-}" ]]; then launch+=(--master_addr "$MASTER_ADDR"); fi
exec "${PYTHON:-python}" -m deepspeed.launcher.runner "${launch[@]}" "$repository/$script" "$@"
