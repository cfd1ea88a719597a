#!/usr/bin/env bash
# The table of selection.md: for every kind of videos and every family, train on all tokens, then
# fine-tune and test each way to select at a quarter of the tokens, over several seeds.
#   bash projects/stts/selection.sh [DIR]
# What is done is not done again. A part of it: KINDS=motion MODELS=mvit SEEDS=1 bash ...
# TIME, SPACE and BOTH are the budgets, SCORERS who competes; TRAIN and TEST set the numbers of
# videos, EPOCHS and TUNE_EPOCHS the length of both trainings.
set -euo pipefail
out="${1:-selection}"
read -ra kinds <<< "${KINDS:-needle motion clutter}"
read -ra models <<< "${MODELS:-mvit timesformer video_swin}"
for kind in "${kinds[@]}"; do
    data="$out/$kind"
    if [ ! -e "$data/video_swin.yaml" ]; then  # the last that it writes
        stts make-data --kind "$kind" --out "$data" --test "${TEST:-256}" --train "${TRAIN:-1024}"
    fi
    for model in "${models[@]}"; do
        cfg="$data/$model.yaml"
        stts run --engine standalone --cfg "$cfg" --opts SOLVER.MAX_EPOCH "${EPOCHS:-7}"
        trained=("$data/run_$model/checkpoints/"checkpoint_epoch_*.pyth)
        stts study --cfg "$cfg" --checkpoint "${trained[-1]}" --out "$data/study_$model" \
            --time ${TIME-0.25} --space ${SPACE-0.25} --both ${BOTH-0.5x0.5} --seeds "${SEEDS:-3}" \
            --scorers ${SCORERS:-learned uniform random} --train \
            --recipe SOLVER.BASE_LR 1e-3 SOLVER.MAX_EPOCH "${TUNE_EPOCHS:-4}" \
            SOLVER.WARMUP_EPOCHS 0.0 STTS.FREEZE_BACKBONE_EPOCHS 0.5
    done
done
