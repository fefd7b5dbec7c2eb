"""A new task head, trained on frozen features before the first round (paper, Step 1)."""

from collections.abc import Iterator, Sequence
from math import ceil, isfinite
from typing import Any

import torch
from torch import nn

from recap_cli.core.batch_norms import estimate_statistics, new_norms
from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches, order, sample
from recap_cli.data.split import Split
from recap_cli.errors import TrainingError
from recap_cli.machine import devices
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import importance_batch_size, on_device
from recap_cli.rounds.full_model import FullModel
from recap_cli.rounds.recipe_model import forward_of, objective_of
from recap_cli.trainable.build import Trainable
from recap_cli.trainable.optim import Optimizer, adamw, learning_rate
from recap_cli.training.evaluation import Pass, evaluate
from recap_cli.training.loop import Steps, train

NO_STATE = "no state is made"
LOWER_THE_RATE = "lower the rate of the warm-up: --set head.lr=…, or leave it out: --set head.warmup_epochs=0"


def warm_up(recipe: Recipe, full: FullModel, examples: tuple[Split, Split], track: Track) -> dict[str, Any]:
    """Train the head on frozen features if it is new, or any weight of it: no backward runs through the model.

    The whole head is trained then, BERT's pooler with its classifier; a head that came with the checkpoint is left as it is.
    What a trained one is worth is measured: the validation data are a fraction of what it was trained on. Without a warm-up
    a look at all of them by the full model would be the longest part of `init`, and is left out.

    Returns:
        The facts of it; none where there is nothing to do.

    Raises:
        TrainingError: a loss, of the training or of the validation data, is not finite.
    """
    settings, model, spec = recipe.head, full.model, full.spec
    split, validation = examples
    steps = settings.warmup_epochs * ceil(len(split) / settings.batch_size)
    device, objective = devices.pick(recipe.importance.device), objective_of(recipe, spec)
    estimate_norms(recipe, full, split, device)
    if steps == 0 or not full.has_new_head:
        return {}

    def epochs() -> Iterator[Batch]:
        for epoch in range(settings.warmup_epochs):
            chosen = order(len(split), seed=recipe.seed, round=0, epoch=epoch)
            yield from batches(split, chosen, settings.batch_size, device=device)

    with on_device(model.eval(), full.layout.axes, device, spec.model_type):
        run = train(
            forward_of(spec, model),
            objective.task,
            Optimizer(_head_trainables(model, full.layout.head), adamw(betas=(0.9, 0.999), eps=1e-8)),
            track(epochs(), "warm up the head", steps),
            steps=Steps(
                rate=lambda step: learning_rate(step, steps=steps, peak=settings.lr, schedule="linear", warmup_ratio=0.0),
                micro_batch_size=None if device.type == "cpu" else importance_batch_size(recipe, device),
                if_not_finite=f"it is the head's warm-up, and {NO_STATE}",
                hint=LOWER_THE_RATE,
            ),
        )
        found = evaluate(
            forward_of(spec, model),
            validation,
            objective,
            how=Pass(
                batch_size=recipe.evaluate.batch_size, device=device, track=track, label="validation of the warmed-up head"
            ),
        )
    if not isfinite(found["loss"]):  # ruined by the last step, which no later one would show
        raise TrainingError(f"the validation loss is {found['loss']} after the head's warm-up; {NO_STATE}", hint=LOWER_THE_RATE)
    return {"head_steps": run.steps, "head_loss": run.loss, "warmed_up": found}


def estimate_norms(recipe: Recipe, full: FullModel, split: Split, device: torch.device) -> None:
    """Give new batch norms the statistics of a sample as large as D_s; a checkpoint's keep their own."""
    if not (norms := new_norms(full.model, full.new)):
        return
    size = recipe.importance.batches * recipe.importance.batch_size
    chosen = sample(len(split), max(size, 2), seed=recipe.seed, round=0, stage="statistics of batch norms")
    each = max(2, importance_batch_size(recipe, device))  # a norm may see one value of an image, which alone has no variance
    if len(chosen) % each == 1:
        chosen = chosen[:-1]
    with on_device(full.model.eval(), full.layout.axes, device, full.spec.model_type):
        stream = batches(split, chosen, each, device=device)
        estimate_statistics(norms, forward_of(full.spec, full.model), stream)


def _head_trainables(model: nn.Module, head: Sequence[str]) -> list[Trainable]:
    """Freeze all but the head; a record for each of its parameters, which is updated where it stands."""
    for name, param in model.named_parameters():
        param.requires_grad_(name in head)
    return [Trainable(name, param, param.detach()) for name, param in model.named_parameters() if name in head]
