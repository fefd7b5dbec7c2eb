"""Killed with SIGKILL and called again, `recap run` ends as one that never was; `recap compare` leaves no run behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from recap_cli.cli import main
from recap_cli.compare import processes
from recap_cli.process import die_with_parent
from recap_cli.recipe import recipe as recipes
from recap_cli.stages.export import export
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.lock import HOLDER, locked
from recap_cli.state.store import State
from tests.calls import here
from tests.forks import Fork
from tests.limits import HANG_SECONDS
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")


def wait_for_mask(running: Fork, state: Path) -> None:
    """Return when the mask of the first round is committed, and the finetuning has just begun."""
    manifest, deadline = state / "state.yaml", time.monotonic() + HANG_SECONDS
    while not (manifest.exists() and "\nstage: mask\n" in manifest.read_text()):
        assert running.poll() is None, running.printed.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def thread_of_autograd() -> None:
    """Autograd has a thread of its own from now on, as it has wherever there is an accelerator: its backward passes nest."""

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            if ctx.depth:
                with torch.enable_grad():
                    Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
            return grad, None

    Nested.apply(torch.ones(1, requires_grad=True), 100).backward()  # more than its 60 on one thread


@pytest.mark.usefixtures("thread_of_autograd")
def test_killed_in_the_middle_of_training_and_run_again_is_uninterrupted(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipes.dump(tiny("vit", rounds=1, finetune={"epochs": 20})))
    assert main(["run", str(recipe), "--state", str(tmp_path / "whole")]) == 0
    killed = Fork(["run", str(recipe), "--state", str(tmp_path / "killed")], tmp_path / "printed")
    wait_for_mask(killed, tmp_path / "killed")
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert State.open(tmp_path / "killed").manifest.stage in ("mask", "finetune")
    assert main(["run", str(recipe), "--state", str(tmp_path / "killed")]) == 0
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*.safetensors")) for d in ("whole", "killed")]
    assert files[0] == files[1]
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "killed" / f).read_bytes() for f in files[0])


def test_the_runs_of_a_comparison_end_with_it_when_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(recipes.dump(tiny("vit", rounds=1, finetune={"epochs": 20})))
    arguments = ("compare", str(recipe), "--methods", "recap", "--ratios", "0.3", "--mask-ratios", "0.5", "--seeds", "0")
    killed = Fork([*arguments, "--out", str(out)], tmp_path / "printed")
    cell = out / "cells" / "recap-rp0.3-rf0.5-s0"
    wait_for_mask(killed, cell)
    (run,) = psutil.Process(killed.pid).children()
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    run.wait(HANG_SECONDS)  # raises if it goes on
    assert State.open(cell).manifest.stage in ("mask", "finetune")  # and not as if it had run to its end
    assert "\nround 1 mask" in (out / "logs" / f"{cell.name}.log").read_text(encoding="utf-8")
    monkeypatch.setattr(processes, "run", here)
    assert main([*arguments, "--out", str(out)]) == 0  # the same command goes on, whatever its runs are


def test_ctrl_c_twice_in_the_cleanup_after_the_last_commit_leaves_nothing_for_ever(tmp_path: Path) -> None:
    recipe, state = tmp_path / "tiny.yaml", tmp_path / "state"
    recipe.write_text(recipes.dump(tiny("vit", rounds=1, prune={"steps": 1})))
    stopped = Fork(["run", str(recipe), "--state", str(state)], tmp_path / "printed", stop_at="full-000/model.safetensors")
    code, printed = stopped.wait(), stopped.printed.read_text()
    assert code == 130, printed
    assert printed.count("error: stopped; the finished stages are kept") == 1
    assert f"hint: continue with `recap run {recipe} --state {state}`" in printed
    assert "Traceback" not in printed
    assert State.open(state).manifest.stage == "merge"
    assert (state / "full-000/model.safetensors").exists()  # the second came before it could go
    assert (state / HOLDER).exists()  # and nothing ran after it: no cleanup that a third could break
    run(recipes.read(str(recipe)), state)
    here = {file.relative_to(state).as_posix() for file in state.rglob("*") if file.is_file()}
    assert here == {"state.yaml", ".recap-lock", *State.open(state).manifest.files}
    assert not (state / "full-000").exists()


@pytest.mark.parametrize("which", ["merge", "prune"])
def test_ctrl_c_after_the_commit_of_a_stage_does_not_say_to_run_it_again(
    tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, unlink = init(tiny("vit", rounds=2, prune={"steps": 1, "ramp": 1}), tmp_path / "state"), Path.unlink
    stages: dict[str, Callable[[State], object]] = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}
    for stage in ("prune", "mask", "finetune", *(("merge",) if which == "prune" else ())):
        stages[stage](state)

    def stop(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name in ("model.safetensors", ".recap-init") and State.open(state.path).manifest.stage == which:
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stop)
        assert main([which, str(state.path)]) == 130
    number = State.open(state.path).manifest.round
    err = capsys.readouterr().err
    assert f"hint: `{which}` of round {number} is done: `recap status {state.path}` shows what comes next" in err
    assert "go on with" not in err
    assert main(["status", str(state.path)]) == 0
    monkeypatch.setattr("recap_cli.commands.status.open_state", interrupted)
    assert main(["status", str(state.path)]) == 130
    assert f"hint: continue with `recap status {state.path}`" in capsys.readouterr().err


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_export_removes_what_a_stopped_cleanup_has_left_and_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, unlink = tmp_path / "state", Path.unlink

    def stop(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "model.safetensors" and path.parent.name == "full-000":
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        run(tiny("vit", rounds=1, prune={"steps": 1}), path, on_stage=lambda facts: patched.setattr(Path, "unlink", stop))
    assert (path / "full-000/model.safetensors").exists()
    state = State.open(path)
    with locked(path, "run"):  # whoever writes tidies up itself
        export(state, tmp_path / "first")
    assert (path / "full-000/model.safetensors").exists()
    export(state, tmp_path / "second")
    here = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert here == {"state.yaml", ".recap-lock", *state.manifest.files}


SWALLOWS = """
import atexit, os, signal, sys
from recap_cli import console
from recap_cli.cli import main
from recap_cli.compare import processes
from recap_cli.commands import status

where, error = sys.argv[1], console.error


def stop(*_):
    os.kill(os.getpid(), signal.SIGINT)


def open_state(folder):
    try:
        stop()
    except KeyboardInterrupt:
        if where == "swallowed":
            raise ValueError("could not determine the shape") from None
        if where == "unwinding":
            stop()
        raise


def say(*args):
    if where == "before the word":
        stop()
    error(*args)
    if where == "after the word":
        stop()


status.open_state, console.error = open_state, say
if where == "exit":
    atexit.register(stop)
sys.exit(main(["status", "x"]))
"""


@pytest.mark.parametrize("where", ["swallowed", "unwinding", "before the word", "after the word", "exit"])
def test_a_ctrl_c_that_is_swallowed_or_comes_twice_ends_with_130_and_the_usual_word(where: str) -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWS, where], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 130, done.stderr
    stopped = "error: stopped; the finished stages are kept, and nothing else\n"
    assert done.stderr.endswith(f"{stopped}hint: continue with `recap status x`\n")
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("place", ["another thread", "ignored", "of another program"])
def test_ctrl_c_that_is_not_ours_to_hear_is_left_alone(place: str) -> None:
    program = f"""
import signal, threading
from recap_cli.cli import main
from recap_cli.compare import processes
place = {place!r}
if place != "another thread":
    signal.signal(signal.SIGINT, signal.SIG_IGN if place == "ignored" else print)
before, seen = signal.getsignal(signal.SIGINT), []
thread = threading.Thread(target=lambda: main(["--version"]))
thread.start() if place == "another thread" else main(["--version"])
assert place != "another thread" or thread.join() is None
assert signal.getsignal(signal.SIGINT) is before
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr


WATCHER = """
import os, subprocess, sys, time
from recap_cli.process import die_with_parent
die_with_parent.watch()
child = subprocess.run([sys.executable, "-c", "import sys; print(repr(sys.stdin.read()))"], capture_output=True, text=True)
print(repr(sys.stdin.read()), child.stdout.strip(), os.environ.get(die_with_parent.VARIABLE), flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["SIGINT as usual", "SIGINT ignored"])
def test_a_process_ends_with_the_holder_of_its_input_which_is_empty_for_all_others(ignored: bool) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + WATCHER if ignored else WATCHER
    asked = {**os.environ, die_with_parent.VARIABLE: "1"}
    watcher = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=asked)
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    with watcher.stdout:
        assert watcher.stdout.readline() == b"'' '' None\n"
        assert watcher.poll() is None  # while its input is held
        watcher.stdin.close()
        assert watcher.wait(HANG_SECONDS) == -signal.SIGTERM
