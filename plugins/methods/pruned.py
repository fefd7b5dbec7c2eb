"""Pruning before or after finetuning. All of the small model is trainable; with `embeddings: false`, all but the embeddings."""

from recap_cli.api import Method, RoundPlan, Settings


def pre(settings: Settings) -> list[RoundPlan]:
    """Return one round: prune by the importance in the pretrained model, then finetune."""
    return [RoundPlan(settings.prune_ratio, embeddings=bool(settings.options["embeddings"]))]


def post(settings: Settings) -> list[RoundPlan]:
    """Return two rounds: finetune the full model; prune it and finetune the rest. One learning-rate schedule spans both."""
    first, embeddings = settings.options["full_share"], bool(settings.options["embeddings"])
    if not isinstance(first, float) or not 0 < first < 1:
        raise ValueError(f"options.full_share: expected a number between 0 and 1; found {first!r}")
    return [
        RoundPlan(share=first, lr_window=(0.0, first), embeddings=embeddings, product=False),
        RoundPlan(settings.prune_ratio, share=1 - first, lr_window=(first, 1.0), embeddings=embeddings),
    ]


PRE = Method("Prune, then finetune the rest.", pre, prunes=True, options={"embeddings": True})
POST = Method(
    "Finetune the full model, prune, finetune again.", post, prunes=True, options={"full_share": 0.5, "embeddings": True}
)
