"""The full model that a run begins with: made and checked by a recipe, and written in its library's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recap_cli.core.axes import prunable_params
from recap_cli.core.method import RoundPlan
from recap_cli.data.sampling import seed_for
from recap_cli.data.split import Split
from recap_cli.errors import ModelError
from recap_cli.machine import devices, threads
from recap_cli.models import build, conformance, create
from recap_cli.models.build import ModelSpec
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import blocks_of
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.recipe_model import forward_of, source_of
from recap_cli.rounds.record import BUFFERS, LAYOUT, WEIGHTS
from recap_cli.state.store import Transaction
from recap_cli.trainable.token_rows import all_token_rows

PROBED = 8  # examples whose forward shows how large the products are


@dataclass(frozen=True)
class FullModel:
    """A model with what describes it.

    Attributes:
        model: on the CPU, in fp32.
        spec: what it is made from.
        processor: its tokenizer; None for images.
        layout: what is cut of it, and how.
        has_new_head: True where the head, or any weight of it, does not come from a checkpoint.
        new: the names of the parameters that do not.
        notes: what a user should know of how it was made.
        found: what `init` notes of its check: the layouts that were found, what is not pruned, and what is cut and trained or
            frozen whole.
    """

    model: nn.Module
    spec: ModelSpec
    processor: Any
    layout: Layout
    has_new_head: bool
    new: frozenset[str]
    notes: Sequence[str]
    found: dict[str, Any]


def make_full_model(recipe: Recipe, label_names: Sequence[str], round_plans: Sequence[RoundPlan]) -> FullModel:
    """The model of a recipe, with a head for these labels.

    Raises:
        ModelError: it cannot be made, holds values that are not finite, or has no token table where a round trains rows of it.
        ConformanceError: its adapter does not describe it.
        PluginError: there is no adapter, or importance is for an accelerator and the adapter does not say what the blocks are.
    """
    torch.manual_seed(seed_for(recipe.seed, 0, "weights"))
    created = create.create_model(source_of(recipe, label_names))
    model, spec, adapter = created.model, created.spec, build.adapter_of(created.spec)
    _check_weights(model, recipe.model.name)
    _check_tokens(round_plans, model)
    with threads.limited(threads.fitting_alone(model)):
        report = conformance.check(model, adapter, spec)
    layout = Layout.of_model(adapter, model)
    if recipe.distill.is_own or devices.pick(recipe.importance.device).type != "cpu":
        blocks_of(model, layout.axes, spec.model_type)
    new = frozenset(created.new if recipe.model.name is not None else dict(model.named_parameters()))
    found = {
        "layouts": report.found,
        "not_pruned": report.coverage,
        "whole_trained": list(layout.whole_trained),
        "whole_frozen": list(layout.whole_frozen),
    }
    return FullModel(model, spec, created.processor, layout, bool(new), new, created.notes, found)


def _check_weights(model: nn.Module, name: str | None) -> None:
    """Refuse a checkpoint with weights that are not finite: every importance would be, too."""
    for weight, param in model.named_parameters():
        if not bool(param.isfinite().all()):
            raise ModelError(
                f"{name}: {weight} holds values that are not finite", hint="the checkpoint is damaged: get it again"
            )


def _check_tokens(round_plans: Sequence[RoundPlan], model: nn.Module) -> None:
    """Refuse rounds that train rows of tokens where there is no table that has just these."""
    if any(round_plan.embeddings == "tokens" for round_plan in round_plans) and all_token_rows(model) is None:
        raise ModelError(
            f"rows of tokens are to be trained, but {type(model).__name__} has no table of tokens that is looked up and "
            "nothing else",
            hint="--set mask.train_embeddings=true, or false",
        )


def fitting_threads(recipe: Recipe, full: FullModel, split: Split) -> int | None:
    """How many threads the stages compute with on the CPU; all there are where that is None."""
    size = recipe.finetune.micro_batch_size or recipe.finetune.batch_size
    batch = split.batch(torch.arange(min(PROBED, len(split))))
    return threads.fitting(full.model.eval(), forward_of(full.spec, full.model), batch, size)


def model_facts(full: FullModel) -> dict[str, Any]:
    """What `init` notes of the model."""
    return {
        "adapter": full.spec.model_type,
        **full.found,
        "parameters": sum(param.numel() for param in full.model.parameters()),
        "prunable_parameters": prunable_params(full.layout.axes, full.layout.shapes),
        "labels": full.spec.num_labels,
        "head_new": full.has_new_head,
    }


def write_full_model(transaction: Transaction, folder: str, full: FullModel) -> None:
    """Write the model in its library's layout: weights, what is no part of a checkpoint, description and layout."""
    in_checkpoint = set(full.model.state_dict())
    tensors = build.tensors_of(full.model)
    transaction.save_tensors(f"{folder}/{WEIGHTS}", {name: t for name, t in tensors.items() if name in in_checkpoint})
    if buffers := {name: t for name, t in tensors.items() if name not in in_checkpoint}:
        transaction.save_tensors(f"{folder}/{BUFFERS}", buffers)
    transaction.save_json(f"{folder}/{LAYOUT}", full.layout.to_json())
    for name, content in build.describe(full.spec, full.processor).items():
        transaction.path(f"{folder}/{name}").write_bytes(content if isinstance(content, bytes) else content.encode())
    transaction.set_full(folder)
