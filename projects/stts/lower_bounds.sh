#!/usr/bin/env bash
# Installs the oldest versions that setup.cfg allows, each ">=" as "==", and runs a small model.
#   bash projects/stts/lower_bounds.sh [DIR]
# The environment, about 6 GB, is created in DIR (default: a temporary folder) and removed at the end.
# PYTHON names an interpreter (default: the oldest one found).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=${1:-$(mktemp -d)}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
for candidate in "${PYTHON:-}" python3.10 python3.11 python3; do
    [ -n "$candidate" ] && "$candidate" -c "" 2> /dev/null && break
done
trap 'rm -rf "$dir/venv" "$dir/run"' EXIT
"$candidate" -m venv "$dir/venv"
source "$dir/venv/bin/activate"
python - "$root/setup.cfg" > "$dir/venv/bounds.txt" << 'PYTHON'
import configparser
import sys

config = configparser.ConfigParser()
config.read(sys.argv[1])
lists = [config["options"]["install_requires"]]
lists += [config["options.extras_require"][extra] for extra in ("standalone", "tools")]
for line in "\n".join(lists).split("\n"):
    if ">=" in line:
        print(line.strip().replace(">=", "=="))
PYTHON
cat "$dir/venv/bounds.txt"
pip=(python -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" -r "$dir/venv/bounds.txt" "pytest>=8.0" "setuptools>=64,<81" wheel
mkdir -p "$dir/run/sources" # a copy, because building leaves folders behind
cp -r "$root"/{stts_slowfast,configs,setup.cfg,pyproject.toml,README.md,LICENSE} "$dir/run/sources"
"${pip[@]}" --no-deps --no-build-isolation "$dir/run/sources"
cp -r "$root/tests" "$root/pyproject.toml" "$dir/run"
cd "$dir/run" # tests the installed package, not the working tree
# Tests that compile or export are skipped: the oldest compiler does not support what they trace.
echo "torch.compile and torch.export are not tested with the oldest versions"
python -m pytest -q --import-mode=importlib -p no:cacheprovider \
    -k "not compil and not exported and not has_no_place_for_it" \
    tests/test_topk.py tests/test_selectors.py tests/test_hooks.py tests/test_config.py \
    tests/backbones tests/checkpoints tests/video tests/standalone/test_config.py \
    tests/standalone/test_engine.py
stts run --help > /dev/null
echo "the lower bounds of setup.cfg work with $(python --version)"
