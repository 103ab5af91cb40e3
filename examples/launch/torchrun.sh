#!/usr/bin/env bash
# One node of a training under torchrun: start it on every node, with the same variables but for NODE_RANK.
#
#   NODES=8 NODE_RANK=0 MASTER_ADDR=node0 CONFIG=examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml \
#     examples/launch/torchrun.sh --parallel.shard 8
#
# NODES          number of nodes (1)
# NODE_RANK      this node's number, from 0 (0)
# GPUS           processes on this node, one per device (8)
# MASTER_ADDR    host of node 0 (localhost)
# MASTER_PORT    a free port there (29500)
# CONFIG         the run's YAML file
# OUTPUT         the run's folder, which all nodes must see (outputs/launched)
# Further words are flags of `fastvideo distill`. A run that was stopped goes on from its newest checkpoint.
set -euo pipefail

: "${CONFIG:?the YAML file of the run}"
OUTPUT=${OUTPUT:-outputs/launched}
RESUME=()
if [ -e "$OUTPUT/config.yaml" ]; then
  RESUME=(--resume)
fi

exec torchrun \
  --nnodes "${NODES:-1}" \
  --node-rank "${NODE_RANK:-0}" \
  --nproc-per-node "${GPUS:-8}" \
  --master-addr "${MASTER_ADDR:-localhost}" \
  --master-port "${MASTER_PORT:-29500}" \
  -m fastvideo.training.distillation --config "$CONFIG" --output "$OUTPUT" "${RESUME[@]}" "$@"
