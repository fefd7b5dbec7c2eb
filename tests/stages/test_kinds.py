"""Models whose groups are of another kind than heads and neurons, or of one kind only: pruned, masked, told of, exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import recap_cli
from recap_cli.commands.tables import _sizes
from recap_cli.core.adapter import Adapter, Heads, Neurons, find_axes
from recap_cli.core.axes import Axis, chosen_params, prunable_params
from recap_cli.models import build
from recap_cli.plugins.adapters.bert import BERT
from recap_cli.report.report import report
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import summary
from recap_cli.stages.export import export
from recap_cli.stages.run import run
from tests.tiny import tiny

WIDE = 4  # neurons of an expert


def with_experts(model: nn.Module) -> list[Axis]:
    """BERT's axes, but the neurons of its second layer are experts of four neurons each."""
    axes = find_axes(BERT, model)
    return [_experts(axis) if (axis.layer, axis.kind) == (1, "neurons") else axis for axis in axes]


def _experts(axis: Axis) -> Axis:
    cuts = tuple(replace(cut, width=WIDE) for cut in axis.cuts)
    return replace(axis, kind="experts", size=axis.size // WIDE, cuts=cuts)


def only(form: type[Heads] | type[Neurons]) -> Adapter:
    return replace(BERT, tables=tuple(table for table in BERT.tables if isinstance(table, form)))


ADAPTERS = {
    "heads, neurons and experts": (replace(BERT, axes=with_experts), {"heads": 2, "neurons": 1, "experts": 1}),
    "heads": (only(Heads), {"heads": 2}),
    "neurons": (only(Neurons), {"neurons": 2}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_prunes_masks_shows_and_exports_whatever_kinds_there_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, layers = ADAPTERS[name]
    monkeypatch.setattr(build, "adapter_of", lambda spec: adapter)
    state = run(tiny("bert"), tmp_path / "state")
    here, rounds = Context(state), summary(state)["rounds"]
    plan, axes, shapes = here.plan("round-002"), here.layout.axes, here.layout.shapes
    for kind in layers:
        pool = [axis for axis in axes if axis.kind == kind]
        share = chosen_params(pool, shapes, plan) / prunable_params(pool, shapes)
        assert share == pytest.approx(0.6, abs=0.5 / sum(axis.size for axis in pool) + 1e-9)
    for row in rounds:
        assert {kind: len(kept) for kind, kept in row["kept"].items()} == layers
        assert row["of"] == {kind: [axis.size for axis in axes if axis.kind == kind] for kind in layers}
    columns, lines = _sizes(rounds)
    assert columns == ["round", *layers]
    assert all(" of " in cell for line in lines for cell in line[1:])
    page = report(state.path, tmp_path / "page.html").read_text()
    assert all(f"{kind} kept in each layer in round" in page for kind in layers)
    out = export(state, tmp_path / "out")
    loaded = recap_cli.load(out["path"])
    best = here.state.load_tensors(f"{here.state.manifest.best['folder']}/model.safetensors")  # type: ignore[index]
    assert all(torch.equal(best[name], param) for name, param in loaded.named_parameters())
