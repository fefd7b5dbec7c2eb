"""`distill.teacher: lora` and `full`: the round that makes the teacher, what those after it take from it, what it holds."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis
from recap_cli.core.blocks import block_paths
from recap_cli.core.method import Method, RoundPlan
from recap_cli.core.streaming import streamed
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.soft_targets import SoftTargets
from recap_cli.errors import BudgetError, CorruptStateError, MissingExtraError, PluginError, RecipeError, StorageError
from recap_cli.memory import budget, meta_model, predict, teacher
from recap_cli.progress import silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import plans, training_round
from recap_cli.rounds import teacher as teachers
from recap_cli.rounds.plans import round_plans_for, steps_of
from recap_cli.rounds.record import TARGETS, TEACHER_FOLDER
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import describe, summary
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
    recipe = taught(name, kind, finetune={"weight_decay": 0.0})
    state = init(recipe, tmp_path / "state")
    before, wanted = Context(state).full_tensors(), by_torch(state, kind)
    for stage in STAGES.values():
        stage(state)
    context = Context(state)
    full = context.full_tensors()
    for param, tensor in wanted.items():
        torch.testing.assert_close(full[param], tensor, rtol=1e-4, atol=1e-5)
    moved = {param for param in wanted if not torch.equal(full[param], before[param])}
    assert moved > set(context.layout.head)
    assert (moved == set(wanted)) == (kind == "full") or name == "bert"  # rows of tokens that no text has stay
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


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_at_a_time_gives_the_same_to_the_bit(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = after_the_teacher(taught(name, kind), tmp_path / "plain")
    entered: list[list[str]] = []

    def on_cpu(model: nn.Module, axes: Sequence[Axis], device: torch.device, adapter: str) -> AbstractContextManager[None]:
        entered.append(block_paths(model, axes))
        return streamed(model, entered[-1], device)

    for module in ("teacher_round", "teacher"):
        monkeypatch.setattr(f"recap_cli.rounds.{module}.on_device", on_cpu)
    found = after_the_teacher(taught(name, kind), tmp_path / "streamed")
    assert [len(blocks) for blocks in entered] == [2, 2]  # training, and the outputs
    for rel in (PLACE, "full-001/model.safetensors"):
        assert found.manifest.files[rel].sha256 == plain.manifest.files[rel].sha256
    assert found.manifest.history[3]["weights_bytes"] == plain.manifest.history[3]["weights_bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_its_stages_and_the_product_is_never_the_teacher(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = taught("bert", kind, mask={"train_embeddings": "tokens"}, patience=2)
    whole, stepwise = run(recipe, tmp_path / "run"), init(recipe, tmp_path / "stages")
    for number, stage in enumerate([*STAGES] * 3):
        assert (PLACE in stepwise.manifest.files) == (number >= 4)
        stepwise = State.open(stepwise.path)
        STAGES[stage](stepwise)
    unlike = ("memory.json", "tokenizer.json")  # seconds; what the tokenizer was used for last
    checksums, apart = (
        {rel: checksum.sha256 for rel, checksum in state.manifest.files.items() if not rel.endswith(unlike)}
        for state in (whole, State.open(stepwise.path))
    )
    assert checksums == apart
    assert not [rel for rel in whole.manifest.files if rel.startswith(TEACHER_FOLDER)]
    told = summary(whole)
    assert told["teacher"] == whole.manifest.history[3]["accuracy"]
    assert [row["steps"] for row in told["rounds"]] == [5, 3, 2]
    scripted(monkeypatch, [(1.0, 0.1), (0.5, 0.5), (0.4, 0.6)])
    best = run(recipe, tmp_path / "scripted").manifest.best
    assert best is not None
    assert best["round"] == 2


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
    for layers in (2, 5):
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


def test_a_budget_makes_its_micro_batches_smaller_and_says_where_a_block_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = taught("vit", "lora")
    of_recipe = meta_model.of_recipe(recipe, LABELS)
    ample = 10**9
    asked: list[int] = []

    def peak(_: Any, tried: Recipe) -> int:
        asked.append(tried.finetune.micro_batch_size or tried.finetune.batch_size)
        return asked[-1] * 2 * 10**8

    monkeypatch.setattr(budget, "teacher_bytes", peak)
    fit = budget.fit(of_recipe, recipe, ample)
    assert asked == [8, 4]
    assert [(change.key, change.before, change.after) for change in fit.changes] == [("finetune.micro_batch_size", 8, 4)]
    monkeypatch.setattr(budget, "teacher_bytes", lambda *_: 2 * 10**9)
    with pytest.raises(BudgetError, match="the teacher's round does not fit") as caught:
        budget.fit(of_recipe, recipe, ample)
    assert "--set distill.teacher=DIR" in str(caught.value.hint)
    assert budget.fit(of_recipe, base_of(recipe), ample).changes == ()


def test_a_dry_run_and_the_stages_say_what_the_round_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = describe(taught("vit", "lora", distill={"teacher_lr": 3e-3}))
    assert "teacher: made in round 1; 70% of the loss, at temperature 2" in lines
    assert any("the full model becomes the teacher, finetuned by LoRA at 0.003, a block at a time" in line for line in lines)
    assert any("finetuned whole at 0.0002" in line for line in describe(taught("vit", "full")))


def test_a_state_whose_teacher_is_not_that_of_the_recipe_is_damaged(tmp_path: Path) -> None:
    state = after_the_teacher(taught("vit", "lora"), tmp_path / "state")

    def forget(history: list[dict[str, Any]]) -> None:
        del history[-1]["teacher"]

    def plain(history: list[dict[str, Any]]) -> None:
        history[0]["round_plans"][0]["trains"] = "mask"

    for change, said in ((forget, "the teacher that `merge` has noted"), (plain, "round_plans are not those of the recipe's")):
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


def test_no_method_may_make_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "method_of_name", lambda _: Method("mine", lambda _: [RoundPlan(trains="teacher")]))
    with pytest.raises(PluginError, match="has trains='teacher', which is none of mask, head, training"):
        round_plans_for(tiny("vit"))
