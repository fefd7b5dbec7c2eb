"""`distill`: what a teacher leaves in a state, what a round learns from it, and what is refused."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from recap_cli.core.task import IGNORED
from recap_cli.core.task import TEACHER as BATCH_KEY
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.soft_targets import SoftTargets
from recap_cli.errors import CorruptStateError, DataError, ModelError, PluginError, RecapError, StorageError
from recap_cli.plugins.tasks import classification
from recap_cli.progress import silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import examples, teacher
from recap_cli.rounds.record import TARGETS, TEACHER_FOLDER, TRAINED
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import describe, summary
from recap_cli.rounds.teacher import Taught, teacher_notes
from recap_cli.rounds.verdict import warning
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.stages.run import STAGES, run
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import Lesson, training_loss
from tests.pico import logits_for
from tests.stages.test_best import scripted
from tests.state.test_damage import forge
from tests.tasks import made
from tests.tiny import TRAIN, data_folder, tiny

KINDS = ("text-classification", "image-classification", *made.KINDS)
PLACE = f"{TEACHER_FOLDER}/{TARGETS}"


def plain(kind: str, **sections: Any) -> Recipe:
    """A recipe of two rounds of a pico model for a task."""
    if kind in made.KINDS:
        return made.recipe(kind, **sections)
    return tiny("bert" if kind.startswith("text") else "vit", **sections)


@cache
def finetuned(kind: str, seed: int = 0) -> Path:
    """The folder of a model of a task with a head for its labels, as a library saves one."""
    state = init(plain(kind, seed=seed), Path(mkdtemp(prefix="recap-teacher-")) / "state")
    folder = state.path / str(state.manifest.full)
    for name in ("spec.json", "layout.json"):
        (folder / name).unlink()
    return folder


def distilled(kind: str, teacher: str | None = "self", distill: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """The recipe of a finetuned model, with a teacher."""
    recipe = plain(kind, **sections)
    model = recipe.model.model_copy(update={"name": str(finetuned(kind)), "config": None, "library": "transformers"})
    lesson = recipe.distill.model_copy(update={"teacher": teacher, **(distill or {})})
    return recipe.model_copy(update={"model": model, "distill": lesson})


def targets_of(state: State) -> SoftTargets:
    return SoftTargets.from_tensors(state.load_tensors(PLACE))


def outputs_one_by_one(context: Context, model: torch.nn.Module, variant: int) -> list[Tensor]:
    """The logits of a model for each training example by itself, those of words at the first token of each word."""
    split, _ = context.splits(silent)
    found = []
    for batch in batches(split, torch.arange(len(split)), 1, variant=variant):
        logits = logits_for(context.spec)(model, batch)
        found.append(logits[batch["labels"] != IGNORED] if logits.ndim == 3 else logits)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_are_the_outputs_of_the_teacher_for_each_example(kind: str, tmp_path: Path) -> None:
    flips = {"data": {"augment": "flip"}} if kind.startswith("image") else {}
    state = init(distilled(kind, **flips), tmp_path / "state")
    context, found = Context(state), targets_of(state)
    model = context.model(context.full_tensors())  # with a head of its own it is not warmed up
    assert len(found) == TRAIN
    assert len(found.values) == (2 if flips else 1)
    with torch.no_grad():
        for variant in range(len(found.values)):
            wanted = outputs_one_by_one(context, model, variant)
            for index, rows in enumerate(wanted):
                ours = found.at(torch.tensor([index]), torch.tensor([variant]))[0]
                torch.testing.assert_close(ours, rows.float(), rtol=2**-7, atol=1e-4)
    made_by = state.manifest.made["teacher"]
    metrics = evaluate(state, which=["full"])[0]
    assert made_by["name"] == "self"
    assert all(made_by["figures"][name] == pytest.approx(metrics[name], abs=1e-3) for name in made_by["figures"])
    assert "warmed_up" not in state.manifest.made


def test_another_model_teaches_with_its_own_size_and_weights(tmp_path: Path) -> None:
    other = init(tiny("distilbert", seed=1), tmp_path / "other")
    folder = other.path / str(other.manifest.full)
    state = init(distilled("text-classification", str(folder)), tmp_path / "state")
    context = Context(other)
    with torch.no_grad():
        wanted = outputs_one_by_one(context, context.model(context.full_tensors()), 0)
    found = targets_of(state).values[0].float()
    torch.testing.assert_close(found, torch.cat(wanted), rtol=2**-7, atol=1e-4)
    assert state.manifest.made["teacher"]["parameters"] != state.manifest.made["parameters"]
    assert any(note.startswith("teacher: ") for note in state.manifest.made["notes"])


def test_another_model_sees_images_at_its_own_size(tmp_path: Path) -> None:
    folder = finetuned("image-classification", seed=1)
    larger = init(distilled("image-classification", str(folder), data={"image_size": 24}), tmp_path / "larger")
    usual = init(distilled("image-classification", str(folder)), tmp_path / "usual")
    assert torch.equal(targets_of(larger).values, targets_of(usual).values)
    first = [Context(of).splits(silent)[0].batch(torch.tensor([0])) for of in (larger, usual)]
    assert [batch["pixel_values"].shape[-1] for batch in first] == [24, 16]


def one_round(**distill: Any) -> Recipe:
    """Another seed's model is the teacher: what learns from itself has gradients that are rounding errors."""
    return distilled(
        "text-classification",
        str(finetuned("text-classification", seed=1)),
        distill,
        rounds=1,
        prune={"ratio": 0.0},
        mask={"ratio": 0.0, "train_embeddings": True},
        finetune={"weight_decay": 0.0, "head_lr": None},
    )


def by_torch(state: State, *, weight: float, temperature: float) -> dict[str, Tensor]:
    """The full model after an epoch of torch's AdamW on `(1 - w) · CE + w · T² · KL`."""
    context = Context(state)
    model = context.model({n: t.clone() for n, t in context.full_tensors().items()})
    teacher = AutoModelForSequenceClassification.from_pretrained(context.recipe.distill.teacher).eval()
    forward, (split, _) = logits_for(context.spec), context.splits(silent)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False, weight_decay=0.0)
    model.train()
    torch.manual_seed(seed_for(context.recipe.seed, 1, "finetune"))
    for step, batch in enumerate(batches(split, order(len(split), seed=context.recipe.seed, round=1, epoch=0), 8)):
        for group in optimizer.param_groups:
            group["lr"] = context.recipe.finetune.lr * (1 - step / 5)
        with torch.no_grad():
            wanted = forward(teacher, batch).bfloat16().float() / temperature
        logits = forward(model, batch)
        hard = torch.nn.functional.cross_entropy(logits, batch["labels"])
        soft = torch.nn.functional.kl_div((logits / temperature).log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
        ((1 - weight) * hard + weight * temperature**2 * soft).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 2.0), (1.0, 4.0)])
def test_a_round_learns_from_the_labels_and_the_teacher_by_their_weights(
    weight: float, temperature: float, tmp_path: Path
) -> None:
    recipe = one_round(weight=weight, temperature=temperature)
    wanted = by_torch(init(recipe, tmp_path / "state"), weight=weight, temperature=temperature)
    ours = Context(run(recipe, tmp_path / "state")).full_tensors()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-4)
    undistilled = run(one_round(teacher=None), tmp_path / "plain")
    apart = Context(undistilled).full_tensors()
    assert max(float((apart[name] - wanted[name]).abs().max()) for name in wanted) > 0.01


def test_a_run_is_its_stages_and_what_was_stopped_goes_on(tmp_path: Path) -> None:
    recipe = distilled("token-classification")
    whole, stepwise = run(recipe, tmp_path / "run"), init(recipe, tmp_path / "stages")
    for stage in [*STAGES] * 2:
        assert PLACE in stepwise.manifest.files
        stepwise = State.open(stepwise.path)
        STAGES[stage](stepwise)
    checksums, apart = (
        {
            rel: checksum.sha256
            for rel, checksum in state.manifest.files.items()
            if not rel.endswith(("memory.json", "steps.jsonl"))
        }
        for state in (whole, State.open(stepwise.path))
    )
    assert checksums == apart


@pytest.mark.parametrize("patience", [None, 1])
def test_the_last_merge_drops_the_targets(patience: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if patience:
        scripted(monkeypatch, [(0.6, 0.5), (0.5, 0.5), (0.9, 0.1)])
    rounds = 3 if patience else 2
    state = run(distilled("text-classification", rounds=rounds, patience=patience, prune={"ramp": 1}), tmp_path / "state")
    assert state.manifest.round == 2
    assert not [rel for rel in state.manifest.files if rel.startswith(TEACHER_FOLDER)]
    assert not (state.path / TEACHER_FOLDER).exists()
    told = summary(state)
    assert told["teacher"] == state.manifest.made["teacher"]["figures"]["accuracy"]
    assert told["finished"]


def test_a_distilled_step_holds_what_a_plain_one_holds(tmp_path: Path) -> None:
    """Weights, gradients and optimizer state to the byte; the teacher's outputs are those of one batch."""
    held = []
    for name in (None, "self"):
        state = run(distilled("image-classification", name, rounds=1), tmp_path / str(name))
        held.append(json.loads((state.path / "round-001" / "memory.json").read_text()))
    kinds = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    assert [held[0][kind] for kind in kinds] == [held[1][kind] for kind in kinds]


def test_the_importance_and_the_scores_are_of_the_labels_alone(tmp_path: Path) -> None:
    states = [init(distilled("image-classification", name, rounds=1), tmp_path / str(name)) for name in (None, "self")]
    for state in states:
        for stage in ("prune", "mask"):
            STAGES[stage](State.open(state.path))
    plans = [State.open(state.path).load_tensors("round-001/plan.safetensors") for state in states]
    assert all(torch.equal(plans[0][name], plans[1][name]) for name in plans[0])


def refusal(recipe: Recipe, path: Path, error: type[RecapError]) -> tuple[str, str]:
    with pytest.raises(error) as caught:
        init(recipe, path)
    assert not (path / "state.yaml").exists()
    return str(caught.value), str(caught.value.hint)


def test_a_model_with_a_new_head_has_nothing_to_teach(tmp_path: Path) -> None:
    recipe = tiny("bert", distill={"teacher": "self"})
    message, hint = refusal(recipe, tmp_path / "state", ModelError)
    assert "model.config has nothing to teach (distill.teacher: self): it has random weights" in message
    assert "--set distill.teacher=DIR" in hint


def test_a_teacher_for_other_labels_is_refused_and_its_labels_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(finetuned("text-classification"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "bat", "1": "elk", "2": "fox"}
    config["label2id"] = {"bat": 0, "elk": 1, "fox": 2}
    (folder / "config.json").write_text(json.dumps(config))
    message, _ = refusal(distilled("text-classification", str(folder)), tmp_path / "state", ModelError)
    assert f"the teacher {folder} has nothing to teach" in message
    assert "bat, elk, fox" in message


def test_a_teacher_with_labels_in_another_order_teaches_in_that_of_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(finetuned("text-classification"), folder)
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(place)] for place in (2, 0, 1)]
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: place for place, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    ours, turned = (
        targets_of(init(distilled("text-classification", name), tmp_path / f"state-{number}")).values[0]
        for number, name in enumerate(("self", str(folder)))
    )
    assert torch.equal(turned, ours[:, [1, 2, 0]])  # the teacher's output 1 is now the first label of the data


def test_a_teacher_whose_tokenizer_reads_other_words_is_refused(tmp_path: Path) -> None:
    words, pieces = tiny("bert").model.config or {}, made.recipe("token-classification")
    other = init(pieces.model_copy(update={"model": pieces.model.model_copy(update={"config": words})}), tmp_path / "other")
    recipe = distilled("token-classification", str(other.path / str(other.manifest.full)), data={"max_length": 6})
    message, hint = refusal(recipe, tmp_path / "state", DataError)
    assert f"of {TRAIN} texts than the student's" in message
    assert "raise data.max_length" in hint


def test_a_task_that_does_not_say_how_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "TEXT_CLASSIFICATION", replace(classification.TEXT_CLASSIFICATION, distillation=None))
    with pytest.raises(RecapError, match="text-classification does not say how a student learns from a teacher; found other"):
        tiny("bert", distill={"teacher": "other"})


def test_a_dry_run_says_who_teaches_and_misses_a_folder_that_is_not_there() -> None:
    lines = describe(distilled("text-classification"))
    assert "teacher: the model itself, as it is before the first round; 70% of the loss, at temperature 2" in lines
    with pytest.raises(ModelError, match=r"there is no folder \./nothing") as caught:
        describe(distilled("text-classification", "./nothing"))
    assert "--set distill.teacher=DIR" in str(caught.value.hint)


def test_a_teacher_whose_outputs_are_not_finite_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(finetuned("text-classification"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][1] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message, hint = refusal(distilled("text-classification", str(folder)), tmp_path / "state", ModelError)
    assert f"the teacher {folder} gives outputs that are not finite" in message
    assert "--set distill.teacher=DIR" in hint


def test_a_teacher_that_is_not_there_is_missed_by_its_key(tmp_path: Path) -> None:
    message, hint = refusal(distilled("text-classification", "./nothing"), tmp_path / "state", ModelError)
    assert "the teacher ./nothing: there is no folder ./nothing" in message
    assert "--set distill.teacher=DIR" in hint


def test_a_text_without_a_word_has_no_row_beside_texts_of_one() -> None:
    batch = {"labels": torch.tensor([[1, IGNORED], [IGNORED, IGNORED]]), BATCH_KEY: torch.ones(2, 1, 3)}
    lesson = Lesson(weight=1.0, temperature=1.0)
    loss, count = training_loss(task_named("token-classification"), torch.zeros(2, 2, 3), batch, lesson)
    assert int(count) == 1
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    batch.pop(BATCH_KEY)
    with pytest.raises(PluginError, match="has left out 'teacher_outputs' of a part of a batch"):
        training_loss(task_named("token-classification"), torch.zeros(2, 2, 3), batch, lesson)


def test_a_teacher_that_knows_nothing_is_noted_when_the_state_is_made(tmp_path: Path) -> None:
    state = init(distilled("text-classification"), tmp_path / "state")
    taught = Taught(targets_of(state), None, {"figures": {"accuracy": 0.3, "loss": 2.0}}, ("teacher: made",))
    metric = tiny("bert").metric
    assert list(teacher_notes(metric, taught, {"accuracy": 0.2, "loss": 1.0})) == ["teacher: made"]
    notes = list(teacher_notes(metric, taught, {"accuracy": 0.3, "loss": 1.0}))
    assert notes[1].startswith("the teacher's accuracy of 0.3000 is no better than chance (0.3000)")
    assert list(teacher_notes(metric, None, None)) == []


def test_a_student_that_is_better_than_itself_is_no_reason_to_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(1.0, 0.1)])
    for name, warns in (("self", False), (str(finetuned("text-classification", seed=1)), True)):
        monkeypatch.undo()
        scripted(monkeypatch, [(1.0, 0.1)])
        state = run(distilled("text-classification", name, rounds=1), tmp_path / str(warns))
        assert bool(summary(state)["warning"]) == warns


def test_a_disk_without_room_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = distilled("text-classification")
    weights = 4 * init(recipe, tmp_path / "before").manifest.made["parameters"]
    monkeypatch.setattr(teacher, "free_bytes", lambda _: TRAIN * 3 * 2 + weights - 1)
    message, hint = refusal(recipe, tmp_path / "state", StorageError)
    assert "the teacher's outputs take" in message
    assert "name a --state on another disk" in hint
    monkeypatch.setattr(teacher, "free_bytes", lambda _: TRAIN * 3 * 2 + weights)
    assert PLACE in init(recipe, tmp_path / "state").manifest.files
    flipped = distilled("image-classification", data={"augment": "flip"})  # each image as it is, and flipped
    weights = 4 * Context(init(tiny("vit"), tmp_path / "images")).state.manifest.made["parameters"]
    monkeypatch.setattr(teacher, "free_bytes", lambda _: 2 * TRAIN * 3 * 2 + weights - 1)
    refusal(flipped, tmp_path / "flipped", StorageError)
    monkeypatch.setattr(teacher, "free_bytes", lambda _: 2 * TRAIN * 3 * 2 + weights)
    assert PLACE in init(flipped, tmp_path / "flipped").manifest.files


def test_data_that_changed_since_the_teacher_saw_them_are_refused(tmp_path: Path) -> None:
    once = (data_folder() / "train.csv").read_text().splitlines()
    rows = [*once, *(line.replace(",", f" w{number},") for number in range(3, 6) for line in once[1:])]  # 160 examples
    file = tmp_path / "train.csv"
    file.write_text("\n".join(rows) + "\n")
    state = init(distilled("text-classification", data={"train": str(file)}), tmp_path / "state")
    for stage in ("prune", "mask"):
        STAGES[stage](State.open(state.path))
    rows[7], rows[10] = rows[10], rows[7]  # of the same label
    file.write_text("\n".join(rows) + "\n")
    examples._SPLITS.clear()  # as a new process has it
    with pytest.raises(DataError, match="does not hold the examples that the teacher has seen") as caught:
        STAGES["finetune"](State.open(state.path))
    assert "recap init RECIPE --state NEW" in str(caught.value.hint)
    examples._SPLITS.clear()


def test_targets_that_no_stage_writes_are_refused(tmp_path: Path) -> None:
    state = init(distilled("text-classification"), tmp_path / "state")
    for stage in ("prune", "mask"):
        STAGES[stage](State.open(state.path))
    wrong = {"values": torch.zeros(1, TRAIN, 3), "ends": torch.arange(1, TRAIN + 1)}
    forge(state.path, PLACE, save(wrong))
    with pytest.raises(CorruptStateError, match="its tensors have other shapes or types"):
        STAGES["finetune"](State.open(state.path))


def test_a_teacher_that_is_worse_than_its_student_is_said() -> None:
    metric = tiny("bert").metric
    said = warning(metric, 0.8, warm_up=None, chance=0.3, teacher=0.7)
    assert said is not None
    assert "accuracy 0.8000 is better than the teacher's 0.7000" in said
    assert warning(metric, 0.7, warm_up=None, chance=0.3, teacher=0.7) is None


@pytest.mark.parametrize("method", ["recap", "post-ft", "movement", "recap-lora"])
def test_every_method_learns_from_a_teacher(method: str, tmp_path: Path) -> None:
    trained = []
    for name in (None, "self"):
        recipe = distilled("image-classification", name, rounds=1, method=method, distill={"weight": 1.0})
        state = init(recipe, tmp_path / f"{method}-{name}")
        for stage in ("prune", "mask", "finetune"):
            STAGES[stage](State.open(state.path))
        trained.append(State.open(state.path).load_tensors(f"round-001/{TRAINED}"))
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
