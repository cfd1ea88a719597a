#!/usr/bin/env bash
# Makes the table of results in docs/experiments.md. For each family and kind of videos it trains on all
# tokens, then fine-tunes and tests each scorer at a quarter of the tokens, an eighth and 3%, over
# several seeds.
#   bash projects/stts/selection.sh [DIR]
# Finished steps are not repeated. For a part of the table: KINDS=motion MODELS=mvit SEEDS=1 bash ...
# TIME, SPACE, BOTH and LEAST set the budgets, SCORERS the scorers, TRAIN and TEST the numbers of
# videos, EPOCHS and TUNE_EPOCHS the length of both trainings, JOBS how many jobs run at once
# (default: one a core), TEACHER how scorers learn (then studies are in DIR/KIND/study_MODEL_TEACHER),
# FREEZE the epochs in which the backbone is frozen. The output of a job is in DIR/KIND/MODEL.log.
# TimeSformer on motion trains twice as long on all tokens, and has one window for all frames
# (docs/experiments.md explains why).
# If a model does not learn a kind from all tokens (below LEARNED percent), it is skipped with a line.
set -euo pipefail
export OUT="${1:-selection}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
kinds="${KINDS:-clutter needle motion}"
jobs="${JOBS:-$(env -u OMP_NUM_THREADS nproc)}"  # nproc takes OMP_NUM_THREADS as a limit

make_data() {
    if [ ! -e "$OUT/$1/video_swin.yaml" ]; then  # the last file that make-data writes
        stts make-data --kind "$1" --out "$OUT/$1" --test "${TEST:-256}" --train "${TRAIN:-1024}" --force
    fi
}

study() {
    local model="$1" kind="$2" data="$OUT/$2" trained top1 both="${BOTH-0.5x0.25}"
    local epochs="${EPOCHS:-7}" freeze="${FREEZE:-0.5}" shared=False
    if [ "$model $kind" = "timesformer motion" ]; then
        epochs=$((2 * epochs)) shared=True
    fi
    stts run --engine standalone --cfg "$data/$model.yaml" --opts SOLVER.MAX_EPOCH "$epochs"
    top1="$(grep -o '"top1_acc": "[0-9]*' "$data/run_$model/json_stats.log" | tail -n 1)"
    if [ "${top1##*\"}" -lt "${LEARNED:-90}" ]; then
        echo "skipped: $model on $kind, because all tokens reach ${top1##*\"}%"
        return
    fi
    # One frame does not show motion.
    if [ "$kind" != motion ]; then both="$both ${LEAST-0.125x0.25}"; fi
    trained=("$data/run_$model/checkpoints/"checkpoint_epoch_*.pyth)
    stts study --cfg "$data/$model.yaml" --checkpoint "${trained[-1]}" --out "$data/study_$model${TEACHER:+_$TEACHER}" \
        --time ${TIME-0.25} --space ${SPACE-0.25} --both $both --seeds "${SEEDS:-3}" \
        --scorers ${SCORERS:-learned uniform random} --train \
        --recipe SOLVER.BASE_LR 1e-3 SOLVER.MAX_EPOCH "${TUNE_EPOCHS:-4}" \
        SOLVER.WARMUP_EPOCHS 0.0 STTS.FREEZE_BACKBONE_EPOCHS "$freeze" \
        STTS.TEACHER "${TEACHER:-both}" \
        --opts STTS.SPACE.SHARED "$shared" \
        DATA_LOADER.NUM_WORKERS 0  # one process caches all videos
}

job() {
    local log="$OUT/$2/$1.log"
    bash -euo pipefail -c 'study "$@"' study "$@" > "$log" 2>&1 || { tail -n 3 "$log" >&2; exit 1; }
    grep "^skipped: $1 on\|^wrote.*csv" "$log" || true
}
export -f make_data study job

xargs -P "$jobs" -n 1 bash -c 'make_data "$1"' make_data <<< "$kinds"
for model in ${MODELS:-timesformer video_swin mvit}; do  # longest jobs first
    for kind in $kinds; do
        echo "$model" "$kind"
    done
done | xargs -P "$jobs" -n 2 bash -c 'job "$@"' job
