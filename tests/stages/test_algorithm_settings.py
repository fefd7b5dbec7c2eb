"""What a recipe can change in the algorithm, against the same reference; and what D_s, the warm-up and the product are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import training_round
from recap_cli.rounds.importance import draw
from recap_cli.rounds.status import summary
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.trainable.optim import Optimizer
from tests.stages import naive
from tests.stages.expected import assert_near, check_training, naive_mask, naive_plan
from tests.stages.witness import Record, indices_of, record_of, still, watching, witnessed
from tests.tiny import TRAIN, tiny

ALIKE: dict[str, Any] = {"rounds": 1, "prune": {"hold_plan": 0.0, "ramp": 1.0}}


def samples_of(record: Record) -> dict[tuple[int, str, int], list[int]]:
    return {use: indices_of(looks) for use, looks in record.samples().items()}


def test_d_s_is_another_random_sample_in_every_round_stage_and_gradual_step() -> None:
    samples = samples_of(record_of("vit"))
    assert set(samples) == {(1, "prune", 0), (1, "prune", 1), (2, "prune", 0), (2, "prune", 1)} | {
        (round, "mask", 0) for round in (1, 2, 3)
    }
    for sample in samples.values():
        assert len(sample) == len(set(sample)) == 16  # two batches of 8, none of them twice
        assert set(sample) <= set(range(TRAIN))
        assert max(sample) >= 16
    assert len({frozenset(sample) for sample in samples.values()}) == len(samples)
    assert not any(look.validation for looks in record_of("vit").samples().values() for look in looks)


def test_d_s_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first = samples_of(record_of("vit"))
    for seed, same in ((0, True), (1, False)):
        samples = samples_of(witnessed(still("vit", seed=seed), stop=(1, "mask")))
        assert {use for use in samples if (samples[use] == first[use]) is same} == {
            (1, "prune", 0),
            (1, "prune", 1),
            (1, "mask", 0),
        }


def test_every_example_is_as_likely_in_d_s_as_any_other() -> None:
    recipe = still("vit")
    split: Any = range(TRAIN)
    counts = torch.zeros(TRAIN)
    for round in range(500):
        counts[draw(recipe, split, round, "mask")] += 1
    expected, spread = 500 * 16 / TRAIN, (500 * 0.4 * 0.6) ** 0.5
    assert float((counts - expected).abs().max()) < 4.5 * spread  # of 40 examples


VARIANTS: dict[str, dict[str, Any]] = {
    "global": {"prune": {"scope": "global"}, "mask": {"scope": "global"}},
    "per-layer and per-kind": {"prune": {"scope": "per-layer"}, "mask": {"scope": "per-kind"}},
    "uniform": {"prune": {"uniform": True}},
    "a floor": {"prune": {"floor": 0.5}},
    "other criteria": {"prune": {"criterion": "magnitude"}, "mask": {"criterion": "fisher-per-example"}},
    "criteria swapped": {"prune": {"criterion": "fisher"}, "mask": {"criterion": "taylor"}},
    "all of the data": {"importance": {"batches": 10}},
}


@pytest.mark.parametrize(
    ("variant", "name"),
    [*((variant, "bert") for variant in VARIANTS), *((variant, "timm-vit-packed-glu") for variant in list(VARIANTS)[:2])],
)
def test_scopes_floors_and_criteria_choose_what_the_reference_chooses(variant: str, name: str) -> None:
    sections = {**ALIKE, **VARIANTS[variant], "prune": {**ALIKE["prune"], **VARIANTS[variant].get("prune", {})}}
    record = witnessed(still(name, **sections), stop=(1, "mask"))
    assert record.plan(1) == naive_plan(record, 1)
    assert record.mask(1) == naive_mask(record, 1)


def test_a_floor_holds_what_the_ranking_would_cut() -> None:
    record = witnessed(still("vit", rounds=1, prune={"floor": 0.74, "ratio": 0.25, "steps": 1}), stop=(1, "prune"))
    assert record.plan(1) == naive_plan(record, 1)
    (looks,) = record.seen(1, "prune").values()
    model, axes = record.model(), record.axes
    whole = naive.everything(axes)
    naive.load(model, record.full(0), axes, whole)
    scores = naive.importance(model, axes, whole, [look.batch for look in looks], "taylor")
    assert record.plan(1) != naive.best_groups(scores, axes, 0.75, whole, scope="per-kind", floor=0.0, least=1)


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd, clipped, accumulated, cosine in each round": {
        "mask": {"train_embeddings": True},
        "finetune": {
            **{"optimizer": "sgd", "momentum": 0.8, "lr": 0.05, "head_lr": 0.1, "max_grad_norm": 0.5, "epochs": 1.0},
            **{"batch_size": 6, "micro_batch_size": 3, "schedule": "cosine", "lr_schedule_span": "round", "warmup_ratio": 0.3},
        },
    },
    "adamw, constant, the head like the rest, new moments each round": {
        "finetune": {"epochs": 1.0, "schedule": "constant", "head_lr": None, "carry_moments": False},
    },
}


@pytest.mark.parametrize(("settings", "name"), list(zip(SETTINGS, ["distilbert", "timm-vit"], strict=True)))
def test_other_optimizers_and_schedules_train_as_the_reference_does(settings: str, name: str) -> None:
    record = witnessed(still(name, **SETTINGS[settings]))
    check_training(record, 3, -(-TRAIN // record.recipe.finetune.batch_size))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_single_round_trains_as_the_reference_does(optimizer: str) -> None:
    settings = {} if optimizer == "adamw" else SETTINGS["sgd, clipped, accumulated, cosine in each round"]
    record = witnessed(still("vit", **{**settings, **ALIKE, "prune": {**ALIKE["prune"], "criterion": "magnitude"}}))
    check_training(record, 1, 7)  # 1.2 epochs in batches of 7, or one in batches of 6


def test_a_gradient_is_clipped_where_the_reference_clips() -> None:
    sections = SETTINGS["sgd, clipped, accumulated, cosine in each round"]
    tuned = [
        witnessed(still("vit", **{**sections, "rounds": 1, "finetune": {**sections["finetune"], "max_grad_norm": norm}})).full(
            1
        )
        for norm in (0.5, None)
    ]
    assert any(not torch.allclose(tuned[0][n], tuned[1][n]) for n in tuned[0])


def test_dropout_is_for_training_alone() -> None:
    calm = witnessed(still("bert", **ALIKE))
    wild = witnessed(still("bert", **ALIKE, model={"config": {**(calm.recipe.model.config or {}), "hidden_dropout_prob": 0.5}}))
    assert all(torch.equal(t, calm.full(0)[n]) for n, t in wild.full(0).items())  # nor is it in the warm-up
    assert wild.plan(1) == calm.plan(1) == naive_plan(wild, 1)
    assert wild.mask(1) == calm.mask(1) == naive_mask(wild, 1)
    assert any(not torch.equal(t, calm.full(1)[n]) for n, t in wild.full(1).items())


@pytest.mark.parametrize("name", ["bert", "deit"])
def test_the_warm_up_trains_the_head_and_nothing_else_as_torch_would(name: str) -> None:
    cold = witnessed(still(name, head={"warmup_epochs": 0}), stop=(0, "init"))
    warm = witnessed(still(name, head={"warmup_epochs": 2, "lr": 0.01}), stop=(0, "init"))
    before, after, head = cold.full(0), warm.full(0), warm.layout["head"]
    assert {n for n in after if not torch.equal(after[n], before[n])} == set(head)
    looks = warm.seen(0, "init")["warm up the head"]
    assert [sorted(indices_of(looks)[start:][:TRAIN]) for start in (0, TRAIN)] == [list(range(TRAIN))] * 2
    assert indices_of(looks)[:TRAIN] != indices_of(looks)[TRAIN:]
    model = warm.model().eval()
    naive.load(model, before, warm.axes, naive.everything(warm.axes))
    params: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if n in head}
    optimizer = torch.optim.AdamW(params.values(), lr=0.0, weight_decay=0.0)
    for step, look in enumerate(looks):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / len(looks))
        grads = naive.gradients(model, [look.batch])
        for n, p in params.items():
            p.grad = grads[n]
        optimizer.step()
    for n, p in params.items():
        torch.testing.assert_close(after[n], p.detach(), rtol=1e-3, atol=2e-4)


def lr_window_of(record: Record, how: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates of a run, or of the stages one after another; `record` has what they looked at."""
    found: list[float] = []
    plain = Optimizer.step

    def step(self: Optimizer) -> None:
        found.append(self.lr)
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        if how == "run":
            with watching(record, [0, ""]) as track:
                run(record.recipe, path / "state", track=track)
        else:
            record.looks += witnessed(record.recipe, folder=path).looks
    return found


LR_SPANS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "recap": ({}, [1 - step / 21 for step in range(21)]),
    "recap, in each round": ({"rounds": 2, "finetune": {"lr_schedule_span": "round"}}, [1 - step / 7 for step in range(7)] * 2),
    "post-ft": ({"method": "post-ft", "options": {"full_share": 0.3}}, [1 - step / 21 for step in range(21)]),
}


@pytest.mark.parametrize("lr_schedule_span", LR_SPANS)
def test_a_run_and_its_stages_see_the_same_examples_at_the_same_rates(
    lr_schedule_span: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections, expected = LR_SPANS[lr_schedule_span]
    finetune = {"epochs": 1.4, "lr": 0.01, "batch_size": 8, **sections.get("finetune", {})}
    recipe = tiny("vit", **{"rounds": 3, **sections, "head": {"warmup_epochs": 0}, "finetune": finetune})
    at_once, stepwise = Record(recipe), Record(recipe)
    rates = lr_window_of(at_once, "run", tmp_path / "run", monkeypatch)
    assert rates == pytest.approx([0.01 * share for share in expected])
    assert lr_window_of(stepwise, "stages", tmp_path / "stages", monkeypatch) == rates
    assert [(look.label, look.indices) for look in at_once.looks] == [(look.label, look.indices) for look in stepwise.looks]
    ends = [State.open(tmp_path / how / "state") for how in ("run", "stages")]
    steps = [[e["steps"] for e in state.manifest.history if e["stage"] == "finetune"] for state in ends]
    assert steps[0] == steps[1] == ([6, 15] if lr_schedule_span == "post-ft" else [7] * recipe.rounds)


def forced(monkeypatch: pytest.MonkeyPatch, metric: str, sign: int, values: list[float]) -> None:
    """Let `finetune` measure these values, one a round: `sign` -1 where less is better."""
    left = iter(values)

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        calm = {"loss": 1.0, "accuracy": 0.5, "f1": 0.5, "matthews": 0.5}
        return calm | {metric: 1.0 + sign * next(left)}

    monkeypatch.setattr(training_round, "evaluate", evaluate)


def short(metric: str, rounds: int, **sections: Any) -> Recipe:
    finetune = {"steps": 1, "lr": 0.01, "batch_size": 8}
    prune = {"ratio": 0.4, "steps": 1, "hold_plan": 0.0, "ramp": 1.0, "criterion": "magnitude"}
    task = {"kind": "image-classification", "metric": metric}
    return tiny("vit", rounds=rounds, task=task, prune=prune, finetune=finetune, **sections)


@pytest.mark.parametrize(
    ("best", "metric", "sign"),
    [(1, "matthews", 1), (2, "loss", -1), (3, "matthews", 1)],
    ids=["1-matthews", "2-loss", "3-matthews"],
)
def test_the_product_is_the_small_model_of_the_round_with_the_best_metric(
    best: int, metric: str, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {1: [0.7, 0.3, 0.5], 2: [0.3, 0.7, 0.5], 3: [0.3, 0.5, 0.7]}[best]
    forced(monkeypatch, metric, sign, values)
    record = witnessed(short(metric, 3))
    assert record.best is not None
    assert (record.best["round"], record.best["metric"]) == (best, metric)
    assert record.best["value"] == pytest.approx(1.0 + sign * 0.7)
    folder = record.best["folder"]
    files = record.files[3, "merge"]
    assert sorted(f for f in files if f.startswith("best-")) == [f"{folder}/{n}.safetensors" for n in ("model", "plan")]
    product, full, alive = files[f"{folder}/model.safetensors"], record.full(best), record.plan(best)
    kept = naive.trainable_entries(record.axes, full, alive, [f for g in alive for f in record.axes.fine_of(g)], frozen=[])
    for name, tensor in full.items():
        assert torch.equal(tensor[kept[name]], product[name].flatten()), name


def test_a_round_that_is_pruned_less_than_the_last_is_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, "accuracy", 1, [0.9, 0.3, 0.2])
    record = witnessed(still("vit", finetune={"steps": 1}))
    assert record.best is not None
    assert record.best["round"] == 2


@pytest.mark.parametrize(
    ("values", "rounds", "metric", "sign"),
    [([0.5, 0.4, 0.3, 0.2], 3, "matthews", 1), ([0.5, 0.6, 0.4, 0.3, 0.2], 4, "loss", -1)],
    ids=["values0-3-matthews", "values1-4-loss"],
)
def test_patience_counts_the_rounds_since_the_best(
    values: list[float], rounds: int, metric: str, sign: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, metric, sign, values)
    state = run(short(metric, 6, patience=2), tmp_path / "state")
    assert state.manifest.round == rounds
    assert "has not improved for 2 rounds" in summary(state)["finished"]


def test_every_example_of_a_last_short_batch_counts_as_much_in_the_importance_as_any_other() -> None:
    recipe = still("vit", **ALIKE, importance={"batches": 10, "batch_size": 12})  # batches of 12, 12, 12 and 4
    record = witnessed(recipe, stop=(1, "mask"))
    assert [len(looks[-1].indices) for looks in record.samples().values()] == [4, 4, 4]
    assert record.plan(1) == naive_plan(record, 1)
    assert record.mask(1) == naive_mask(record, 1)


def test_the_reference_itself_sees_a_difference_of_a_thousandth() -> None:
    with pytest.raises(AssertionError, match="a weight"):
        assert_near(torch.tensor([1.0, 1.002]), torch.tensor([1.0, 1.0]), "a weight")
