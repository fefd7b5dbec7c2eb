"""What `init` does to a new head: a warm-up, which may diverge, and the statistics of its batch norms."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSemanticSegmentation

from recap_cli.data.sampling import batches, sample
from recap_cli.errors import TrainingError
from recap_cli.models import transformers_models
from recap_cli.progress import silent
from recap_cli.rounds import warm_up
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.stages.init import init
from tests.segmentation import spec_of
from tests.tiny import tiny

NORM = "decode_head.batch_norm"  # of a SegFormer


@pytest.mark.filterwarnings("ignore:.*overflow.*")
@pytest.mark.parametrize(
    ("epochs", "said"),
    [
        (3, r"the loss is (nan|inf) at step \d+; it is the head's warm-up, and no state is made"),
        (1, r"the validation loss is (nan|inf) after the head's warm-up; no state is made"),
    ],
    ids=["a later step shows it", "the last step ruins it"],
)
def test_a_warm_up_that_diverges_makes_no_state(epochs: int, said: str, tmp_path: Path) -> None:
    recipe = tiny("vit", head={"lr": 3e37, "warmup_epochs": epochs, "batch_size": 64})
    with pytest.raises(TrainingError, match=said) as caught:
        init(recipe, tmp_path / "state")
    assert "--set head.lr=" in str(caught.value.hint)
    assert not (tmp_path / "state").exists()


def statistics(context: Context) -> tuple[Tensor, Tensor]:
    tensors = context.full_tensors()
    return tensors[f"{NORM}.running_mean"], tensors[f"{NORM}.running_var"]


def test_a_new_batch_norm_has_the_statistics_of_a_sample_of_the_training_data(tmp_path: Path) -> None:
    context = Context(init(tiny("segformer", head={"warmup_epochs": 0}), tmp_path / "state"))
    model = context.model(context.full_tensors())
    seen: list[Tensor] = []
    model.get_submodule(NORM).register_forward_pre_hook(lambda _, args: seen.append(args[0].movedim(1, 0).flatten(1)))
    split, _ = context.splits(silent)
    chosen = sample(len(split), 16, seed=context.recipe.seed, round=0, stage="statistics of batch norms")
    with torch.no_grad():
        for batch in batches(split, chosen, 8):
            forward_of(context.spec, model)(batch)
    mean, variance = (torch.stack(of).mean(0) for of in ([x.mean(1) for x in seen], [x.var(1) for x in seen]))
    torch.testing.assert_close(statistics(context), (mean, variance))


@pytest.mark.parametrize(("holds", "kept"), [("all", True), ("other labels", True), ("no head", False)])
def test_a_batch_norm_of_a_checkpoint_keeps_its_statistics(holds: str, kept: bool, tmp_path: Path) -> None:
    config = transformers_models.configure(spec_of("segformer").config)
    if holds == "other labels":
        config.num_labels = 2
    model = (AutoModel if holds == "no head" else AutoModelForSemanticSegmentation).from_config(config)
    if holds != "no head":
        model.get_buffer(f"{NORM}.running_mean").fill_(0.125)
        model.get_buffer(f"{NORM}.running_var").fill_(3.0)
    model.save_pretrained(tmp_path / "model")
    recipe = tiny("segformer", model={"config": None, "name": str(tmp_path / "model")})
    mean, variance = statistics(Context(init(recipe, tmp_path / "state")))
    assert ((mean == 0.125).all() and (variance == 3.0).all()) == kept
    assert kept or not (set(mean.tolist()) | set(variance.tolist())) & {0.0, 1.0}


@pytest.mark.parametrize(("batches_of_sample", "size"), [(4, 13), (40, 1)])  # 40 examples: 13, 13, 13 and 1; and one by one
def test_batch_norms_are_estimated_on_no_image_alone(
    batches_of_sample: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(warm_up, "estimate_statistics", lambda _, __, stream: seen.extend(len(b["labels"]) for b in stream))
    importance = {"batches": batches_of_sample, "batch_size": size}
    init(tiny("segformer", importance=importance, head={"warmup_epochs": 0}), tmp_path / "state")
    assert seen == ([13] * 3 if size == 13 else [2] * 20)
