"""The runner starts with Fabric alone."""

import subprocess
import sys


def test_the_runner_does_not_wait_for_packages_that_it_does_not_use():
    script = (
        "import sys, stts_slowfast.standalone.engine\n"
        "heavy = {'lightning', 'torchmetrics', 'transformers', 'tensorboard', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
