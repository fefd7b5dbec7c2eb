"""Disks that are full or may not be written, made up and real."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recap_cli.errors import StorageError
from recap_cli.state import store as state_module
from recap_cli.state.store import State
from tests.state.made import advance, committed, full_disk, script, tree


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
