"""A process that pretends to have a GPU, and how a test asks it.

Each line that it reads is a function of ``subjects`` or ``loops`` and its arguments, each that it
writes is what came of it. The tests themselves, and what else runs in their process, see no GPU.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 300.0  # seconds for one answer


def find_compiler() -> str | None:
    """A C compiler, for the stub of the CUDA runtime."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))), None)


class Worker:
    """The process; ``ask(function, *arguments)`` gives what the function returns.

    Args:
        folder: where the stub is compiled to.
    """

    def __init__(self, folder: Path):
        library = folder / "libcuda.so.1"
        source = HERE / "driver_stub.c"
        compiler = find_compiler()
        assert compiler, "there is no C compiler"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder)}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=HERE.parents[1],
            text=True,
        )

    def ask(self, function: str, *arguments):
        self.process.stdin.write(json.dumps([function, *arguments]) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        answer = self.process.stdout.readline() if ready else ""
        assert answer, f"the worker gave no answer to {function}{arguments}"
        result, error = json.loads(answer)
        assert not error, error
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    # What libraries print goes to stderr.
    answers, sys.stdout = sys.stdout, sys.stderr
    from tests.gpu import loops, pretended_cuda, subjects

    pretended_cuda.install()
    for line in sys.stdin:
        function, *arguments = json.loads(line)
        try:
            module = subjects if hasattr(subjects, function) else loops
            answer = [getattr(module, function)(*arguments), ""]
        except Exception:
            answer = [None, traceback.format_exc()]
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # the threads of autograd's device would not end


if __name__ == "__main__":
    main()
