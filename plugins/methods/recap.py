"""RECAP: K rounds of prune, mask, finetune and merge, the last of them on a plan that stays as it is."""

from recap_cli.api import Method, Settings, Turn


def turns(settings: Settings) -> list[Turn]:
    """K rounds of equal length; the learning rate decays once over all, or (the paper) in each of them."""
    rounds, settled = settings.rounds, min(settings.settled, settings.rounds - 1)
    return [
        Turn(
            settings.prune_ratio,
            settings.mask_ratio,
            plan="same" if number >= rounds - settled else "importance",
            share=1 / rounds,
            course=(0.0, 1.0) if settings.restarts else (number / rounds, (number + 1) / rounds),
            embeddings=settings.embeddings,
        )
        for number in range(rounds)
    ]


RECAP = Method("RECAP: prune, mask, finetune, merge, round by round.", turns, prunes=True, masks=True)
