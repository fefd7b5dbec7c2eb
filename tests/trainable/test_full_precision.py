"""What computes in fp32 where weights are held as bf16: batch norms, and the loss that a model has of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.batch_norms import train_mode
from recap_cli.core.frozen_weight import FrozenWeight
from recap_cli.stages.run import run
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.placement import Placement
from tests.tiny import tiny

BF16 = Placement(weights=FrozenWeight(name="bf16", dtype=torch.bfloat16))


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_of_bf16_weights_has_statistics_that_bf16_cannot_hold(affine: bool) -> None:
    norm = nn.BatchNorm2d(2, affine=affine)
    x = torch.tensor([1000.0, 1004.0]).view(1, 2, 1, 1).repeat(3, 1, 2, 2).bfloat16().requires_grad_()  # exact in bf16
    norm.running_mean.copy_(torch.tensor([1001.0, 1001.5]))  # type: ignore[union-attr]
    wanted = norm.eval()(x.float())
    model = nn.Sequential(norm)
    trainables = make_partial(train_mode(model), {}, frozen=lambda _: False, placement=BF16)
    found = model(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    found.float().sum().backward()
    assert x.grad is not None
    assert [trainable.grad_param.grad is not None for trainable in trainables] == [True, True] * affine


class Judged(nn.Module):
    """A model with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.criterion = nn.Linear(3, 2), Criterion()

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.layer(x)
        return self.criterion(logits, labels=labels, more=[{"logits": logits}])


class Criterion(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor, more: Any) -> Any:
        return logits.dtype, labels.dtype, more[0]["logits"].dtype


@pytest.mark.parametrize(("placement", "dtype"), [(BF16, torch.bfloat16), (Placement(), torch.float32)])
def test_a_loss_of_the_models_own_is_given_fp32(placement: Placement, dtype: torch.dtype) -> None:
    model = Judged()
    make_partial(model, {}, frozen=lambda _: False, placement=placement)
    assert model(torch.ones(1, 3, dtype=dtype), torch.ones(1, dtype=torch.int64)) == (
        *(torch.float32, torch.int64),
        torch.float32,
    )


@pytest.mark.parametrize("name", ["segformer", "mask2former", "oneformer"])
def test_a_round_on_bf16_weights_is_near_that_on_fp32(name: str, tmp_path: Path) -> None:
    losses = {}
    for weights in ("fp32", "bf16"):
        state = run(tiny(name, rounds=1, finetune={"weights": weights}), tmp_path / weights)
        losses[weights] = next(entry["loss"] for entry in state.manifest.history if entry["stage"] == "finetune")
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
