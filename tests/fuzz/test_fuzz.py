"""A small share of `make fuzz` in every run of the tests: drawn cases, and the inputs that once broke something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import documented
from tests.fuzz.case import Case

ROOT = Path(__file__).parents[2]
CASES = 200


@pytest.mark.proof
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case is played in a fork")
@pytest.mark.timeout(1200)  # against a hang only: it takes half a minute of one core
def test_no_drawn_or_known_input_breaks_a_command(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--cases", str(CASES), "--seed", "14", "--jobs", "1", "--corpus", "sample", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stderr
    assert done.returncode == 0, done.stdout
    assert json.loads(report.read_text())["cases"] >= CASES


def test_a_case_is_one_line_and_comes_back_as_it_was() -> None:
    case = Case("data", "csv", (("cell", "train", 0.5, "label", "a\n\udcff"), ("bytes", "train", ("cut", 0, 0.5))), ("init",))
    line = case.to_json()
    assert "\n" not in line
    assert Case.from_json(line).to_json() == line


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("rounds", [1, 10, "1e3"], [0, -1, 1.5, True, None, "x", [], float("nan")]),
        ("prune.ratio", [0, 0.5, "1e-4"], [1, -0.1, True, "half", float("nan"), None]),
        ("prune.ramp", [1, 0.1], [0, 1.1]),
        ("finetune.betas", [[0.9, 0.999]], [[0.9], [0.9, 1.0], 0.9, None]),
        ("finetune.head_lr", ["auto", None, 0.1], ["x", 0, True]),
        ("prune.compensate", [False, "auto", 0.1, "1e-2"], [True, 0, -1, "x", None]),
        ("mask.train_embeddings", [True, False, "tokens"], ["true", 1, None]),
        ("finetune.device", ["auto", "cuda:1"], ["gpu", 1, "cuda:"]),
        ("finetune.memory_budget", ["2GiB", "0.5GB", None], ["2", "GB", 2]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("data.builtin", ["digits", None], ["letters", 1]),
        ("task.kind", ["text-classification", "token-classification"], ["classification", None, 1]),
        ("task.metric", ["f1", "pearson", None], ["F1", 1]),
        ("data.label", ["label", ["a", "b"]], [["a"], [], None, ["a", ""], True]),
        ("prune", [{}, None], [1, "x", []]),
        ("nonsense", [], [1]),
        ("options.rank", [8], []),
    ],
)
def test_what_the_reference_of_recipes_forbids_is_read_from_its_table(key: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert not list(documented.violation(key, value)), value
    for value in bad:
        assert list(documented.violation(key, value)), value


def test_every_type_in_the_reference_of_recipes_is_understood() -> None:
    for key in sorted(documented.keys()):
        for value in (None, True, 1, 0.5, "x", [], {}):
            list(documented.violation(key, value))


def test_the_exit_codes_are_read_from_the_documentation() -> None:
    assert {0, 1, 2, 11, 18, 130} <= documented.exit_codes()
