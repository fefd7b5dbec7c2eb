"""What the record of a plugin means where it says nothing."""

from dataclasses import fields

import pytest

from recap_cli.core.adapter import Heads
from recap_cli.core.frozen_weight import FrozenWeight
from recap_cli.core.method import Method, Settings
from recap_cli.core.ragged import Ragged
from recap_cli.core.ranking import Limits
from recap_cli.core.task import Labels, Task
from recap_cli.trainable.optim import adamw, sgd
from recap_cli.training.loop import Steps


@pytest.mark.parametrize(
    ("record", "name", "default"),
    [
        (Method, "prunes", False),
        (Method, "masks", False),
        (Method, "training", None),
        (Method, "extra", None),
        (Method, "lr", 2e-4),
        (Task, "constant", None),
        (Task, "distillation", None),
        (Task, "problem_type", None),
        (Task, "timm", False),
        (Task, "fewest", 2),
        (Task, "extra", None),
        (Heads, "shared", False),
        (Ragged, "left", False),
        (FrozenWeight, "name", ""),
        (Settings, "ramp", 1.0),
        (Labels, "words", True),
        (Limits, "rank_by", "parameter"),
        (Steps, "hint", None),
        (Steps, "if_not_finite", "nothing is kept"),
    ],
)
def test_a_default_is_the_one_that_plugins_rely_on(record: type, name: str, default: object) -> None:
    (found,) = (field.default for field in fields(record) if field.name == name)
    assert found == default
    assert type(found) is type(default)


def test_a_rule_has_the_name_that_a_recipe_gives_it() -> None:
    assert [adamw(betas=(0.9, 0.999), eps=1e-8).name, sgd(momentum=0.9).name] == ["adamw", "sgd"]
