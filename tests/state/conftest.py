"""What the tests of the state folder share."""

from pathlib import Path

import pytest

from recap_cli.state.store import State
from tests.state.made import create


@pytest.fixture
def state(tmp_path: Path) -> State:
    return create(tmp_path / "s")
