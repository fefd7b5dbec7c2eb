"""I5 to I7 of the design, on whole runs. `test_algorithm.py` has the others, and I7 of a round after others."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli import registry
from recap_cli.core.task import IGNORED, Batch
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.pico import PICO, logits_for
from tests.segmentation import CONFIGS, TYPICAL
from tests.stages import naive
from tests.strange import STRANGE, register
from tests.tiny import tiny

STEPWISE = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@cache
def state_of(name: str) -> Path:
    """The state of a finished run."""
    path = Path(mkdtemp(prefix=f"recap-{name}-")) / "state"
    run(tiny(name), path)
    return path


def stored_files(root: Path) -> dict[str, bytes]:
    """Every tensor file of a state, and what it decided: all that must be equal where two runs are."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.safetensors"))}


def test_every_registered_adapter_has_a_pico_model() -> None:
    types = {PICO[name]().model_type for name in PICO} | set(CONFIGS)
    assert {entry.name for entry in registry.entries("adapters") if entry.distribution == "recap-cli"} == types


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_i7_stage_by_stage_is_run(name: str, tmp_path: Path) -> None:
    recipe = tiny(name)
    state = init(recipe, tmp_path / "state")
    for _ in range(recipe.rounds):
        for stage in STEPWISE.values():
            stage(State.open(tmp_path / "state"))
    assert stored_files(state.path) == stored_files(state_of(name))


def plain_loss(context: Context, model: nn.Module) -> Callable[[Batch], Tensor]:
    """The loss as a plain loop in training has it: torch's mean over all examples, or pixels of a class; or the model's own.

    A mean over pixels is torch's sum by their number, which is its mean but for the last bit.
    """
    naive.train_mode(model)
    forward, cross_entropy = forward_of(context.spec, model), torch.nn.functional.cross_entropy

    def loss(batch: Batch) -> Tensor:
        outputs, labels = forward(batch), batch["labels"]
        if labels.ndim == 1:
            return cross_entropy(outputs.float(), labels)
        counted = (labels != IGNORED).sum()
        if not isinstance(outputs, Tensor):
            return outputs.loss * counted / counted
        scores = torch.nn.functional.interpolate(outputs, labels.shape[1:], mode="bilinear")
        return cross_entropy(scores, labels, reduction="sum") / counted

    return loss


@pytest.mark.parametrize("name", [*sorted(PICO), *STRANGE, *TYPICAL])
def test_i5_both_ratios_zero_in_one_round_is_plain_finetuning_to_the_bit(name: str, tmp_path: Path) -> None:
    recipe = tiny(
        name, rounds=1, prune={"ratio": 0.0}, mask={"ratio": 0.0, "train_embeddings": True}, finetune={"weight_decay": 0.1}
    )
    state = init(recipe, tmp_path / "state")
    context = Context(state)
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False)
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    steps = 5  # one epoch of 40 in batches of 8
    loss_of = plain_loss(context, model)
    torch.manual_seed(seed_for(recipe.seed, 1, "finetune"))
    for step, batch in enumerate(batches(split, order(len(split), seed=recipe.seed, round=1, epoch=0), 8)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.finetune.lr * (1 - step / steps)
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    end = Context(run(recipe, tmp_path / "state"))
    ours = end.full_tensors()
    assert all(torch.equal(ours[n], p.detach()) for n, p in model.named_parameters())


def test_two_rounds_in_which_everything_trains_are_one_torch_optimizer(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"prune": {"ratio": 0.0}, "mask": {"ratio": 0.0, "train_embeddings": True}}
    state = init(tiny("vit", finetune={"weight_decay": 0.0}, **sections), tmp_path / "state")
    context = Context(state)
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False, weight_decay=0.0)
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    forward = logits_for(context.spec)
    model.train()
    for round in (1, 2):
        torch.manual_seed(seed_for(context.recipe.seed, round, "finetune"))
        for step, batch in enumerate(batches(split, order(len(split), seed=context.recipe.seed, round=1, epoch=round - 1), 8)):
            optimizer.param_groups[0]["lr"] = context.recipe.finetune.lr * (1 - ((round - 1) * 5 + step) / 10)
            torch.nn.functional.cross_entropy(forward(model, batch).float(), batch["labels"]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    ours = Context(run(context.recipe, tmp_path / "state")).full_tensors()
    assert all(torch.equal(ours[n], p.detach()) for n, p in model.named_parameters())


class StopHere(KeyboardInterrupt):
    """What Ctrl-C does, at a chosen moment."""


def run_with_stops(recipe: Recipe, path: Path) -> set[tuple[int, str]]:
    """Run a recipe to its end, stopped once in every loop of every round; the round and the label of each stop."""
    seen: set[tuple[int, str]] = set()

    def stop_once(items: Any, label: str, total: int | None = None) -> Any:
        for i, item in enumerate(items):
            moment = (State.open(path).manifest.round, label) if (path / "state.yaml").exists() else (0, label)
            if i == 1 and moment not in seen:
                seen.add(moment)
                raise StopHere
            yield item

    for _ in range(60):
        try:
            run(recipe, path, track=stop_once)
            break
        except StopHere:
            continue
    return seen


@pytest.mark.parametrize("name", ["bert", "timm-vit", "segformer"])
def test_i6_stopped_in_every_stage_and_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    seen = run_with_stops(tiny(name), tmp_path / "state")
    assert len(seen) >= 7  # init, the importances and the finetuning of both rounds were each stopped once
    assert stored_files(tmp_path / "state") == stored_files(state_of(name))


def test_runs_from_the_same_seed_are_equal_and_from_another_are_not(tmp_path: Path) -> None:
    expected = stored_files(state_of("vit"))
    run(tiny("vit"), tmp_path / "same")
    run(tiny("vit", seed=1), tmp_path / "other")
    assert stored_files(tmp_path / "same") == expected
    assert stored_files(tmp_path / "other") != expected


def test_a_deep_copy_is_not_needed_to_read_a_state_twice(tmp_path: Path) -> None:
    context = Context(State.open(state_of("vit")))
    first = copy.deepcopy(context.full_tensors())
    for tensor in context.full_tensors().values():
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), context.full_tensors().values(), strict=True))
