"""The state folder: what it holds is what was committed, and nothing is read that was not."""

import hashlib
import os
import re
import stat
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from recap_cli.errors import CorruptStateError, StageOrderError, StateError
from recap_cli.state import files
from recap_cli.state.store import STAGES, State
from tests.state.made import BEST, RECIPE, advance, alter, committed, tree


def test_init_commits_what_was_written_and_nothing_else(state: State) -> None:
    manifest = state.manifest
    assert (manifest.schema, manifest.round, manifest.stage, manifest.recipe_digest) == (3, 0, "init", "d1")
    assert (manifest.full, manifest.small, manifest.best, manifest.versions) == ("full-000", None, None, {"recap": "0.1.0"})
    assert set(manifest.files) == {"recipe.yaml", "full-000/model.txt", "full-000/deep/config.json"}
    assert manifest.files["full-000/model.txt"].bytes == 4
    assert manifest.files["full-000/model.txt"].sha256 == hashlib.sha256(b"zero").hexdigest()
    assert state.recipe_text == RECIPE
    assert tree(state.path) == committed(state.path)


def test_history_has_one_entry_per_stage_with_its_facts(state: State) -> None:
    advance(state, "prune")
    first, second = state.manifest.history
    assert (first["stage"], first["round"], first["metric"]) == ("init", 0, 0.5)
    assert (second["stage"], second["round"]) == ("prune", 1)
    assert second["seconds"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", second["finished"])
    assert State.open(state.path).manifest == state.manifest


def test_a_round_goes_from_prune_to_merge_and_the_next_begins_with_prune(state: State) -> None:
    for stage, number in [("prune", 1), ("mask", 1), ("finetune", 1), ("merge", 1), ("prune", 2)]:
        assert state.next_stage() == stage
        with state.writing(stage) as transaction:
            assert (transaction.stage, transaction.round) == (stage, number)
        assert (state.manifest.stage, state.manifest.round) == (stage, number)


@pytest.mark.parametrize("asked", [stage for stage in STAGES if stage != "mask"])
def test_a_stage_out_of_order_names_the_one_done_and_the_next_command(state: State, asked: str) -> None:
    advance(state, "prune")
    before = (state.path / "state.yaml").read_bytes()
    with pytest.raises(StageOrderError) as caught, state.writing(asked):
        pytest.fail("the body ran")
    assert "`prune` of round 1 is done" in caught.value.message
    assert f"not `{asked}`" in caught.value.message
    assert caught.value.hint == f"recap mask {state.path}"
    assert (state.path / "state.yaml").read_bytes() == before


def test_tensors_come_back_bit_for_bit(state: State) -> None:
    tensors = {
        "w": torch.randn(4, 6),
        "t": torch.randn(4, 6).T,
        "keep": torch.tensor([True, False]),
        "b": torch.ones(3).bfloat16(),
    }
    with state.writing("prune") as transaction:
        transaction.save_tensors("round-001/small.safetensors", tensors)
        transaction.set_small("round-001")
    loaded = state.load_tensors("round-001/small.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(state.path / "round-001/small.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers opens no checkpoint
    loaded["w"].zero_()  # the caller's own, not the file's
    assert torch.equal(State.open(state.path).load_tensors("round-001/small.safetensors")["w"], tensors["w"])


def test_saving_copies_no_contiguous_tensor(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    real, seen = safetensors.torch.save_file, {}

    def spy(tensors: dict[str, torch.Tensor], *rest: object) -> None:
        seen.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        real(tensors, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", spy)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    with state.writing("prune") as transaction:
        transaction.save_tensors("round-001/w.safetensors", {"w": weight})
    assert seen == {"w": weight.data_ptr()}


def test_saved_files_are_as_readable_as_any_other(state: State) -> None:
    with state.writing("prune") as transaction:
        transaction.save_text("round-001/a.txt", "a")
        transaction.save_tensors("round-001/w.safetensors", {"w": torch.ones(2)})
    text, tensors = (stat.S_IMODE((state.path / "round-001" / name).stat().st_mode) for name in ("a.txt", "w.safetensors"))
    assert text == tensors


def test_json_and_text_come_back(state: State) -> None:
    with state.writing("prune") as transaction:
        transaction.save_json("round-001/metrics.json", {"accuracy": 0.25, "über": [1, None]})
        transaction.save_text("round-001/note.txt", "žluť\r\n")
    assert state.load_json("round-001/metrics.json") == {"accuracy": 0.25, "über": [1, None]}
    assert state.load_text("round-001/note.txt") == "žluť\r\n"


def test_a_file_written_again_after_it_was_hashed_is_hashed_again(state: State) -> None:
    with state.writing("prune") as transaction:
        transaction.save_tensors("round-001/w.safetensors", {"w": torch.zeros(4)})
        time.sleep(0.02)
        transaction.save_tensors("round-001/w.safetensors", {"w": torch.ones(4)})
        transaction.save_tensors("round-001/v.safetensors", {"v": torch.ones(4)})
        alter(transaction.path("round-001/v.safetensors"), b"other")
    assert state.load_tensors("round-001/w.safetensors")["w"].sum() == 4
    assert state.load_text("round-001/v.safetensors") == "other"


def test_dropped_files_stay_until_the_commit_and_are_gone_after_it(state: State) -> None:
    with state.writing("prune") as transaction:
        transaction.drop("full-000")
        transaction.save_text("full-001/model.txt", "one")
        transaction.set_full("full-001")
        transaction.save_text("best-001/model.txt", "best")
        transaction.set_best(BEST)
        assert (state.path / "full-000/model.txt").read_text() == "zero"
    assert tree(state.path) == {"state.yaml", "recipe.yaml", "full-001/model.txt", "best-001/model.txt"}
    assert not (state.path / "full-000").exists()
    assert state.manifest.best == BEST


@pytest.mark.parametrize(
    "misuse",
    [
        lambda transaction: transaction.path("../outside.txt"),
        lambda transaction: transaction.path("round-001/../../outside.txt"),
        lambda transaction: transaction.path("/etc/passwd"),
        lambda transaction: transaction.path("notes/a.txt"),
        lambda transaction: transaction.path("full-001"),
        lambda transaction: transaction.path("recipe.yaml"),
        lambda transaction: transaction.path("full-000/model.txt"),
        lambda transaction: transaction.path("round-001/never-written"),
        lambda transaction: transaction.drop("full-007"),
        lambda transaction: transaction.drop("recipe.yaml"),
        lambda transaction: transaction.set_small("round-007"),
        lambda transaction: transaction.drop("full-000"),
        lambda transaction: transaction.facts.update(stage="other"),
        lambda transaction: transaction.set_full("full-0"),
        lambda transaction: transaction.set_full(None),
        lambda transaction: transaction.set_best({**BEST, "folder": "full-000"}),
        lambda transaction: transaction.set_best({"folder": "full-000"}),
        lambda transaction: transaction.versions.update(recap=1),
    ],
)
def test_misuse_by_a_stage_is_an_error_and_commits_nothing(state: State, misuse: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"\w+: .+|facts"), state.writing("prune") as transaction:
        misuse(transaction)
    assert State.open(state.path).manifest.stage == "init"
    assert tree(state.path) == committed(state.path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: alter(path, path.read_bytes()[:-1]), "it has 79 bytes, 80 were committed"),
        (lambda path: alter(path, path.read_bytes()[:-1] + b"\1"), "its sha256 begins with"),
        (lambda path: path.unlink(), "it is missing"),
    ],
)
def test_a_truncated_altered_or_missing_tensor_file_is_named(
    state: State, damage: Callable[[Path], object], message: str
) -> None:
    with state.writing("prune") as transaction:
        transaction.save_tensors("round-001/w.safetensors", {"w": torch.zeros(2)})
    path = state.path / "round-001/w.safetensors"
    message = message.replace("79", str(path.stat().st_size - 1)).replace("80", str(path.stat().st_size))
    assert state.load_tensors("round-001/w.safetensors")["w"].tolist() == [0, 0]
    damage(path)
    for read in (state.load_tensors, state.verified, lambda _: state.verified("round-001")):
        with pytest.raises(CorruptStateError, match=re.escape(f"{path}: {message}")) as caught:
            read("round-001/w.safetensors")
        assert caught.value.hint
    assert State.open(state.path).next_stage() == "mask"


def test_a_committed_file_that_holds_no_tensors_is_named(state: State) -> None:
    with pytest.raises(CorruptStateError, match=r"model\.txt: is no safetensors file"):
        state.load_tensors("full-000/model.txt")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.usefixtures("permissions")
@pytest.mark.parametrize("rel", ["full-000/deep", "full-000/model.txt", "full-000", "recipe.yaml", "state.yaml"])
def test_what_may_not_be_read_is_called_neither_damaged_nor_full(state: State, rel: str) -> None:
    (state.path / rel).chmod(0)

    def read() -> None:
        State.open(state.path).verified("full-000")

    def write() -> None:
        advance(State.open(state.path), "prune")

    for use in (read, write) if rel.startswith("full-000/deep") or rel == "full-000" else (read,):
        with pytest.raises(StateError, match=r"(may not|cannot) be read.*Permission denied") as caught:
            use()
        assert type(caught.value) is StateError
        assert caught.value.hint == "check the permissions of the folder and its files; the state is as it was"
    (state.path / rel).chmod(0o700)
    advance(State.open(state.path), "prune")


def test_reading_what_is_not_part_of_the_state_is_refused(state: State) -> None:
    (state.path / "full-000/extra.txt").write_text("x")
    with pytest.raises(StateError, match=r"full-000/extra\.txt is not part of this state"):
        state.load_text("full-000/extra.txt")


def test_a_reader_whose_state_trained_on_is_told_so(state: State) -> None:
    reader = State.open(state.path)
    with state.writing("prune") as transaction:
        transaction.drop("full-000")
        transaction.save_text("full-001/model.txt", "one")
        transaction.set_full("full-001")
    with pytest.raises(StateError, match="another process finished `prune` of round 1") as caught:
        reader.load_text("full-000/model.txt")
    assert not isinstance(caught.value, CorruptStateError)


def test_a_file_is_hashed_once_per_process(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    with state.writing("prune") as transaction:
        transaction.save_tensors("round-001/w.safetensors", {"w": torch.zeros(2)})
    real, hashed = hashlib.file_digest, []

    def spy(file: BufferedReader, name: str) -> object:
        hashed.append(file.name)
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    State.open(state.path).load_tensors("round-001/w.safetensors")
    assert hashed == []  # the commit has done it
    files._checksummed.clear()
    for _ in range(2):
        State.open(state.path).load_tensors("round-001/w.safetensors")
    assert sorted(Path(name).name for name in hashed) == ["recipe.yaml", "w.safetensors"]
