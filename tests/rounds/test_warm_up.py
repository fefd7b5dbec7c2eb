"""A warm-up of the head that diverges: said of the warm-up, with the setting of the warm-up, and no state is left."""

from pathlib import Path

import pytest

from recap_cli.errors import TrainingError
from recap_cli.stages.init import init
from tests.tiny import tiny


@pytest.mark.filterwarnings("ignore:.*overflow.*")
@pytest.mark.parametrize(
    ("epochs", "said"),
    [
        (3, r"the loss is (nan|inf) at step \d+; it is the head's warm-up, and no state is made"),
        (1, r"the validation loss is (nan|inf) after the head's warm-up; no state is made"),
    ],
    ids=["a later step shows it", "the last step ruins it"],
)
def test_a_warm_up_that_diverges_makes_no_state(epochs: int, said: str, tmp_path: Path) -> None:
    recipe = tiny("vit", head={"lr": 3e37, "warmup_epochs": epochs, "batch_size": 64})
    with pytest.raises(TrainingError, match=said) as caught:
        init(recipe, tmp_path / "state")
    assert "--set head.lr=" in str(caught.value.hint)
    assert not (tmp_path / "state").exists()
