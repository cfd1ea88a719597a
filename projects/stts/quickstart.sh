#!/usr/bin/env bash
# Watch selection being learned on real video: sets up .venv, then runs `stts quickstart`.
#   bash projects/stts/quickstart.sh [DIR] [--smoke] [--seed N]
# DIR (./quickstart where none is given) gets videos, configs, runs, a table, and report.html to look at.
set -euo pipefail
out="quickstart"
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
    out="$1"
    shift
fi
extras=all
source "$(dirname "$0")/setup_venv.sh"
exec stts quickstart --out "$out" "$@"
