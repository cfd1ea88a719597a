#!/usr/bin/env bash
# Runs ruff, mypy and the test suite in .venv, which is made if it is missing.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=dev,export,hosts
source projects/stts/setup_venv.sh
ruff check .
ruff format --check .
mypy
# Two files of tests at a time, one thread each; tests of a file run in their order. If a test kills
# its process, all end, instead of waiting for a result for ever.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist loadfile --max-worker-restart=0 "$@"
