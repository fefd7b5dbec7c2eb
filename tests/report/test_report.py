"""`recap report`: what it computes of a state and of results, which pages it makes, and what it refuses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recap_cli.cli import main
from recap_cli.compare import schema
from recap_cli.core.axes import UnitMask
from recap_cli.core.surgery import compose_index_maps, gather, indices, scatter
from recap_cli.errors import CorruptStateError, DataError, RecapError, StateError, StorageError, UsageError
from recap_cli.report.report import of_state, report
from recap_cli.rounds.record import MASK
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import trainable_entries
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.report.test_pages import NASTY, read, sample, without_result
from tests.tiny import tiny


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> State:
    """A state of three rounds, all merged; no test writes to it."""
    torch.set_num_threads(1)
    return run(tiny("vit", rounds=3), tmp_path_factory.mktemp("states") / "done")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A results.json as `recap compare` writes it."""
    place = tmp_path / "results.json"
    place.write_text(json.dumps(sample()))
    return place


def said(place: Path) -> str:
    return " ".join(" ".join(read(place.read_text(encoding="utf-8")).text).split())


def owned(context: Context, plan: UnitMask) -> dict[str, torch.Tensor]:
    """For each cut parameter, which entries belong to a group that `plan` has, entry by entry."""
    found = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in context.layout.shapes.items()}
    for axis in context.layout.axes:
        for cut in axis.cuts:
            for unit in plan[axis.name].nonzero().flatten().tolist():
                start = cut.offset + unit * cut.width
                found[cut.param].narrow(cut.dim, start, cut.width).fill_(True)
    return found


def trained(context: Context, number: int) -> dict[str, torch.Tensor]:
    """For each cut parameter, which entries the round has trained, by the functions that `merge` writes them back with."""
    folder, layout = f"round-{number:03d}", context.layout
    full = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in layout.shapes.items()}
    plan = context.plan(folder)
    chosen = {name: c.bool() for name, c in context.state.load_tensors(f"{folder}/{MASK}").items()}
    kept = indices(layout.axes, plan, layout.shapes)
    where = compose_index_maps(kept, trainable_entries(layout, plan, chosen, gather(full, kept)))
    scatter(full, {name: torch.ones_like(t) for name, t in gather(full, where).items()}, where)
    return full


def entries(found: dict[str, torch.Tensor]) -> int:
    return sum(int(t.sum()) for t in found.values())


def both(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t & b[name] for name, t in a.items()}


@pytest.mark.parametrize("name", ["vit", "bert", "timm-vit-packed-glu"])
def test_overlap_and_coverage_are_those_counted_entry_by_entry(name: str, tmp_path: Path) -> None:
    state = run(tiny(name, rounds=3), tmp_path / "state")
    context, rows = Context(state), of_state(state)["rounds"]
    prunable = owned(context, {axis.name: torch.ones(axis.size, dtype=torch.bool) for axis in context.layout.axes})
    seen = {name: torch.zeros_like(t) for name, t in prunable.items()}
    before: dict[str, torch.Tensor] | None = None
    for row in rows:
        kept = owned(context, context.plan(f"round-{row['round']:03d}"))
        assert row["overlap"] == (None if before is None else entries(both(kept, before)) / entries(kept))
        seen = {name: t | moved for (name, t), moved in zip(seen.items(), trained(context, row["round"]).values(), strict=True)}
        assert row["coverage"] == entries(both(seen, prunable)) / entries(prunable)
        before = kept


def test_a_plan_that_stays_overlaps_wholly_and_all_that_may_move_is_covered(tmp_path: Path) -> None:
    rows = of_state(run(tiny("vit", prune={"ratio": 0.0}, mask={"ratio": 0.0}), tmp_path / "state"))["rounds"]
    assert [(row["overlap"], row["coverage"]) for row in rows] == [(None, 1.0), (1.0, 1.0)]


def test_the_page_of_a_state_has_the_result_first_then_pictures_and_settings(done: State, tmp_path: Path) -> None:
    found = of_state(done)
    text = said(report(done.path, tmp_path / "page.html"))
    best = found["best"]
    assert text.index(f"{best['value']:.4f}") < text.index("Round by round") < text.index("What was pruned where")
    for share in (row[key] for row in found["rounds"] for key in ("overlap", "coverage") if row[key] is not None):
        assert f"{share:.1%}" in text
    assert "criterion: taylor" in text
    assert "Changed since the state was made None." in text
    assert "finished: all 3 rounds are done" in text


def stopped(path: Path) -> Iterator[State]:
    """One state, after `init` and after each stage of two rounds but the last."""
    state = init(tiny("vit"), path)
    yield state
    for stage in (prune, mask, finetune, merge, prune, mask, finetune):
        stage(state)
        yield state


def test_a_state_in_the_middle_of_a_run_gives_a_page_that_says_so(tmp_path: Path) -> None:
    for number, state in enumerate(stopped(tmp_path / "state")):
        text = said(report(state.path, tmp_path / "page.html"))
        manifest = state.manifest
        assert ("No round is merged yet" in text) == (number < 4)
        assert f"recap run --state {state.path}" in text
        assert (f"Round {manifest.round} is under way: {manifest.stage} is done" in text) == (number not in (0, 4))


@pytest.mark.parametrize("what", ["missing", "cut"])
def test_without_the_losses_of_a_round_the_page_has_all_else_and_a_note_says_why(what: str, tmp_path: Path) -> None:
    state, notes = run(tiny("vit", rounds=1), tmp_path / "state"), list[str]()
    assert "Training loss" in said(report(state.path, tmp_path / "whole.html", say=notes.append))
    assert not notes
    file = state.path / "round-001" / "steps.jsonl"
    file.unlink() if what == "missing" else file.write_text("{}")
    text = said(report(state.path, tmp_path / "page.html", say=notes.append))
    assert "Training loss" not in text
    assert "Round by round" in text
    assert re.search(r"^note: the page has no training loss: .*round-001/steps\.jsonl: it (is missing|has 2 bytes)", notes[0])


def test_changed_settings_stand_on_the_page_with_what_they_were(tmp_path: Path) -> None:
    state = init(tiny("vit", rounds=1), tmp_path / "state")
    prune(state)
    mask(state)
    finetune(state, overrides=["finetune.micro_batch_size=4"])
    assert "mask of round 1 finetune.micro_batch_size none 4" in said(report(state.path))


def test_a_recipes_name_is_escaped(tmp_path: Path) -> None:
    nasty = NASTY.replace("/", "")  # which a name cannot have
    state = init(tiny("vit").model_copy(update={"name": nasty}), tmp_path / "state")
    page = report(state.path)
    assert nasty in "".join(read(page.read_text()).text)
    assert "<script" not in page.read_text()


def test_the_page_of_results_is_the_same_for_the_file_and_its_folder(written: Path) -> None:
    page = report(written.parent)
    assert page == written.parent / "report.html"
    before = page.read_bytes()
    assert report(written) == page  # ours, so it is replaced
    assert page.read_bytes() == before
    assert "recap, r_p 0.9, r_f 0.3 , seeds 0, 1, 2: impossible" in said(page)


def test_numbers_that_are_not_finite_are_no_numbers(written: Path) -> None:
    found = sample()
    found["cells"][0]["value"] = float("nan")
    written.write_text(json.dumps(found))
    (group, *_) = schema.read(written)["groups"]
    assert group["value"] == pytest.approx(sum(cell["value"] for cell in found["cells"][1:3]) / 2)
    said(report(written))


def test_cells_may_lack_all_that_may_be_null(written: Path) -> None:
    found = sample()
    found["cells"] = [{name: one[name] for name in ("method", "seed", "status")} for one in found["cells"]]
    found["cells"] += [
        without_result(one, "waiting", None) | {"method": "new", "seconds": None} for one in sample()["cells"][:1]
    ]
    del found["total_steps"]
    written.write_text(json.dumps(found))
    assert "done, without a metric" in said(report(written))


def refused(kind: type[RecapError], source: Path, out: Path | None = None) -> str:
    with pytest.raises(kind) as caught:
        report(source, out)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value.message


def test_what_is_neither_a_state_nor_results_is_refused(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refused(StateError, tmp_path / "no")
    assert "has neither state.yaml nor results.json" in refused(StateError, tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"schema": 1,\n', "line 2: is no JSON"),
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[" * 51 + "]" * 51, "nested more than 50 deep"),
        ("[" * 50 + "]" * 50, "is no result of"),
        ("[]", "is no result of `recap compare`"),
        ('{"schema": 1, "kind": "forecast"}', "is no result of `recap compare`"),
        (b"\xff\xfe", "is no text"),
        ('"\\ud800"', "is no JSON that can be read"),
    ],
)
def test_a_file_that_is_no_results_is_refused(text: str | bytes, what: str, tmp_path: Path) -> None:
    place = tmp_path / "results.json"
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert what in refused(DataError, place)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"schema": 2}, "has schema 2, and this recap reads only schema 1"),
        ({"cells": {}}, "cells is not what it should be"),
        ({"cells": [1]}, "cells[0] is not"),
        ({"grid": None}, "grid is not what it should be: found nothing"),
        ({"total_steps": "many"}, "total_steps is not"),
        ({"cells": [{**sample()["cells"][0], "status": "gone"}]}, "cells[0].status is not what it should be: found 'gone'"),
        ({"cells": [{**sample()["cells"][0], "value": "0.9"}]}, "cells[0].value is not"),
        ({"cells": [{**sample()["cells"][0], "memory": {"peak_bytes": True}}]}, "cells[0].memory.peak_bytes is not"),
        ({"cells": [{**sample()["cells"][0], "seconds": [1]}]}, "cells[0].seconds is not"),
        ({"cells": [{**sample()["cells"][0], "steps": 10**400}]}, "cells[0].steps is not"),
        ({"cells": [{**sample()["cells"][0], "seed": -1}]}, "cells[0].seed is not"),
    ],
)
def test_results_that_are_not_as_agreed_are_refused(change: dict[str, Any], what: str, written: Path) -> None:
    written.write_text(json.dumps(sample() | change))
    assert what in refused(DataError, written)


def test_a_place_for_the_page_that_will_not_do_is_refused(written: Path, tmp_path: Path) -> None:
    assert "is a folder" in refused(UsageError, written, tmp_path)
    assert "there is no folder" in refused(StorageError, written, tmp_path / "no" / "page.html")
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my own notes</html>")
    assert "`recap report` has not made it" in refused(UsageError, written, mine)
    assert mine.read_text() == "<html>my own notes</html>"
    refused(UsageError, written, written)
    assert "is no plain file" in refused(UsageError, written, Path("/dev/null"))


def test_a_state_with_an_altered_plan_is_refused_and_no_page_is_made(tmp_path: Path) -> None:
    state = init(tiny("vit"), tmp_path / "state")
    prune(state)
    plan = state.path / "round-001" / "plan.safetensors"
    content = bytearray(plan.read_bytes())
    content[-1] ^= 1
    plan.write_bytes(bytes(content))
    assert "sha256" in refused(CorruptStateError, state.path)
    assert not (state.path / "report.html").exists()


@pytest.mark.parametrize(
    ("method", "covered"),
    [("full-ft", 1.0), ("head-ft", 0.0), ("lora-ft", None)],  # what a training of its own visits is not guessed from the mask
)
def test_every_method_has_a_page(method: str, covered: float | None, tmp_path: Path) -> None:
    state = run(tiny("vit", method=method), tmp_path / "state")
    assert of_state(state)["rounds"][-1]["coverage"] == covered
    assert method in said(report(state.path))


def test_the_page_does_not_stand_in_the_way_of_the_next_stage(tmp_path: Path) -> None:
    state = init(tiny("vit"), tmp_path / "state")
    page = report(state.path)
    prune(state)
    assert page.exists()


def test_the_command_prints_the_page_and_nothing_else(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = written.parent / "a page.html"
    assert main(["report", str(written), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert main(["report", str(written.parent / "no")]) == StateError.exit_code
    told = capsys.readouterr().err
    assert "hint: " in told
    assert "Traceback" not in told


def test_the_recipe_on_the_page_is_that_of_the_state(done: State) -> None:
    assert yaml.safe_load(of_state(done)["recipe_text"])["rounds"] == 3
