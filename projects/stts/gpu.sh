#!/usr/bin/env bash
# Everything that ten minutes of a GPU can tell, without a network:
#   bash projects/stts/gpu.sh pack          # beforehand, with a network: wheels to gpu_wheels/
#   bash projects/stts/gpu.sh OUT           # on the GPU's machine; it has PyTorch and transformers
#   bash projects/stts/gpu.sh OUT --device cpu --tiny     # the same parts, rehearsed
# Each part has a time limit, and writes OUT/PART.json and OUT/PART.log; OUT/report.md has their
# tables. A part of it: ... OUT --parts bench graphs.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
wheels=$root/projects/stts/gpu_wheels
python=${PYTHON:-python3}

if [ "${1:-}" = pack ]; then
    if [ $# -ne 1 ]; then
        echo "usage: bash projects/stts/gpu.sh pack (it takes no options: FOR_PYTHON=3.12 in front)" >&2
        exit 2
    fi
    for_python=${FOR_PYTHON:-3.12} # of the GPU's machine
    mkdir -p "$wheels"
    "$python" -m pip --quiet wheel --no-deps --wheel-dir "$wheels" fvcore iopath
    "$python" -m pip --quiet download --no-deps --only-binary :all: --dest "$wheels" \
        --python-version "$for_python" --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        av simplejson wrapt yacs portalocker termcolor tabulate tqdm filelock \
        lightning-fabric lightning-utilities pytest pluggy iniconfig rich pygments \
        markdown-it-py mdurl
    size=$(du -sm "$wheels" | cut -f 1)
    echo "$(ls "$wheels" | wc -l) wheels, $size MiB in $wheels"
    [ "$size" -lt 64 ]
    exit
fi

"$python" "$root/projects/stts/gpu_parts.py" "$@" --check # before anything is made: OUT and options
out=$1
shift
mkdir -p "$out"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if ls "$wheels"/*.whl > /dev/null 2>&1; then
    # In front of what the machine has: none of them is PyTorch or NumPy.
    "$python" -m pip --quiet install --no-index --no-deps --upgrade --target "$out/site" "$wheels"/*.whl
    export PYTHONPATH=$PYTHONPATH:$(realpath "$out/site")
fi
exec "$python" "$root/projects/stts/gpu_parts.py" "$out" "$@"
