"""RECAP: K rounds of prune, mask, finetune and merge.

The first rounds explore: each prunes anew. The last ones keep the plan, so that what is left heals together. While exploring,
the model is pruned less than in the end, and as many fewer entries move as the memory for that needs: no round holds more of
weights, gradients and optimizer state than the last.
"""

from recap_cli.api import Method, RoundPlan, Settings


def round_plans(settings: Settings) -> list[RoundPlan]:
    """K rounds of equal length; the learning rate decays once over all, or (the paper) in each of them."""
    rounds = settings.rounds
    explore = rounds - min(settings.hold_plan, rounds - 1)
    made = []
    for number in range(rounds):
        prune_ratio, mask_ratio = _ratios(settings, min(1.0, number / (explore - 1)) if explore > 1 else 1.0)
        made.append(
            RoundPlan(
                prune_ratio,
                mask_ratio,
                plan="same" if number >= explore else "importance",
                share=1 / rounds,
                lr_window=(0.0, 1.0) if settings.restarts else (number / rounds, (number + 1) / rounds),
                embeddings=settings.embeddings,
                product=prune_ratio == settings.prune_ratio,
            )
        )
    return made


def _ratios(settings: Settings, way: float) -> tuple[float, float]:
    """r_p and r_f when this share of the `way` to those of the settings is gone.

    A model of which a share 1 − r_p is left, and of that a share m = 1 − r_f moves, holds (1 − r_p)(1 + c·m) times what the
    full model's weights take, c being `entry_cost`. The ramp lets m rise from `ramp` times its last value, and r_p so that
    this stays the same.
    """
    last = 1 - settings.mask_ratio
    trains = last * (settings.ramp + (1 - settings.ramp) * way)
    cost = settings.entry_cost
    kept = (1 - settings.prune_ratio) * (1 + cost * last) / (1 + cost * trains)
    if way >= 1 or settings.ramp == 1 or settings.prune_ratio == 0:
        return settings.prune_ratio, settings.mask_ratio
    if cost == 0:  # fewer moving entries save nothing
        return settings.prune_ratio, 1 - trains
    if kept <= 1:
        return 1 - kept, 1 - trains
    trains = ((1 - settings.prune_ratio) * (1 + cost * last) - 1) / cost  # nothing is pruned, and memory is left: more may move
    return 0.0, 1 - min(last, trains)


RECAP = Method("RECAP: prune, mask, finetune, merge, round by round.", round_plans, prunes=True, masks=True)
