"""`recap profile-memory` as it is typed: its tables and JSON, what it refuses and how, and that its advice runs."""

import errno
import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recap_cli import errors
from recap_cli.cli import main
from recap_cli.commands.memory_tables import _parts_text
from recap_cli.memory import budget, meta_model, predict
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import examples
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.settings import recipe_of
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.state.store import State
from tests.pico import LABELS
from tests.tiny import one_layer, tiny

Answer = tuple[int, str, str]
KINDS = ("weights", "gradients", "optimizer state", "activations", "temporary", "other")
UNKNOWN = "name: u\nmodel: {config: {model_type: swinv2}}\ntask: {kind: image-classification}\ndata: {builtin: digits}\n"


def vit() -> Recipe:
    """A vit of one layer: what is seen here is said of any number of them, and a prediction takes half as long."""
    return tiny("vit", rounds=1, model=one_layer("vit"))


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECAP_TRACEBACK", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs `recap profile-memory WORDS` beside a recipe `vit.yaml`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("vit.yaml").write_text(recipes.dump(vit()), encoding="utf-8")

    def run(line: str) -> Answer:
        code = main(["profile-memory", *shlex.split(line)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state whose `mask` is done, to copy."""
    state = init(vit(), tmp_path_factory.mktemp("made") / "state")
    for stage in (prune, mask):
        stage(state)
    return state.path


@pytest.fixture
def state(ask: Any, made: Path) -> Path:
    """The same as the folder `state`."""
    shutil.copytree(made, "state")
    return Path("state")


# What is shown


def test_tables_name_all_kinds_both_sums_and_the_parameters_and_fit_80_columns(ask: Any) -> None:
    code, out, err = ask("vit.yaml --methods full,head,lora,pre-ft,recap --by-module --measure")
    assert code == 0
    lines = [line.rstrip() for line in out.splitlines()]
    assert all(len(line) <= 80 for line in lines[1:])
    firsts = [line.strip().split("   ")[0] for line in lines]
    for name in (*KINDS, "sum of maxima", "peak instant", "scoring at peak", "full", "recap"):
        assert name in firsts
    for shown in ("in MB (10⁶ bytes): finetuning at batch size 8 with adamw, fp32 weights", "total", "weights", "trainable"):
        assert shown in out
    for shown in ("recap: held at the peak", "vit.layers.0", "outside modules", "A real step beside its prediction", "+0.0%"):
        assert shown in out
    for shown in ("the paper counts the sum of the first four", "Not included", "cuBLAS's workspace", "not seen: a peak"):
        assert shown in err
    assert "every layer keeps and trains the same share of its groups" in err


@pytest.fixture
def text(ask: Any) -> Path:
    """A state of a text model beside `ask`'s recipe, with data of its own, before its first finetune."""
    for split in ("train", "validation"):
        Path(f"{split}.csv").write_text("sentence,label\n" + "w0 w1,cat\nw2,dog\nw3 w4,newt\n" * 4, encoding="utf-8")
    data = {"train": "train.csv", "validation": "validation.csv"}
    recipe = tiny("bert", rounds=1, model=one_layer("bert"), data=data)
    Path("bert.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
    return init(recipe, Path("text")).path


def parameters_of(out: str) -> tuple[int, int]:
    (row,) = json.loads(out)["predicted"]
    return row["held_parameters"], row["trainable_parameters"]


@pytest.mark.parametrize("target", ["bert.yaml", "text"])
def test_the_tokens_of_local_texts_count_and_it_is_said(target: str, ask: Any, text: Path) -> None:
    _, _, err = ask(f"{target} --methods recap")
    assert "the data use 10 of 64 tokens; other rows are held only if all are trainable" in err  # five words, five special ones
    found = {}
    for trains in ("false", "tokens", "true"):
        code, out, _ = ask(f"{target} --methods recap --json --set mask.train_embeddings={trains}")
        assert code == 0
        found[trains] = parameters_of(out)
    (still, least), (held, some), (whole, most) = (found[trains] for trains in ("false", "tokens", "true"))
    assert held == still == whole - 54 * 32
    assert some == least + 7 * 32  # five words, [CLS] and [SEP]
    assert most > least + 64 * 32


@pytest.mark.parametrize("target", ["bert.yaml", "text"])
def test_texts_that_are_not_here_are_said_to_be_unknown(target: str, ask: Any, text: Path) -> None:
    examples._SPLITS.clear()
    Path("train.csv").unlink()
    _, _, err = ask(f"{target} --methods recap --set mask.train_embeddings=tokens")
    shown = (
        "the tokens that the data use are unknown: assumes that all rows of the token table are held, and that recap trains all"
    )
    assert shown in " ".join(err.split())


def test_texts_that_are_not_the_states_own_are_not_read(ask: Any, text: Path) -> None:
    code, _, err = ask("text --methods recap --set data.train=other.csv")
    assert code == 0
    assert "data.train differs from the state's recipe: the texts were not read" in " ".join(err.split())
    assert "the tokens that the data use are unknown" in err


def test_the_json_stands_alone_and_says_what_the_tables_say(ask: Any) -> None:
    amount = profile_peak("full") + budget.WORKSPACE_BYTES
    code, out, _ = ask(f"vit.yaml --json --by-module --measure --plot x.svg --batch-sizes 2,4 --budget {amount}B")
    found = json.loads(out)
    assert code == 0
    assert [(row["method"], row["batch_size"]) for row in found["predicted"]] == [
        *(("full", 2), ("full", 4)),
        *(("recap", 2), ("recap", 4)),
    ]
    for row in found["predicted"]:
        assert sum(sum(kinds.values()) for kinds in row["by_module"].values()) == row["training_peak_bytes"]
        assert row["sum_of_maxima_bytes"] == sum(
            row[f"{kind}_bytes"] for kind in ("weights", "gradients", "optimizer", "activations")
        )
        assert row["total_parameters"] >= row["held_parameters"] >= row["trainable_parameters"] > 0
    assert [row["method"] for row in found["measured"]] == ["full", "recap"]
    assert found["budget"]["memory_budget"] == f"{amount}B"
    assert found["budget"]["budget_bytes"] == amount
    assert found["pictures"] == ["x.svg"]
    assert Path("x.svg").stat().st_size > 1000
    assert len(found["not_included"]) == 3
    assert any("the measured step uses the batch size" in note for note in found["notes"])


def profile_peak(method: str) -> int:
    recipe = vit()
    return predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, method).peak_bytes


def test_a_grid_has_a_table_a_method_and_one_of_peaks(ask: Any) -> None:
    code, out, err = ask("vit.yaml --batch-sizes 1,8 --ratios 0,0.4 --set finetune.micro_batch_size=4")
    assert code == 0
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines()[1:])
    assert "full: predicted" in out
    assert "recap: predicted" in out
    peaks = out[out.index("Peak instant") : out.index("Parameters")]
    assert len([line for line in peaks.splitlines() if "%" in line]) == 4
    assert "--batch-sizes ignore finetune.micro_batch_size=4" in err


def test_what_is_taken_at_a_time_is_said_of_all_methods_or_of_those_that_it_is_true_of() -> None:
    def text(**sizes: int) -> str:
        return _parts_text([{"method": method, "batch_size": 32, "micro_batch_size": size} for method, size in sizes.items()])

    assert text(full=32, lora=32) == ""
    assert text(full=4, recap=4) == " (4 at a time)"
    assert text(full=32, recap=16) == " (recap 16 at a time)"
    assert text(full=8, recap=4) == " (full 8 at a time, recap 4 at a time)"


def test_importance_on_an_accelerator_is_predicted_too(ask: Any) -> None:
    code, out, _ = ask("vit.yaml --methods recap --json --set importance.device=cuda")
    assert code == 0
    assert json.loads(out)["importance_peak_bytes"] > 0


# States


def test_a_state_counts_with_its_own_plan_and_mask_as_long_as_they_apply(ask: Any, state: Path) -> None:
    own = json.loads(ask("state --methods recap --json")[1])
    assert own["notes"] == ["recap and pre-ft use the plan of the state, and recap its mask"]
    even = json.loads(ask("state --methods recap --json --set prune.ratio=0.1")[1])
    assert even["notes"][0] == "prune.ratio differs from the state's recipe: its plan and mask are ignored"
    assert even["predicted"][0]["held_parameters"] > own["predicted"][0]["held_parameters"]
    unmasked = json.loads(ask("state --methods recap --json --set mask.ratio=0.9")[1])
    assert unmasked["notes"][0] == "mask.ratio differs from the state's recipe: its mask is ignored"
    assert unmasked["predicted"][0]["held_parameters"] == own["predicted"][0]["held_parameters"]
    assert unmasked["predicted"][0]["trainable_parameters"] < own["predicted"][0]["trainable_parameters"]


def test_a_state_that_is_being_written_is_looked_at_all_the_same(ask: Any, state: Path) -> None:
    found = []

    def write() -> None:
        with State.open(state).writing("finetune"):
            found.append(ask("state --methods head")[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert found == [0]
    assert State.open(state).manifest.stage == "mask"


def test_what_a_budget_changes_in_a_state_runs_there(ask: Any, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = meta_model.of_state(Context(State.open(state)))
    recipe = recipe_of(State.open(state))
    amount = int(predict.predict(model, recipe, "recap").usage.peak_bytes * 0.9) + budget.WORKSPACE_BYTES
    code, out, _ = ask(f"state --methods recap --json --budget {amount}B --set evaluate.batch_size=8")
    found = json.loads(out)["budget"]
    assert code == 0
    assert max(found["training_peak_bytes"], found["evaluation_peak_bytes"]) + found["workspace_bytes"] <= amount
    (command,) = found["commands"]
    assert command.startswith("recap run --state state --set evaluate.batch_size=8 --set ")
    assert main(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    now = recipe_of(State.open(state))
    changed = {change["key"] for change in found["changes"]}
    assert set(recipes.differences(recipe, now)) == {"evaluate.batch_size", *changed}
    _, out, err = ask(f"state --methods recap --budget {amount}B")
    assert out.startswith(f"RECAP fits in {amount}B without changes.\n")
    assert "this state has no stage left to run with these settings" in err


@pytest.mark.parametrize(
    ("line", "problem", "hint"),
    [
        ("--set model.config.hidden_size=64", "the model of the state state cannot change", "state/recipe.yaml"),
        ("--set data.image_size=32", "the model of the state state cannot change", "state/recipe.yaml"),
        ("--budget 1GB --set prune.ratio=0.1", "prune.ratio is none", "execution settings are data.workers"),
    ],
)
def test_settings_that_a_state_cannot_have_are_refused(line: str, problem: str, hint: str, ask: Any, state: Path) -> None:
    code, out, err = ask(f"state {line}")
    assert (code, out) == (2, "")
    assert problem in err
    assert hint in err


# Budgets


def test_the_advice_for_a_recipe_keeps_the_settings_that_were_given_and_runs(
    ask: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--set 'finetune.fused_backward =false' --set finetune.batch_size=4 --set evaluate.batch_size=4"
    given += " --set finetune.memory_budget=1GB"
    recipe = recipes.read("vit.yaml", ["finetune.batch_size=4"])
    peak = predict.predict(meta_model.of_recipe(recipe, LABELS), recipe, "recap").usage.peak_bytes
    amount = f"{int(peak * 0.95) + budget.WORKSPACE_BYTES}B"
    code, out, err = ask(f"vit.yaml --methods full {given} --budget {amount}")
    assert code == 0
    assert f"Changes to fit in {amount} (MB)" in out
    assert " costs " in out
    (so,) = [line.removeprefix("run: ") for line in err.splitlines() if line.startswith("run: ")]
    assert so.startswith("recap run vit.yaml --set finetune.batch_size=4 --set evaluate.batch_size=4 --set finetune.")
    assert so.endswith(" --set finetune.memory_budget=null")
    assert so.count("finetune.fused_backward") == 1  # what was changed stands once
    (solving,) = [line for line in err.splitlines() if line.startswith("or let init find the settings: ")]
    assert solving.endswith(f"--set evaluate.batch_size=4 --set finetune.memory_budget={amount}")
    assert solving.count("memory_budget") == 1
    words = shlex.split(so)[1:]
    assert main([*words, "--state", "runs"]) == 0
    assert main(["profile-memory", *words[1:]]) == 0
    capsys.readouterr()
    run = recipe_of(State.open("runs"))
    assert run.finetune.batch_size == 4
    assert predict.predict(meta_model.of_recipe(run, LABELS), run, "recap").peak_bytes + budget.WORKSPACE_BYTES <= int(
        amount[:-1]
    )


def test_the_budget_of_a_recipe_counts_without_being_named(ask: Any) -> None:
    code, out, err = ask("vit.yaml --methods recap --set finetune.memory_budget=2GiB")
    assert code == 0
    assert out.startswith("RECAP fits in 2GiB without changes.\n")
    assert "of 2GiB, recap takes" in err


def test_a_budget_below_the_least_names_the_least(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LADDER", budget.LADDER[:1])
    code, out, err = ask("vit.yaml --budget 1MB --json")
    assert (code, out) == (errors.BudgetError.exit_code, "")
    assert "error: nothing fits in 1.0MB: the least is " in err
    assert "hint: a budget of " in err


# What is refused


@pytest.mark.parametrize(
    ("line", "code", "problem", "hint"),
    [
        ("vit.yaml --methods foo", 2, "--methods foo: there is no method 'foo'", "choose among full-ft, head-ft, lora-ft"),
        ("vit.yaml --methods ''", 2, "--methods '': no method was named", "choose among"),
        ("vit.yaml --methods ,", 2, "no method was named", "choose among"),
        *(
            (f"vit.yaml --batch-sizes {bad}", 2, f"--batch-sizes {bad}: expected whole numbers from 1", "--batch-sizes 1,8,32")
            for bad in ("''", "0", "-1", "1,,2", "1.5", "1e3", "99999999999")
        ),
        *(
            (f"vit.yaml --ratios {bad}", 2, f"--ratios {bad}: expected shares from 0 to below 1", "as in --ratios 0.166")
            for bad in ("''", "nan", "inf", "1", "-0.1", "33%")
        ),
        ("vit.yaml --ratios 0.5,0.9", 2, "--ratios 0.5,0.9: expected at most 0.85, as prune.floor", "--set prune.floor=0.1"),
        ("vit.yaml --ratios 0.1 --methods full", 2, "none of the methods full prunes", "--methods pre-ft,recap"),
        *(
            (f"vit.yaml --budget {bad}", 2, f"--budget {bad}: expected an amount of memory", "units are B, KB, MB")
            for bad in ("''", "10", "10XB", "-1GB", "2gib", "1e9B")
        ),
        ("none.yaml", 3, "no recipe none.yaml", "recap recipes ls"),
        ("empty", 8, "empty: is not a state", "recap init RECIPE --state empty"),
        ("empty/state.yaml", 2, "empty/state.yaml is the record of a state", "name its folder: empty"),
        ("bad.yaml", 3, "bad.yaml:1:5", "recap recipes show"),
        ("unknown.yaml", 5, "the model type 'swinv2' is unknown", "recap.adapters"),
        (
            "unknown.yaml --set model.config=null --set model.name=./none",
            5,
            "there is no folder ./none",
            "--set model.name=DIR",
        ),
        ("unknown.yaml --set model.config=null --set model.name=./model", 5, "model/config.json cannot be read", "config.json"),
        ("vit.yaml --set model.config.num_hidden_layers=0", 6, "does not describe this model", "number of layers"),
        ("vit.yaml --plot x", 2, "x: a picture's name ends in .png, .svg, .pdf", "name it x.svg"),
        ("vit.yaml --plot no/x.svg", 12, "no/x.svg cannot be written: there is no folder no", "make it first"),
        ("vit.yaml --plot taken.svg", 12, "taken.svg cannot be written: it is a folder", "taken.svg/memory.svg"),
        ("vit.yaml --set finetune.micro_batch_size=3", 3, "expected a divisor of finetune.batch_size", "recap recipes show"),
        (
            "vit.yaml --set finetune.max_grad_norm=1 --set finetune.fused_backward=true",
            *(3, "expected null with finetune.fused_backward", "recap recipes show"),
        ),
        (
            "vit.yaml --measure --set finetune.device=cuda:99",
            *(3, "there is no device 'cuda:99' on this machine", "use one of auto, cpu"),
        ),
    ],
)
def test_bad_input_gets_one_message_with_what_to_do_next(line: str, code: int, problem: str, hint: str, ask: Any) -> None:
    for folder in ("empty", "model", "taken.svg"):
        Path(folder).mkdir()
    Path("model/config.json").write_text("{", encoding="utf-8")
    Path("bad.yaml").write_text("a: [", encoding="utf-8")
    Path("unknown.yaml").write_text(UNKNOWN, encoding="utf-8")
    before = sorted(Path().rglob("*"))
    found = ask(line)
    assert found[:2] == (code, "")
    first, *others = found[2].splitlines()
    assert first.startswith("error: ")
    assert problem in found[2]
    assert others[-1].startswith("hint: ")
    assert hint in others[-1]
    assert "Traceback" not in found[2]
    assert "bug in recap" not in found[2]
    assert sorted(Path().rglob("*")) == before


class Gone(io.StringIO):
    """What a pipe is whose reader has gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_reader_that_has_gone_is_no_error(
    ask: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", Gone())
    assert main(["profile-memory", "vit.yaml", "--methods", "head"]) == 1
    assert "rror" not in capsys.readouterr().err


def test_a_snapshot_needs_real_steps_on_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "snapshot.pickle"
    assert main(["profile-memory", "quickstart", "--snapshot", str(file)]) == 2
    assert "expected only with --measure" in capsys.readouterr().err
    assert main(["profile-memory", "quickstart", "--measure", "--snapshot", str(file), "--set", "finetune.device=cpu"]) == 2
    assert "--snapshot records CUDA's allocator, and this stage would run on cpu" in capsys.readouterr().err
    assert not file.exists()


def test_advice_with_a_given_configuration_says_that_it_would_train_random_weights(ask: Callable[..., Answer]) -> None:
    problem = "a run with model.config starts from random weights"
    for line, warned in (("--set model.config.hidden_size=32", True), ("--set seed=1", False)):
        code, _, err = ask(f"vit.yaml --methods recap --budget 2GiB {line}")
        assert (code, problem in err) == (0, warned)
