"""`recap-lora`: rounds that train low-rank adapters of the small model, in a share of its blocks, and merge them."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recap_cli.core.surgery import IndexMap, gather, indices
from recap_cli.errors import RecipeError
from recap_cli.plugins.methods.recap_lora import drawn
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.plans import round_plans_for
from recap_cli.rounds.run_context import Context
from recap_cli.stages.init import init
from recap_cli.stages.run import STAGES
from recap_cli.state.store import State
from tests.tiny import tiny

RANK = 2


class Round(NamedTuple):
    """What a round did to the full model: the layout, the entries of the small model, and the tensors before and after."""

    layout: Layout
    kept: IndexMap
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def changed(self) -> set[str]:
        """The tensors that are no longer as they were, but for the head's."""
        names = {name for name, tensor in self.before.items() if not torch.equal(tensor, self.after[name])}
        return names - set(self.layout.head)

    def blocks(self) -> set[str]:
        return {name.partition("layer.")[2].partition(".")[0] for name in self.changed()}


def rounds_of(path: Path, name: str, count: int, **options: Any) -> list[Round]:
    recipe = tiny(name, method="recap-lora", rounds=count, options={"rank": RANK, "alpha": 4, **options})
    state, found = init(recipe, path), []
    for number in range(1, count + 1):
        before = Context(State.open(path)).full_tensors()
        for stage in STAGES.values():
            state = State.open(path)
            stage(state)
        context = Context(State.open(path))
        layout = context.layout
        kept = indices(layout.axes, context.plan(f"round-{number:03d}"), layout.shapes)
        found.append(Round(layout, kept, before, context.full_tensors()))
    return found


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_each_round_adds_a_change_of_low_rank_to_the_matrices_of_the_small_model(name: str, tmp_path: Path) -> None:
    for one in rounds_of(tmp_path / "state", name, 2):
        names = one.changed()
        assert names
        assert all(name.endswith("weight") and name in one.layout.along for name in names)
        for each in names:
            delta = one.after[each] - one.before[each]
            assert torch.linalg.matrix_rank(delta.double(), tol=1e-5) <= RANK * (3 if "qkv" in each else 1)
            inside = gather({each: delta}, one.kept)[each]
            assert torch.isclose(inside.square().sum(), delta.square().sum())  # nothing outside the small model has changed


def test_a_share_of_the_blocks_is_drawn_anew_in_each_round(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path / "state", "bert", 4, blocks=0.5)
    assert all(len(one.blocks()) == 1 for one in rounds)  # of two
    assert len({frozenset(one.blocks()) for one in rounds}) == 2
    assert [one.blocks() for one in rounds_of(tmp_path / "again", "bert", 4, blocks=0.5)] == [one.blocks() for one in rounds]
    axes = rounds[0].layout.axes
    torch.manual_seed(0)
    assert len({tuple(axis.name for axis in drawn(axes, 0.5)) for _ in range(20)}) == 2
    assert len(drawn(axes, 1.0)) == len(axes)
    assert len(drawn(axes, 0.01)) == 2  # heads and neurons of one block


def test_every_round_prunes_to_the_ratio_and_the_last_ones_keep_the_plan() -> None:
    plans = round_plans_for(tiny("bert", method="recap-lora", rounds=4))
    assert [plan.prune_ratio for plan in plans] == [0.4] * 4
    assert [plan.plan for plan in plans] == ["importance", "importance", "same", "same"]
    assert {plan.trains for plan in plans} == {"training"}
    assert all(plan.product for plan in plans)


@pytest.mark.parametrize(("options", "said"), [({"blocks": 0}, "options.blocks"), ({"blocks": 1.5}, "options.blocks")])
def test_a_share_of_blocks_that_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"{said}: expected a number above 0, and at most 1"):
        round_plans_for(tiny("bert", method="recap-lora", options=options))
