"""What a plain installation leaves out: each extra is missed at the beginning, by name, and all else works without it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recap_cli import extras
from recap_cli.cli import main
from recap_cli.core.method import Method, RoundPlan
from recap_cli.errors import MissingExtraError, ModelError, PluginError
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds import plans
from tests.limits import HANG_SECONDS
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where they are not called as what they bring
WITHOUT = ("peft", "matplotlib", "jinja2", "sklearn")  # what a plain installation needs nowhere

# Read by every Python that starts: these packages and their metadata are not found, as if nobody had installed them.
SITECUSTOMIZE = """
import importlib.machinery, importlib.metadata

MODULES, DISTRIBUTIONS = {modules!r}, {distributions!r}
find, from_name = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name.__func__


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in MODULES else find(name, path, target)


def named(cls, name):
    if name in DISTRIBUTIONS:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(cls, name)


importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
importlib.metadata.Distribution.from_name = classmethod(named)
"""


def requirements(lines: list[str]) -> set[str]:
    """The distributions that requirements name, without their versions."""
    return {re.split(r"[^\w-]", line)[0] for line in lines}


def test_the_extras_are_those_of_the_package_and_bring_nothing_that_is_there_anyway() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    for name, extra in extras.EXTRAS.items():
        assert requirements(declared[name]) == set(extra.modules)
    assert declared["all"] == [f"recap-cli[{','.join(extras.EXTRAS)}]"]
    assert "recap-cli[all]" in declared["dev"]
    assert not requirements(project["dependencies"]) & {DISTRIBUTIONS.get(name, name) for name in WITHOUT}


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes modules look as if they were not installed, in this process."""

    def hide(*modules: str) -> None:
        for module in modules:
            for name in [name for name in sys.modules if name.partition(".")[0] == module]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, module, None)

    return hide


def test_a_missing_module_is_named_with_its_extra_and_the_command(hide: Callable[..., None]) -> None:
    extras.require("lora")
    extras.require("report", "jinja2")
    hide("peft", "jinja2")
    with pytest.raises(MissingExtraError, match=r"^peft is not installed: the extra lora \(.*\) needs it\n") as caught:
        extras.require("lora")
    assert caught.value.hint == "pip install 'recap-cli[lora]'"
    with pytest.raises(MissingExtraError, match=r"^jinja2 is not installed"):
        extras.require("report")
    extras.require("report", "matplotlib")
    hide("matplotlib")
    with pytest.raises(MissingExtraError, match=r"^jinja2 and matplotlib are not installed: .* needs them\n"):
        extras.require("report")
    assert not extras.is_installed("report")


def test_looking_for_an_extra_imports_nothing() -> None:
    program = (
        "import sys; from recap_cli import extras; found = [extras.is_installed(name) for name in extras.EXTRAS]; "
        "extras.require('plots'); print(sorted({'peft', 'matplotlib', 'jinja2', 'torch'} & sys.modules.keys()), all(found))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    assert (done.stdout.strip(), done.stderr) == ("[] True", "")


def test_a_strangers_method_can_name_no_extra_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("Odd.", lambda _: [RoundPlan()], extra="quantum")
    monkeypatch.setattr(plans, "method_of_name", lambda _: method)
    with pytest.raises(PluginError, match="'odd' needs the extra 'quantum', which recap-cli does not have"):
        plans.require_extra("odd")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a command line in a folder with the recipe `tiny.yaml`, expects exit code 19, and returns what it said."""
    for name in ("RECAP_TRACEBACK", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(recipes.dump(tiny("vit", rounds=1)), encoding="utf-8")
    Path("lora.yaml").write_text(recipes.dump(tiny("vit", rounds=1, method="lora-ft")), encoding="utf-8")

    def run(line: str) -> str:
        before = set(tmp_path.rglob("*"))
        code = main(line.split())
        out, err = capsys.readouterr()
        assert (code, out) == (MissingExtraError.exit_code, "")
        assert set(tmp_path.rglob("*")) == before, "nothing is written"
        assert "Traceback" not in err
        assert err.count("\n") == 2, "the error and its hint, and nothing that was computed before"
        return err

    return run


@pytest.mark.parametrize(
    "line",
    [
        "run tiny.yaml --set method=lora-ft",
        "run tiny.yaml --set method=lora-ft --dry-run",
        "init tiny.yaml --state s --set method=lora-ft",
        "init tiny.yaml --state s --set method=lora-ft --set finetune.memory_budget=1GiB",
        "compare tiny.yaml --methods recap,lora-ft --seeds 0",
        "compare lora.yaml --seeds 0",
        "profile-memory tiny.yaml --methods full,lora",
        "profile-memory tiny.yaml --set method=lora-ft",
    ],
)
def test_lora_without_its_extra_is_refused_at_once(line: str, refused: Callable[[str], str], hide: Callable[..., None]) -> None:
    hide("peft")
    err = refused(line)
    assert (
        "error: peft is not installed: the extra lora (finetune with LoRA: the methods lora-ft and recap-lora) needs it" in err
    )
    assert "hint: pip install 'recap-cli[lora]'" in err


@pytest.mark.parametrize(
    ("line", "extra", "missing"),
    [
        ("profile-memory tiny.yaml --plot memory.svg", "plots", "matplotlib"),
        ("report somewhere", "report", "jinja2"),
        ("report somewhere", "report", "matplotlib"),
    ],
)
def test_pictures_and_pages_without_their_extra_are_refused_at_once(
    line: str, extra: str, missing: str, refused: Callable[[str], str], hide: Callable[..., None]
) -> None:
    hide(missing)
    err = refused(line)
    assert f"error: {missing} is not installed: the extra {extra} (" in err
    assert f"hint: pip install 'recap-cli[{extra}]'" in err


def test_a_lora_state_is_refused_before_its_stages_and_needs_nothing_once_they_are_done(
    refused: Callable[[str], str], hide: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main(["init", "lora.yaml", "--state", "s"]) == 0
    for allowed, line in (("status s", "run --state s"), ("prune s", "profile-memory s"), ("mask s", "finetune s")):
        assert main(allowed.split()) == 0
        capsys.readouterr()
        with monkeypatch.context() as hidden:
            hidden.setattr(extras, "find_spec", lambda _: None)
            assert "peft is not installed" in refused(line)
    assert main(["run", "--state", "s"]) == 0
    hide("peft")
    for line in ("run --state s", "status s", "eval s", "export s product"):
        assert main(line.split()) == 0, capsys.readouterr().err


def test_doctor_and_plugins_say_which_extras_are_installed(capsys: Any, hide: Callable[..., None]) -> None:
    main(["plugins"])
    assert "extra" not in capsys.readouterr().err
    hide("peft")
    main(["doctor", "--json"])
    others = dict.fromkeys(("plots", "report", "segmentation", "tokens"), True)
    assert json.loads(capsys.readouterr().out)["extras"] == {"lora": False, **others}
    main(["doctor"])
    said = " ".join(capsys.readouterr().out.split())
    assert "extra lora not installed: pip install 'recap-cli[lora]'" in said
    assert "extra plots installed" in said
    main(["plugins"])
    assert "the extra lora is not installed" in capsys.readouterr().err


def test_a_torchvision_that_does_not_go_with_torch_is_named_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extras, "version", lambda _: "2.13.0+cpu")
    Path("tiny.yaml").write_text(recipes.dump(tiny("vit", rounds=1)), encoding="utf-8")
    wrong = "torchvision cannot be imported beside torch 2.13.0+cpu: RuntimeError: operator torchvision::nms does not exist"
    mend = "install both from one index: pip install --force-reinstall torch torchvision --index-url https://"
    for line in ("init tiny.yaml --state s", "profile-memory tiny.yaml"):
        assert main(line.split()) == ModelError.exit_code
        said = " ".join(capsys.readouterr().err.split())
        assert f"error: no model can be built: {wrong} hint: {mend}" in said
    assert main(["doctor", "--json"]) == 1
    assert any(problem.startswith(f"{wrong}; {mend}") for problem in json.loads(capsys.readouterr().out)["problems"])


LINES = (
    "--help",
    "recipes ls",
    "plugins",
    "doctor",
    "init tiny.yaml --state s",
    "prune s",
    "mask s",
    "finetune s",
    "merge s",
    "status s",
    "eval s",
    "export s product",
    "profile-memory tiny.yaml",
    "compare tiny.yaml --seeds 0 --dry-run",
    "run quickstart --dry-run",
    "init quickstart --state q --set head.warmup_epochs=0",
)


COMPARISON = ["compare", "tiny.yaml", "--methods", "recap", "--seeds", "0", "--out", "out", "--set", "finetune.steps=2"]
PROGRAM = f"""
import sys, importlib.util as found
sys.path.append({str(ROOT)!r})
from recap_cli.cli import main
from recap_cli.compare import processes
assert not any(map(found.find_spec, {WITHOUT!r}))
codes = [main(line.split()) for line in {LINES!r}]
import recap_cli
assert recap_cli.load("product").config.num_labels == 3
print(codes, file=sys.stderr, flush=True)
from tests.calls import here
processes.run = here  # its cell by a call of `run`, which needs no extra either
sys.exit(main({COMPARISON!r}))
"""


class Light(NamedTuple):
    """What a program said that ran where none of `WITHOUT` is installed, and the folder of its recipe `tiny.yaml`."""

    folder: Path
    codes: str  # of `LINES`
    said: str  # before these
    compared: Any  # exit code and standard error of `COMPARISON`


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Light:
    """One process for all that is looked at there: to import torch and transformers takes most of its time."""
    folder = tmp_path_factory.mktemp("light")
    site = folder / "site"
    site.mkdir()
    names = {"modules": WITHOUT, "distributions": tuple(DISTRIBUTIONS.get(name, name) for name in WITHOUT)}
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE.format(**names), encoding="utf-8")
    (folder / "tiny.yaml").write_text(recipes.dump(tiny("vit", rounds=1)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    said = done.stderr.splitlines()
    at = next((number for number, line in enumerate(said) if re.fullmatch(r"\[[\d, ]+\]", line)), len(said) - 1)
    return Light(folder, said[at], done.stderr, (done.returncode, "\n".join(said[at + 1 :])))


def test_all_else_works_without_any_extra(light: Light) -> None:
    assert light.codes == str([0] * len(LINES)), light.said
    assert "Loading" not in light.said  # of the product, by Python


def test_of_all_methods_a_comparison_leaves_out_those_without_their_extra(hide: Callable[..., None], capsys: Any) -> None:
    hide("peft")
    assert main(["compare", "quickstart", "--dry-run", "--json", "--seeds", "0"]) == 0
    out, err = capsys.readouterr()
    assert "lora-ft" not in {record["method"] for record in json.loads(out)}
    assert "note: lora-ft is left out: peft is not installed" in " ".join(err.split())
    assert "pip install 'recap-cli[lora]'" in " ".join(err.split())


def test_a_comparison_without_pictures_says_so_first_writes_its_results_and_draws_them_later(
    light: Light, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = light.compared
    assert code == 0, said
    (note,) = (line for line in said.splitlines() if line.startswith("note: no pictures will be drawn"))
    assert "matplotlib is not installed" in note
    assert "pip install 'recap-cli[plots]'" in note
    assert said.index(note) < said.index("1 cells in out")
    monkeypatch.chdir(light.folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert [record["status"] for record in results["cells"]] == ["done"]
    assert [note for note in results["notes"] if note.startswith("no pictures") and "pip install 'recap-cli[plots]'" in note]
    assert "peft" not in results["versions"]
    assert "torch" in results["versions"]
    assert not results.get("pictures")
    assert not list(Path("out").glob("*.png"))
    assert main(COMPARISON) == 0  # by now with matplotlib
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert results["pictures"]
    assert not [note for note in results["notes"] if "no pictures" in note]
