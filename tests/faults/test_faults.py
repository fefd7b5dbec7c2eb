"""Every fault of the table is found by the tests that are named for it, and sources as they are by none of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.server import FaultServer, Outcomes
from tests.faults.table import CHOSEN, DRAWN, FAULTS, ROOT, TOGETHER, Fault

pytestmark = pytest.mark.proof
ALL = sorted({test for fault in FAULTS for test in fault.tests})


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as started:
        yield started


@pytest.fixture(scope="module")
def unchanged(server: FaultServer) -> Outcomes:
    return server.run(ALL, modules=True)


def test_the_table_has_faults_of_many_files_with_names_of_their_own() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({fault.file for fault in FAULTS}) >= 12


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_text_that_a_fault_changes_stands_once_in_its_file(fault: Fault) -> None:
    compile(fault.changed(), fault.file, "exec")


def test_a_text_that_is_not_found_once_is_refused() -> None:
    fault = FAULTS[0]
    with pytest.raises(ValueError, match="0 times, not once: mend the table"):
        fault.changed("nothing of it")
    with pytest.raises(ValueError, match="2 times, not once"):
        fault.changed(fault.old * 2)


def test_without_a_fault_every_named_test_passes(unchanged: Outcomes) -> None:
    assert unchanged == dict.fromkeys(ALL, "passed")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fails_the_tests_that_are_named_for_it(fault: Fault, server: FaultServer, unchanged: Outcomes) -> None:
    assert server.run(fault.tests, {fault.file: fault.changed()}) == dict.fromkeys(fault.tests, "failed")


def test_the_first_three_faults_together_fail(server: FaultServer, unchanged: Outcomes) -> None:
    texts: dict[str, str] = {}
    for fault in TOGETHER:
        texts[fault.file] = fault.changed(texts.get(fault.file))
    assert server.run([CHOSEN, DRAWN], texts) == {CHOSEN: "failed", DRAWN: "failed"}


def test_a_test_that_crashes_has_found_no_fault(server: FaultServer, unchanged: Outcomes) -> None:
    test, file = "tests/trainable/test_optim.py::test_vectors_do_not_decay", "recap_cli/trainable/optim.py"
    text = (
        (ROOT / file).read_text(encoding="utf-8").replace("if trainable.grad_param.ndim > 1", "if trainable.grad_param.nothing")
    )
    assert server.run([test], {file: text}) == {test: "crashed: AttributeError"}


def test_a_source_that_cannot_be_imported_is_no_fault_that_a_test_found(server: FaultServer, unchanged: Outcomes) -> None:
    test = "tests/trainable/test_optim.py::test_vectors_do_not_decay"
    outcomes = server.run([test], {"recap_cli/trainable/optim.py": "raise RuntimeError('broken')"})
    assert "failed" not in outcomes.values()
    assert "error" in outcomes.values()
    assert Path(ROOT / "recap_cli/trainable/optim.py").read_text().startswith('"""SGD')  # nothing is written to the sources
