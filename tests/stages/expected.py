"""What the stages of a recorded run should have written, by the reference; and checks that they did.

The losses of some models draw random points. The reference draws the same ones: it has the seeds of the stages, that of each
batch where importance is computed.
"""

import pytest
import torch
from torch import Tensor, nn

from recap_cli.data.sampling import seed_for
from recap_cli.training.evaluation import SEED
from tests.stages import naive
from tests.stages.naive import Group, Memory
from tests.stages.naive_losses import is_told
from tests.stages.witness import Look, Record, indices_of
from tests.tiny import VALIDATION


def naive_plan(record: Record, round: int) -> list[Group]:
    """Gradual pruning by eq. (1), on the D_s that each step looked at."""
    recipe, axes, model = record.recipe, record.axes, record.model()
    ratio, _, anew = naive.ratios(recipe)[round - 1]
    if not anew:
        return record.plan(round - 1)
    alive, samples = naive.everything(axes), list(record.seen(round, "prune").values())
    if recipe.prune.criterion == "magnitude":  # which looks at no example
        samples = [[]] * recipe.prune.steps
    assert len(samples) == recipe.prune.steps
    for number, looks in enumerate(samples, 1):
        naive.load(model, record.full(round - 1), axes, alive)
        scores = _scores(record, model, alive, looks, recipe.prune.criterion)
        share = (1 - ratio) ** (number / recipe.prune.steps)
        prune = recipe.prune
        alive = naive.best_groups(
            scores,
            axes,
            share,
            naive.everything(axes),
            scope="per-layer" if prune.uniform else prune.scope,
            floor=prune.floor,
            least=1,
        )
    return alive


def naive_mask(record: Record, round: int) -> list[Group]:
    """The fine groups of highest eq. (4), on the D_s that the stage looked at."""
    recipe, axes, model, alive = record.recipe, record.axes, record.model(), record.plan(round)
    looks = record.only(round, "mask")
    naive.load(model, record.full(round - 1), axes, alive)
    scores = _scores(record, model, alive, looks, recipe.mask.criterion, fine=True)
    whole = [fine for group in alive for fine in axes.fine_of(group)]
    share = 1 - naive.ratios(recipe)[round - 1][1]
    return naive.best_groups(scores, axes, share, whole, scope=recipe.mask.scope, fine=True)


def _scores(
    record: Record, model: nn.Module, alive: list[Group], looks: list[Look], criterion: str, *, fine: bool = False
) -> dict[Group, float]:
    def seed_of(number: int) -> int:
        return seed_for(record.recipe.seed, number, looks[0].label)

    return naive.importance(model, record.axes, alive, [look.batch for look in looks], criterion, fine=fine, seed_of=seed_of)


def assert_near(ours: Tensor, expected: Tensor, what: str, near: float = 1e-5) -> None:
    """To a thousandth of each entry, or to `near` of the largest."""
    scale = float(expected.abs().max())
    alike = (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    if alike and torch.allclose(ours, expected, rtol=1e-3, atol=near * max(scale, 1e-3)):
        return  # what follows says where they differ, and takes ten times as long
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=near * max(scale, 1e-3), msg=lambda m: f"{what}: {m}")


def check_training(record: Record, rounds: int, steps: int) -> None:
    """Each round's full model, moments and metrics are those of dense gradients, a mask, and torch's optimizers.

    The moments are the reference's own throughout; the weights of each round start from what the round before wrote.
    """
    recipe, axes, layout, model = record.recipe, record.axes, record.layout, record.model()
    tune = recipe.finetune
    rest = {"weight_decay": tune.weight_decay, "head": layout["head"], "clip": tune.max_grad_norm}
    training = naive.adamw(tune.betas, tune.eps, **rest) if tune.optimizer == "adamw" else naive.sgd(tune.momentum, **rest)
    frozen = [] if recipe.mask.train_embeddings else layout["embeddings"]
    memory = Memory({n: tuple(p.shape) for n, p in model.named_parameters()})
    for round in range(1, rounds + 1):
        tensors = record.full(round - 1)
        full = {n: t for n, t in tensors.items() if n in memory.shapes}
        alive = record.plan(round)
        trains = naive.trainable_entries(axes, full, alive, record.mask(round), frozen)
        naive.load(model, tensors, axes, alive)
        looks = record.only(round, "finetune")
        torch.manual_seed(seed_for(recipe.seed, round, "finetune"))
        rates = naive.rates(recipe, round, steps)
        naive.finetune(model, full, trains, memory, training, [look.batch for look in looks], rates)
        # a bias before a norm of OneFormer has no gradient but rounding, which moves it by 3e-8
        check_full_model(record, round, full, trains, near=1e-4 if is_told(model) else 1e-5)
        if tune.carry_moments:
            # gradients of the next steps feel the rounding of those before: up to 7e-5 of the largest on one processor of
            # three; with queries, whose points and masks a rounding may change, up to 5e-4
            check_moments(record, round, memory, near=3e-3 if hasattr(model, "class_predictor") or is_told(model) else 3e-4)
        else:
            memory = Memory(memory.shapes)
        check_metrics(record, round, model)


def check_full_model(record: Record, round: int, full: dict[str, Tensor], trains: dict[str, Tensor], near: float) -> None:
    before, after = record.full(round - 1), record.full(round)
    for param, expected in full.items():
        assert_near(after[param], expected, f"{param} after round {round}", near)
        assert torch.equal(after[param][~trains[param]], before[param][~trains[param]]), param
    assert all(torch.equal(after[n], before[n]) for n in before.keys() - full.keys())  # statistics of batch norms
    changed = sum(int((after[n] != before[n]).sum()) for n in full)
    assert changed > 0.5 * sum(int(m.sum()) for m in trains.values())


def check_moments(record: Record, round: int, memory: Memory, near: float) -> None:
    stored = record.files[round, "merge"][f"full-{round:03d}/moments.safetensors"]
    assert {key.rpartition("/")[0] for key in stored} == set(memory.counts)
    for param, of in memory.moments.items():
        for moment, expected in of.items():
            assert_near(stored[f"{param}/{moment}"], expected, f"{param}/{moment} after round {round}", near)
        dense, count = memory.counts[param], stored[f"{param}/count"]
        if len(count) == 1:
            assert dense.unique().tolist() == count.tolist(), param
        else:
            dims = {c["param"]: c["dim"] for axis in record.axes.axes for c in axis["cuts"]}
            dim = dims.get(param, 0)  # 0: the rows of a table of tokens
            assert torch.equal(dense.movedim(dim, 0).reshape(len(count), -1).amax(1), count.long()), param
            assert torch.equal(dense.movedim(dim, 0).reshape(len(count), -1).amin(1), count.long()), param


def check_metrics(record: Record, round: int, model: nn.Module) -> None:
    """What `finetune` wrote is the trained small model's loss and metrics on all of the validation data, once."""
    looks = record.only(round, "finetune", validation=True)
    assert indices_of(looks) == list(range(VALIDATION))
    torch.manual_seed(SEED)
    for name, value in naive.evaluate(model, [look.batch for look in looks]).items():
        assert record.metrics[round][name] == pytest.approx(value, rel=1e-3), name
