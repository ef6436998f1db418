#!/usr/bin/env bash
# Train on several hosts without ssh: run this on every host, by hand or from your scheduler.
#
#   launch/no_ssh/pretrain_node.sh NODE_RANK HOSTFILE [--] ARGUMENTS OF pretrain_gpt.py
#
# NODE_RANK is the line of this host in HOSTFILE, from 0. HOSTFILE has one line a host,
# "NAME slots=NUMBER OF GPUS", and is the same everywhere. The order of starting does not matter.
#
# Environment: SCRIPT (launch/pretrain_gpt.py), PYTHON (python), MASTER_ADDR (the first host), MASTER_PORT (29500).
# Check the cluster first:  SCRIPT=launch/check_cluster.py launch/no_ssh/pretrain_node.sh 0 HOSTFILE
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "pretrain_node.sh: $*" >&2
    exit 2
}

if [[ "${1-}" == "-h" || "${1-}" == "--help" ]]; then
    usage
    exit 0
fi
[[ $# -ge 2 ]] || fail "NODE_RANK and HOSTFILE are needed; see --help"
node_rank=$1
hostfile=$2
shift 2
if [[ "${1-}" == "--" ]]; then shift; fi

[[ -r "$hostfile" ]] || fail "HOSTFILE $hostfile: cannot be read"
mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF {print $1}')
[[ ${#hosts[@]} -ge 1 ]] || fail "HOSTFILE $hostfile: names no host"
[[ "$node_rank" =~ ^[0-9]+$ && "$node_rank" -lt ${#hosts[@]} ]] ||
    fail "NODE_RANK $node_rank: must be 0 to $((${#hosts[@]} - 1)), a line of $hostfile"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
script=${SCRIPT:-launch/pretrain_gpt.py}
[[ -f "$repository/$script" ]] || fail "SCRIPT $script: no such file in $repository"

exec "${PYTHON:-python}" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" \
    --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "${MASTER_PORT:-29500}" "$repository/$script" "$@"
