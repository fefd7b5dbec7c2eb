"""What stages refuse, and what each finetuning setting does, on tiny states."""

import json
import re
import shutil
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recap_cli.stages.finetune as finetuning
from recap_cli import registry
from recap_cli.core.axes import counts
from recap_cli.errors import (
    DeviceMemoryError,
    ModelError,
    PluginError,
    RecipeError,
    StageOrderError,
    StateError,
    TrainingError,
    UsageError,
)
from recap_cli.memory import oom
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds import small_model, training_round
from recap_cli.rounds.record import IMPORTANCE, MASK, MOMENTS, PLAN, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.selection import choose
from recap_cli.rounds.settings import EXECUTION
from recap_cli.rounds.status import describe, next_stage, summary
from recap_cli.rounds.trainer import Trainer
from recap_cli.stages import eval as evaluation
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.pico import logits_for
from tests.tiny import tiny

finetune = finetuning.finetune


STAGES = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}


@cache
def _made(name: str, until: str, sections: str) -> Path:
    path = Path(mkdtemp(prefix=f"recap-{name}-{until}-")) / "state"
    init(tiny(name, **json.loads(sections)), path)
    for stage, do in STAGES.items() if until != "init" else ():
        do(State.open(path))
        if stage == until:
            break
    return path


def made(place: Path, until: str, name: str = "vit", **sections: Any) -> State:
    """A state whose stage `until` of the first round, or `init`, is done: a copy of one that is made once."""
    shutil.copytree(_made(name, until, json.dumps(sections, sort_keys=True)), place)
    return State.open(place)


def change_of(tmp_path: Path, name: str = "vit", **sections: Any) -> dict[str, torch.Tensor]:
    """The entries that one round moved, compact."""
    tune = sections.pop("finetune", {})
    later = {key: value for key, value in tune.items() if f"finetune.{key}" in EXECUTION}
    rest = {"finetune": {key: value for key, value in tune.items() if key not in later}} if tune.keys() - later.keys() else {}
    state = made(tmp_path, "mask", name, rounds=1, **sections, **rest)
    finetune(state, overrides=[f"finetune.{key}={json.dumps(value)}" for key, value in later.items()])
    return state.load_tensors(f"round-001/{TRAINED}")


def test_a_stage_out_of_order_names_the_right_command(tmp_path: Path) -> None:
    state = made(tmp_path / "state", "init")
    with pytest.raises(StageOrderError, match="`init` of round 0 is done") as caught:
        mask(state)
    assert f"recap prune {tmp_path / 'state'}" in str(caught.value.hint)


def test_after_the_last_round_a_further_one_is_refused(tmp_path: Path) -> None:
    state = made(tmp_path / "state", "merge", rounds=1)
    assert next_stage(Context(state).recipe, state) is None
    with pytest.raises(StageOrderError, match="its one round is done") as caught:
        prune(state)
    assert "recap export" in str(caught.value.hint)
    assert State.open(tmp_path / "state").manifest.stage == "merge"


def test_patience_ends_a_run_early(tmp_path: Path) -> None:
    state = run(tiny("vit", rounds=6, patience=1, finetune={"lr": 1e-12, "weight_decay": 0.0}), tmp_path / "state")
    assert state.manifest.round < 6
    assert "has not improved for 1 rounds" in summary(state)["finished"]


def test_a_run_with_another_recipe_names_the_keys_that_differ(tmp_path: Path) -> None:
    made(tmp_path / "state", "merge", rounds=1)
    with pytest.raises(StateError, match=r"prune\.ratio"):
        run(tiny("vit", rounds=1, prune={"ratio": 0.2}), tmp_path / "state")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    recipe = tiny("vit", rounds=1)
    before = run(recipe, tmp_path / "state").manifest
    assert run(recipe, tmp_path / "state").manifest == before


@pytest.mark.filterwarnings("ignore:.*overflow.*")
def test_a_loss_that_is_not_finite_commits_nothing(tmp_path: Path) -> None:
    state = init(tiny("vit", finetune={"lr": 1e30, "optimizer": "sgd", "steps": 8}), tmp_path / "state")
    prune(state)
    mask(state)
    files = sorted(p for p in (tmp_path / "state").rglob("*") if p.is_file())
    with pytest.raises(TrainingError, match="the round is not committed"):
        finetune(state)
    assert State.open(tmp_path / "state").manifest.stage == "mask"
    assert [p for p in files if not p.exists()] == []


def test_a_last_step_that_ruins_the_model_commits_nothing(tmp_path: Path) -> None:
    state = init(tiny("vit", finetune={"lr": 1e38, "optimizer": "sgd", "steps": 1}), tmp_path / "state")
    for stage in (prune, mask):
        stage(state)
    with pytest.raises(TrainingError, match="after finetuning; the round is not committed"):
        finetune(state)
    assert State.open(tmp_path / "state").manifest.stage == "mask"


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "steps": 1, "lr": 1.0}
    state = init(tiny("vit", rounds=1, finetune={**settings, "max_grad_norm": 1e-3}), tmp_path / "state")
    before = Context(state).full_tensors()
    after = Context(run(Context(state).recipe, tmp_path / "state")).full_tensors()
    trained = torch.sqrt(sum((after[n].double() - before[n].double()).square().sum() for n in before))  # type: ignore[call-overload]
    assert float(trained) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("section", ["prune", "mask"])
def test_an_unknown_criterion_is_refused_before_a_state_is_made(section: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="taylr") as caught:
        init(tiny("vit", **{section: {"criterion": "taylr"}}), tmp_path / "state")
    assert "taylor" in str(caught.value.hint)
    assert not (tmp_path / "state").exists()


def test_an_unknown_model_type_names_the_adapters_there_are(tmp_path: Path) -> None:
    with pytest.raises((ModelError, PluginError), match="swinv2") as caught:
        init(tiny("vit", model={"config": {"model_type": "swinv2"}}), tmp_path / "state")
    assert "timm-vit" in caught.value.message
    assert "recap.adapters" in str(caught.value.hint)
    assert not (tmp_path / "state").exists()


def test_fused_backward_trains_the_same_and_holds_fewer_gradients(tmp_path: Path) -> None:
    plain = change_of(tmp_path / "plain")
    fused = change_of(tmp_path / "fused", finetune={"fused_backward": True})
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    held = [State.open(tmp_path / d).manifest.history[-1]["gradients_bytes"] for d in ("plain", "fused")]
    assert held[1] < held[0] / 2


@pytest.mark.parametrize("weights", registry.names("weights"))
def test_offloading_trains_the_same(weights: str, tmp_path: Path) -> None:
    plain = change_of(tmp_path / "plain", finetune={"weights": weights})
    offloaded = change_of(tmp_path / "offloaded", finetune={"weights": weights, "offload": True, "fused_backward": True})
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)


@pytest.mark.parametrize(("name", "weights"), [("bert", "int8"), ("vit", "nf4"), ("timm-vit", "int8"), ("bert", "nf4")])
def test_quantized_rounds_go_through_and_the_full_model_keeps_what_did_not_move(
    name: str, weights: str, tmp_path: Path
) -> None:
    recipe = tiny(name, finetune={"weights": weights, "checkpointing": True, "fused_backward": True})
    state = run(recipe, tmp_path / "state")
    assert state.manifest.history[-2]["evaluated_in"] == weights
    used = {plugin["kind"]: plugin["name"] for plugin in state.manifest.plugins["used"]}
    assert used["weights"] == weights
    plain = made(tmp_path / "plain", "init", name)
    before, after = (Context(s).full_tensors() for s in (plain, state))
    trained = sum(not torch.equal(before[n], after[n]) for n in before)
    assert 0 < trained < len(before)
    for n in before:
        same = (before[n] == after[n]).float().mean()
        assert same == 1 or after[n].dtype == torch.float32  # what moved did so in fp32; I3 holds the rest to the bit


def test_micro_batches_are_the_big_batch(tmp_path: Path) -> None:
    settings = {"batch_size": 16, "optimizer": "sgd", "lr": 0.05, "epochs": 2}
    whole = change_of(tmp_path / "whole", finetune=settings)
    parts = change_of(tmp_path / "parts", finetune={**settings, "micro_batch_size": 4})
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_checkpointing_runs_every_block_twice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[bool, int] = {}
    partial = small_model.make_partial
    for checkpointing in (False, True):
        calls[checkpointing] = 0

        def counted(model: Any, *args: Any, on: bool = checkpointing, **settings: Any) -> Any:
            trainables = partial(model, *args, **settings)
            layers = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
            for layer in layers:
                layer.register_forward_pre_hook(lambda *_: calls.__setitem__(on, calls[on] + torch.is_grad_enabled()))
            return trainables

        monkeypatch.setattr(small_model, "make_partial", counted)
        change_of(tmp_path / str(checkpointing), name, finetune={"checkpointing": checkpointing, "steps": 1})
    assert calls[True] >= calls[False] + 4  # two layers with two norms each


@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_checkpointing_of_attention_runs_it_twice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, calls = torch.nn.functional.scaled_dot_product_attention, dict[Any, int]()
    made(tmp_path / "before", "mask", name, rounds=1, finetune={"steps": 1})  # copied below: what it attends to is not counted
    for how in (False, "attention"):

        def counted(*args: Any, on: Any = how, **settings: Any) -> Any:
            calls[on] = calls.get(on, 0) + torch.is_grad_enabled()
            return attend(*args, **settings)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        change_of(tmp_path / str(how), name, finetune={"checkpointing": how, "steps": 1})
    assert calls["attention"] == calls[False] + 2  # two layers, in one step


@pytest.mark.parametrize("how", [True, "attention"])
@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit"])
def test_checkpointing_changes_nothing_but_memory(name: str, how: bool | str, tmp_path: Path) -> None:
    dropless = {"config": {**tiny(name).model.config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}  # type: ignore[dict-item]
    sections = {} if name == "timm-vit" else {"model": dropless}
    kept = change_of(tmp_path / "kept", name, **sections)
    recomputed = change_of(tmp_path / "recomputed", name, finetune={"checkpointing": how}, **sections)
    for key in kept:
        torch.testing.assert_close(recomputed[key], kept[key], rtol=1e-4, atol=1e-6)


def test_bf16_weights_hold_half_the_weights_and_merge_full_precision(tmp_path: Path) -> None:
    recipe = tiny("vit", rounds=1, finetune={"weights": "bf16"})
    state = run(recipe, tmp_path / "bf16")
    fp32 = made(tmp_path / "fp32", "merge", rounds=1)
    held = [next(e for e in s.manifest.history if e["stage"] == "finetune") for s in (state, fp32)]
    assert held[0]["weights_bytes"] < 0.9 * held[1]["weights_bytes"]  # half the residents, and the masters beside them
    assert held[0]["optimizer_bytes"] == held[1]["optimizer_bytes"]
    first, second = Context(state).full_tensors(), Context(fp32).full_tensors()
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    best = state.manifest.best
    assert best is not None
    classifier = first["classifier.weight"]
    assert not torch.equal(classifier, classifier.bfloat16().float())  # what moved was never rounded
    unchanged = [n for n in first if n in Context(state).layout.embeddings]
    assert unchanged
    assert all(torch.equal(first[name], second[name]) for name in unchanged)


def test_sgd_has_one_moment_and_without_carrying_none_is_kept(tmp_path: Path) -> None:
    state = run(tiny("vit", finetune={"optimizer": "sgd"}), tmp_path / "sgd")
    entry = next(e for e in state.manifest.history if e["stage"] == "finetune")
    assert entry["optimizer_bytes"] == 4 * entry["trainable"]
    assert any(name.endswith(MOMENTS) for name in state.manifest.files)
    forgetful = run(tiny("vit", finetune={"carry_moments": False}), tmp_path / "none")
    assert not any(name.endswith(MOMENTS) for name in forgetful.manifest.files)


def test_uniform_and_rounded_sizes_reach_the_small_model(tmp_path: Path) -> None:
    recipe = tiny("vit", rounds=1, prune={"ratio": 0.4, "uniform": True, "round_to": 8})
    state = init(recipe, tmp_path / "state")
    facts = prune(state)
    assert len(set(facts["kept"]["heads"])) == 1
    assert facts["kept"]["neurons"] == [32, 32]  # 48 · 0.6 = 28.8, and the nearest multiple of 8 above it


def test_embeddings_move_only_when_asked(tmp_path: Path) -> None:
    still = change_of(tmp_path / "still")
    trainable_entries = change_of(tmp_path / "trained", mask={"train_embeddings": True})
    embeddings = set(Context(State.open(tmp_path / "still")).layout.embeddings)
    assert embeddings
    assert embeddings.isdisjoint(still)
    assert embeddings <= set(trainable_entries)


def test_importance_is_averaged_over_rounds_when_asked(tmp_path: Path) -> None:
    settings = {"hold_plan": 0.0, "ramp": 1.0, "steps": 2}
    plans = {}
    for ema in (0.0, 0.5, 1 - 1e-9):
        state = run(tiny("timm-vit", rounds=3, prune={**settings, "ema": ema}), tmp_path / str(ema))
        plans[ema] = [shared_plan(state, number) for number in (1, 2, 3)]
        kept = [f"round-{number:03d}/{IMPORTANCE}" in state.manifest.files for number in (1, 2, 3)]
        assert kept == [ema > 0] * 3
    first = state.load_tensors(f"round-001/{IMPORTANCE}")
    last = state.load_tensors(f"round-003/{IMPORTANCE}")
    context = Context(state)
    for kind in ("heads", "neurons"):  # of which each is ranked by itself: nothing of later rounds is in it, but a factor
        of_kind = [torch.cat([of[axis.name] for axis in context.layout.axes if axis.kind == kind]) for of in (first, last)]
        assert torch.allclose(of_kind[0] / of_kind[0].sum(), of_kind[1] / of_kind[1].sum(), rtol=1e-4)
    naive = choose(
        context.recipe, context.layout.axes, context.layout.shapes, first, 0.6
    )  # by what the first round found, in one go
    assert plans[1 - 1e-9][2] == {name: kept.to(torch.uint8).tolist() for name, kept in naive.items()}
    assert plans[0.0][0] == plans[0.5][0]  # there is nothing to average with
    assert plans[0.0] != plans[0.5]


def test_averaged_importance_and_drawn_groups_are_the_same_after_a_stop(tmp_path: Path) -> None:
    recipe = tiny("vit", rounds=3, prune={"hold_plan": 0.0, "ema": 0.5}, mask={"random": 0.5})
    whole = run(recipe, tmp_path / "whole")
    state = init(recipe, tmp_path / "stopped")
    for stage in (prune, mask, finetune, merge) * 3:
        stage(State.open(state.path))  # as a process of its own would
    tensors = [
        {name: checksum for name, checksum in of.manifest.files.items() if name.endswith(".safetensors")}
        for of in (whole, State.open(state.path))
    ]
    assert tensors[0] == tensors[1]


def shared_plan(state: State, number: int) -> dict[str, list[int]]:
    return {name: t.tolist() for name, t in state.load_tensors(f"round-{number:03d}/{PLAN}").items()}


@pytest.mark.parametrize("scope", ["per-kind", "global", "per-layer"])
def test_a_share_of_the_mask_is_drawn_at_random_and_the_rest_is_the_best(scope: str, tmp_path: Path) -> None:
    masks = {}
    for place, ratio, random, seed in (("all", 0.6, 0.0, 0), ("best", 0.8, 0.0, 0), ("half", 0.6, 0.5, 0)):
        recipe = tiny("vit", rounds=1, seed=seed, mask={"ratio": ratio, "random": random, "scope": scope})
        state = init(recipe, tmp_path / place)
        prune(state), mask(state)
        masks[place] = {name: t.bool() for name, t in state.load_tensors(f"round-001/{MASK}").items()}
        trains = state.manifest.history[-1]["trainable_share_of_prunable"]
        assert trains == pytest.approx(1 - ratio, abs=0.05)
    assert all(bool(masks["half"][name][kept].all()) for name, kept in masks["best"].items())
    assert any(not torch.equal(masks["half"][name], kept) for name, kept in masks["all"].items())


def test_the_head_has_a_rate_of_its_own_when_asked(tmp_path: Path) -> None:
    still = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 1e-30}
    state = init(tiny("vit", rounds=1, finetune={**still, "head_lr": 0.01}), tmp_path / "state")
    context = Context(state)
    before, head = context.full_tensors(), set(context.layout.head)
    after = Context(run(context.recipe, tmp_path / "state")).full_tensors()
    assert {name for name in before if not torch.allclose(before[name], after[name], rtol=0, atol=1e-20)} == head
    plain, same = change_of(tmp_path / "plain"), change_of(tmp_path / "same", finetune={"head_lr": 0.01})
    assert all(torch.equal(plain[name], same[name]) for name in plain)  # 0.01 is the rate of the rest


def head_rate_of(state: State) -> float | None:
    """The rate of the head's own that the newest finetuning says it had, or None."""
    return next(e for e in reversed(state.manifest.history) if e["stage"] == "finetune").get("head_lr")


def test_a_new_head_trains_at_the_rate_of_its_warm_up_where_that_is_higher(tmp_path: Path) -> None:
    low: dict[str, Any] = {"finetune": {"steps": 1, "lr": 0.005}, "head": {"lr": 0.02}}
    assert head_rate_of(run(tiny("vit", rounds=1, **low), tmp_path / "low")) == 0.02
    for place, other in (
        ("high", {"finetune": {"steps": 1, "lr": 0.05}}),
        ("sgd", {"finetune": {**low["finetune"], "optimizer": "sgd"}}),
        ("head-ft", {"method": "head-ft"}),
        ("faithful", {"faithful": True}),
    ):
        assert head_rate_of(run(tiny("vit", rounds=1, **{**low, **other}), tmp_path / place)) is None
    far = {**low, "finetune": {"steps": 1, "lr": 1e-4}}
    assert head_rate_of(run(tiny("vit", rounds=1, **far), tmp_path / "far")) == pytest.approx(1e-3)  # ten times at most
    exported = export(State.open(tmp_path / "low"), tmp_path / "model", dense=True)
    trained = run(tiny("vit", rounds=1, model={"name": exported["path"], "config": None}, **low), tmp_path / "trained")
    assert head_rate_of(trained) is None  # the head came with the checkpoint
    assert trained.manifest.history[0]["head_new"] is False


def test_the_mask_trains_the_same_share_of_every_layer_unless_the_plain_algorithm_is_asked_for(tmp_path: Path) -> None:
    spread = {}
    for place, faithful in (("default", False), ("faithful", True)):
        state = init(tiny("vit", rounds=1, faithful=faithful, mask={"ratio": 0.8}), tmp_path / place)
        prune(state), mask(state)
        chosen = state.load_tensors(f"round-001/{MASK}")
        spread[place] = max(abs(float(trains.float().mean()) - 0.2) * len(trains) for trains in chosen.values())
    assert spread["default"] <= 0.5
    assert spread["faithful"] > 1  # in groups: as near as whole groups can be


def test_the_head_is_warmed_up_and_nothing_else_trains(tmp_path: Path) -> None:
    cold = Context(init(tiny("bert", head={"warmup_epochs": 0}), tmp_path / "cold"))
    warm = Context(init(tiny("bert", head={"warmup_epochs": 2}), tmp_path / "warm"))
    first, second = cold.full_tensors(), warm.full_tensors()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == set(cold.layout.head)
    assert warm.state.manifest.history[0]["head_steps"] == 4


def test_a_head_that_came_with_the_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    exported = export(made(tmp_path / "first", "merge", rounds=1), tmp_path / "model", dense=True)
    state = init(tiny("vit", model={"name": exported["path"], "config": None}), tmp_path / "second")
    loaded = Context(state).full_tensors()
    wanted = Context(State.open(tmp_path / "first"))
    best = wanted.state.manifest.best
    assert best is not None
    own = wanted.state.load_tensors(f"{best['folder']}/{WEIGHTS}")
    assert "head_steps" not in state.manifest.history[0]
    assert all(torch.equal(loaded[name], own[name]) for name in wanted.layout.head)


def test_eval_scores_every_model_of_a_state(tmp_path: Path) -> None:
    state = run(tiny("vit"), tmp_path / "state")
    rows = {row["model"]: row for row in evaluation.evaluate(state, which=["full", "small", "best"])}
    best = state.manifest.best
    assert best is not None
    assert rows["best"]["accuracy"] == pytest.approx(best["value"])
    assert rows["small"]["parameters"] < rows["full"]["parameters"]
    last = next(e for e in reversed(state.manifest.history) if e["stage"] == "finetune")
    assert rows["small"]["loss"] == pytest.approx(last["loss"], rel=1e-4)


def test_the_small_model_is_scored_as_finetuned_before_the_merge(tmp_path: Path) -> None:
    state = made(tmp_path / "state", "mask", "bert")
    facts = finetune(state)
    (row,) = evaluation.evaluate(state, which=["small"])
    assert row["loss"] == pytest.approx(facts["loss"], rel=1e-4)
    with pytest.raises(UsageError, match="no best model yet: round 1 is the first that may give it"):
        evaluation.evaluate(state, which=["best"])
    merge(state)
    (merged,) = evaluation.evaluate(state, which=["small"])
    assert merged["loss"] == pytest.approx(facts["loss"], rel=1e-4)


def test_a_round_of_the_ramp_gives_no_best_model_and_nothing_is_scored_before_that_is_said(tmp_path: Path) -> None:
    state = init(tiny("vit", rounds=4), tmp_path / "state")
    for stage in (prune, mask, finetune, merge):
        stage(state)
    scored: list[str] = []

    def track(items: Any, label: str, total: int | None = None) -> Any:
        scored.append(label)
        return iter(items)

    evaluation.evaluate(state, which=["full", "small"], track=track)
    assert {"full model", "small model"} <= set(scored)
    scored.clear()
    with pytest.raises(UsageError, match="no best model yet: round 2 is the first that may give it") as caught:
        evaluation.evaluate(state, which=["full", "best"], track=track)
    assert not any("model" in label for label in scored)
    assert "recap prune" in str(caught.value.hint)
    with pytest.raises(UsageError, match="round 2 is the first"):
        export(state, tmp_path / "out")


def test_a_full_model_that_no_round_has_trained_is_not_exported(tmp_path: Path) -> None:
    state = init(tiny("vit"), tmp_path / "state")
    with pytest.raises(UsageError, match="no round is merged, so that the full model is as it began"):
        export(state, tmp_path / "out", which="full")
    assert not (tmp_path / "out").exists()


def test_the_full_model_is_exported_as_the_rounds_have_left_it(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    state = made(tmp_path / "state", "merge", rounds=2)
    facts = export(state, tmp_path / "out", which="full")
    assert (facts["form"], facts["facts"]) == ("stock", {"round": 1, "model": "full"})
    context = Context(state)
    wanted = context.full_weights()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("dense", [False, True])
def test_an_export_gives_the_logits_of_the_best_model(dense: bool, tmp_path: Path) -> None:
    import recap_cli
    from recap_cli.models import build

    state = made(tmp_path / "state", "merge", rounds=1)
    facts = export(state, tmp_path / "out", dense=dense)
    context = Context(state)
    best = state.manifest.best
    assert best is not None
    model = context.model(state.load_tensors(f"{best['folder']}/{WEIGHTS}"), counts(context.plan(best["folder"])))
    batch = build.example_batch(context.spec)
    loaded = recap_cli.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(pixel_values=batch["pixel_values"]).logits, logits_for(context.spec)(model, batch), rtol=1e-4, atol=1e-5
        )
    assert facts["form"] == ("dense" if dense else facts["form"])


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "fisher-per-example", "magnitude", "random"])
def test_every_criterion_prunes_and_masks(criterion: str, tmp_path: Path) -> None:
    recipe = tiny(
        "vit", prune={"criterion": criterion}, mask={"criterion": criterion}, importance={"batches": 1, "batch_size": 4}
    )
    state = init(recipe, tmp_path / "state")
    assert prune(state)["kept_share_of_prunable"] == pytest.approx(0.6, abs=0.06)
    assert mask(state)["trainable_share_of_prunable"] == pytest.approx(0.4, abs=0.05)
    assert [plugin["name"] for plugin in state.manifest.plugins["used"]] == [
        *("recap", "image-classification", "fp32"),
        *(criterion, criterion, "vit"),
    ]


def test_a_checkpoint_with_values_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    exported = export(made(tmp_path / "first", "merge", rounds=1), tmp_path / "model", dense=True)
    file = Path(exported["path"]) / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight"))
    tensors[name] = tensors[name].clone().fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="values that are not finite"):
        init(tiny("vit", model={"name": exported["path"], "config": None}), tmp_path / "second")


def test_texts_longer_than_the_positions_of_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model has positions for 40 tokens") as caught:
        init(tiny("bert", data={"max_length": 41}), tmp_path / "state")
    assert caught.value.hint == "--set data.max_length=40"


def test_a_dry_run_says_what_would_happen() -> None:
    lines = "\n".join(describe(tiny("bert")))
    assert "40.0% of the prunable parameters by taylor" in lines
    assert "60.0% of what is left frozen by fisher" in lines
    assert "warm up the head: 1 epoch at 0.001" in lines
    assert ", the head" not in lines
    low = {"finetune": {"lr": 2e-4}}
    assert "adamw at 0.0002, the head at 0.001 " in "\n".join(describe(tiny("bert", **low)))
    named = tiny("bert", model={"name": "google-bert/bert-base-uncased", "config": None}, **low)
    assert "adamw at 0.0002, the head, if it is new, at 0.001 " in "\n".join(describe(named))
    assert ", the head" not in "\n".join(describe(tiny("bert", method="head-ft", **low)))
    more = "\n".join(describe(tiny("bert", prune={"ema": 0.5}, mask={"random": 0.25}, finetune={"head_lr": 0.02})))
    for said in (
        "taylor, averaged over rounds (0.5),",
        "per-layer, 25% of what is trained at random;",
        "at 0.01, the head at 0.02 ",
    ):
        assert said in more


# Settings that may be changed, and a device whose memory runs out


def masked(place: Path, **sections: Any) -> State:
    """A state whose next stage is the first `finetune`."""
    return made(place, "mask", **sections)


def test_execution_settings_are_changed_in_the_state_and_the_run_goes_on(tmp_path: Path) -> None:
    recipe = tiny("vit", rounds=1)
    masked(tmp_path / "state", rounds=1)
    heard: list[Any] = []
    lighter = tiny("vit", rounds=1, finetune={"micro_batch_size": 4, "fused_backward": True}, evaluate={"batch_size": 6})
    state = run(lighter, tmp_path / "state", on_change=heard.append)
    assert state.manifest.stage == "merge"
    (change,) = heard
    assert change["before"] == {
        "finetune.micro_batch_size": None,
        "finetune.fused_backward": False,
        "evaluate.batch_size": recipe.evaluate.batch_size,
    }
    assert change["after"] == {"finetune.micro_batch_size": 4, "finetune.fused_backward": True, "evaluate.batch_size": 6}
    found = State.open(tmp_path / "state")
    assert Context(found).recipe == lighter
    assert found.manifest.recipe_digest == recipes.digest(lighter)
    assert summary(found)["changes"] == [change]
    again = run(recipe, tmp_path / "state")  # what is named counts, also where it takes a change back
    assert Context(again).recipe == recipe
    assert len(again.manifest.changes) == 2


def test_what_a_result_is_of_may_not_be_changed_and_the_message_says_what_may(tmp_path: Path) -> None:
    masked(tmp_path / "state")
    with pytest.raises(StateError, match=r"prune\.ratio differ; in a state only .*finetune\.checkpointing.* may be") as caught:
        run(tiny("vit", prune={"ratio": 0.2}, finetune={"checkpointing": True}), tmp_path / "state")
    assert f"recap run --state {tmp_path / 'state'}" in str(caught.value.hint)
    with pytest.raises(StateError, match=r"finetune\.lr differ"):
        finetune(State.open(tmp_path / "state"), overrides=["finetune.lr=0.5"])
    assert State.open(tmp_path / "state").manifest.changes == []


def test_every_execution_setting_is_a_key_of_the_recipe() -> None:
    recipe = tiny("vit").model_dump()
    assert [key for key in EXECUTION if key.partition(".")[2] not in recipe[key.partition(".")[0]]] == []


def test_finetune_takes_changed_settings(tmp_path: Path) -> None:
    state = masked(tmp_path / "state")
    heard: list[Any] = []
    before = state.manifest.plugins["used"]
    facts = finetune(state, overrides=["finetune.checkpointing=true", "finetune.weights=nf4"], on_change=heard.append)
    assert (facts["stage"], facts["evaluated_in"]) == ("finetune", "nf4")
    assert [change["after"] for change in heard] == [{"finetune.checkpointing": True, "finetune.weights": "nf4"}]
    used = State.open(tmp_path / "state").manifest.plugins["used"]
    assert [plugin["name"] for plugin in used if plugin["kind"] == "weights"] == ["nf4"]
    assert [plugin for plugin in used if plugin not in before] == [registry.used("weights", "nf4")]
    assert state.manifest.stage == State.open(tmp_path / "state").manifest.stage == "finetune"
    with pytest.raises(StageOrderError):
        finetune(state, overrides=["finetune.checkpointing=false"])
    assert len(State.open(tmp_path / "state").manifest.changes) == 1


def test_an_override_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    state = masked(tmp_path / "state")
    for wrong in ("finetune.micro_batch_size=3", "finetune.chekpointing=true"):
        with pytest.raises(RecipeError):
            finetune(state, overrides=[wrong])
    with pytest.raises(PluginError, match="there is no frozen weight named 'nf5'"):
        finetune(state, overrides=["finetune.weights=nf5"])
    assert State.open(tmp_path / "state").manifest.changes == []


def test_a_snapshot_without_cuda_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    state = masked(tmp_path / "state")
    with pytest.raises(UsageError, match="--snapshot records CUDA's allocator, and this stage would run on cpu"):
        finetune(state, overrides=["finetune.checkpointing=true"], snapshot_to=tmp_path / "a.pickle")
    assert State.open(tmp_path / "state").manifest.changes == []
    assert not (tmp_path / "a.pickle").exists()


def test_memory_json_says_what_was_held_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    state = masked(tmp_path / "state")
    facts = finetune(state)
    found = state.load_json("round-001/memory.json")
    for kind in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "full_finetuning"):
        assert found[kind] == facts[kind]
    assert found["process"]["rss_bytes"] > 0
    assert found["process"]["peak_rss_bytes"] > 0
    assert (found["device"], found["training_peak"], found["accelerator"]) == ("cpu", None, None)
    assert len(found["not_seen"]) == 1


LACK = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Makes a step of `finetune` run out of the device's memory; gives weak references to what was held then."""

    def put(step: str) -> list[Any]:
        seen: list[Any] = []
        module = training_round if step in ("evaluate", "make_trainer") else finetuning
        real = getattr(module, step)

        def fail(*given: Any, **settings: Any) -> Any:
            made = real(*given, **settings) if step == "make_trainer" else None  # all on the device, and then one more
            activations = torch.zeros(1000)
            trainer = next((thing for thing in (*given, made) if isinstance(thing, Trainer)), None)
            held = [] if trainer is None else [trainer.small.model, trainer.optimizer]
            seen.extend(weakref.ref(thing) for thing in (*held, activations))
            raise torch.OutOfMemoryError(LACK)

        monkeypatch.setattr(module, step, fail)
        return seen

    return put


@pytest.mark.parametrize(
    ("step", "doing"),
    [("make_trainer", "moving the model there"), ("train_round", "training"), ("evaluate", "evaluating")],
)
def test_a_device_that_is_too_small_is_explained_and_the_state_goes_on_with_less(
    step: str, doing: str, lacking: Callable[[str], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = masked(tmp_path / "state", rounds=1)
    before = (tmp_path / "state/state.yaml").read_bytes()
    held, asked = lacking(step), []

    def savings(context: Context) -> list[tuple[str, int]]:
        asked.append([thing() for thing in held])
        return [("finetune.checkpointing=true", 5_000_000), ("prune.ratio=0.5", 3_000_000), ("finetune.weights=bf16", 0)]

    monkeypatch.setattr(oom, "_savings", savings)
    with pytest.raises(DeviceMemoryError) as caught:
        finetune(state)
    told, hint = caught.value.message, str(caught.value.hint)
    assert told.startswith(f"cpu: out of memory in `finetune` of round 1, while {doing}, where 2.00 GiB more were asked for;")
    assert re.search(r"this run held weights 0\.[1-9]", told), told
    assert "gradients " in told
    assert "optimizer state " in told
    assert held
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    if doing == "evaluating":
        assert f"by evaluate.batch_size=32: recap run --state {tmp_path / 'state'} --set evaluate.batch_size=32" in hint
        assert not asked
        assert [thing() for thing in held] == [None] * len(held)
    else:
        assert asked == [[None] * len(held)]  # all was let go before
        assert "by finetune.checkpointing=true (about 5.0 MB less): " in hint
        assert f": recap run --state {tmp_path / 'state'} --set finetune.checkpointing=true; " in hint
        assert "in a new state, prune.ratio=0.5 (about 3.0 MB less)" in hint
        assert "bf16" not in hint
    assert (tmp_path / "state/state.yaml").read_bytes() == before
    monkeypatch.undo()
    assert run(tiny("vit", rounds=1, finetune={"checkpointing": True}), tmp_path / "state").manifest.stage == "merge"


def test_without_a_prediction_the_settings_that_are_still_off_are_named(
    lacking: Callable[[str], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking("train_round")

    def broken(_: Context) -> None:
        raise RuntimeError("fake tensors, and what not")

    monkeypatch.setattr(oom.budget, "savings", broken)
    with pytest.raises(DeviceMemoryError) as caught:
        finetune(masked(tmp_path / "state", finetune={"checkpointing": True}))
    hint = str(caught.value.hint)
    assert (
        "by finetune.fused_backward=true, finetune.weights=bf16, finetune.micro_batch_size=4, finetune.offload=true, " in hint
    )
    assert "checkpointing" not in hint


def test_on_cuda_the_message_names_the_card_what_was_held_and_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    from recap_cli.machine import nvml

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 70_000_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 80_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000, 100_000_000))
    properties = SimpleNamespace(name="Made Up 3000", total_memory=100_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvml, "processes", lambda _: nvml.Processes(1, 9_000_000, ()))
    report = oom.OOMReport(torch.device("cuda"), "training")
    report.measure(torch.OutOfMemoryError(LACK))
    told = oom._message(3, report)
    assert told == (
        "cuda (Made Up 3000, 100.0 MB in all): out of memory in `finetune` of round 3, while training, where 2.00 GiB more "
        "were asked for; this run held 70.0 MB: weights 0.0 MB, gradients 0.0 MB, optimizer state 0.0 MB, activations and "
        "temporary 70.0 MB; other processes held 9.0 MB"
    )
    monkeypatch.setattr(nvml, "processes", lambda _: nvml.Processes())
    report.measure(torch.OutOfMemoryError(LACK))
    assert oom._message(3, report).endswith(
        "; 10.0 MB were held outside this run's allocator: by other processes, and by CUDA itself"
    )

    def refuse(_: object) -> int:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "memory_allocated", refuse)
    report.measure(RuntimeError("CUDA error: out of memory"))
    assert oom._message(3, report) == (
        "cuda: out of memory in `finetune` of round 3, while training; this run held weights 0.0 MB, gradients 0.0 MB, "
        "optimizer state 0.0 MB"
    )


def test_memory_of_the_machine_that_runs_out_is_left_to_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(finetuning, "train_round", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        finetune(masked(tmp_path / "state"))
