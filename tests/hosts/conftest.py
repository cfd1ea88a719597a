"""Runs a test with every host."""

import pytest

from tests.hosts.examples import EXAMPLES


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]()
