#!/usr/bin/env bash
# Runs ruff and the test suite in .venv, which is made where it is missing.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=dev,export,hosts
source projects/stts/setup_venv.sh
ruff check .
ruff format --check .
python -m pytest "$@"
