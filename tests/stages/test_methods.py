"""Every registered method on whole runs: what moves and what does not, the product, and runs that were stopped."""

import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli import registry
from recap_cli.api import Method, RoundPlan, TrainerHook
from recap_cli.core.axes import all_units, counts
from recap_cli.errors import PluginError
from recap_cli.plugins.methods.lora import targets
from recap_cli.plugins.methods.movement import keep_share
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.record import SCORES, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.selection import choose
from recap_cli.rounds.status import summary
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.run import STAGES, run
from recap_cli.state.store import State
from recap_cli.training.evaluation import Pass, evaluate
from tests.tiny import tiny

METHODS = registry.names("methods")
PRUNING = [name for name in METHODS if name not in ("full-ft", "head-ft", "lora-ft")]


@cache
def run_of(method: str, name: str = "vit") -> Path:
    path = Path(mkdtemp(prefix=f"recap-{method}-{name}-")) / "state"
    run(tiny(name, method=method), path)
    return path


def files_of(path: Path) -> dict[str, str]:
    """The checksums of a state's tensors."""
    return {rel: checksum.sha256 for rel, checksum in State.open(path).manifest.files.items() if rel.endswith(".safetensors")}


def before_and_after(method: str, name: str = "vit") -> tuple[Context, dict[str, Tensor], dict[str, Tensor]]:
    """The finished run, the full model it began with, and the one it ended with."""
    context = Context(State.open(run_of(method, name)))
    start = context.model({n: t.clone() for n, t in before(name).items()})
    return context, {n: p.detach() for n, p in start.named_parameters()}, context.full_tensors()


@cache
def before(name: str) -> dict[str, Tensor]:
    state = init(tiny(name), Path(mkdtemp(prefix=f"recap-start-{name}-")) / "state")
    return Context(state).full_tensors()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_takes_the_steps_of_the_recipe_and_ends_in_a_product_that_scores_what_was_said(method: str) -> None:
    state = State.open(run_of(method))
    context, found = Context(state), summary(State.open(run_of(method)))
    assert sum(row["steps"] for row in found["rounds"]) == 2 * 5  # rounds · steps a round, whatever the method
    assert found["next"] is None
    assert found["method"] == method
    best = state.manifest.best
    assert best is not None
    assert context.round_plans[best["round"] - 1].product
    model = context.model(state.load_tensors(f"{best['folder']}/{WEIGHTS}"), counts(context.plan(best["folder"])))
    _, validation = context.splits(lambda items, label, total=None: iter(items))
    scored = evaluate(forward_of(context.spec, model), validation, context.objective, how=Pass(batch_size=64))
    assert scored["accuracy"] == pytest.approx(best["value"])


@pytest.mark.parametrize("name", ["vit", "bert", "distilbert", "dinov2-swiglu", "timm-vit", "timm-vit-packed-glu"])
@pytest.mark.parametrize("method", ["lora-ft", "movement"])
def test_a_training_of_its_own_runs_on_every_kind_of_layer(method: str, name: str) -> None:
    state = State.open(run_of(method, name))
    assert summary(state)["next"] is None
    full = Context(state).full_tensors()
    assert set(full) == set(before(name))  # nothing of the training is left in the model
    assert all(tensor.isfinite().all() for tensor in full.values())


def test_full_finetuning_trains_every_weight() -> None:
    _, start, end = before_and_after("full-ft")
    assert {name for name, tensor in start.items() if torch.equal(tensor, end[name])} <= {
        name
        for name in start
        if "mask_token" in name  # which no classification reads
    }


def test_head_finetuning_trains_the_head_alone_to_the_bit() -> None:
    context, start, end = before_and_after("head-ft")
    assert {name for name, tensor in start.items() if not torch.equal(tensor, end[name])} == set(context.layout.head)
    history = context.state.manifest.history
    assert next(e for e in history if e["stage"] == "finetune")["trainable"] == sum(
        start[n].numel() for n in context.layout.head
    )


@pytest.mark.parametrize(
    ("method", "head_lr", "others"),
    [
        *((method, 1e-2, {}) for method in ("full-ft", "head-ft", "lora-ft", "recap")),
        *((method, "auto", {}) for method in ("full-ft", "lora-ft", "recap")),
        ("recap", "auto", {"fused_backward": True, "offload": True, "weights": "bf16"}),
    ],
)
def test_the_rate_of_the_head_is_that_of_every_method(
    method: str, head_lr: float | str, others: dict[str, Any], tmp_path: Path
) -> None:
    once = {"steps": 1, "schedule": "constant", "weight_decay": 0.0, "lr": 1e-3, "head_lr": head_lr, **others}
    state = init(tiny("vit", method=method, rounds=1, finetune=once, head={"lr": 1e-2}), tmp_path / "state")
    context = Context(state)
    start, head = context.full_tensors(), set(context.layout.head)
    end = Context(run(context.recipe, state.path)).full_tensors()
    trained = {name: float((end[name] - start[name]).abs().max()) for name in start}
    rest = max(trained[name] for name in start if name not in head)
    assert max(trained[name] for name in head) == pytest.approx(1e-2, rel=1e-2)  # AdamW's first step is as long as its rate
    if method in ("full-ft", "recap"):
        assert rest == pytest.approx(1e-3, rel=1e-2)
    elif method == "head-ft":
        assert rest == 0.0
    else:
        width = start["vit.layers.0.attention.q_proj.weight"].shape[1]
        assert 0.0 < rest <= 1e-3 * 16 / width**0.5  # alpha · B A: B has moved by the rate, A began no larger than 1 / √width


def whole(context: Context) -> nn.Module:
    return context.model(context.full_tensors())


@pytest.mark.parametrize("name", ["vit", "bert", "timm-vit", "timm-vit-packed-glu"])
def test_lora_trains_its_targets_by_a_matrix_of_its_rank_and_the_head(name: str) -> None:
    context, start, end = before_and_after("lora-ft", name)
    trained = {n for n, tensor in start.items() if not torch.equal(tensor, end[n])}
    wanted = {f"{path}.weight" for path in targets(whole(context), context.layout.axes, ["query", "value"])}
    assert trained == wanted | set(context.layout.head)
    for weight in wanted:
        assert 1 <= torch.linalg.matrix_rank(end[weight] - start[weight], atol=1e-6) <= 8


def test_lora_puts_adapters_where_it_is_told() -> None:
    context = Context(State.open(run_of("full-ft")))
    model, axes = whole(context), context.layout.axes
    every = targets(model, axes, ["query", "key", "value", "output", "up", "down"])
    assert len(every) == len(set(every)) == 2 * 6
    assert set(targets(model, axes, ["down"])) == {path for path in every if path.endswith("fc2")}


@pytest.mark.parametrize("method", PRUNING)
def test_a_pruning_method_ends_at_the_ratio(method: str) -> None:
    state = State.open(run_of(method))
    last = summary(state)["rounds"][-1]
    assert last["kept_share"] == pytest.approx(0.6, abs=0.06)
    assert state.manifest.best is not None
    assert Context(state).round_plans[state.manifest.best["round"] - 1].product


@pytest.mark.parametrize("method", ["pre-ft", "post-ft"])
def test_embeddings_stay_as_they_are_where_a_pruning_method_is_told_so(method: str, tmp_path: Path) -> None:
    context, start, trained = before_and_after(method)
    still = Context(run(tiny("vit", method=method, options={"embeddings": False}), tmp_path / "state")).full_tensors()
    embeddings = set(context.layout.embeddings)
    assert embeddings
    for name, tensor in start.items():
        assert torch.equal(still[name], tensor) == (name in embeddings), name
        assert not torch.equal(trained[name], tensor), name


def test_movement_prunes_by_the_scores_that_it_learned() -> None:
    state = State.open(run_of("movement"))
    context = Context(state)
    scores, plan = state.load_tensors(f"round-001/{SCORES}"), context.plan("round-002")
    expected = choose(context.recipe, context.layout.axes, context.layout.shapes, scores, 0.6)
    assert {name: kept.tolist() for name, kept in plan.items()} == {name: kept.tolist() for name, kept in expected.items()}
    assert any(score.unique().numel() > 1 for score in scores.values())


def test_the_cubic_schedule_begins_at_one_and_ends_at_the_ratio() -> None:
    shares = [keep_share(step, 100, ratio=0.5, warmup=0.1) for step in range(101)]
    assert shares[:11] == [1.0] * 11
    assert shares[-1] == pytest.approx(0.5)
    assert all(b < a for a, b in pairwise(shares[10:]))
    middle = keep_share(55, 100, ratio=0.5, warmup=0.1)
    assert middle == pytest.approx(0.5 + 0.5 * 0.5**3)  # Sanh et al. 2020, sec. 4.2: v_f + (v_i − v_f)(1 − t)³


def test_gates_that_are_closed_are_groups_that_are_cut() -> None:
    from recap_cli.api import TrainContext
    from recap_cli.core import adapter as adapters
    from recap_cli.core.surgery import cut_model, indices
    from recap_cli.plugins.methods.movement import MOVEMENT, attach

    context = Context(State.open(run_of("full-ft")))
    tensors = context.full_tensors()
    axes, plan = context.layout.axes, all_units(context.layout.axes)
    for number, axis in enumerate(axes):
        plan[axis.name][number % axis.size] = False
    gated, small = (context.model({n: t.clone() for n, t in tensors.items()}) for _ in range(2))
    train_context = TrainContext(
        gated, axes, (), (RoundPlan(trains="training"), RoundPlan(0.4)), 1e-3, MOVEMENT.options, lambda _s, _k: plan
    )
    attach(train_context).before_step(0, 1, lambda _: torch.zeros(1))
    cut_model(small, indices(axes, plan, context.layout.shapes))
    adapters.resize(context.adapter, small, counts(plan))
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    batch = split.batch(torch.arange(6))
    with torch.no_grad():
        ours, cut = (forward_of(context.spec, model)(batch) for model in (gated, small))
    assert torch.allclose(ours, cut, atol=1e-5)


def test_the_gradient_of_a_score_is_the_sum_of_gradient_times_weight_over_its_group() -> None:
    from recap_cli.api import TrainContext
    from recap_cli.plugins.methods.movement import MOVEMENT, SCORES, attach

    context = Context(State.open(run_of("full-ft")))
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    attach(TrainContext(model, context.layout.axes, (), (RoundPlan(0.4),), 1e-3, MOVEMENT.options, lambda _s, _k: {}))
    split, _ = context.splits(lambda items, label, total=None: iter(items))
    forward_of(context.spec, model)(split.batch(torch.arange(6))).square().sum().backward()
    params = dict(model.named_parameters())
    for axis in context.layout.axes:
        cut = next(cut for cut in axis.cuts if cut.dim == 1)
        weight = params[cut.param]
        product = (weight * weight.grad).sum(0).view(axis.size, cut.width).sum(1)
        score = params[f"{cut.param.removesuffix('.weight')}.{SCORES}"]
        assert torch.allclose(score.grad, product, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "recap"])
def test_stopped_in_every_stage_and_resumed_is_uninterrupted(method: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    path, seen = tmp_path / "state", set[tuple[int, str]]()

    def stop_once(items: Any, label: str, total: int | None = None) -> Any:
        for number, item in enumerate(items):
            moment = (State.open(path).manifest.round if (path / "state.yaml").exists() else 0, label)
            if number == 1 and moment not in seen:
                seen.add(moment)
                raise Stop
            yield item

    while True:
        try:
            run(tiny("vit", method=method), path, track=stop_once)
            break
        except Stop:
            continue
    assert seen
    assert files_of(path) == files_of(run_of(method))


@pytest.mark.parametrize("method", ["post-ft", "movement", "lora-ft"])
def test_stage_by_stage_is_what_run_does(method: str, tmp_path: Path) -> None:
    from recap_cli.rounds.status import next_stage

    state = init(tiny("vit", method=method), tmp_path / "state")
    while stage := next_stage(Context(state).recipe, state):
        STAGES[stage](State.open(state.path))
        state = State.open(state.path)
    assert files_of(state.path) == files_of(run_of(method))


@pytest.mark.parametrize(("method", "counted"), [("lora-ft", False), ("recap", True)])
def test_what_a_mask_lets_move_is_noted_unless_a_training_of_its_own_says_it(method: str, counted: bool) -> None:
    (entry, *_) = (one for one in State.open(run_of(method)).manifest.history if one["stage"] == "mask")
    assert ("trainable_dimensions" in entry, "trainable_prunable" in entry) == (counted, counted)


@pytest.mark.parametrize("method", METHODS)
def test_the_product_of_every_method_is_exported_and_loads(method: str, tmp_path: Path) -> None:
    copied = tmp_path / "state"
    shutil.copytree(run_of(method), copied)
    assert Path(export(State.open(copied), tmp_path / "model", dense=method in ("full-ft", "lora-ft"))["path"]).is_dir()


@pytest.mark.parametrize(
    "settings",
    [{"weights": "bf16", "fused_backward": True}, {"weights": "int8"}, {"weights": "nf4"}, {"offload": True}],
    ids=str,
)
@pytest.mark.parametrize("method", ["head-ft", "lora-ft", "movement", "post-ft"])
def test_methods_run_with_the_settings_of_memory(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    state = run(tiny("vit", method=method, finetune=settings), tmp_path / "state")
    assert summary(state)["finished"]
    start, end = before("vit"), Context(state).full_tensors()
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert any(not torch.equal(tensor, end[name]) for name, tensor in start.items() if "classifier" in name)
    held = [max(row["weights_bytes"] for row in summary(at)["rounds"]) for at in (state, State.open(run_of(method)))]
    assert held[0] < held[1] or settings == {"offload": True} or method in ("movement", "post-ft")  # which hold masters of all


@pytest.mark.parametrize("method", ["recap-lora", "movement"])
def test_attention_is_found_by_the_names_that_a_model_has_before_a_training_of_its_own(method: str, tmp_path: Path) -> None:
    plain, again = (
        run(tiny("vit", method=method, rounds=1, finetune={"checkpointing": how}), tmp_path / str(how))
        for how in (False, "attention")
    )
    expected = Context(plain).full_tensors()
    for name, tensor in Context(again).full_tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def strangers(training: Any, trains: str = "training") -> Method:
    return Method("A stranger's.", lambda _: [RoundPlan(trains=trains)], training=training)  # type: ignore[arg-type]


def hook(**others: Any) -> Any:
    given = {"trains": lambda name: "classifier" in name, "result": lambda values, _: (dict(values), {}), **others}
    return lambda _: TrainerHook(**given)


def broken(*_: Any) -> Any:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (broken, "failed: KeyError"),
        (lambda _: None, "gave NoneType, not TrainerHook"),
        (hook(trains=broken), "`trains` of a method's training failed: KeyError"),
        (hook(rate=broken), "`rate` of a method's training failed: KeyError"),
        (hook(before_step=broken), "`before_step` of a method's training failed: KeyError"),
        (hook(result=broken), "`result` of a method's training failed: KeyError"),
        (
            hook(result=lambda v, _: ({n: t[:1] for n, t in v.items()}, {})),
            "is no tensor of the model, or not of its shape",
        ),
        (hook(result=lambda v, _: ({"nothing": torch.zeros(1)}, {})), "nothing is no tensor of the model"),
        (hook(result=lambda v, _: (v, {"axis": torch.zeros(1)})), "no scores of shape"),
    ],
)
def test_a_strangers_training_that_goes_wrong_is_named_and_nothing_is_committed(
    training: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recap_cli.rounds.plans.method_of", lambda _: strangers(training))
    monkeypatch.setattr("recap_cli.rounds.custom_training.method_of", lambda _: strangers(training))
    with pytest.raises(PluginError, match=said):
        run(tiny("vit", rounds=1), tmp_path / "state")
    assert State.open(tmp_path / "state").manifest.stage == "mask"


def test_result_is_given_the_small_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def result(values: Any, small: Any) -> Any:
        seen.update({name: values[name] - small[name] for name in values})
        return dict(values), {}

    for place in ("plans", "custom_training"):
        monkeypatch.setattr(f"recap_cli.rounds.{place}.method_of", lambda _: strangers(hook(result=result)))
    run(tiny("vit", rounds=1), tmp_path / "state")
    assert all(bool(delta.any()) for delta in seen.values())
