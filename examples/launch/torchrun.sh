#!/usr/bin/env bash
# One node of a training under torchrun: start it on every node, with the same variables but for NODE_RANK.
#
#   NODES=8 NODE_RANK=0 MASTER_ADDR=node0 CONFIG=examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml \
#     examples/launch/torchrun.sh --parallel.shard 8
#
# NODES               number of nodes (1)
# NODE_RANK           this node's number, from 0 (0)
# GPUS                processes on this node, one per device (8)
# MASTER_ADDR         host of node 0 (localhost)
# MASTER_PORT         a free port there (29500)
# CONFIG              the run's YAML file
# OUTPUT              the run's folder, which all nodes must see (outputs/launched)
# GRACE               seconds from SIGTERM to SIGKILL (300; torch before 2.12 kills after 30 whatever this says): longer
#                     than a step, a network call of a validation and a save together
# GLOO_SOCKET_IFNAME  network interface between the nodes, where a node has several (`ip -br addr`); NCCL has its own,
#                     NCCL_SOCKET_IFNAME
# Further words are flags of `fastvideo distill`. A run that was stopped goes on from its newest checkpoint,
# of OUTPUT or of its mirror (checkpoint.mirror).
#
# SIGTERM and SIGUSR1 to this script stop the run with a checkpoint. It ends with the exit code of the run's processes
# (75: stopped and saved, 2: a mistake in the config, 1: anything that failed), which torchrun alone turns into 1.
set -euo pipefail

: "${CONFIG:?the YAML file of the run}"
OUTPUT=${OUTPUT:-outputs/launched}
RESUME=()
# With a mirror also on a disk that is new: the run goes on from its newest checkpoint there, or begins if there is none.
if [ -e "$OUTPUT/config.yaml" ] ||
  [[ " $*" == *" --checkpoint.mirror"[\ =]* ]] ||
  grep -Eqs '^[^#]*\bmirror: *[^ #]+://' "$CONFIG"; then
  RESUME=(--resume)
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-300}
FASTVIDEO_EXIT_CODES=$(mktemp)
export FASTVIDEO_EXIT_CODES

torchrun \
  --nnodes "${NODES:-1}" \
  --node-rank "${NODE_RANK:-0}" \
  --nproc-per-node "${GPUS:-8}" \
  --master-addr "${MASTER_ADDR:-localhost}" \
  --master-port "${MASTER_PORT:-29500}" \
  -m fastvideo.training.distillation --config "$CONFIG" --output "$OUTPUT" "${RESUME[@]}" "$@" &
launcher=$!

# A signal ends `wait` and not torchrun, so wait again. Ctrl-C reaches torchrun from the terminal.
trap 'kill -TERM $launcher 2>/dev/null || true' TERM USR1
trap : INT
code=0
wait $launcher || code=$?
while kill -0 $launcher 2>/dev/null; do
  code=0
  wait $launcher || code=$?
done

words=$(sort -n "$FASTVIDEO_EXIT_CODES" | uniq)
rm -f "$FASTVIDEO_EXIT_CODES"
if [ $code -ne 0 ] && [ -n "$words" ]; then
  # One process that failed is a failed run, whatever the others say.
  code=$(grep -qx 1 <<<"$words" && echo 1 || tail -n 1 <<<"$words")
fi
exit "$code"
