"""Killed with SIGKILL and called again, `recap run` ends as one that never was; `recap compare` leaves no run behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recap_cli import parent
from recap_cli import recipe as recipes
from recap_cli.state import State
from tests.limits import HANG_SECONDS
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")


def begin(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "recap_cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start(recipe: Path, state: Path) -> "subprocess.Popen[str]":
    return begin("run", str(recipe), "--state", str(state))


def wait_for_mask(running: "subprocess.Popen[str]", state: Path) -> None:
    """Return when the mask of the first round is committed, and the finetuning has just begun."""
    manifest, deadline = state / "state.yaml", time.monotonic() + HANG_SECONDS
    while not (manifest.exists() and "\nstage: mask\n" in manifest.read_text()):
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_in_the_middle_of_training_and_run_again_is_uninterrupted(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipes.dump(tiny("vit", finetune={"epochs": 20})))
    whole = start(recipe, tmp_path / "whole")
    out, err = whole.communicate(timeout=HANG_SECONDS)
    assert whole.returncode == 0, err
    assert Path(out.strip()).is_dir()
    killed = start(recipe, tmp_path / "killed")
    wait_for_mask(killed, tmp_path / "killed")
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert State.open(tmp_path / "killed").manifest.stage in ("mask", "finetune")
    again = start(recipe, tmp_path / "killed")
    _, err = again.communicate(timeout=HANG_SECONDS)
    assert again.returncode == 0, err
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*.safetensors")) for d in ("whole", "killed")]
    assert files[0] == files[1]
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "killed" / f).read_bytes() for f in files[0])


def test_the_runs_of_a_comparison_end_with_it_when_it_is_killed(tmp_path: Path) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(recipes.dump(tiny("vit", finetune={"epochs": 20})))
    arguments = ("compare", str(recipe), "--methods", "recap", "--ratios", "0.3", "--mask-ratios", "0.5", "--seeds", "0")
    killed = begin(*arguments, "--out", str(out))
    cell = out / "cells" / "recap-rp0.3-rf0.5-s0"
    wait_for_mask(killed, cell)
    (run,) = psutil.Process(killed.pid).children()
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    run.wait(HANG_SECONDS)  # raises if it goes on
    assert State.open(cell).manifest.stage in ("mask", "finetune")  # and not as if it had run to its end
    again = begin(*arguments, "--out", str(out))
    _, err = again.communicate(timeout=HANG_SECONDS)
    assert again.returncode == 0, err


WATCHER = """
import os, subprocess, sys, time
from recap_cli import parent
parent.watch()
child = subprocess.run([sys.executable, "-c", "import sys; print(repr(sys.stdin.read()))"], capture_output=True, text=True)
print(repr(sys.stdin.read()), child.stdout.strip(), os.environ.get(parent.VARIABLE), flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["SIGINT as usual", "SIGINT ignored"])
def test_a_process_ends_with_the_holder_of_its_input_which_is_empty_for_all_others(ignored: bool) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + WATCHER if ignored else WATCHER
    asked = {**os.environ, parent.VARIABLE: "1"}
    watcher = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=asked)
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    with watcher.stdout:
        assert watcher.stdout.readline() == b"'' '' None\n"
        assert watcher.poll() is None  # while its input is held
        watcher.stdin.close()
        assert watcher.wait(HANG_SECONDS) == -signal.SIGTERM
