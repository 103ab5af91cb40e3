#!/usr/bin/env bash
# Distils Wan2.1-T2V-1.3B into an 8-step student with DMD2, through the general entry (DMD2Method x WanAdapter).
#
#   bash examples/distillation/phase1/distill_wan2.1_t2v_1.3B_dmd2_8steps.sh [--SECTION.FIELD VALUE ...]
#
# Environment (each has a default):
#   NUM_GPUS             GPUs of this machine (8), which split the networks; on one, whole ones fill a card of 80 GB
#   MASTER_PORT          port where they meet (29504)
#   CONFIG               recipe; what is set below overrides it (examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml)
#   STUDENT_MODEL_PATH   diffusers folder or hub id of the student, its text encoder and its VAE
#   TEACHER_MODEL_PATH   the teacher's; a larger one, such as Wan-AI/Wan2.1-T2V-14B-Diffusers, needs the memory for it
#   CRITIC_MODEL_PATH    what the critic starts from (as the student)
#   PROMPTS              text file, one prompt per line
#   OUTPUT_DIR           the run's folder; must be new (add --resume to continue a run, --overwrite to delete it)
#   MAX_STEPS            steps (4000)
#
# Any further argument goes to the entry, so every field of the config can be set from here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

NUM_GPUS=${NUM_GPUS:-8}
MASTER_PORT=${MASTER_PORT:-29504}
CONFIG=${CONFIG:-examples/distillation/wan2.1_t2v_1.3b_dmd2.yaml}
STUDENT_MODEL_PATH=${STUDENT_MODEL_PATH:-Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
TEACHER_MODEL_PATH=${TEACHER_MODEL_PATH:-Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
CRITIC_MODEL_PATH=${CRITIC_MODEL_PATH:-$STUDENT_MODEL_PATH}
PROMPTS=${PROMPTS:-examples/distillation/prompts.txt}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/phase1_wan2.1_t2v_1.3B_dmd2_8steps}
MAX_STEPS=${MAX_STEPS:-4000}

# FastVideo's 8-step list 1000,850,700,550,350,275,200,125: timesteps as they stand, so t = step / 1000.
LADDER=(1.0 0.85 0.7 0.55 0.35 0.275 0.2 0.125)

export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

torchrun --nnodes 1 --nproc-per-node "$NUM_GPUS" --master-port "$MASTER_PORT" \
  fastvideo/training/distillation.py \
  --distill-model wan \
  --distill-method dmd2 \
  --config "$CONFIG" \
  --model.path "$STUDENT_MODEL_PATH" \
  --roles.teacher.path "$TEACHER_MODEL_PATH" \
  --roles.critic.path "$CRITIC_MODEL_PATH" \
  --ladder.times "${LADDER[@]}" \
  --data.prompts "$PROMPTS" \
  --trainer.max-steps "$MAX_STEPS" \
  --parallel.shard "$NUM_GPUS" \
  --output "$OUTPUT_DIR" \
  "$@"
