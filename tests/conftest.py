"""What tests of several folders share."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test, or the command line that it calls, sets in the environment is gone after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps on tiny models: threads that wait for each other cost more there than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
