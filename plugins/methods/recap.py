"""RECAP: K rounds of prune, mask, finetune and merge.

The first rounds explore: each prunes anew. The last rounds keep the plan, so that the remaining groups adapt to each other.
Exploring rounds prune less, and train fewer entries to make up for the memory: no round holds more weights, gradients and
optimizer state than the last. Their batches are taken in parts, as a larger model has more activations.
"""

from math import ceil

from recap_cli.api import Method, RoundPlan, Settings


def round_plans(settings: Settings) -> list[RoundPlan]:
    """Return K rounds of equal length. The learning-rate schedule spans all of them, or (the paper) restarts in each."""
    rounds = settings.rounds
    explore = rounds - min(settings.hold_plan, rounds - 1)
    planned = []
    for number in range(rounds):
        prune_ratio, mask_ratio = _ratios(settings, min(1.0, number / (explore - 1)) if explore > 1 else 1.0)
        planned.append(
            RoundPlan(
                prune_ratio,
                mask_ratio,
                plan="same" if number >= explore else "importance",
                share=1 / rounds,
                lr_window=(0.0, 1.0) if settings.restarts else (number / rounds, (number + 1) / rounds),
                embeddings=settings.embeddings,
                product=prune_ratio == settings.prune_ratio,
                batch_parts=ceil((1 - prune_ratio) / (1 - settings.prune_ratio) - 1e-9),
            )
        )
    return planned


def _ratios(settings: Settings, progress: float) -> tuple[float, float]:
    """Return r_p and r_f at a point of the ramp; `progress` goes from 0 in the first round to 1.

    A share 1 − r_p is kept, and a share m = 1 − r_f of that is trainable. So a model holds (1 − r_p)(1 + c·m) times the full
    model's weights; c is `entry_cost`. The ramp raises m from `ramp` times its last value, and r_p with it so that this product
    is constant.
    """
    last = 1 - settings.mask_ratio
    trainable = last * (settings.ramp + (1 - settings.ramp) * progress)
    cost = settings.entry_cost
    kept = (1 - settings.prune_ratio) * (1 + cost * last) / (1 + cost * trainable)
    if progress >= 1 or settings.ramp == 1 or settings.prune_ratio == 0:
        return settings.prune_ratio, settings.mask_ratio
    if cost == 0:  # fewer trainable entries save no memory
        return settings.prune_ratio, 1 - trainable
    if kept <= 1:
        return 1 - kept, 1 - trainable
    trainable = ((1 - settings.prune_ratio) * (1 + cost * last) - 1) / cost  # nothing is pruned: memory for more entries
    return 0.0, 1 - min(last, trainable)


RECAP = Method("RECAP: prune, mask, finetune, merge, round by round.", round_plans, prunes=True, masks=True, lr=4e-4)
