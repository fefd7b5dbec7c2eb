"""Plugins: listed unloaded, loaded one at a time, refused with a message that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from recap_cli import registry
from recap_cli.core.adapter import Adapter
from recap_cli.core.criterion import Criterion
from recap_cli.core.groups import Axis, Cut
from recap_cli.core.method import Method
from recap_cli.core.scoring import group_scores
from recap_cli.errors import PluginError


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
    assert set(registry.names("criteria")) >= {"taylor", "fisher", "fisher-per-example", "magnitude", "random"}
    assert set(registry.names("adapters")) >= {"bert", "roberta", "electra", "distilbert", "vit", "deit", "dinov2", "timm-vit"}
    entry = next(entry for entry in registry.entries("criteria") if entry.name == "taylor")
    assert (entry.distribution, entry.target) == ("recap-cli", "recap_cli.plugins.criteria.taylor:TAYLOR")


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_registered_plugin_loads_and_is_of_its_kind(kind):
    for name in registry.names(kind):
        assert isinstance(registry.load(kind, name), {"criteria": Criterion, "adapters": Adapter, "methods": Method}[kind])


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
    assert "docs/plugins.md" in str(caught.value.hint)


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
