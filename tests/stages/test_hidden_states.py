"""`distill.hidden_weight`: what is kept of a teacher's blocks, what a round learns from it, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from recap_cli.core.hidden_states import spread, watched
from recap_cli.core.task import IGNORED, TEACHER, TEACHER_STATES
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.soft_targets import SoftTargets
from recap_cli.errors import CorruptStateError, DataError, ModelError, PluginError, RecipeError, StorageError
from recap_cli.progress import silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import teacher, teacher_outputs
from recap_cli.rounds.record import STATES, TARGETS, TEACHER_FOLDER
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import describe
from recap_cli.stages.init import init
from recap_cli.stages.run import STAGES, run
from recap_cli.state.manifest import COMMIT, manifest_text
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import Lesson, training_loss
from tests.stages.test_distillation import distilled, finetuned, one_round, plain
from tests.state.test_damage import forge
from tests.strange import register
from tests.tiny import TRAIN, model_section, tiny

PLACE = f"{TEACHER_FOLDER}/{STATES}"


def learning(kind: str, name: str | None = "self", weight: float = 1.0, **sections: Any) -> Recipe:
    return distilled(kind, name, {"hidden_weight": weight}, **sections)


def kept(state: State) -> SoftTargets:
    return SoftTargets.from_tensors(state.load_tensors(PLACE))


def outputs_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the direction of the mean over the tokens of each block's hidden states, by transformers' own record."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", TEACHER, TEACHER_STATES)}
    out = model(**inputs, output_hidden_states=True)
    rows = []
    for states in out.hidden_states[1:]:  # (examples, tokens, width)
        means = []
        for place, tokens in enumerate(states):
            real = batch["attention_mask"][place].bool() if "attention_mask" in batch else slice(None)
            means.append(tokens[real].mean(0))
        rows.append(torch.stack([mean / mean.norm() for mean in means]))
    return out.logits, rows


def model_of(context: Context) -> torch.nn.Module:
    return context.model({name: tensor.clone() for name, tensor in context.full_tensors().items()})


@pytest.mark.parametrize("kind", ["text-classification", "image-classification", "token-classification"])
def test_what_is_kept_are_the_averages_of_what_each_block_of_the_teacher_gives(kind: str, tmp_path: Path) -> None:
    flips = {"data": {"augment": "flip"}} if kind.startswith("image") else {}
    state = init(learning(kind, **flips), tmp_path / "state")
    context, found = Context(state), kept(state)
    assert (len(found), len(found.values)) == (TRAIN, 2 if flips else 1)
    model, (split, _) = model_of(context).eval(), context.splits(silent)
    with torch.no_grad():
        for variant in range(len(found.values)):
            for batch in batches(split, torch.arange(8), 8, variant=variant):
                wanted = torch.cat(outputs_of(model, batch)[1], 1)  # (examples, blocks · width)
                ours = found.at(torch.arange(8), torch.full((8,), variant))[:, 0]
                torch.testing.assert_close(ours, wanted, rtol=0, atol=2**-8)
    assert not torch.equal(found.values[0, 0], found.values[0, 1])
    assert not flips or not torch.equal(found.values[0], found.values[1])


def by_torch(state: State, hidden_weight: float) -> dict[str, Tensor]:
    """The full model after an epoch of torch's AdamW on the labels, the teacher's outputs and its hidden states."""
    context = Context(state)
    model, lesson, (split, _) = model_of(context), context.recipe.distill, context.splits(silent)
    teaches = model_of(Context(init_of(context.recipe, state.path.parent / "teacher"))).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False, weight_decay=0.0)
    model.train()
    torch.manual_seed(seed_for(context.recipe.seed, 1, "finetune"))
    for step, batch in enumerate(batches(split, order(len(split), seed=context.recipe.seed, round=1, epoch=0), 8)):
        optimizer.param_groups[0]["lr"] = context.recipe.finetune.lr * (1 - step / 5)
        with torch.no_grad():
            logits, theirs = outputs_of(teaches, batch)
        wanted = (logits.bfloat16().float() / lesson.temperature).softmax(-1)
        logits, ours = outputs_of(model, batch)
        hard = torch.nn.functional.cross_entropy(logits, batch["labels"])
        soft = torch.nn.functional.kl_div((logits / lesson.temperature).log_softmax(-1), wanted, reduction="batchmean")
        apart = [(a - b.bfloat16().float()).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)]
        loss = (1 - lesson.weight) * hard + lesson.weight * lesson.temperature**2 * soft
        (loss + hidden_weight * sum(apart) / len(apart)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: param.detach() for name, param in model.named_parameters()}


def init_of(recipe: Recipe, path: Path) -> State:
    """A state whose full model is the teacher of a recipe."""
    model = recipe.model.model_copy(update={"name": recipe.distill.teacher})
    return init(
        recipe.model_copy(
            update={"model": model, "distill": recipe.distill.model_copy(update={"teacher": None, "hidden_weight": 0.0})}
        ),
        path,
    )


def test_a_round_learns_them_by_their_weight(tmp_path: Path) -> None:
    recipe = one_round(hidden_weight=3.0)
    wanted = by_torch(init(recipe, tmp_path / "state"), 3.0)
    ours = Context(run(recipe, tmp_path / "state")).full_tensors()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-4)
    without = Context(run(one_round(), tmp_path / "without")).full_tensors()
    assert max(float((without[name] - wanted[name]).abs().max()) for name in wanted) > 0.01


def trained(recipe: Recipe, path: Path) -> dict[str, Tensor]:
    state = init(recipe, path)
    for stage in ("prune", "mask", "finetune"):
        STAGES[stage](State.open(state.path))
    return State.open(state.path).load_tensors("round-001/trained.safetensors")


@pytest.mark.parametrize(
    ("settings", "same"), [({"checkpointing": True}, 0.0), ({"fused_backward": True}, 0.0), ({"micro_batch_size": 4}, 1e-4)]
)
def test_how_a_step_is_taken_changes_nothing(settings: dict[str, Any], same: float, tmp_path: Path) -> None:
    kind = "image-classification"  # whose models have no dropout
    name, plain_sgd = str(finetuned(kind, seed=1)), {"optimizer": "sgd", "lr": 0.1, "max_grad_norm": None}
    usual, other = (
        trained(learning(kind, name, 5.0, finetune={**plain_sgd, **more}), tmp_path / str(number))
        for number, more in enumerate(({}, settings))
    )
    for key, tensor in usual.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=same)


def test_an_example_counts_as_often_as_it_has_rows_so_that_parts_add_up_to_the_batch() -> None:
    labels = torch.tensor([[0, 1, 2], [1, IGNORED, IGNORED], [2, 2, IGNORED], [IGNORED] * 3])
    generator = torch.Generator().manual_seed(0)
    logits, rows, ours, theirs = (torch.randn(4, *size, generator=generator) for size in ((3, 3), (3, 3), (5,), (5,)))
    batch = {"labels": labels, TEACHER: rows, TEACHER_STATES: theirs}
    task = task_named("token-classification")
    whole, count = training_loss(task, logits, batch, Lesson(0.5, 2.0, 3.0, lambda: [ours]))
    parts = [
        training_loss(
            task, logits[at : at + 2], task.part(batch, at, at + 2), Lesson(0.5, 2.0, 3.0, lambda at=at: [ours[at : at + 2]])
        )
        for at in (0, 2)
    ]
    assert float(sum(mean * share for mean, share in parts) / count) == pytest.approx(float(whole))
    alone, _ = training_loss(task, logits, batch, Lesson(0.5, 2.0))
    distances = (ours - theirs).square().sum(1)
    assert float(whole - alone) == pytest.approx(3.0 * float((distances * torch.tensor([3, 1, 2, 0])).sum()) / 6, rel=1e-4)


def after_its_teacher(name: str, path: Path, **sections: Any) -> State:
    """The state after the first round that learns from the teacher of the round before."""
    state = init(tiny(name, rounds=1, distill={"teacher": "full", "hidden_weight": 1.0}, **sections), path)
    for stage in [*STAGES, "prune", "mask", "finetune"]:
        STAGES[stage](State.open(state.path))
    return State.open(state.path)


def test_timm_recomputes_its_blocks_and_learns_the_same(tmp_path: Path) -> None:
    usual, recomputed = (
        after_its_teacher("timm-vit", tmp_path / str(again), finetune={"checkpointing": again}).load_tensors(
            "round-002/trained.safetensors"
        )
        for again in (False, True)
    )
    assert all(torch.equal(usual[name], recomputed[name]) for name in usual)


@pytest.mark.parametrize("method", ["recap", "full-ft", "lora-ft", "post-ft", "movement", "recap-lora"])
def test_every_method_learns_them(method: str, tmp_path: Path) -> None:
    name = str(finetuned("image-classification", seed=1))
    apart = [
        trained(learning("image-classification", name, weight, rounds=1, method=method), tmp_path / f"{method}-{weight}")
        for weight in (0.0, 10.0)
    ]
    assert any(not torch.equal(apart[0][key], apart[1][key]) for key in apart[0])


@pytest.mark.parametrize(("name", "widths"), [("albert", [32] * 3), ("t5-encoder", [32] * 3), ("swin", [16, 16, 32, 32])])
def test_layers_that_run_several_times_or_differ_in_width_are_heard_each(
    name: str, widths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    state = after_its_teacher(name, tmp_path / "state")
    assert kept(state).values.shape == (1, TRAIN, sum(widths))
    parts = kept(state).values.float().split(widths, 2)
    assert all(torch.allclose(part.norm(dim=2), torch.ones(1, TRAIN), atol=0.01) for part in parts)


def of_layers(count: int, path: Path, seed: int = 0, **config: Any) -> State:
    section = model_section("bert")
    section["config"] = {**section["config"], "num_hidden_layers": count, **config}
    return init(tiny("bert", model=section, seed=seed), path)


@pytest.mark.parametrize(
    ("student", "teacher", "places"),
    [
        ([8] * 2, [8] * 2, [0, 1]),
        ([8] * 6, [8] * 12, [1, 3, 5, 7, 9, 11]),
        ([8] * 4, [8] * 6, [1, 2, 4, 5]),
        ([8] * 3, [8] * 2, [0, 1, 1]),
        ([4, 4, 8, 8, 16], [4, 4, 8, 8, 8, 8, 16], [0, 1, 3, 5, 6]),  # in each stage by itself
        ([4, 8], [4, 4], None),
        ([4, 8], [8, 4], None),
        ([], [], []),
    ],
)
def test_a_student_learns_from_blocks_that_are_spread_evenly(
    student: list[int], teacher: list[int], places: list[int] | None
) -> None:
    assert spread(student, teacher) == places


def test_a_teacher_of_other_depth_teaches_the_blocks_that_fit(tmp_path: Path) -> None:
    other = of_layers(4, tmp_path / "other", seed=1)
    folder = other.path / str(other.manifest.full)
    state = init(learning("text-classification", str(folder)), tmp_path / "state")
    context = Context(other)
    with torch.no_grad():
        for batch in batches(context.splits(silent)[0], torch.arange(8), 8):
            wanted = outputs_of(model_of(context).eval(), batch)[1]
    ours = kept(state).at(torch.arange(8), None)[:, 0]
    torch.testing.assert_close(ours, torch.cat([wanted[1], wanted[3]], 1), rtol=0, atol=2**-8)


def test_a_teacher_of_other_width_is_refused(tmp_path: Path) -> None:
    other = of_layers(2, tmp_path / "other", hidden_size=64, intermediate_size=64)
    folder = other.path / str(other.manifest.full)
    with pytest.raises(
        ModelError, match=rf"the blocks of the teacher {folder} are 64 wide, and those of the model 32"
    ) as caught:
        init(learning("text-classification", str(folder)), tmp_path / "state")
    assert "--set distill.hidden_weight=0" in str(caught.value.hint)
    assert not (tmp_path / "state" / COMMIT).exists()
    assert TARGETS in str([*init(distilled("text-classification", str(folder)), tmp_path / "state").manifest.files])


def test_without_a_weight_nothing_is_kept_and_the_last_merge_drops_what_is(tmp_path: Path) -> None:
    assert PLACE not in init(distilled("text-classification"), tmp_path / "none").manifest.files
    state = init(learning("text-classification"), tmp_path / "state")
    assert PLACE in state.manifest.files
    done = run(learning("text-classification"), tmp_path / "state")
    assert not [rel for rel in done.manifest.files if rel.startswith(TEACHER_FOLDER)]
    assert not (done.path / TEACHER_FOLDER).exists()


def test_stopped_after_each_stage_it_is_uninterrupted(tmp_path: Path) -> None:
    recipe = learning("text-classification", rounds=1)
    whole, stepwise = run(recipe, tmp_path / "run"), init(recipe, tmp_path / "stages")
    for stage in STAGES:
        STAGES[stage](State.open(stepwise.path))
    best = "best-001/model.safetensors"
    assert whole.manifest.files[best].sha256 == State.open(stepwise.path).manifest.files[best].sha256


def at_finetune(path: Path) -> State:
    state = init(learning("text-classification"), path)
    for stage in ("prune", "mask"):
        STAGES[stage](State.open(state.path))
    return state


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"values": torch.zeros(1, TRAIN, 3)}, CorruptStateError, "it holds values"),
        ({"values": torch.zeros(1, TRAIN, 64), "ends": torch.arange(1, TRAIN + 1)}, CorruptStateError, "other shapes or types"),
        (
            {"values": torch.zeros(1, TRAIN, 64).bfloat16(), "ends": torch.tensor([2, 2, *range(3, TRAIN + 1)])},
            DataError,
            "the hidden states of the teacher are not one row for each example",
        ),
        (
            {"values": torch.zeros(1, TRAIN, 32).bfloat16(), "ends": torch.arange(1, TRAIN + 1)},
            PluginError,
            r"the blocks give hidden states of \(8, 64\), and \(8, 32\) are kept of the teacher",
        ),
    ],
)
def test_states_that_no_stage_writes_are_refused(
    tensors: dict[str, Tensor], error: type[Exception], message: str, tmp_path: Path
) -> None:
    state = at_finetune(tmp_path / "state")
    forge(state.path, PLACE, save(tensors))
    with pytest.raises(error, match=message):
        STAGES["finetune"](State.open(state.path))
    assert State.open(state.path).manifest.stage == "mask"


def test_a_record_without_them_is_refused(tmp_path: Path) -> None:
    state = at_finetune(tmp_path / "state")
    manifest = State.open(state.path).manifest
    files = {rel: checksum for rel, checksum in manifest.files.items() if rel != PLACE}
    (state.path / COMMIT).write_text(manifest_text(replace(manifest, files=files)))
    with pytest.raises(CorruptStateError, match=f"{PLACE} is not in files"):
        STAGES["finetune"](State.open(state.path))


def test_a_disk_without_room_for_them_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = learning("text-classification")
    parameters = init(recipe, tmp_path / "before").manifest.made["parameters"]
    needed = 4 * parameters + TRAIN * 2 * (3 + 64)  # weights; of each example 3 outputs, and 32 values of two blocks, in bf16
    monkeypatch.setattr(teacher, "free_bytes", lambda _: needed - 1)
    with pytest.raises(StorageError, match="the teacher's outputs take"):
        init(recipe, tmp_path / "state")
    monkeypatch.setattr(teacher, "free_bytes", lambda _: needed)
    assert PLACE in init(recipe, tmp_path / "state").manifest.files


def test_a_task_that_leaves_them_out_of_a_part_is_refused() -> None:
    batch = {"labels": torch.tensor([[1, IGNORED]]), TEACHER: torch.ones(1, 1, 3)}
    lesson = Lesson(0.5, 1.0, 1.0, lambda: [torch.ones(1, 4)])
    with pytest.raises(PluginError, match="has left out 'teacher_states' of a part of a batch"):
        training_loss(task_named("token-classification"), torch.zeros(1, 2, 3), batch, lesson)


@pytest.mark.parametrize(
    ("give", "mask", "message"),
    [
        (lambda x: x[:, 0], None, r"a block gives \(2, 3\) for 2 examples, and no width"),
        (lambda x: x[:1], None, r"a block gives \(1, 4, 3\) for 2 examples"),
        (lambda _: "nothing", None, "a block gives str for 2 examples"),
        (lambda x: x, torch.ones(2, 3), r"hidden states of \(2, 4, 3\), and which tokens are padding is said for \(2, 3\)"),
    ],
)
def test_a_block_that_gives_no_states_of_tokens_is_refused(give: Any, mask: Tensor | None, message: str) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return give(x)

    model, batch = torch.nn.Sequential(Block()), {"x": torch.zeros(2, 4, 3), "labels": torch.zeros(2)}
    if mask is not None:
        batch["attention_mask"] = mask
    with watched(model, ["0"]) as states, pytest.raises(PluginError, match=message) as caught:
        states.heard(lambda given: model(given["x"]))(batch)
    assert "--set distill.hidden_weight=0" in str(caught.value.hint)


def test_what_is_heard_is_of_one_forward_and_taken_once() -> None:
    model, batch = torch.nn.Sequential(torch.nn.Linear(3, 3)), {"x": torch.randn(2, 4, 3), "labels": torch.zeros(2)}
    with watched(model, ["0"]) as states:
        heard = states.heard(lambda given: model(given["x"]))
        heard(batch), heard(batch), model(batch["x"])
        assert len(states.take()) == 1
        assert states.take() == []
    heard(batch)
    assert states.take() == []


def test_an_adapter_that_says_no_blocks_is_refused_by_what_can_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere(*_: Any) -> list[str]:
        raise LookupError("no list holds it")

    monkeypatch.setattr(teacher_outputs, "block_paths", nowhere)
    with pytest.raises(PluginError, match="the adapter 'bert' does not say what the blocks are: no list holds it") as caught:
        init(learning("text-classification"), tmp_path / "state")
    assert caught.value.hint == "learn from the outputs alone: --set distill.hidden_weight=0"


def test_without_a_teacher_there_is_nothing_to_learn() -> None:
    with pytest.raises(RecipeError, match=r"distill\.hidden_weight +expected 0 without distill\.teacher; found 10"):
        tiny("vit", distill={"hidden_weight": 10})


def test_a_dry_run_says_so() -> None:
    lines = describe(learning("text-classification", weight=2.0))
    assert any(line.endswith("70% of the loss, at temperature 2, and hidden states at weight 2") for line in lines)
    assert not any("hidden states" in line for line in describe(plain("text-classification")))
