"""A process with a pretended GPU for all tests of a session."""

import pytest

from tests.gpu.worker import Worker, find_compiler


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    if find_compiler() is None:
        pytest.skip("no C compiler (cc, gcc or $CC), which the pretended GPU needs")
    worker = Worker(tmp_path_factory.mktemp("pretended-cuda"))
    yield worker
    worker.close()
