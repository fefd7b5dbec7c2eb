"""`recap run` killed with SIGKILL in the middle and called again ends as one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recap_cli import recipe as recipes
from recap_cli.state import State
from tests.tiny import tiny


def start(recipe: Path, state: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "recap_cli", "run", str(recipe), "--state", str(state)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_killed_in_the_middle_of_training_and_run_again_is_uninterrupted(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipes.dump(tiny("vit", finetune={"epochs": 20})))
    whole = start(recipe, tmp_path / "whole")
    out, err = whole.communicate(timeout=200)
    assert whole.returncode == 0, err
    assert Path(out.strip()).is_dir()
    killed = start(recipe, tmp_path / "killed")
    manifest = tmp_path / "killed" / "state.yaml"
    deadline = time.monotonic() + 120
    while not (manifest.exists() and "\nstage: mask\n" in manifest.read_text()):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)  # the mask is committed, the finetuning has just begun
    killed.communicate()
    assert State.open(tmp_path / "killed").manifest.stage in ("mask", "finetune")
    again = start(recipe, tmp_path / "killed")
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*.safetensors")) for d in ("whole", "killed")]
    assert files[0] == files[1]
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "killed" / f).read_bytes() for f in files[0])
