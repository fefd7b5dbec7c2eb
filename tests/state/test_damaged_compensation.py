"""The change of a compensated cut, damaged or not one of a stage: refused before anything is written."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from recap_cli.errors import CorruptStateError
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import summary
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.manifest import manifest_text, read_manifest
from recap_cli.state.store import State
from tests.state.test_damage import contents, forge, gone, of_another_shape, of_another_type, under_another_name
from tests.tiny import tiny

REL = "round-001/compensation.safetensors"


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A compensated state before its first merge, and one after it; the second round keeps the plan."""
    root = tmp_path_factory.mktemp("compensated")
    found = {"merge": root / "merge", "prune 2": root / "prune 2"}
    copied = {"finetune": found["merge"], "merge": found["prune 2"]}

    def copy_state(facts: dict[str, Any]) -> None:
        if facts["stage"] in copied and facts["round"] == 1:
            shutil.copytree(root / "now", copied[facts["stage"]])

    recipe = tiny("vit", head={"warmup_epochs": 0}, prune={"compensate": 0.1, "steps": 1}, finetune={"steps": 1})
    run(recipe, root / "now", on_stage=copy_state)
    return found


@pytest.fixture
def damaged(states: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the states, to be damaged."""
    return lambda name: Path(shutil.copytree(states[name], tmp_path / "state"))


READERS: dict[str, Callable[[State], object]] = {
    "merge": merge,
    "prune 2": prune,
    "small": lambda state: evaluate(state, which=["small"]),
}


def a_change_more(tensors: dict[str, Tensor], name: str) -> None:
    tensors["vit.layers.0.mlp.fc1.weight"] = torch.zeros(2, 32)  # which is cut along its outputs


@pytest.mark.parametrize("change", [of_another_shape, of_another_type, under_another_name, gone, a_change_more])
@pytest.mark.parametrize("reader", READERS)
def test_a_change_that_no_stage_has_written_is_refused_whatever_its_checksum(
    reader: str, change: Callable[[dict[str, Tensor], str], None], damaged: Callable[[str], Path]
) -> None:
    path = damaged("merge" if reader == "small" else reader)
    tensors = load((path / REL).read_bytes())
    change(tensors, sorted(tensors)[0])
    state, before = forge(path, REL, save(tensors)), contents(path)
    with pytest.raises(CorruptStateError, match=REL) as caught:
        READERS[reader](state)
    assert caught.value.hint
    assert contents(path) == before


def test_a_change_that_was_altered_is_refused(damaged: Callable[[str], Path]) -> None:
    path = damaged("merge")
    data = bytearray((path / REL).read_bytes())
    data[-1] ^= 1
    (path / REL).write_bytes(data)
    with pytest.raises(CorruptStateError, match=REL):
        merge(State.open(path))


def _without_file(files: dict[str, Any], entry: dict[str, Any]) -> None:
    del files[REL]


def _without_note(files: dict[str, Any], entry: dict[str, Any]) -> None:
    del entry["compensated"]


def _noted_as_none(files: dict[str, Any], entry: dict[str, Any]) -> None:
    entry["compensated"] = None


def _without_shares(files: dict[str, Any], entry: dict[str, Any]) -> None:
    entry["compensated"] = {"given_back_share": 0.5}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (_without_file, f"{REL} is not in files"),
        (_without_note, r"history\[1\].compensated is missing"),
        (_noted_as_none, f"{REL} is in files, and `prune` of round 1 has noted no change"),
        (_without_shares, r"history\[1\].compensated.left_shares is missing"),
    ],
)
def test_a_state_yaml_that_does_not_agree_with_the_change_is_refused(
    alter: Callable[[dict[str, Any], dict[str, Any]], None], message: str, damaged: Callable[[str], Path]
) -> None:
    path = damaged("merge")
    manifest = read_manifest(path)
    files, history = dict(manifest.files), [dict(entry) for entry in manifest.history]
    alter(files, history[1])
    (path / "state.yaml").write_text(manifest_text(replace(manifest, files=files, history=history)))
    for look in (summary, Context):
        with pytest.raises(CorruptStateError, match=message):
            look(State.open(path))


def test_a_note_of_a_change_that_the_recipe_does_not_make_is_refused(tmp_path: Path) -> None:
    state = init(tiny("vit", head={"warmup_epochs": 0}), tmp_path / "state")
    prune(state)
    manifest = read_manifest(state.path)
    history = [{**entry, "compensated": None} if entry["stage"] == "prune" else entry for entry in manifest.history]
    (state.path / "state.yaml").write_text(manifest_text(replace(manifest, history=history)))
    with pytest.raises(CorruptStateError, match=r"history\[1\].compensated"):
        Context(State.open(state.path))
