"""Which column of a table holds the label maps, where nobody or somebody has said it."""

from typing import Any

import pyarrow as pa
import pytest

from recap_cli.data.guess import guess_columns
from recap_cli.tasks.calls import task_named

TABLE = pa.table({name: pa.array([f"{name}/0.png"]) for name in ("image", "mask", "depth")})


@pytest.mark.parametrize(
    ("given", "found"), [({}, {"label_map": "mask", "image": "image"}), ({"label_map": "depth"}, {"image": "image"})]
)
def test_maps_are_the_column_that_is_named_so_or_that_the_user_says(given: dict[str, Any], found: dict[str, str]) -> None:
    assert guess_columns(task_named("semantic-segmentation"), TABLE, "table", given) == found
