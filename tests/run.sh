#!/usr/bin/env bash
# Runs ruff and the test suite in .venv, which is made where it is missing.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=dev,export,hosts
source projects/stts/setup_venv.sh
ruff check .
ruff format --check .
# Two files of tests at a time, a thread each: the same order of tests in a file as without. A test
# that ends its process ends them all, where a new process would wait for it for ever.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist loadfile --max-worker-restart=0 "$@"
