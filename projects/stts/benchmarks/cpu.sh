#!/usr/bin/env bash
# Measures the CPU tables of ../benchmarks.md with one thread, in core-seconds, so that other work on
# the machine has little effect. Takes about an hour of a core. tables.py writes them.
#   bash projects/stts/benchmarks/cpu.sh [FOLDER for JSON files and plots] [PART ...]
# Parts: mvit mvitv2 frames frames_64 timesformer_8x32 timesformer_96x4 swin topk decoders
# exact_frames, and with SlowFast at $SLOWFAST_ROOT models loader loaders end_to_end whole_test
# (default: all). authors.py and tokens.py are run by themselves.
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=${1:-benchmarks}
mkdir -p "$out"
parts=" ${*:2} "
configs=configs/Kinetics
STOCK=STTS.ENABLE=False,STTS.FUSED_ATTENTION=False
FUSED=STTS.ENABLE=False
mvit=$configs/STTS_MVIT_B_16x4_T0
mvit2=$configs/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9.yaml
timesformer=$configs/STTS_TIMESFORMER
swin=$configs/STTS_SWIN_B_32x2_T0

export OMP_NUM_THREADS=1
bench() { stts bench --core-seconds --batch-size 1 --repeats 2 "$@"; }

wanted() { [[ $parts == "  " || $parts == *" $1 "* ]]; }

if wanted mvit; then
    bench "stock=${mvit}_0.9_S4_0.9.yaml,$STOCK" \
        "all tokens fused=${mvit}_0.9_S4_0.9.yaml,$FUSED" \
        "T0_0.9-S4_0.9=${mvit}_0.9_S4_0.9.yaml" "T0_0.8-S4_0.9=${mvit}_0.8_S4_0.9.yaml" \
        "T0_0.6-S4_0.9=${mvit}_0.6_S4_0.9.yaml" "T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml" \
        "T0_0.4-S4_0.6=${mvit}_0.4_S4_0.6.yaml" \
        --json "$out/mvit.json" --plot "$out/mvit.png"
fi
if wanted mvitv2; then
    bench "stock=$mvit2,$STOCK" "all tokens fused=$mvit2,$FUSED" "T0_0.9-S4_0.9=$mvit2" \
        --json "$out/mvitv2.json" --plot "$out/mvitv2.png"
fi
if wanted frames; then
    rows=("stock=${mvit}_0.5_S4_0.7.yaml,$STOCK" "T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml")
    bench "${rows[@]}" --modes eval --no-memory --frames 16 32 --json "$out/frames.json"
fi
if wanted frames_64; then  # a step takes half a minute: once, without warm-up
    rows=("stock=${mvit}_0.5_S4_0.7.yaml,$STOCK" "T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml")
    bench "${rows[@]}" --modes eval --no-memory --frames 64 --warmup 0 --repeats 1 \
        --json "$out/frames_64.json"
fi
if wanted timesformer_8x32; then
    bench "8x32 all tokens=${timesformer}_8x32_T0_0.9_S4_0.9.yaml,$FUSED" \
        "8x32 T0_0.9-S4_0.9=${timesformer}_8x32_T0_0.9_S4_0.9.yaml" \
        --no-memory --json "$out/timesformer_8x32.json"
fi
if wanted timesformer_96x4; then
    bench "96x4 all tokens=${timesformer}_96x4_T0_0.5_S4_0.9.yaml,$FUSED" \
        "96x4 T0_0.5-S4_0.9=${timesformer}_96x4_T0_0.5_S4_0.9.yaml" \
        --modes eval --warmup 0 --repeats 1 --no-memory --json "$out/timesformer_96x4.json"
fi
if wanted swin; then
    bench "Swin-B all tokens=${swin}_0.9.yaml,$FUSED" "Swin-B T0_0.9=${swin}_0.9.yaml" \
        "Swin-B T0_0.6=${swin}_0.6.yaml" "Swin-B T0_0.4=${swin}_0.4.yaml" \
        --modes eval --warmup 0 --repeats 1 --no-memory --json "$out/swin.json"
fi
for script in topk decoders exact_frames; do
    if wanted $script; then
        python projects/stts/benchmarks/$script.py --json "$out/$script.json"
    fi
done
[ -n "${SLOWFAST_ROOT:-}" ] || exit 0
slowfast=$SLOWFAST_ROOT/configs/Kinetics
if wanted models; then
    bench --engine slowfast "MViT-B 16x4=$slowfast/MVIT_B_16x4_CONV.yaml" \
        "the same with STTS.ENABLE=$slowfast/MVIT_B_16x4_CONV.yaml,STTS.ENABLE=True" \
        "MViT-B 16x4 T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml" \
        "MViTv2-S 16x4=$slowfast/MVITv2_S_16x4.yaml" "MViTv2-S 16x4 T0_0.9-S4_0.9=$mvit2" \
        "SlowFast 8x8 R50=$slowfast/SLOWFAST_8x8_R50.yaml" "X3D-M=$slowfast/X3D_M.yaml" \
        "C2D 8x8 R50=$slowfast/C2D_8x8_R50.yaml" "I3D 8x8 R50=$slowfast/I3D_8x8_R50.yaml" \
        --modes eval --no-memory --json "$out/models.json"
fi
for script in loader whole_test; do
    if wanted $script; then
        python projects/stts/benchmarks/$script.py --json "$out/$script.json"
    fi
done
videos=$(mktemp -d)
trap 'rm -r "$videos"' EXIT
small=,DATA.PATH_TO_DATA_DIR=$videos,DATA_LOADER.PIN_MEMORY=False
if wanted loaders; then  # in the process itself, whose core time is measured
    python projects/stts/benchmarks/sample_videos.py "$videos"
    small+=,TRAIN.BATCH_SIZE=3,TEST.BATCH_SIZE=10
    for engine in slowfast standalone; do
        rows=("MViT-B 16x4=$slowfast/MVIT_B_16x4_CONV.yaml$small")
        rows+=("MViTv2-S 16x4=$slowfast/MVITv2_S_16x4.yaml$small")
        if [ $engine = slowfast ]; then
            rows+=("SlowFast 8x8 R50=$slowfast/SLOWFAST_8x8_R50.yaml$small")
            rows+=("X3D-M=$slowfast/X3D_M.yaml$small" "C2D 8x8 R50=$slowfast/C2D_8x8_R50.yaml$small")
            rows+=("I3D 8x8 R50=$slowfast/I3D_8x8_R50.yaml$small")
        fi
        stts bench --engine $engine "${rows[@]}" --data --batches 2 \
            --json "$out/loaders_$engine.json"
    done
fi
if wanted end_to_end; then  # a whole test of two videos
    python projects/stts/benchmarks/sample_videos.py "$videos" 2
    small+=,TEST.NUM_ENSEMBLE_VIEWS=5,TEST.NUM_SPATIAL_CROPS=1,TEST.BATCH_SIZE=1
    for engine in standalone slowfast; do
        stts bench --engine $engine --end-to-end --workers 1 --json "$out/end_to_end_$engine.json" \
            "all tokens=$slowfast/MVIT_B_16x4_CONV.yaml$small" \
            "T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml$small"
    done
fi
