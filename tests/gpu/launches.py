"""Kernel launches of the models of the table, bf16 under autocast, batch 8, on a pretended GPU.

python -m tests.gpu.launches            # prints them beside launches.json
python -m tests.gpu.launches --write    # and writes launches.json anew
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from tests.gpu.subjects import FULL
from tests.gpu.worker import Worker

TABLE = Path(__file__).with_name("launches.json")


def read_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"torch": "", "launches": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write launches.json")
    args = parser.parse_args()
    old, new = read_table()["launches"], {}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        for name in FULL:
            new[name] = worker.ask("count_launches", name)
            for selection, launches in new[name].items():
                before = old.get(name, {}).get(selection)
                print(name, selection, before, "->", launches, flush=True)
        worker.close()
    if args.write:
        version = torch.__version__.partition("+")[0]
        TABLE.write_text(json.dumps({"torch": version, "launches": new}, indent=2) + "\n")


if __name__ == "__main__":
    main()
