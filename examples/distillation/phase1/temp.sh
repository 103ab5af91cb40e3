#!/usr/bin/env bash
# Edit the paths, then start:  bash examples/distillation/phase1/temp.sh
set -euo pipefail

export NUM_GPUS=8
export STUDENT_MODEL_PATH=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
export TEACHER_MODEL_PATH=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
export CRITIC_MODEL_PATH=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
export PROMPTS=examples/distillation/prompts.txt
export OUTPUT_DIR=outputs/phase1_temp
export MAX_STEPS=4000

exec bash "$(dirname "${BASH_SOURCE[0]}")/distill_wan2.1_t2v_1.3B_dmd2_8steps.sh" "$@"
