"""The state folder: one commit point, whoever is killed whenever; one writer; nothing read that was not committed."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open

from recap_cli.errors import CorruptStateError, StageOrderError, StateError, StateLockedError, StorageError
from recap_cli.state import files
from recap_cli.state import store as state_module
from recap_cli.state.manifest import CHECKSUMMED, ELSEWHERE, FIELDS, checksummed, manifest_text
from recap_cli.state.store import STAGES, State

RECIPE = "name: test\n"
BEST = {"round": 1, "metric": "accuracy", "value": 0.9, "loss": 0.2, "folder": "best-001", "noted": "by merge"}


def create(path: Path) -> State:
    with State.create(path, RECIPE, "d1") as transaction:
        transaction.save_text("full-000/model.txt", "zero")
        transaction.save_json("full-000/deep/config.json", {"hidden": 32})
        transaction.set_full("full-000")
        transaction.versions["recap"] = "0.1.0"
        transaction.facts["metric"] = 0.5
    return State.open(path)


def advance(state: State, stage: str, text: str = "one") -> None:
    with state.writing(stage) as transaction:
        transaction.save_text(f"round-{transaction.round:03d}/{stage}.txt", text)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return create(tmp_path / "s")


def tree(root: Path) -> set[str]:
    """Every file below `root`, but not the lock, which stays between writers."""
    found = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    return found - {".recap-lock"}


def committed(root: Path) -> set[str]:
    return {"state.yaml", *State.open(root).manifest.files}


def alter(path: Path, data: bytes) -> None:
    time.sleep(0.02)  # the clock of file times ticks every few milliseconds
    path.write_bytes(data)


def rewrite(state: State, **changes: object) -> None:
    """Other facts under a checksum that is right: as another program would write them."""
    place = state.path / "state.yaml"
    facts = yaml.safe_load(place.read_text())
    place.write_text(checksummed(yaml.safe_dump({**facts, **changes})))


def script(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "child.py"
    file.write_text(text)
    return [sys.executable, str(file)]


# --- what a state is -------------------------------------------------------------------------------------------------


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


# --- making and opening ----------------------------------------------------------------------------------------------


def test_a_second_init_refuses_the_state_that_is_there(state: State) -> None:
    with pytest.raises(StateError, match="is a state already") as caught:
        create(state.path)
    assert "--state" in str(caught.value.hint)
    assert f"recap run --state {state.path}" in str(caught.value.hint)
    assert tree(state.path) == committed(state.path)


def test_init_refuses_a_folder_with_other_things_and_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "full-000").mkdir()
    with pytest.raises(StateError, match="not empty"):
        create(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full-000", "thesis.tex"]


def test_init_takes_an_empty_folder(tmp_path: Path) -> None:
    assert create(tmp_path).next_stage() == "prune"


@pytest.mark.parametrize("error", [RuntimeError("adapter"), KeyboardInterrupt()])
def test_a_failed_init_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(root: Path) -> None:
        with State.create(root, RECIPE, "d") as transaction:
            transaction.save_text("full-000/model.txt", "zero")
            raise error

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(type(error)):
            fail(tmp_path / name)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("kept", ["names", "model.txt", ".recap-transaction"])
@pytest.mark.parametrize("made", [True, False])
def test_a_failed_init_that_cannot_clean_up_leaves_a_folder_that_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, made: bool, error: BaseException
) -> None:
    root = tmp_path / "s"
    if not made:
        root.mkdir()

    def failing(patched: pytest.MonkeyPatch) -> None:
        with State.create(root, RECIPE, "d") as transaction:
            transaction.save_text("full-000/model.txt", "zero")
            refuse_to_remove(kept, error, patched)
            raise RuntimeError("adapter")

    with monkeypatch.context() as patched, pytest.raises((RuntimeError, KeyboardInterrupt)):
        failing(patched)
    assert root.exists()
    with pytest.raises(StateError, match="its `init` was stopped") as caught:
        State.open(root)
    assert caught.value.hint == f"recap init RECIPE --state {root}"
    state = create(root)
    assert tree(root) == committed(root)
    assert state.next_stage() == "prune"


def refuse_to_remove(name: str, error: BaseException, patched: pytest.MonkeyPatch) -> None:
    """Let every removal of a file or folder of this name fail, by `pathlib` and by `shutil`."""

    def guard(plainly: Callable[..., None]) -> Callable[..., None]:
        def remove(path: Path | str, *more: object, **how: object) -> None:
            if Path(path).name == name:
                raise error
            plainly(path, *more, **how)

        return remove

    for place, function in ((Path, "unlink"), (os, "unlink"), (os, "rmdir")):
        patched.setattr(place, function, guard(getattr(place, function)))


def test_init_where_a_file_stands_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="is a file"):
        create(tmp_path / "file")
    with pytest.raises(StorageError, match=r"file.s: cannot be written: Not a directory"):
        create(tmp_path / "file" / "s")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission of a folder")
@pytest.mark.usefixtures("permissions")
def test_init_in_an_unwritable_folder_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        create(tmp_path / "s")
    tmp_path.chmod(0o700)
    assert "--state" in str(caught.value.hint)


def test_opening_what_is_no_state_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, message in [("none", "there is no such folder"), ("file", "is a file"), ("folder", "has no state.yaml")]:
        with pytest.raises(StateError, match=message) as caught:
            State.open(tmp_path / name)
        new = f"recap init RECIPE --state {tmp_path / name}"
        assert caught.value.hint == (ELSEWHERE if name == "file" else new)
    (tmp_path / "folder" / "thesis.tex").touch()
    for place in (tmp_path / "folder", tmp_path / "file" / "below", Path("/dev/null"), tmp_path / ("n" * 300)):
        with pytest.raises(StateError) as caught:
            State.open(place)
        assert caught.value.hint == ELSEWHERE


def test_what_can_be_no_folder_is_not_called_unwritable(tmp_path: Path) -> None:
    for place, error, message in [
        (Path("/dev/null"), StateError, "is a file, not a folder"),
        (tmp_path / ("n" * 300), StorageError, "File name too long"),
    ]:
        with pytest.raises(error, match=message) as caught:
            create(place)
        assert "--state" in str(caught.value.hint)
        assert "writable" not in str(caught.value.hint)


def test_a_path_through_folders_that_are_not_there_makes_none_of_them(state: State, tmp_path: Path) -> None:
    around = f"{state.path}/full-000/x/../../../{state.path.name}/"
    with pytest.raises(StateError, match="is a state already"):
        create(around)  # type: ignore[arg-type]  # as text, which keeps its slashes
    assert State.open(around).path == state.path
    assert tree(state.path) == committed(state.path)
    assert not (state.path / "full-000/x").exists()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert create(tmp_path / "link" / ".." / "new").next_stage() == "prune"
    assert (tmp_path / "far" / "new" / "state.yaml").exists()


def test_a_newer_schema_is_refused_with_both_versions(state: State) -> None:
    rewrite(state, schema=7, versions={"recap": "9.1"}, files="another shape")
    with pytest.raises(StateError, match=r"schema 7, written by recap 9\.1, and this recap reads only schema 3") as caught:
        State.open(state.path)
    assert not isinstance(caught.value, CorruptStateError)
    assert "the version of recap that made the state" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no schema number"),
        ("schema: 3\nround: [", "state.yaml, line [23]: is no YAML"),
        ("schema: 3\n", "round is missing"),
        ("!!python/object/apply:os.system [echo]", "is no YAML"),
        ("!!bool maybe", "is no YAML"),
        ("schema: 3\nx: 2026-99-99\n", "is no YAML"),
        ("schema: 3\nx: " + "[" * 50_000, "is no YAML"),
        ("\0", "is no YAML"),
        ("schema: 3\nround: 0\nround: 1\n", "round stands in it twice"),
        ("schema: 3\nx:\n- {a: 1, a: 2}\n", "a stands in it twice"),
        (
            "x: &a [1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrst")),
            "schema",
        ),
    ],
)
def test_a_malformed_state_yaml_is_named(state: State, text: str, message: str) -> None:
    (state.path / "state.yaml").write_text(checksummed(text))
    with pytest.raises(CorruptStateError, match=message) as caught:
        State.open(state.path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "distill"}, "stage is missing or not"),
        ({"history": 3}, "history is missing or not"),
        ({"schema": "3"}, "has no schema number"),
        ({"round": -1}, "round is missing or not"),
        ({"round": 1}, "does not lead to init of round 1"),
        ({"round": 1000}, "does not lead to init of round 1000"),
        ({"stage": "merge"}, "does not lead to merge of round 0"),
        ({"history": []}, "does not lead to init"),
        ({"history": [{"stage": "init"}]}, r"history\[0\]\.round is missing"),
        ({"plugins": {"used": [{"name": "x"}]}}, r"plugins\.used\[0\]\.kind is missing"),
        ({"plugins": {"used": {"kind": "x"}}}, r"plugins\.used is missing or not"),
        ({"full": ".."}, r"full is '\.\.'"),
        ({"full": None}, "full is missing"),
        ({"full": "full-001"}, "full is 'full-001'"),
        ({"full": "full-0"}, "full is 'full-0'"),
        ({"full": "full-٠٠٠"}, "full is"),
        ({"small": ".."}, r"small is '\.\.'"),
        ({"small": "full-000"}, "small is 'full-000'"),
        ({"best": {}}, "best.round is missing"),
        ({"best": {**BEST, "round": ".."}}, "best.round is missing or not"),
        ({"best": {**BEST, "value": "high"}}, "best.value is missing or not"),
        ({"best": {key: value for key, value in BEST.items() if key != "loss"}}, "best.loss is missing"),
        ({"best": BEST}, "best is 'best-001'"),
        ({"versions": {"recap": 3}}, r"versions\.recap is missing or not"),
        ({"recipe": "recipe-002.yaml"}, "'recipe.yaml' in files makes no sense"),
        ({"files": {}}, "is not in files"),
        ({"files": {"../../x": {"bytes": 1, "sha256": "a" * 64}}}, r"entry of '\.\./\.\./x'"),
        ({"files": {"full-000/x": {"bytes": "1", "sha256": "a" * 64}}}, "files.full-000/x.bytes is"),
        ({"files": {"full-000/x": {"bytes": 1, "sha256": "a"}}}, "files.full-000/x.sha256 is"),
        ({"extra": 1}, "extra is missing or not"),
    ],
)
def test_a_state_yaml_that_makes_no_sense_is_named(state: State, changes: dict[str, object], message: str) -> None:
    rewrite(state, **changes)
    with pytest.raises(CorruptStateError, match=message):
        State.open(state.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in ("seconds", "finished", "stage", "round")
        for value in (None, "x", [1], -1)
        if (key, value) != ("finished", "x")  # a text, and nothing reckons with it
    ],
)
def test_an_entry_of_the_history_that_makes_no_sense_is_named(state: State, key: str, value: object) -> None:
    (entry,) = state.manifest.history
    rewrite(state, history=[{**entry, key: value}])
    with pytest.raises(CorruptStateError, match=rf"history\[0\]\.{key} is missing or not"):
        State.open(state.path)


def test_an_edited_recipe_is_refused(state: State) -> None:
    alter(state.path / "recipe.yaml", b"name: other\n")
    with pytest.raises(CorruptStateError, match=r"recipe.yaml: .*; the recipe of a state is not edited by hand"):
        State.open(state.path)


# --- reading ---------------------------------------------------------------------------------------------------------


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


# --- a changed recipe ------------------------------------------------------------------------------------------------


def amend(state: State, value: int = 2, text: str = "name: changed\n") -> None:
    state.amend(text, f"d{value}", {"finetune.micro_batch_size": None}, {"finetune.micro_batch_size": value})


def test_a_changed_recipe_is_committed_under_a_new_name_with_the_values_before(state: State) -> None:
    advance(state, "prune")
    amend(state)
    manifest = State.open(state.path).manifest
    assert manifest == state.manifest
    assert (manifest.recipe, manifest.recipe_digest) == ("recipe-002.yaml", "d2")
    assert state.recipe_text == State.open(state.path).recipe_text == "name: changed\n"
    (change,) = manifest.changes
    assert (change["round"], change["stage"]) == (1, "prune")
    assert (change["before"], change["after"]) == ({"finetune.micro_batch_size": None}, {"finetune.micro_batch_size": 2})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", change["changed"])
    assert [entry["stage"] for entry in manifest.history] == ["init", "prune"]
    assert tree(state.path) == committed(state.path)
    assert "recipe.yaml" not in manifest.files


def test_stages_go_on_after_a_changed_recipe_and_it_may_change_again(state: State) -> None:
    amend(state)
    advance(state, "prune")
    amend(state, 4, "name: again\n")
    advance(state, "mask")
    found = State.open(state.path)
    assert (found.manifest.recipe, found.recipe_text, found.manifest.recipe_digest) == (
        "recipe-003.yaml",
        "name: again\n",
        "d4",
    )
    assert [change["after"]["finetune.micro_batch_size"] for change in found.manifest.changes] == [2, 4]
    assert found.manifest.stage == "mask"
    assert tree(state.path) == committed(state.path)


def test_the_facts_stand_in_the_file_in_their_order_and_its_checksum_last(state: State) -> None:
    amend(state)
    text = (state.path / "state.yaml").read_text()
    assert list(yaml.safe_load(text)) == list(FIELDS)
    assert manifest_text(state.manifest) == text
    body, _, checksum = text.partition(CHECKSUMMED)
    assert checksum == f"{hashlib.sha256(body.encode()).hexdigest()}\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "../recipe.yaml"},
        {"recipe": None},
        {"recipe": "recipe.yaml"},
        {"changes": []},
        {"changes": [{"changed": "2026"}]},
        {"changes": ["x"]},
    ],
)
def test_a_changed_recipe_that_makes_no_sense_is_named(state: State, changes: dict[str, object]) -> None:
    amend(state)
    rewrite(state, **changes)
    with pytest.raises(CorruptStateError, match=r"recipe(-002.yaml')? (is missing|in files|is not in files)|changes\[0\]"):
        State.open(state.path)


def test_a_changed_recipe_that_was_edited_is_refused_under_its_name(state: State) -> None:
    amend(state)
    alter(state.path / "recipe-002.yaml", b"name: other\n")
    with pytest.raises(CorruptStateError, match=r"recipe-002\.yaml: .*not edited by hand") as caught:
        State.open(state.path)
    assert "restore recipe-002.yaml" in str(caught.value.hint)


def test_a_writer_that_has_read_the_recipe_before_it_was_changed_is_refused(state: State) -> None:
    late, later = State.open(state.path), State.open(state.path)
    amend(state)
    with pytest.raises(StateError, match="another process changed settings of this state"):
        advance(late, "prune")
    with pytest.raises(StateError, match="another process changed settings of this state"):
        amend(later)
    with pytest.raises(StateError, match="another process changed settings of this state"):
        late.load_text("recipe.yaml")
    assert tree(state.path) == committed(state.path)


def test_the_recipe_is_not_changed_while_another_process_writes(state: State) -> None:
    with state.writing("prune"), pytest.raises(StateLockedError):
        amend(State.open(state.path))
    assert State.open(state.path).manifest.recipe == "recipe.yaml"


@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
def test_a_full_disk_while_the_recipe_is_changed_leaves_the_old_one(
    state: State, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before, text = tree(state.path), (state.path / "state.yaml").read_bytes()
    monkeypatch.setattr(Path if step == "write_bytes" else os, step, full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        amend(state)
    monkeypatch.undo()
    assert (tree(state.path), (state.path / "state.yaml").read_bytes()) == (before, text)
    assert (State.open(state.path).recipe_text, state.recipe_text) == (RECIPE, RECIPE)


# --- leftovers and interruptions -------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root` with what it holds, but not the lock, which stays between writers."""
    return {rel: (root / rel).read_bytes() for rel in tree(root)}


FOREIGN = (
    *("notes.txt", "full-backup/a", "full-000.zip", "round-1/a", "mine.tmp", ".git/config", "state.yaml.tmp"),
    *("full-000/notes.txt", "full-000/deep/notes.txt", "round-001/mine/b", "round-099/a", "best-001/c", "recipe-999.yaml"),
)


def test_files_of_the_user_stay_wherever_they_lie(state: State, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("x")
    for rel in FOREIGN:
        (state.path / rel).parent.mkdir(parents=True, exist_ok=True)
        (state.path / rel).write_text(rel)
    (state.path / "full-000" / "link").symlink_to(outside)
    (state.path / "best-002").symlink_to(outside)
    advance(state, "prune")
    amend(state)
    with state.writing("mask") as transaction:
        transaction.drop("full-000")
        transaction.save_text("full-001/model.txt", "one")
        transaction.set_full("full-001")
    assert tree(state.path) == committed(state.path) | set(FOREIGN)
    assert {rel: (state.path / rel).read_text() for rel in FOREIGN} == {rel: rel for rel in FOREIGN}
    assert (state.path / "full-000" / "link").is_symlink()
    assert (state.path / "best-002" / "precious.txt").exists()


@pytest.mark.parametrize(
    ("rel", "kind"),
    [
        *(("round-001/prune.txt", kind) for kind in ("file", "folder", "link", "dangling link")),
        *(("round-001", kind) for kind in ("file", "link", "dangling link")),  # a stage may write into a folder
    ],
)
def test_what_a_stage_did_not_write_is_not_overwritten(state: State, tmp_path: Path, rel: str, kind: str) -> None:
    place = state.path / rel
    place.parent.mkdir(exist_ok=True)
    (tmp_path / "outside").mkdir()
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    else:
        place.symlink_to(tmp_path / ("outside" if kind == "link" else "nowhere"))
    before = contents(state.path)
    with pytest.raises(StateError, match=rf"{rel}: is in the way of `prune`") as caught:
        advance(state, "prune")
    assert not isinstance(caught.value, CorruptStateError)
    assert f"recap run --state {state.path}" in str(caught.value.hint)
    assert contents(state.path) == before
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_recipe_of_the_users_is_not_overwritten_by_a_changed_one(state: State) -> None:
    (state.path / "recipe-002.yaml").write_text("mine")
    before = contents(state.path)
    with pytest.raises(StateError, match=r"recipe-002\.yaml: is in the way"):
        amend(state)
    assert contents(state.path) == before


def stop_in_the_cleanup(state: State, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that replaces the full model is committed, and then a second Ctrl-C comes at its first removal."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def write(patched: pytest.MonkeyPatch) -> None:
        with state.writing(stage) as transaction:
            transaction.drop("full-000")
            transaction.save_text("full-001/model.txt", "one")
            transaction.set_full("full-001")
            patched.setattr(Path, "unlink", interrupt)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        write(patched)
    assert (state.path / ".recap-transaction/names").exists()
    assert (state.path / "full-000/model.txt").exists()


@pytest.mark.parametrize("go_on", ["tidy", "the next stage", "a changed recipe"])
def test_what_a_stopped_cleanup_has_left_goes_with_the_next_writer(
    state: State, monkeypatch: pytest.MonkeyPatch, go_on: str
) -> None:
    stop_in_the_cleanup(state, "prune", monkeypatch)
    found = State.open(state.path)
    (state.path / "full-000/mine.txt").write_text("mine")
    if go_on == "tidy":
        found.tidy()
    elif go_on == "the next stage":
        advance(found, "mask")
    else:
        amend(found)
    assert tree(state.path) == committed(state.path) | {"full-000/mine.txt"}
    assert not (state.path / ".recap-transaction").exists()


def test_what_is_removed_is_flushed_before_the_journal_that_names_it_goes(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, unlink, rmtree = files.flush, Path.unlink, shutil.rmtree

    def recorded(what: str, plainly: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, *more: object, **how: object) -> None:
            events.append(f"{what} {path.relative_to(state.path).as_posix()}")
            plainly(path, *more, **how)

        return call

    with state.writing("prune") as transaction:
        transaction.drop("full-000/model.txt")
        transaction.save_text("round-001/prune.txt", "one")
        transaction.set_full("full-000")
        monkeypatch.setattr(files, "flush", recorded("flush", flush))
        monkeypatch.setattr(Path, "unlink", recorded("remove", unlink))
        monkeypatch.setattr(shutil, "rmtree", recorded("remove", rmtree))
    after = events[events.index("remove full-000/model.txt") :]
    assert {"flush .", "flush full-000"} <= set(after[: after.index("remove .recap-transaction")])


def test_tidy_writes_nothing_where_nothing_is_left(state: State) -> None:
    (state.path / ".recap-lock").unlink()
    State.open(state.path).tidy()
    assert not (state.path / ".recap-lock").exists()


@pytest.mark.parametrize("name", ["full-000/config.json", "full-000/notes.txt", "../outside.txt", "notes.txt", "full-000"])
def test_a_journal_that_is_not_as_it_was_written_removes_nothing(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (state.path / "notes.txt").write_text("mine")
    (state.path / "full-000/notes.txt").write_text("mine")
    stop_in_the_cleanup(state, "prune", monkeypatch)
    journal = state.path / ".recap-transaction/names"
    lines = journal.read_text().splitlines()
    torn = f"{hashlib.sha256(name.encode()).hexdigest()[:16]} {name}"  # without its end
    journal.write_text("\n".join([*(f"{line[:16]} {name}" for line in lines), torn]))
    before = contents(state.path)
    State.open(state.path).tidy()
    gone = (".recap-transaction/names", ".recap-writer")
    assert contents(state.path) == {rel: held for rel, held in before.items() if rel not in gone}
    assert (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "notes.txt", "/etc/hostname", "full-000/../notes.txt", ".recap-lock"])
def test_a_journal_with_names_that_are_not_ours_removes_nothing(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (state.path / "notes.txt").write_text("mine")
    stop_in_the_cleanup(state, "prune", monkeypatch)
    line = f"{hashlib.sha256(name.encode()).hexdigest()[:16]} {name}\n"
    (state.path / ".recap-transaction/names").write_text(line)
    State.open(state.path).tidy()
    assert (tmp_path / "outside.txt").exists()
    assert (state.path / "notes.txt").exists()
    assert (state.path / ".recap-lock").exists()


# --- links, pipes and devices ----------------------------------------------------------------------------------------

PLACES = ("state.yaml", "recipe.yaml", "full-000", "full-000/model.txt", "full-000/deep")
MADE = (".recap-transaction", ".recap-lock", ".recap-writer")  # beside the committed ones


@pytest.mark.parametrize("rel", [*PLACES, *MADE])
def test_a_link_in_the_place_of_what_was_committed_is_refused_by_name_and_nothing_changes(
    state: State, tmp_path: Path, rel: str
) -> None:
    big, place = tmp_path / "big", state.path / rel
    big.mkdir()
    (state.path / "round-001").mkdir()
    (state.path / "round-001/mine.txt").write_text("mine")
    if not place.exists():
        place.mkdir() if rel == ".recap-transaction" else place.touch()
    place.rename(big / place.name)
    place.symlink_to(big / place.name)
    before, outside = contents(state.path), contents(big)
    with pytest.raises(CorruptStateError, match=f"{re.escape(rel)}: is a link, (which|not)") as caught:
        advance(State.open(state.path), "prune")
    assert caught.value.hint
    assert (contents(state.path), contents(big)) == (before, outside)
    assert place.is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("rel", ["state.yaml", "recipe.yaml", "full-000/model.txt", *MADE])
def test_a_pipe_a_socket_or_a_device_is_refused_and_not_waited_for(
    state: State, monkeypatch: pytest.MonkeyPatch, rel: str, kind: str
) -> None:
    place = state.path / rel
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        monkeypatch.chdir(place.parent)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    else:
        try:
            os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("no device may be made here")
    program = "import sys; from recap_cli.state.store import State\nwith State.open(sys.argv[1]).writing('prune'): pass"
    done = subprocess.run(
        [sys.executable, "-c", program, str(state.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert f"CorruptStateError: {place}: is a {kind}, " in done.stderr


@pytest.mark.parametrize("error", [RuntimeError("nan"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_in_a_stage_leaves_the_state_as_it_was(state: State, error: BaseException) -> None:
    advance(state, "prune")
    before, text = tree(state.path), (state.path / "state.yaml").read_bytes()

    def fail() -> None:
        with state.writing("mask") as transaction:
            transaction.save_tensors("round-001/mask.safetensors", {"m": torch.ones(1000)})
            transaction.save_text("full-001/new.txt", "x")
            transaction.drop("round-001/prune.txt")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tree(state.path) == before
    assert not (state.path / "full-001").exists()
    assert (state.path / "state.yaml").read_bytes() == text
    advance(state, "mask")


@pytest.mark.parametrize("step", ["flush_folders", "replace_text", "after"])
def test_ctrl_c_during_the_commit_leaves_the_old_state_or_the_new_one(
    state: State, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real = files.replace_text

    def interrupt(*args: object) -> None:
        if step == "after":
            real(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(files, step if step != "after" else "replace_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        advance(state, "prune")
    monkeypatch.undo()
    found = State.open(state.path)
    assert found.manifest.stage == ("prune" if step == "after" else "init")
    assert tree(state.path) == committed(state.path)
    advance(found, found.next_stage())


KILLED_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from recap_cli.errors import StateError
from recap_cli.state.store import State

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.chmod", "shutil.rmtree"}


def init(root):
    with State.create(root, "name: x\\n", "d") as draft:
        draft.save_text("full-000/a.txt", "a")
        draft.save_text("full-000/b.txt", "b")
        draft.set_full("full-000")


def amend(root):
    State.open(root).amend("name: y\\n", "e", {"k": 1}, {"k": 2})


def prune(root):
    with State.open(root).writing("prune") as draft:
        draft.save_text("full-001/a.txt", "new")
        draft.save_text("round-001/plan.txt", "plan")
        draft.drop("full-000")
        draft.set_full("full-001")


def killed_at(number, stage, root):
    child = os.fork()
    if not child:
        seen = 0

        def count(event, args):
            nonlocal seen
            seen += event in EVENTS
            if event in EVENTS and seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        stage(root)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def check(root):
    state = State.open(root)
    for rel in state.manifest.files:
        state.verified(rel)
    changed = state.manifest.recipe != "recipe.yaml"
    assert (state.recipe_text, state.manifest.recipe_digest) == (("name: y\\n", "e") if changed else ("name: x\\n", "d"))
    assert len(state.manifest.changes) == changed
    return "amended" if sys.argv[2] == "amend" and changed else state.manifest.stage


def clean(root):
    here = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    want = {"state.yaml", ".recap-lock", *State.open(root).manifest.files}
    assert here == want, here ^ want


root, counts, number = Path(sys.argv[1]) / "s", {}, 0
stage = {"init": init, "prune": prune, "amend": amend}[sys.argv[2]]
while True:
    number += 1
    shutil.rmtree(root, ignore_errors=True)
    if stage is not init:
        init(root)
    dead = killed_at(number, stage, root)
    try:
        found = check(root)
    except StateError as error:
        assert sys.argv[2] == "init" and type(error) is StateError, error
        found = "nothing"
    counts[found] = counts.get(found, 0) + 1
    if found == "nothing":
        init(root)
    elif found in ("init", "amended"):
        prune(root)
    else:
        with State.open(root).writing("mask"):
            pass
    check(root)
    clean(root)
    if not dead:
        break
print(json.dumps(counts))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked, and this system has no fork")
@pytest.mark.parametrize(
    ("stage", "outcomes"), [("init", ["nothing", "init"]), ("prune", ["init", "prune"]), ("amend", ["init", "amended"])]
)
def test_killed_at_any_moment_the_state_is_the_one_before_or_the_one_after(
    tmp_path: Path, stage: str, outcomes: list[str]
) -> None:
    """Kills the writer at its first, second, … touch of the file system, until it ends; then opens, checks and goes on."""
    done = subprocess.run([*script(tmp_path, KILLED_EVERYWHERE), tmp_path, stage], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert sorted(counts) == sorted(outcomes)
    assert all(count >= 2 for count in counts.values())


HOLDS = """
import sys, time
from pathlib import Path
from recap_cli.state.store import State

with State.open(sys.argv[1]).writing("prune") as draft:
    draft.save_text("round-001/half.txt", "half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(state: State, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of a stage."""
    child = subprocess.Popen([*script(tmp_path, HOLDS), state.path], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_writer_is_refused_and_told_who_writes(state: State, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StateLockedError, match=rf"process {holder.pid} on .* \(`recap prune`\) is writing") as caught:
        advance(state, "prune")
    assert caught.value.hint
    assert (state.path / "round-001/half.txt").exists()  # not swept from under the writer
    assert State.open(state.path).load_text("full-000/model.txt") == "zero"  # readers are free


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_kill_9_frees_the_lock_and_its_leftovers_go(state: State, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (state.path / "round-001/half.txt").exists()
    assert State.open(state.path).manifest.stage == "init"
    advance(state, "prune")
    assert tree(state.path) == committed(state.path)


def test_a_second_writer_in_the_same_process_is_refused(state: State) -> None:
    with state.writing("prune"), pytest.raises(StateLockedError, match=f"process {os.getpid()}"):
        advance(State.open(state.path), "prune")
    assert state.manifest.stage == "prune"


def test_a_second_init_at_the_same_time_is_refused(tmp_path: Path) -> None:
    with State.create(tmp_path / "s", RECIPE, "d") as transaction:
        transaction.save_text("full-000/a.txt", "a")
        transaction.set_full("full-000")
        with pytest.raises(StateLockedError):
            create(tmp_path / "s")
        with pytest.raises(StateLockedError, match=r"`recap init`.* is writing") as caught:
            State.open(tmp_path / "s")
        assert "wait" in str(caught.value.hint)
    assert State.open(tmp_path / "s").load_text("full-000/a.txt") == "a"


# --- disks -----------------------------------------------------------------------------------------------------------


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
def test_a_full_disk_at_any_step_is_named_and_the_state_is_untouched(
    state: State, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before, text = tree(state.path), (state.path / "state.yaml").read_bytes()
    monkeypatch.setattr(Path if step == "write_bytes" else os, step, full_disk)
    with pytest.raises(StorageError, match=r"No space left on device, \d+ bytes wanted, [\d,]+ bytes free") as caught:
        advance(state, "prune")
    monkeypatch.undo()
    assert str(state.path) in caught.value.message
    assert "free space" in str(caught.value.hint)
    assert (tree(state.path), (state.path / "state.yaml").read_bytes()) == (before, text)


def test_tensors_for_which_there_is_no_room_are_not_begun(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    problem = r"w\.safetensors: .*No space left.* 69,536 bytes wanted, 1,000 bytes free"
    with pytest.raises(StorageError, match=problem), state.writing("prune") as transaction:
        transaction.save_tensors("round-001/w.safetensors", {"w": torch.zeros(1000)})
    assert tree(state.path) == committed(state.path)


def test_a_full_disk_met_by_other_code_in_a_stage_is_named(state: State) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(state.path / "round-001/vocab.txt"))
    with pytest.raises(StorageError, match=r"vocab\.txt: cannot be written: No space left"), state.writing("prune"):
        raise error


def test_errors_that_are_not_about_the_state_pass_as_they_are(state: State, tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "no", str(tmp_path / "data.csv")), FileNotFoundError(errno.ENOENT, "no", "x")):
        with pytest.raises(type(error)), state.writing("prune"):
            raise error


ON_A_DISK = """
import json, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from recap_cli.errors import RecapError
from recap_cli.state.store import State

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
with State.create(disk / "s", "name: x\\n", "d") as transaction:
    transaction.save_text("full-000/a.txt", "a")
    transaction.set_full("full-000")
state = State.open(disk / "s")
before = sorted(map(str, disk.rglob("*"))), (disk / "s/state.yaml").read_bytes()
refusals = []


def attempt(write):
    try:
        with state.writing("prune") as transaction:
            write(transaction)
    except RecapError as error:
        refusals.append([type(error).__name__, error.message])
    assert (sorted(map(str, disk.rglob("*"))), (disk / "s/state.yaml").read_bytes()) == before


big = {"w": torch.zeros(1 << 20)}
attempt(lambda transaction: transaction.save_text("round-001/big.txt", "x" * (2 << 20)))
attempt(lambda transaction: transaction.save_tensors("round-001/big.safetensors", big))
shutil.disk_usage = lambda path: SimpleNamespace(total=0, free=0)  # a file system that does not say: the write itself fails
attempt(lambda transaction: transaction.save_tensors("round-001/big.safetensors", big))
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
attempt(lambda transaction: transaction.save_text("round-001/a.txt", "a"))
try:
    with State.create(disk / "t", "name: x\\n", "d"):
        pass
except RecapError as error:
    refusals.append([type(error).__name__, error.message])
print(json.dumps(refusals))
"""


def test_a_real_full_disk_and_a_real_read_only_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(disk)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk may be mounted here")
    done = subprocess.run([*unshare, *script(tmp_path, ON_A_DISK), disk], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refusals = json.loads(done.stdout)
    assert [kind for kind, _ in refusals] == ["StorageError"] * 5
    for place, message in zip(["big.txt", "big.safetensors", "big.safetensors"], refusals, strict=False):
        assert f"{place}: cannot be written: No space left on device" in message[1]
        assert "bytes wanted" in message[1]
    assert "bytes free" not in refusals[2][1]
    assert all("Read-only file system" in message for _, message in refusals[3:])


def test_the_module_imports_no_torch() -> None:
    code = "import sys, recap_cli.state.store; sys.exit(any(name in sys.modules for name in ('torch', 'safetensors.torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert state_module.SCHEMA == 3
