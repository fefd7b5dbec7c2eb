"""The command line: what each command calls and prints, and which message and exit code each error becomes."""

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recap_cli import console, errors
from recap_cli.cli import main
from recap_cli.errors import PipeError
from recap_cli.recipe.recipe import digest, dump, parse, shipped
from recap_cli.state.store import State

Fake = Callable[..., None]
RECIPE = "name: pico\nmodel: {name: vit}\ntask: {kind: image-classification}\ndata: {builtin: digits}\n"
PRUNED = {
    "round": 1,
    "best": True,
    "full_parameters": 2_000_000,
    "small_parameters": 1_500_000,
    "kept_share": 0.667,
    "heads": [3, 2],
    "neurons": [40, 40],
    "full_heads": [4, 4],
    "full_neurons": [64, 64],
    "kept": {"heads": [3, 2], "neurons": [40, 40]},
    "of": {"heads": [4, 4], "neurons": [64, 64]},
    "seconds": {"prune": 1.5},
}
ROUND = PRUNED | {
    "seconds": {"prune": 1.5, "mask": 0.5, "finetune": 61.0, "merge": 0.2},
    "metric": "accuracy",
    "value": 0.9512,
    "trainable_entries": 150_000,
    "trainable_share": 0.1,
    "weights_bytes": 6_000_000,
    "gradients_bytes": 600_000,
    "optimizer_bytes": 1_200_000,
    "full_weights_bytes": 8_000_000,
    "full_gradients_bytes": 8_000_000,
    "full_optimizer_bytes": 16_000_000,
}
SUMMARY = {
    "recipe": "pico",
    "state": "runs/pico",
    "stage": "prune",
    "round": 2,
    "rounds_planned": 3,
    "next": "mask",
    "product": "runs/pico/best-001",
    "seconds": 63.2,
    "finished": None,
    "rounds": [ROUND, PRUNED | {"round": 2, "best": False}],
}
FACTS = {
    "round": 1,
    "stage": "prune",
    "seconds": 1.5,
    "finished": "2026",
    "plan": "importance",
    "prune_ratio": 0.333,
    "params_full": 2_000_000,
    "params_small": 1_500_000,
    "kept_share_of_prunable": 0.667,
    "kept": {"heads": [3]},
}
MASKED = {"trains": "mask", "mask_ratio": 0.75, "trainable_share_of_prunable": 0.25}
TUNED = {"metric": "accuracy", "accuracy": 0.9512, "loss": 0.1, "steps": 1360, "trainable": 150_000}
MERGED = {"trained": 150_000, "best_round": 1}
PRUNED_TEXT = "pruned 33.3% of the prunable parameters by importance; the small model has 1.50 M of 2.00 M parameters"
CHANGE = {
    "changed": "2026-07-28T10:00:00+00:00",
    "round": 2,
    "stage": "mask",
    "before": {"finetune.checkpointing": False, "finetune.micro_batch_size": None},
    "after": {"finetune.checkpointing": True, "finetune.micro_batch_size": 8},
}
CHANGED = "finetune.checkpointing false → true, finetune.micro_batch_size null → 8"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECAP_TRACEBACK", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts functions in the place of a module of a room, which is then not imported."""

    def put(name: str, room: str = "stages", **functions: object) -> None:
        module = SimpleNamespace(**functions)
        monkeypatch.setitem(sys.modules, f"recap_cli.{room}.{name}", module)
        monkeypatch.setattr(import_module(f"recap_cli.{room}"), name, module, raising=False)

    return put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state whose `init` is done."""
    recipe = parse(RECIPE, "pico.yaml")
    with State.create(tmp_path / "state", dump(recipe), digest(recipe)) as transaction:
        transaction.facts |= {"notes": ["random weights"], "not_pruned": ["pooler"]}
        transaction.facts |= {"adapter": "vit", "parameters": 2_000_000, "prunable_parameters": 1_900_000}
        transaction.facts |= {"train_examples": 1438, "labels": 10, "head_new": True}
        transaction.save_text("full-000/model.txt", "zero")
        transaction.set_full("full-000")
    return tmp_path / "state"


def raising(error: BaseException) -> Callable[..., Any]:
    def stage(*_: object, **__: object) -> None:
        raise error

    return stage


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def subclasses(of: type[errors.RecapError]) -> list[type[errors.RecapError]]:
    return [of, *(found for below in of.__subclasses__() for found in subclasses(below))]


# Errors


def test_every_error_has_an_exit_code_of_its_own() -> None:
    ours = [error for error in subclasses(errors.RecapError) if error.__module__.startswith("recap_cli.")]
    codes = [error.exit_code for error in ours]
    assert len(set(codes)) == len(codes)
    assert min(codes) == 1
    assert PipeError in ours


@pytest.mark.parametrize("kind", subclasses(errors.RecapError), ids=lambda kind: kind.__name__)
def test_an_error_becomes_a_message_a_hint_and_its_exit_code(
    kind: type[errors.RecapError], fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("prune", prune=raising(kind("runs/x/full: is truncated", hint="recap status runs/x")))
    assert main(["prune", str(folder)]) == kind.exit_code
    out, err = capsys.readouterr()
    assert not out
    assert err == "error: runs/x/full: is truncated\nhint: recap status runs/x\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/a.bin"), "runs/x/a.bin: the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), "runs/x: the file system is read-only"),
        (MemoryError(), "out of memory"),
    ],
)
def test_the_limits_of_the_machine_are_no_bugs(
    error: Exception, message: str, fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("finetune", finetune=raising(error))
    assert main(["finetune", str(folder)]) == errors.StorageError.exit_code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert "hint: " in err


def test_an_unknown_error_is_called_a_bug_and_shows_no_traceback(
    fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("mask", mask=raising(ValueError("shapes differ")))
    assert main(["mask", str(folder)]) == 1
    first, hint = capsys.readouterr().err.splitlines()
    assert first.startswith("error: this is a bug in recap: ValueError: shapes differ (")
    assert f"{Path(__file__).name}, line " in first
    assert "RECAP_TRACEBACK=1" in hint


def test_the_traceback_is_there_for_who_asks(
    fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECAP_TRACEBACK", "1")
    fake("mask", mask=raising(ValueError("shapes differ")))
    assert main(["mask", str(folder)]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake("finetune", finetune=raising(KeyboardInterrupt()))
    assert main(["finetune", str(folder)]) == 130
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "error: stopped; the finished stages are kept, and nothing else",
        f"hint: continue with `recap finetune {folder}`",
    ]


def in_a_plugin(error: Exception) -> errors.PluginError:
    wrapped = errors.PluginError("the criterion failed")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: no room"),
        in_a_plugin(MemoryError()),
    ],
)
def test_out_of_memory_is_no_bug_of_ours(
    error: Exception, fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("finetune", finetune=raising(error))
    assert main(["finetune", str(folder)]) == 12
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB, max allowed: 9.07 GB). Tried to allocate 2 GB"),
        RuntimeError("CUDA error: out of memory"),
        in_a_plugin(type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.")),
    ],
)
@pytest.mark.parametrize("stage", ["prune", "mask"])
def test_a_device_whose_memory_runs_out_has_a_code_of_its_own(
    stage: str, error: Exception, fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(stage, **{stage: raising(error)})
    assert main([stage, str(folder)]) == errors.DeviceMemoryError.exit_code == 16
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory: ")
    assert "the same recap run with --set importance.device=cpu" in err


def test_a_closed_stdout_and_one_that_knows_only_ascii_are_borne() -> None:
    code = (
        "import io, sys; sys.stdout = None; from recap_cli.cli import main\n"
        "run = ['run', 'quickstart', '--dry-run', '--set', 'name=ü']\n"
        "closed, sys.stdout = main(run), io.TextIOWrapper(io.BytesIO(), encoding='ascii')\n"
        "sys.exit(closed or main(run))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_looks_for_criteria_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--dry-run", "--set", "prune.criterion=tailor"]) == 7
    assert "taylor" in capsys.readouterr().err
    assert main(["run", "bert_base_cola", "--dry-run", "--set", "data.train=none.csv"]) == 4
    assert "none.csv" in capsys.readouterr().err
    assert main(["run", "quickstart", "--dry-run", "--set", "model.name=./nowhere"]) == 5
    assert "there is no folder ./nowhere" in capsys.readouterr().err


def test_a_hint_is_shown_in_plain_python_too() -> None:
    assert errors.DataError("no file", hint="name one").__notes__ == ["hint: name one"]
    assert not hasattr(errors.DataError("no file"), "__notes__")


def test_paths_in_hints_are_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "my state")]) == errors.StateError.exit_code
    assert f"hint: recap init RECIPE --state '{tmp_path / 'my state'}'\n" in capsys.readouterr().err
    assert main(["recipes", "copy", "quickstart", str(tmp_path / "my recipe.yaml")]) == 0
    assert f"recap run '{tmp_path / 'my recipe.yaml'}'\n" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--state", "n" * 300]) == errors.StorageError.exit_code
    assert "File name too long" in capsys.readouterr().err


def test_ctrl_c_takes_the_bar_off_the_screen(fake: Fake, folder: Path) -> None:
    def stage(_: State, *, track: Any, **__: Any) -> None:
        for _item in track(range(3), "finetune"):
            raise KeyboardInterrupt

    fake("finetune", finetune=stage)
    assert main(["finetune", str(folder)]) == 130
    assert not console._live


def test_a_reader_that_has_gone_is_no_error(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake("prune", prune=raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    kept = sys.stdout, sys.stderr
    try:
        assert main(["prune", str(folder)]) == 1
    finally:
        sys.stdout, sys.stderr = kept
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (["prun"], "'prune'"),
        (["recipes", "lst"], "'ls'"),
        (["prune", "--jsn"], "--json"),
        (["init", "quickstart"], "--state"),
        (["export", "somewhere"], "OUT"),
    ],
)
def test_a_wrong_command_line_names_what_is_near(line: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert not out
    assert problem in err


# Pipes


@pytest.mark.parametrize(
    ("stage", "facts", "text"),
    [
        ("prune", {}, PRUNED_TEXT),
        (
            "prune",
            {"plan": "learned"},
            "pruned 33.3% of the prunable parameters by learned scores; the small model has 1.50 M of 2.00 M parameters",
        ),
        ("prune", {"plan": "same"}, "kept the groups of the round before; the small model has 1.50 M of 2.00 M parameters"),
        ("prune", {"prune_ratio": 0.0}, "pruned nothing; the small model has all 2.00 M parameters"),
        ("mask", MASKED, "25.0% of the small model's prunable parameters are trainable, 75.0% are frozen"),
        ("mask", MASKED | {"mask_ratio": 0.0}, "all prunable parameters of the small model are trainable"),
        ("mask", {"trains": "head", "mask_ratio": 0.0}, "only the task head is trainable"),
        ("mask", {"trains": "training", "mask_ratio": 0.0}, "the method chooses what is trainable"),
        ("finetune", TUNED, "trained 0.15 M parameters for 1,360 steps; validation: accuracy 0.9512, loss 0.1000"),
        ("merge", MERGED, "wrote 0.15 M trained parameters into the full model; best round so far: 1"),
        ("merge", MERGED | {"best_round": None}, "wrote 0.15 M trained parameters into the full model"),
    ],
)
def test_a_stage_prints_what_it_did_and_the_folder_for_the_next_one(
    stage: str,
    facts: dict[str, Any],
    text: str,
    fake: Fake,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def run(state: State, *, track: Any, **_: Any) -> dict[str, Any]:
        seen.append(state.path)
        list(track([1], "loop"))
        return FACTS | facts | {"stage": stage}

    fake(stage, **{stage: run})
    pipe(monkeypatch, f"{folder}\nmore\n")
    assert main([stage]) == 0
    out, err = capsys.readouterr()
    assert seen == [folder]
    assert out == f"{folder}\n"
    assert f"round 1 {stage}, 1.5 s: {text}\n" in err


def test_json_takes_the_place_of_the_folder(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake("prune", prune=lambda state, track: FACTS)
    assert main(["prune", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == FACTS


def test_an_empty_pipe_means_that_the_stage_before_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, "")
    assert main(["mask"]) == PipeError.exit_code == 15
    assert "in a pipe, the stage before this one has failed" in capsys.readouterr().err


def test_json_in_the_pipe_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, '{\n  "round": 1\n')
    assert main(["mask"]) == 2
    assert "leave out --json" in capsys.readouterr().err


def test_a_terminal_has_no_folder_to_give(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, closed=False))
    assert main(["status"]) == 2
    assert "error: no state was named" in capsys.readouterr().err


def test_a_folder_without_a_state_is_refused_before_anything_heavy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(tmp_path / "nothing")]) == errors.StateError.exit_code
    assert "hint: recap init" in capsys.readouterr().err


# Commands


def test_init_hands_over_the_recipe_with_its_overrides(
    fake: Fake, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pico.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    seen: list[Any] = []

    def init(recipe: Any, path: Path, *, track: Any) -> State:
        seen.extend([recipe.prune.ratio, recipe.finetune.lr, path])
        return State.open(folder)

    fake("init", init=init)
    line = ["init", str(file), "--state", "s", "--set", "prune.ratio=0.5", "--set", "finetune.lr=1e-4"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert seen == [0.5, 1e-4, Path("s")]
    assert out == f"{folder}\n"
    assert ": vit with 2.00 M parameters, 1.90 M prunable, new head; 1,438 training examples, 10 labels\n" in err
    assert "  note: random weights\n  not pruned: pooler\n" in err
    assert f"next: recap prune {folder}" in err


def test_a_bad_override_is_told_before_anything_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pico.yaml").write_text(RECIPE, encoding="utf-8")
    assert main(["run", "pico.yaml", "--set", "prune.ratoi=0.5"]) == errors.RecipeError.exit_code
    assert "prune.ratoi" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pico.yaml"]


@pytest.mark.parametrize("line", [["run"], ["init", "--state", "s"]])
def test_a_dry_run_only_describes(
    line: list[str], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pico.yaml").write_text(RECIPE, encoding="utf-8")
    fake("status", "rounds", describe=lambda recipe: [f"{recipe.name}: {recipe.rounds} rounds", "prune"], summary=None)
    assert main([*line, "pico.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == "pico: 10 rounds\nprune\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pico.yaml"]


@pytest.fixture
def ran(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where `run` was called, and with which recipe; its summary is SUMMARY."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pico.yaml").write_text(RECIPE, encoding="utf-8")
    calls: list[Any] = []

    def run(
        recipe: Any, path: Path, *, track: Any, on_stage: Callable[..., None], on_change: Callable[..., None], overridden: Any
    ) -> str:
        assert overridden is None or overridden == set()  # None: the recipe of a state
        calls.append((recipe, path))
        on_change(CHANGE)
        on_stage(FACTS)
        return "the state"

    fake("run", run=run)
    fake("status", "rounds", describe=None, summary=lambda state: SUMMARY)
    return calls


def test_run_prints_the_tables_on_stderr_and_the_product_alone_on_stdout(
    ran: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "pico.yaml"]) == 0
    out, err = capsys.readouterr()
    assert ran[0][1] == Path("runs/pico")
    assert out == "runs/pico/best-001\n"
    for problem in (
        f"round 1 prune, 1.5 s: {PRUNED_TEXT}\n",
        "1 *",
        "0.9512",
        "2.00 M",
        "66.7%",
        "0.15 M",
        "10.0%",
        "1 min 01 s",
    ):
        assert problem in err
    assert f"changed in this state: {CHANGED}\n" in err
    for text in ("10.0%", "1 min 01 s", "3 2 of 4", "40 of 64", "7.8 MB", "32.0 MB", "24.4%", "product: runs/pico/best-001"):
        assert text in err
    assert "\x1b" not in err


def test_run_json_is_the_summary(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pico.yaml", "--state", "elsewhere", "--json"]) == 0
    assert ran[0][1] == Path("elsewhere")
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_run_takes_the_recipe_of_a_state_that_is_there(ran: list[Any], folder: Path) -> None:
    assert main(["run", "--state", str(folder)]) == 0
    assert ran == [(parse(RECIPE, "pico.yaml"), folder)]


def test_finetune_changes_settings_and_says_so(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def finetune(state: State, *, on_change: Callable[..., None], **settings: Any) -> dict[str, Any]:
        seen.append((settings["overrides"], settings["snapshot_to"]))
        on_change(CHANGE)
        return FACTS | TUNED | {"stage": "finetune"}

    fake("finetune", finetune=finetune)
    assert main(["finetune", str(folder), "--set", "a.b=1", "--set", "a.c=2", "--snapshot", "x.pickle"]) == 0
    assert main(["finetune", str(folder)]) == 0
    assert seen == [(["a.b=1", "a.c=2"], Path("x.pickle")), ((), None)]
    assert f"changed in this state: {CHANGED}\n" in capsys.readouterr().err


def test_run_without_recipe_or_state_says_what_to_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "recap run quickstart" in capsys.readouterr().err


def test_status_is_a_result(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake("status", "rounds", summary=lambda state: SUMMARY)
    assert main(["status", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "0.9512" in out
    assert "pico: runs/pico, round 2 of 3, prune done, 1 min 03 s in total" in out
    assert "next: recap mask runs/pico" in out


def test_status_says_which_settings_were_changed_when_and_from_what(
    fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("status", "rounds", summary=lambda state: SUMMARY | {"changes": [CHANGE]})
    assert main(["status", str(folder)]) == 0
    assert f"changed 2026-07-28T10:00:00+00:00, after mask of round 2: {CHANGED}\n" in capsys.readouterr().out


def test_status_says_why_a_run_is_over(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = SUMMARY | {"next": None, "finished": "all 3 rounds are done"}
    fake("status", "rounds", summary=lambda state: over)
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("finished: all 3 rounds are done\n")


def test_status_before_the_first_round(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = SUMMARY | {"rounds": [], "stage": "init", "round": 0, "next": "prune", "product": None}
    fake("status", "rounds", summary=lambda state: begun)
    assert main(["status", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_status_keeps_the_notes_of_init(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake("status", "rounds", summary=lambda state: SUMMARY | {"init": {"notes": ["labels 1, 2, 5 are numbered 0 … 2"]}})
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("\nnote: labels 1, 2, 5 are numbered 0 … 2\n")


def test_eval_scores_what_was_asked_for(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def evaluate(state: State, *, which: list[str], **_: Any) -> list[dict[str, Any]]:
        seen.append(which)
        return [{"name": name, "accuracy": 0.5, "parameters": 2_000_000, "seconds": 1.0} for name in which]

    fake("eval", evaluate=evaluate)
    assert main(["eval", str(folder), "--which", "full, best"]) == 0
    out = capsys.readouterr().out
    assert seen == [["full", "best"]]
    assert "2.00 M" in out
    assert main(["eval", str(folder), "--which", "full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["accuracy"] == 0.5


def test_eval_refuses_a_model_that_no_state_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(folder), "--which", "tiny"]) == 2
    assert "full, small, best" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "stock"), [("ragged", False), ("stock", True), ("dense", True)])
def test_export_prints_the_path_and_how_to_load_it(
    form: str, stock: bool, fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def export(state: State, out: Path, *, which: str, dense: bool, track: Any) -> dict[str, Any]:
        seen.append((which, dense))
        reason = "its layers differ" if form == "ragged" else None
        called = {"auto_class": "AutoModelForUniversalSegmentation", "forward": {"task_inputs": [1, 2], "flag": True}}
        return {"path": str(out), "form": form, "reason": reason, **called}

    fake("export", export=export)
    assert main(["export", str(folder), "out", *(["--dense"] if form == "dense" else [])]) == 0
    out, err = capsys.readouterr()
    assert seen == [("best", form == "dense")]
    assert out == "out\n"
    assert "    model = recap_cli.load('out')\n" in err
    assert ("transformers.AutoModelForUniversalSegmentation.from_pretrained('out')" in err) is stock
    assert "    # call it with task_inputs too: the row stands in spec.json, under forward\n" in err
    assert ("its layers differ" in err) is not stock


def test_export_of_the_full_model_and_what_it_refuses(fake: Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def export(state: State, out: Path, **settings: Any) -> dict[str, Any]:
        seen.append(settings["which"])
        return {"path": str(out), "form": "stock", "reason": None, "auto_class": None, "forward": {}}

    fake("export", export=export)
    assert main(["export", str(folder), "out", "--which", "full"]) == 0
    for arguments, said in (
        (["--which", "small"], "has no such model to export"),
        (["--which", "full", "--dense"], "nothing is"),
    ):
        capsys.readouterr()
        assert main(["export", str(folder), "out", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert seen == ["full"]


# Lists


def test_recipes_are_listed_shown_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "ls", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names == [recipe.name for recipe in shipped()]
    assert main(["recipes", "show", "quickstart"]) == 0
    text = capsys.readouterr().out
    assert main(["recipes", "copy", "quickstart"]) == 0
    assert capsys.readouterr().out == "quickstart.yaml\n"
    assert (tmp_path / "quickstart.yaml").read_text(encoding="utf-8") == text
    assert main(["recipes", "show", "quickstart", "--filled"]) == 0
    filled = parse(capsys.readouterr().out, "filled.yaml")
    assert filled == parse(text, "quickstart.yaml")


def test_a_copy_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "quickstart", str(tmp_path)]) == 0
    (tmp_path / "quickstart.yaml").write_text("mine", encoding="utf-8")
    assert main(["recipes", "copy", "quickstart", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text(encoding="utf-8") == "mine"
    assert main(["recipes", "copy", "quickstart", str(tmp_path / "no" / "x.yaml")]) == 2


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "schema"]) == 0
    assert "prune" in json.loads(capsys.readouterr().out)["properties"]


def test_plugins_are_listed_with_their_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    ours = {(row["kind"], row["name"]) for row in rows if row["distribution"] == "recap-cli"}
    assert {("criterion", "taylor"), ("adapter", "vit")} <= ours
    assert main(["plugins"]) == 0
    assert "taylor" in capsys.readouterr().out


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["devices"][0]["device"] == "cpu"
    monkeypatch.setattr("recap_cli.commands.doctor.PACKAGES", ("recap-cli", "no-such-package"))
    assert main(["doctor"]) == 1
    assert "no-such-package is not installed" in capsys.readouterr().out


def test_doctor_asks_the_driver_who_holds_the_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from recap_cli.machine import nvml

    holders = [nvml.Processes(1, 2_000_000, ()), nvml.Processes(not_seen=("what processes hold on cuda:1: it sleeps",))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6_000_000, 8_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made Up 3000")
    monkeypatch.setattr(nvml, "processes", lambda device: holders[device.index])
    monkeypatch.setattr(nvml, "driver", lambda: ("580.65.06", None))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["driver"], found["nvml"]) == ("580.65.06", "works")
    assert [device.get("other_processes_bytes") for device in found["devices"][1:]] == [2_000_000, None]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "2.0 MB held by other processes" in out
    assert "it sleeps" in out
    assert "580.65.06" in out
    monkeypatch.setattr(nvml, "driver", lambda: (None, "NVML does not answer: Not Supported"))
    assert main(["doctor"]) == 0
    assert "NVML does not answer: Not Supported" in capsys.readouterr().out


# Help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("recap ")


COMMANDS = ["run", "export", "init", "prune", "mask", "finetune", "merge", "status", "eval", "plugins", "doctor"]
RECIPES = [["recipes", name] for name in ("ls", "show", "copy", "schema")]


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + RECIPES, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert f"Example: recap {' '.join(command)}" in capsys.readouterr().out


def test_the_shell_completes_commands_and_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_RECAP_COMPLETE", "complete_bash")
    for words, wanted in (("recap pru", "prune"), ("recap run quick", "quickstart"), ("recap recipes sh", "show")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert main([]) == 0
        assert wanted in capsys.readouterr().out.split()
