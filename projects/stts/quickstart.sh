#!/usr/bin/env bash
# Trains a selection on synthetic videos: creates .venv, then runs `stts quickstart`.
#   bash projects/stts/quickstart.sh [DIR] [--smoke] [--seed N]
# Writes videos, configs, runs, a table and report.html to DIR (default: ./quickstart).
set -euo pipefail
out="quickstart"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    out="$1"
    shift
fi
extras=all
source "$(dirname "$0")/setup_venv.sh"
exec stts quickstart --out "$out" "$@"
