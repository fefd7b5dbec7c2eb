"""`distill.teacher: lora` and `full`: the round that makes the teacher, what those after it take from it, what it holds."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.compare import cell as cells
from recap_cli.compare import rate_axis
from recap_cli.core.axes import Axis
from recap_cli.core.blocks import block_paths
from recap_cli.core.method import Method, RoundPlan
from recap_cli.core.streaming import streamed
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.soft_targets import SoftTargets
from recap_cli.errors import (
    BudgetError,
    CorruptStateError,
    DataError,
    DeviceMemoryError,
    MissingExtraError,
    PluginError,
    RecipeError,
    StorageError,
)
from recap_cli.memory import budget, meta_model, predict, teacher, teacher_budget
from recap_cli.memory.changes import MICRO, Change
from recap_cli.progress import silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.report.report import _changes as changes_of
from recap_cli.report.report import report
from recap_cli.rounds import plans, training_round
from recap_cli.rounds import teacher as teachers
from recap_cli.rounds.plans import round_plans_for, steps_of
from recap_cli.rounds.record import STATES, TARGETS, TEACHER_FOLDER
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import describe, summary
from recap_cli.stages import finetune as finetuning
from recap_cli.stages.init import init
from recap_cli.stages.run import STAGES, run
from recap_cli.state.manifest import COMMIT, manifest_text, read_manifest
from recap_cli.state.store import State
from tests.pico import LABELS, logits_for
from tests.stages.test_best import scripted
from tests.tiny import tiny

PLACE = f"{TEACHER_FOLDER}/{TARGETS}"
KINDS = ("lora", "full")


def taught(name: str, kind: str, **sections: Any) -> Recipe:
    return tiny(name, distill={"teacher": kind, **sections.pop("distill", {})}, **sections)


def after_the_teacher(recipe: Recipe, path: Path) -> State:
    """A state whose first round is merged."""
    state = init(recipe, path)
    for stage in STAGES.values():
        stage(state)
    return state


def by_torch(state: State, kind: str) -> dict[str, Tensor]:
    """The full model after the teacher's steps by torch's AdamW and, for LoRA, peft's own merge."""
    context = Context(state)
    recipe, (split, _) = context.recipe, context.splits(silent)
    model = context.model({name: tensor.clone() for name, tensor in context.full_tensors().items()})
    head = set(context.layout.head)
    torch.manual_seed(seed_for(recipe.seed, 1, "training"))
    if kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        ends = (".query", ".value", ".q_proj", ".v_proj")
        targets = [name for name, module in model.named_modules() if name.endswith(ends) and isinstance(module, nn.Linear)]
        assert len(targets) == 4
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), model)
    model.eval()
    trained = {name: param for name, param in model.named_parameters() if kind == "full" or name in head or ".lora_" in name}
    rate = 1e-3 if kind == "lora" else 2e-4
    rates = {name: recipe.head.lr if name in head else rate for name in trained}  # that of the warm-up: the head is new
    groups = [{"params": [param], "name": name} for name, param in trained.items()]
    for param in trained.values():
        param.requires_grad_(True)  # peft freezes all but its own
    optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False, weight_decay=0.0)
    for step, batch in enumerate(batches(split, order(len(split), seed=recipe.seed, round=1, epoch=0), 8)):
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]] * (1 - step / 5)
        torch.nn.functional.cross_entropy(logits_for(context.spec)(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for module in list(model.modules()):
        if kind == "lora" and hasattr(module, "lora_A"):
            module.merge()
    return {name.replace(".base_layer", ""): param.detach() for name, param in model.named_parameters() if ".lora_" not in name}


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_full_model_as_torch_trains_it_and_the_others_begin_there(
    kind: str, name: str, tmp_path: Path
) -> None:
    recipe = taught(name, kind, finetune={"weight_decay": 0.0}, distill={"teacher_lr": 1e-3 if kind == "lora" else "auto"})
    state = init(recipe, tmp_path / "state")
    before, wanted = Context(state).full_tensors(), by_torch(state, kind)
    for stage in STAGES.values():
        stage(state)
    context = Context(state)
    full = context.full_tensors()
    for param, tensor in wanted.items():
        torch.testing.assert_close(full[param], tensor, rtol=1e-4, atol=1e-5)
    moved = {param for param in wanted if not torch.equal(full[param], before[param])}
    tables = {param for param in wanted if "embeddings." in param and name == "bert"}  # rows of tokens that no text has stay
    parts = (".query.weight", ".value.weight", ".q_proj.weight", ".v_proj.weight")
    lora = {param for param in wanted if param.endswith(parts)} | set(context.layout.head)
    assert moved - tables == (set(wanted) - tables if kind == "full" else lora)
    assert bool(moved & tables) == (kind == "full" and name == "bert")
    targets = SoftTargets.from_tensors(state.load_tensors(PLACE))
    split, _ = context.splits(silent)
    with torch.no_grad():
        for batch in batches(split, torch.arange(8), 8):
            logits = logits_for(context.spec)(context.model(full), batch)
    found = targets.at(torch.arange(8), torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(found[:, 0], logits, rtol=2**-7, atol=1e-4)
    assert state.manifest.best is None
    STAGES["prune"](state)
    context = Context(state)
    small, gathered = context.small("round-002", plan := context.plan("round-002")), context.gathered("round-002", plan)
    assert all(torch.equal(small[key], gathered[key]) for key in small)


def test_its_steps_are_of_the_runs_and_each_schedule_is_whole() -> None:
    recipe = tiny("vit", rounds=4, finetune={"epochs": 2})
    shared = recipes.changed(recipe, {"distill.teacher": "lora", "distill.steps_share": 0.25})
    plain, found = round_plans_for(recipe), round_plans_for(shared)
    assert [plan.trains for plan in found] == ["teacher"] + ["mask"] * 4
    assert found[0] == RoundPlan(trains="teacher", share=0.25, product=False)
    assert [plan.share for plan in found[1:]] == [pytest.approx(0.75 * plan.share) for plan in plain]
    assert sum(steps_of(found, 40)) == sum(steps_of(plain, 40)) == 40
    assert steps_of(found, 40)[0] == 10
    each = steps_of(found, 376)
    context = type("Planned", (), {"round_plans": found})()
    windows = [training_round._lr_window(context, number, each) for number in range(1, 6)]  # type: ignore[arg-type]
    assert each == [94, 70, 71, 71, 70]
    assert windows == [(94, 0), (282, 0), (282, 70), (282, 141), (282, 212)]


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("bert", "lora", {"fused_backward": True}),
        ("vit", "lora", {"max_grad_norm": 0.5, "micro_batch_size": 4}),
        ("bert", "full", {"max_grad_norm": 0.5}),
        ("timm-vit-packed-glu", "full", {"fused_backward": True, "micro_batch_size": 2, "weights": "int8", "offload": True}),
    ],
)
def test_a_block_at_a_time_gives_the_same_to_the_bit(
    kind: str, name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = taught(name, kind, finetune=settings, distill={"hidden_weight": 1.0})
    plain = after_the_teacher(recipe, tmp_path / "plain")
    entered: list[list[str]] = []

    def on_cpu(model: nn.Module, axes: Sequence[Axis], device: torch.device, adapter: str) -> AbstractContextManager[None]:
        entered.append(block_paths(model, axes))
        return streamed(model, entered[-1], device)

    for module in ("teacher_round", "teacher_outputs"):
        monkeypatch.setattr(f"recap_cli.rounds.{module}.on_device", on_cpu)
    found = after_the_teacher(recipe, tmp_path / "streamed")
    assert [len(blocks) for blocks in entered] == [2, 2]  # training, and the outputs
    for rel in (PLACE, f"{TEACHER_FOLDER}/{STATES}", "full-001/model.safetensors"):
        assert found.manifest.files[rel].sha256 == plain.manifest.files[rel].sha256
    facts = found.manifest.history[3]
    assert (facts["weights_bytes"], facts["evaluated_in"]) == (plain.manifest.history[3]["weights_bytes"], "fp32")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_its_stages_and_the_product_is_never_the_teacher(kind: str, tmp_path: Path) -> None:
    recipe = taught("bert", kind, mask={"train_embeddings": "tokens"}, patience=2)
    whole, stepwise = run(recipe, tmp_path / "run"), init(recipe, tmp_path / "stages")
    for number, stage in enumerate([*STAGES] * 3):
        assert (PLACE in stepwise.manifest.files) == (number >= 4)
        stepwise = State.open(stepwise.path)
        STAGES[stage](stepwise)
    unlike = ("memory.json", "steps.jsonl", "tokenizer.json")  # seconds; what the tokenizer was used for last
    checksums, apart = (
        {rel: checksum.sha256 for rel, checksum in state.manifest.files.items() if not rel.endswith(unlike)}
        for state in (whole, State.open(stepwise.path))
    )
    assert checksums == apart
    assert not [rel for rel in whole.manifest.files if rel.startswith(TEACHER_FOLDER)]
    told = summary(whole)
    assert told["teacher"] == whole.manifest.history[3]["accuracy"]
    assert whole.manifest.history[4]["metric"] == "accuracy"  # which `merge` prints the teacher's figure by
    assert [row["steps"] for row in told["rounds"]] == [5, 3, 2]


def test_patience_does_not_count_the_metric_of_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(1.0, 0.1), (0.4, 0.6), (0.5, 0.5), (0.4, 0.6), (0.9, 0.1)])
    longer = taught("vit", "lora", patience=1, rounds=4, finetune={"epochs": 0.5}, prune={"ramp": 1})
    patient = run(longer, tmp_path / "scripted")
    assert patient.manifest.round == 4  # the teacher's 1.0 does not count: the second student round is better than the first
    assert patient.manifest.best is not None
    assert patient.manifest.best["round"] == 3


def test_what_it_holds_is_a_block_and_what_stands_outside_counted_by_hand(tmp_path: Path) -> None:
    state = after_the_teacher(taught("vit", "full"), tmp_path / "state")
    context = Context(state)
    sizes = {name: tensor.nbytes for name, tensor in context.model(context.full_tensors()).named_parameters()}
    blocks = [sum(size for name, size in sizes.items() if f".{number}." in name) for number in (0, 1)]
    outside = sum(sizes.values()) - sum(blocks)
    held = state.manifest.history[3]
    assert held["weights_bytes"] == held["gradients_bytes"] == outside + max(blocks)
    assert held["optimizer_bytes"] == pytest.approx(2 * outside, abs=8 * len(sizes))  # and step counts
    text = after_the_teacher(taught("bert", "lora"), tmp_path / "text")
    whole = sum(tensor.nbytes for tensor in Context(text).full_weights().values())
    assert text.manifest.history[3]["weights_bytes"] < 0.6 * whole  # tables of embeddings stay on the CPU


@pytest.mark.parametrize("kind", KINDS)
def test_the_prediction_of_its_peak_grows_by_the_inputs_of_a_block_and_not_by_its_weights(kind: str) -> None:
    held, weights = {}, {}
    larger = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "image_size": 48}
    for layers in (5, 2):
        base = tiny("vit")
        config = {**(base.model.config or {}), **larger, "num_hidden_layers": layers}
        recipe = taught("vit", kind, model={"config": config}, importance={"batch_size": 4}, finetune={"batch_size": 4})
        of_recipe = meta_model.of_recipe(recipe, LABELS)
        held[layers] = teacher.teacher_bytes(of_recipe, recipe)
        weights[layers] = sum(tensor.nbytes for tensor in of_recipe.tensors.values())
    student, alone = (predict.predict(of_recipe, one, "recap") for one in (recipe, base_of(recipe)))
    assert student.usage == alone.usage  # the student's step holds what it holds without a teacher
    per_block, inputs = (weights[5] - weights[2]) / 3, 4 * 37 * 128 * 4
    assert per_block < held[2]
    assert 0.9 * inputs <= (held[5] - held[2]) / 3 <= 1.5 * inputs < per_block / 4


def base_of(recipe: Recipe) -> Recipe:
    return recipes.changed(recipe, {"distill.teacher": None})


def test_a_budget_makes_its_parts_smaller_and_says_where_a_block_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = taught("vit", "lora", finetune={"batch_size": 30}, evaluate={"batch_size": 8})
    of_recipe, ample = meta_model.of_recipe(recipe, LABELS), 10**9
    asked: list[int] = []

    def peak(_: Any, tried: Recipe) -> int:
        asked.append(tried.finetune.micro_batch_size or tried.finetune.batch_size)
        return asked[-1] * 10**8

    monkeypatch.setattr(teacher_budget, "teacher_bytes", peak)
    monkeypatch.setattr(teacher_budget, "teacher_scoring_bytes", lambda _, tried: tried.evaluate.batch_size * 3 * 10**8)
    fit = budget.fit(of_recipe, recipe, ample)
    assert asked == [30, 15, 10, 6]  # divisors, as a recipe must have
    assert [(change.key, change.before, change.after) for change in fit.changes] == [
        ("finetune.micro_batch_size", 30, 6),
        ("evaluate.batch_size", 8, 2),
    ]
    monkeypatch.setattr(teacher_budget, "teacher_scoring_bytes", lambda *_: 2 * 10**9)
    with pytest.raises(BudgetError, match="the teacher's round does not fit") as caught:
        budget.fit(of_recipe, recipe, ample)
    assert "--set distill.teacher=DIR" in str(caught.value.hint)
    with pytest.raises(BudgetError) as caught:  # in a state, whose teacher is what it is
        budget.fit(of_recipe, recipe, ample, may_change=lambda key: key != "distill.teacher")
    assert "distill.teacher" not in str(caught.value.hint)
    for made in (replace(of_recipe, round_plan=RoundPlan(0.4)), of_recipe):
        asked_of = recipe if made is not of_recipe else base_of(recipe)
        assert budget.fit(made, asked_of, ample).changes == ()


def test_changes_of_a_budget_that_are_of_one_setting_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = taught("vit", "lora")
    model = meta_model.of_recipe(recipe, LABELS)
    now = replace(predict.predict(model, recipe, "recap"), recipe=recipes.changed(recipe, {MICRO: 4}))
    monkeypatch.setattr(teacher_budget, "teacher_bytes", lambda _, tried: tried.finetune.micro_batch_size * 100)
    monkeypatch.setattr(teacher_budget, "teacher_scoring_bytes", lambda *_: 0)
    before = [Change(MICRO, 8, 4, 900, 500, "time"), Change("finetune.offload", False, True, 500, 400, "time")]
    fitted, changes = teacher_budget.fit_teacher(model, now, before, 150, lambda _: True)
    assert fitted.recipe.finetune.micro_batch_size == 1
    told = [(change.key, change.before, change.after) for change in changes]
    assert told == [("finetune.offload", False, True), (MICRO, 8, 1)]


def test_a_device_that_is_too_small_for_it_is_told_what_its_round_could_do_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = init(taught("vit", "lora"), tmp_path / "state")
    for stage in ("prune", "mask"):
        STAGES[stage](state)

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(finetuning, "train_round", fail)
    with pytest.raises(DeviceMemoryError, match="in `finetune` of round 1, while training") as caught:
        finetuning.finetune(state)
    hint = str(caught.value.hint)
    assert "by finetune.micro_batch_size=4 (about" in hint
    assert not any(word in hint for word in ("offload", "mask.ratio", "prune.ratio", "weights"))


def test_a_teacher_that_learned_nothing_or_whose_data_changed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(0.1, 2.0)])
    state = init(taught("vit", "lora"), tmp_path / "state")
    for name in ("prune", "mask", "finetune"):
        STAGES[name](state)
    monkeypatch.setattr(teachers, "fingerprint", lambda _: "other")
    with pytest.raises(DataError, match="does not hold the examples that the teacher has seen"):
        STAGES["merge"](state)
    monkeypatch.undo()
    facts = STAGES["merge"](state)
    assert facts["notes"][0].startswith("the teacher's accuracy of 0.1000 is no better than chance (0.3333)")
    assert state.next_stage() == "prune"


def test_a_dry_run_and_the_stages_say_what_the_round_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = describe(taught("vit", "lora", distill={"teacher_lr": 3e-3}))
    assert "teacher: made in round 1; 70% of the loss, at temperature 2" in lines
    assert any("the full model becomes the teacher, finetuned by LoRA at 0.003, a block at a time" in line for line in lines)
    assert any("finetuned whole at 0.0002" in line for line in describe(taught("vit", "full")))


def test_a_page_figures_of_a_comparison_and_the_record_know_it(tmp_path: Path) -> None:
    state = run(taught("vit", "full"), tmp_path / "state")
    page = report(state.path, tmp_path / "page.html").read_text()
    assert "1 (the teacher)" in page
    first, *others = changes_of(Context(state), [1, 2, 3])
    assert first == {"overlap": None, "coverage": None}
    assert [row["overlap"] for row in others] == [None, 1.0]  # the last round keeps the plan
    assert all(0 < row["coverage"] <= 1 for row in others)
    found = cells.figures(state.path)
    assert len(found["per_round"]) == 2
    assert found["steps"] == 10
    assert found["parameters"]["trainable"] < found["parameters"]["product"]
    peak = cells.predicted(state.path)["peak_bytes"]
    assert peak >= teacher.teacher_bytes(meta_model.of_state(Context(state)), Context(state).recipe)
    assert [plugin["name"] for plugin in state.manifest.plugins["used"]][:2] == ["recap", "full-ft"]


def test_the_rate_of_a_method_that_trains_the_head_alone_is_the_heads_beside_a_teacher_too() -> None:
    recipe = recipes.changed(taught("vit", "full"), {"method": "head-ft"})
    assert rate_axis.key_of(recipe) == rate_axis.HEAD_LR
    assert not any(", the head at" in line for line in describe(recipe))


def test_a_state_whose_teacher_is_not_that_of_the_recipe_is_damaged(tmp_path: Path) -> None:
    state = after_the_teacher(taught("vit", "lora"), tmp_path / "state")

    def forget(history: list[dict[str, Any]]) -> None:
        del history[-1]["teacher"]

    def forget_examples(history: list[dict[str, Any]]) -> None:
        del history[3]["examples"]

    def plain(history: list[dict[str, Any]]) -> None:
        history[0]["round_plans"][0]["trains"] = "mask"

    for change, said in (
        (forget, "the teacher that `merge` has noted"),
        (forget_examples, r"history\[3\]\.examples is missing"),
        (plain, "round_plans are not those of the recipe's"),
    ):
        text = (state.path / COMMIT).read_text()
        manifest = copy.deepcopy(read_manifest(state.path))
        change(manifest.history)
        (state.path / COMMIT).write_text(manifest_text(manifest))
        with pytest.raises(CorruptStateError, match=said):
            Context(State.open(state.path))
        (state.path / COMMIT).write_text(text)


def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, said in (
        ({"steps_share": 1.0}, "steps_share"),
        ({"steps_share": 0}, "steps_share"),
        ({"teacher_lr": -1}, "distill.teacher_lr"),
    ):
        with pytest.raises(RecipeError, match=said):
            taught("vit", "lora", distill=values)
    with pytest.raises(RecipeError, match=r"distill\.teacher_lr.*expected a number with sgd; found auto"):
        taught("vit", "lora", finetune={"optimizer": "sgd"})
    with pytest.raises(RecipeError, match=r"distill\.teacher_lr.*float32 overflows"):
        taught("vit", "lora", distill={"teacher_lr": 1e38})
    one_step = taught("vit", "lora", finetune={"steps": 1, "epochs": None}, rounds=2)
    with pytest.raises(RecipeError, match="2 optimizer steps are too few for the 3 rounds"):
        describe(one_step)
    monkeypatch.setattr(teachers, "free_bytes", lambda _: 10)
    with pytest.raises(StorageError, match="the teacher's outputs"):
        init(taught("vit", "lora"), tmp_path / "state")
    assert not (tmp_path / "state" / "state.yaml").exists()

    def missing(extra: str) -> None:
        raise MissingExtraError(f"no {extra}", hint="pip")

    monkeypatch.setattr(plans.extras, "require", missing)
    describe(taught("vit", "full"))
    with pytest.raises(MissingExtraError, match="no lora"):
        describe(taught("vit", "lora"))


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), "fast", True])
def test_the_rate_of_a_method_is_a_number_above_0(lr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "method_of_name", lambda _: Method("mine", lambda _: [RoundPlan()], lr=lr))
    with pytest.raises(PluginError, match="has the learning rate"):
        round_plans_for(tiny("vit"))


def test_an_adapter_that_says_no_blocks_is_refused_before_a_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> list[str]:
        raise LookupError("no list holds it")

    monkeypatch.setattr("recap_cli.rounds.device_policy.block_paths", unknown)
    with pytest.raises(PluginError, match="does not say which blocks can go to a device one at a time"):
        init(taught("vit", "lora"), tmp_path / "state")
    assert not (tmp_path / "state" / "state.yaml").exists()
    init(tiny("vit"), tmp_path / "plain")


def test_no_method_may_make_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "method_of_name", lambda _: Method("mine", lambda _: [RoundPlan(trains="teacher")]))
    with pytest.raises(PluginError, match="has trains='teacher', which is none of mask, head, training"):
        round_plans_for(tiny("vit"))
