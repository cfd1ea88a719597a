#!/usr/bin/env bash
# Runs ruff, mypy and the test suite in .venv, and creates .venv if it is missing.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=dev,export,hosts
source projects/stts/setup_venv.sh
ruff check .
ruff format --check .
mypy
# Two test files run in parallel with one thread each, and tests of a file stay in order. A test that
# ends its process fails the whole run; a restarted worker would wait for it forever.
export OMP_NUM_THREADS=1
python -m pytest -n 2 --dist loadfile --max-worker-restart=0 "$@"
