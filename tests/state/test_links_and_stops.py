"""Links, pipes and devices in a state, and whatever stops a stage: one commit point."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recap_cli.errors import CorruptStateError, StateLockedError
from recap_cli.state import files
from recap_cli.state.store import State
from tests.limits import HANG_SECONDS
from tests.state.made import RECIPE, advance, committed, contents, create, script, tree

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


OPENED = """
import sys
from recap_cli.errors import CorruptStateError
from recap_cli.state.store import State
for path in sys.argv[1:]:
    try:
        with State.open(path).writing("prune"):
            print("written")
    except CorruptStateError as error:
        print(error.message)
"""


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_pipe_a_socket_or_a_device_is_refused_and_not_waited_for(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    places = []
    for number, rel in enumerate(["state.yaml", "recipe.yaml", "full-000/model.txt", *MADE]):
        root = tmp_path / f"opened-{number}"
        shutil.copytree(state.path, root)
        (root / rel).unlink(missing_ok=True)
        _make(kind, root / rel, monkeypatch)
        places.append((root, root / rel))
    done = subprocess.run(
        [sys.executable, "-c", OPENED, *(str(root) for root, _ in places)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    said = done.stdout.splitlines()
    assert len(said) == len(places), done.stderr
    for (_, place), line in zip(places, said, strict=True):
        assert line.startswith(f"{place}: is a {kind}, ")


def _make(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
