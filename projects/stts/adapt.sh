#!/usr/bin/env bash
# Makes the table of adapted classifiers in docs/experiments.md ("Without labels"): trains the small ViT of
# a kind of synthetic videos on all tokens, then adapts it without labels to keep single tokens, with
# learned, random and uniform ones alike, and compares on other videos.
#   bash projects/stts/adapt.sh [DIR]
# KIND sets the kind, SEEDS the seeds, STEPS the length of each adaptation, EPOCHS that of the training,
# BACKBONE= leaves the backbone as it is. Finished steps are not repeated. The rows are in
# DIR/KIND/adapt_SCORER_SEED/adapt.json.
set -euo pipefail
out="${1:-adapt}" kind="${KIND:-needle}" steps="${STEPS:-100}" backbone="${BACKBONE---backbone}"
data="$out/$kind"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ ! -e "$data/vit.yaml" ]; then
    stts make-data --kind "$kind" --out "$data" --train 1024 --test 256
fi
stts run --engine standalone --cfg "$data/vit.yaml" --opts SOLVER.MAX_EPOCH "${EPOCHS:-7}" \
    DATA_LOADER.NUM_WORKERS 0 > "$data/train.log"
trained=("$data/run_vit/checkpoints/"checkpoint_epoch_*.pyth)
for seed in ${SEEDS:-0 1 2}; do
    for scorer in ${SCORERS:-learned random uniform}; do
        if [ "$scorer" != learned ] && [ -z "$backbone" ]; then continue; fi  # nothing would learn
        target="$data/adapt_${scorer}_$seed"
        if [ -e "$target/adapt.json" ]; then continue; fi
        echo "$kind, $scorer, seed $seed"
        stts adapt --cfg "$data/vit.yaml" --checkpoint "${trained[-1]}" --out "$target" \
            --films "$data/train.csv" --test-films "$data/test.csv" --steps "$steps" $backbone \
            --opts RNG_SEED "$seed" STTS.TIME.BLOCKS "[]" STTS.SPACE.BLOCKS "[]" \
            STTS.TOKENS.BLOCKS "[1]" STTS.TOKENS.KEEP "[[0.12, 0.5]]" \
            STTS.TOKENS.SCORER "$scorer" DATA_LOADER.NUM_WORKERS 0
    done
done
