"""Plugins: listed unloaded, loaded one at a time, refused with a message that says what to do."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from torch import nn

from recap_cli import registry
from recap_cli.cli import main
from recap_cli.core.adapter import Adapter
from recap_cli.core.axes import Axis, Cut
from recap_cli.core.criterion import Criterion
from recap_cli.core.frozen_weight import FrozenWeight
from recap_cli.core.importance import group_scores
from recap_cli.core.method import Method
from recap_cli.core.task import Task
from recap_cli.errors import PluginError

TYPES = {"criteria": Criterion, "adapters": Adapter, "methods": Method, "tasks": Task, "weights": FrozenWeight}


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Installs a distribution of one module with the given source and entry points, for the length of a test."""

    def install(name: str, points: str, source: str = "", version: str = "1.2") -> Path:
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(points)
        (site / f"{name.replace('-', '_')}_module.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        return site

    return install


def test_ours_are_listed_as_a_strangers_would_be():
    assert set(registry.names("criteria")) >= {"taylor", "fisher", "fisher-per-example", "magnitude", "random", "wanda"}
    assert set(registry.names("adapters")) >= {"bert", "roberta", "electra", "distilbert", "vit", "deit", "dinov2", "timm-vit"}
    entry = next(entry for entry in registry.entries("criteria") if entry.name == "taylor")
    assert (entry.distribution, entry.target) == ("recap-cli", "recap_cli.plugins.criteria.taylor:TAYLOR")


KINDS = {"criteria": Criterion, "adapters": Adapter, "methods": Method, "tasks": Task}


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_registered_plugin_loads_and_is_of_its_kind(kind):
    for name in registry.names(kind):
        assert isinstance(registry.load(kind, name), TYPES[kind])


def test_listing_imports_neither_torch_nor_a_plugin():
    code = (
        "import sys; from recap_cli import registry; registry.entries('criteria'); registry.entries('adapters');"
        "print([name for name in sys.modules if name == 'torch' or name.startswith('recap_cli.plugins')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_imports_no_other_plugin(distribution):
    code = (
        "import sys; from recap_cli import registry; registry.load('criteria', 'magnitude');"
        "print([name for name in sys.modules if name.startswith('recap_cli.plugins.') and name.count('.') == 3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['recap_cli.plugins.criteria.magnitude']"


def test_a_strangers_criterion_is_found_loaded_and_recorded(distribution):
    source = "from recap_cli.api import Criterion\nABS = Criterion(score=lambda w, g: w.abs(), needs='none')\n"
    distribution("acme-prune", "[recap.criteria]\nabs = acme_prune_module:ABS\n", source)
    assert "abs" in registry.names("criteria")
    assert isinstance(registry.load("criteria", "abs"), Criterion)
    wanted = {"kind": "criteria", "name": "abs", "distribution": "acme-prune", "version": "1.2"}
    assert registry.used("criteria", "abs") == wanted


def test_an_unknown_criterion_names_near_names_and_all_names():
    with pytest.raises(PluginError, match=r"no criterion named 'tailor'.*fisher, .*taylor") as caught:
        registry.load("criteria", "tailor")
    assert caught.value.hint == "did you mean taylor?"
    assert caught.value.exit_code == 7


def test_an_unknown_adapter_says_how_to_add_one():
    with pytest.raises(PluginError, match="no adapter named 'mamba'") as caught:
        registry.load("adapters", "mamba")
    assert "recap.adapters" in str(caught.value.hint)
    assert "docs/plugins/adapter.md" in str(caught.value.hint)


def test_a_name_that_two_distributions_claim_is_refused_naming_both(distribution):
    for name in ("acme-one", "acme-two"):
        distribution(name, f"[recap.criteria]\nours = {name.replace('-', '_')}_module:X\n")
    for ask in (registry.load, registry.used):
        with pytest.raises(PluginError, match=r"'ours' is claimed by acme-one 1.2 and acme-two 1.2"):
            ask("criteria", "ours")
    assert registry.names("criteria").count("ours") == 1


def test_a_plugin_that_fails_to_import_is_named_with_its_error(distribution):
    distribution("acme-broken", "[recap.criteria]\nbroken = acme_broken_module:X\n", "raise OSError('no such device')")
    with pytest.raises(PluginError, match=r"'broken'.*acme-broken 1.2.*OSError: no such device") as caught:
        registry.load("criteria", "broken")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_plugin_that_ends_the_process_is_refused_in_one_line(distribution):
    distribution("acme-exit", "[recap.criteria]\nleave = acme_exit_module:X\n", "raise SystemExit('bye\\nand more')")
    with pytest.raises(PluginError, match=r"'leave'.*SystemExit: bye") as caught:
        registry.load("criteria", "leave")
    assert "more" not in caught.value.message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda *_: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda *_: None, "gave no scores for layer"),
        (lambda *_: {}, "gave no scores for layer"),
    ],
)
def test_a_criterion_whose_group_scores_are_none_is_named_as_such(given, message):
    axis = Axis("layer", "neurons", 0, 2, ())
    with pytest.raises(PluginError, match=message):
        group_scores(nn.Linear(2, 2), [axis], Criterion(score_groups=given), lambda each: iter(()))


def test_only_the_first_line_of_what_a_criterion_raises_is_told():
    def fail(weight, grad):
        raise ValueError("first\nsecond")

    axis = Axis("layer", "neurons", 0, 2, (Cut("weight", 0, 1),))
    with pytest.raises(PluginError, match="ValueError: first") as caught:
        group_scores(nn.Linear(2, 2), [axis], Criterion(score=fail, needs="none"), lambda each: iter(()))
    assert "second" not in caught.value.message


def test_a_plugin_of_the_wrong_type_is_refused(distribution):
    distribution("acme-odd", "[recap.adapters]\nodd = acme_odd_module:X\n", "X = 3\n")
    with pytest.raises(PluginError, match=r"'odd'.*is of type int, not Adapter"):
        registry.load("adapters", "odd")


def test_an_entry_point_to_nothing_is_refused(distribution):
    distribution("acme-gone", "[recap.criteria]\ngone = acme_gone_module:MISSING\n")
    with pytest.raises(PluginError, match=r"'gone'.*AttributeError"):
        registry.load("criteria", "gone")


BROKEN = [
    ("[console_scripts]\nno equals sign here\n", "line 2 of its entry_points.txt has no '='"),
    ("[a]\nb = c\n\xff\n", "entry_points.txt cannot be read: UnicodeDecodeError"),
]


@pytest.fixture
def restored(monkeypatch):
    """`leave_out_broken` changes the process: after the test it reads entry points as before."""
    monkeypatch.setattr(Distribution, "entry_points", Distribution.entry_points)


@pytest.mark.parametrize(("points", "problem"), BROKEN)
@pytest.mark.usefixtures("restored")
def test_a_distribution_with_broken_entry_points_is_left_out_and_named(distribution, capsys, points, problem):
    known = {kind: registry.names(kind) for kind in registry.KINDS}
    site = distribution("zz-broken", "")
    (site / "zz_broken-1.2.dist-info" / "entry_points.txt").write_bytes(points.encode("latin-1"))
    assert {kind: registry.names(kind) for kind in registry.KINDS} == known
    (found,) = registry.broken()
    assert (found.distribution, found.version) == ("zz-broken", "1.2")
    assert problem in found.problem
    assert main(["plugins"]) == 0
    shown = capsys.readouterr()
    assert "taylor" in shown.out
    assert f"zz-broken 1.2 is ignored: {found.problem}" in shown.err
    assert main(["doctor", "--json"]) == 1
    assert any("zz-broken 1.2" in one and problem in one for one in json.loads(capsys.readouterr().out)["problems"])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "is no ordinary file"),
        (lambda file: (file.touch(), os.truncate(file, 2**40)), "has 1,099,511,627,776 bytes"),
    ],
)
@pytest.mark.timeout(120)  # a pipe would be waited for
def test_entry_points_that_cannot_be_a_small_file_are_not_opened(distribution, make, problem):
    file = distribution("zz-broken", "") / "zz_broken-1.2.dist-info" / "entry_points.txt"
    file.unlink()
    make(file)
    (found,) = registry.broken()
    assert found.problem == f"its entry_points.txt {problem}"
    assert "taylor" in registry.names("criteria")


def test_libraries_that_read_all_entry_points_are_imported_beside_a_broken_one(distribution):
    site = distribution("zz-broken", "[console_scripts]\nno equals sign here\n")
    code = (
        "from recap_cli.cli import main; import sys; code = main(['run', 'quickstart', '--dry-run']); "
        "import torch; sys.exit(code)"
    )
    where = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=where)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_distribution_is_read_as_it_is_imported_the_first_on_the_path(distribution, tmp_path, monkeypatch):
    distribution("acme-prune", "[recap.criteria]\nabs = acme_prune_module:ABS\n", "", "1.0")
    (tmp_path / "acme-prune").rename(tmp_path / "before")
    monkeypatch.syspath_prepend(str(tmp_path / "before"))
    distribution("acme-prune", "[recap.criteria]\nabs = acme_prune_module:ABS\n", "", "2.0")
    assert [entry.version for entry in registry.entries("criteria") if entry.name == "abs"] == ["2.0"]


def test_what_is_installed_or_removed_while_the_process_runs_is_seen(distribution):
    site = distribution("acme-one", "[recap.criteria]\none = acme_one_module:X\n")
    assert "one" in registry.names("criteria")
    info = site / "acme_two-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-two\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[recap.criteria]\ntwo = acme_two_module:X\n")
    assert {"one", "two"} <= set(registry.names("criteria"))
    sys.path.remove(str(site))
    assert {"one", "two"}.isdisjoint(registry.names("criteria"))


def test_metadata_are_read_once_for_all_look_ups(distribution, monkeypatch):
    distribution("acme-one", "[recap.criteria]\none = acme_one_module:X\n")
    assert "one" in registry.names("criteria")
    monkeypatch.setattr(registry.metadata, "distributions", lambda: pytest.fail("read again"))
    for kind in registry.KINDS:
        assert registry.entries(kind)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("class Own(BaseException): pass\nraise Own('mine')", "Own: mine"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
    ],
)
def test_whatever_an_import_raises_names_the_plugin(distribution, source, problem):
    distribution("acme-raises", "[recap.criteria]\nraises = acme_raises_module:X\n", source)
    with pytest.raises(PluginError, match=rf"'raises'.*acme-raises 1.2.*{problem}\n"):
        registry.load("criteria", "raises")


def test_a_dry_run_imports_a_strangers_criterion(distribution, capsys):
    distribution("acme-boom", "[recap.criteria]\nboom = acme_boom_module:X\n", "raise OSError('boom')")
    assert main(["run", "quickstart", "--dry-run", "--set", "mask.criterion=boom"]) == 7
    assert "'boom'" in capsys.readouterr().err


def test_what_an_import_prints_and_where_it_goes_stay_its_own(distribution, capfd):
    source = (
        "import os; print('from python', flush=True); os.system('echo from a process'); os.chdir('/')\n"
        "from recap_cli.api import Criterion\nX = Criterion(score=lambda w, g: w.abs())\n"
    )
    distribution("acme-loud", "[recap.criteria]\nloud = acme_loud_module:X\n", source)
    before = os.getcwd()
    registry.load("criteria", "loud")
    print("the result")
    out, err = capfd.readouterr()
    assert out == "the result\n"
    assert "from python" in err
    assert "from a process" in err
    assert os.getcwd() == before


def test_a_real_ctrl_c_ends_a_plugins_import_as_any_other(distribution):
    source = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    distribution("acme-slow", "[recap.criteria]\nslow = acme_slow_module:X\n", source)
    heard = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        registry.load("criteria", "slow")
    assert signal.getsignal(signal.SIGINT) is heard
    assert main(["run", "quickstart", "--dry-run", "--set", "mask.criterion=slow"]) == 130
