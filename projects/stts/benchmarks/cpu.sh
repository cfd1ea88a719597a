#!/usr/bin/env bash
# Measures every table of ../benchmarks.md for a CPU; about 20 minutes on 2 cores, alone on them.
#   bash projects/stts/benchmarks/cpu.sh [folder for the JSON files and pictures]
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=${1:-benchmarks}
mkdir -p "$out"
configs=configs/Kinetics
STOCK=STTS.ENABLE=False,STTS.FUSED_ATTENTION=False
FUSED=STTS.ENABLE=False

mvit=$configs/STTS_MVIT_B_16x4_T0
stts bench "stock=${mvit}_0.9_S4_0.9.yaml,$STOCK" "all tokens fused=${mvit}_0.9_S4_0.9.yaml,$FUSED" \
    "T0_0.9-S4_0.9=${mvit}_0.9_S4_0.9.yaml" "T0_0.8-S4_0.9=${mvit}_0.8_S4_0.9.yaml" \
    "T0_0.6-S4_0.9=${mvit}_0.6_S4_0.9.yaml" "T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml" \
    "T0_0.4-S4_0.6=${mvit}_0.4_S4_0.6.yaml" \
    --json "$out/mvit.json" --plot "$out/mvit.png"

mvit2=$configs/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9.yaml
stts bench "stock=$mvit2,$STOCK" "all tokens fused=$mvit2,$FUSED" "T0_0.9-S4_0.9=$mvit2" \
    --repeats 3 --json "$out/mvitv2.json"

stts bench "stock=${mvit}_0.5_S4_0.7.yaml,$STOCK" "T0_0.5-S4_0.7=${mvit}_0.5_S4_0.7.yaml" \
    --frames 16 32 64 --batch-size 1 --modes eval --repeats 3 --no-memory \
    --json "$out/frames.json" --plot "$out/frames.png"

python projects/stts/benchmarks/topk.py
