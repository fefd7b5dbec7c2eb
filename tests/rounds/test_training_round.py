"""The batches of a round, what a ruined one says, and what its record holds."""

import json
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_cli.errors import TrainingError
from recap_cli.progress import Label
from recap_cli.rounds import training_round
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.training.loop import Steps, Training
from tests.tiny import tiny


def test_what_is_flipped_is_drawn_by_the_seed_and_anew_in_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds_of(seed: int) -> list[int]:
        found = list[int]()

        def batches(split: Any, chosen: torch.Tensor, size: int, *, augment_seed: int, device: Any) -> Iterator[dict[str, Any]]:
            found.append(augment_seed)
            yield from [{}] * ceil(len(chosen) / size)

        monkeypatch.setattr(training_round, "batches", batches)
        steps = training_round._epochs(tiny("vit", seed=seed), range(40), 0, 10, torch.device("cpu"))  # type: ignore[arg-type]
        assert len(list(steps)) == 10  # two epochs of five
        return found

    assert len({*seeds_of(0), *seeds_of(1)}) == 4
    assert seeds_of(0) == seeds_of(0)


def test_a_round_looks_at_its_losses_as_often_as_the_recipe_says_and_shows_the_last(tmp_path: Path) -> None:
    state = init(tiny("vit", rounds=1, finetune={"steps": 7, "log_every": 3}), tmp_path / "state")
    prune(state), mask(state)
    heard = list[Label]()

    def track(items: Any, label: str, total: int | None = None) -> Any:
        heard.extend([label] if isinstance(label, Label) else [])
        return iter(items)

    finetune(state, track=track)
    looks = [json.loads(line) for line in (state.path / "round-001/steps.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [3, 6, 7]
    assert [label.now for label in heard] == [f"loss {looks[-1]['loss']:.4f}"]


def test_only_the_rounds_of_the_ramp_take_their_batches_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, taken = training_round.train, list[int | None]()

    def train(*args: Any, steps: Steps) -> Training:
        taken.append(steps.micro_batch_size)
        return plain(*args, steps=steps)

    monkeypatch.setattr(training_round, "train", train)
    run(tiny("vit", rounds=4, finetune={"steps": 1, "batch_size": 8}), tmp_path / "state")
    assert taken == [4, None, None, None]


def test_what_a_last_step_has_ruined_is_named_with_what_to_do() -> None:
    ruined = type("Named", (), {"name": "a.weight", "master": torch.tensor([1.0, torch.nan])})()
    optimizer: Any = type("Optimizer", (), {"trainables": [ruined]})()
    with pytest.raises(TrainingError, match=r"^a\.weight is not finite after finetuning; the round is not committed") as caught:
        training_round._check_finite(0.5, optimizer)
    assert str(caught.value.hint).startswith("lower the rate in a new state, and that of the head: recap run RECIPE")
    optimizer.trainables = []
    with pytest.raises(TrainingError, match=r"^the validation loss is inf after finetuning"):
        training_round._check_finite(float("inf"), optimizer)
    training_round._check_finite(0.5, optimizer)


def test_a_loss_that_is_not_finite_ends_the_round_with_the_same_hint(tmp_path: Path) -> None:
    state = init(
        tiny("vit", rounds=1, finetune={"lr": 1e30, "max_grad_norm": None}, head={"warmup_epochs": 0}), tmp_path / "state"
    )
    prune(state), mask(state)
    with pytest.raises(TrainingError, match=r"the loss is .* the round is not committed") as caught:
        finetune(state)
    assert caught.value.hint == training_round.LOWER_THE_RATE


def test_the_record_has_the_ratios_and_rates_of_a_round(tmp_path: Path) -> None:
    state = run(tiny("vit", rounds=1, prune={"steps": 1}, finetune={"steps": 1}), tmp_path / "state")
    facts = {entry["stage"]: entry for entry in state.manifest.history}
    assert facts["prune"]["prune_ratio"] == 0.4
    assert facts["mask"]["mask_ratio"] == 0.6
    assert facts["finetune"]["lr"] == 0.01
