"""D_s on a task that counts words: each batch, or example, has the share of what it has of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED, Objective
from recap_cli.data.split import Split
from recap_cli.plugins.tasks.token_classification import TOKEN_CLASSIFICATION
from recap_cli.progress import silent
from recap_cli.rounds import importance
from recap_cli.rounds.importance import Sample, losses_over

TAGS = [[0, 2, 1, 1, 0], [1], [IGNORED, IGNORED], [2, IGNORED, 0], [1, 1]]  # of each example, token by token
CHOSEN = torch.tensor([4, 0, 2, 3])


def test_the_shares_of_d_s_are_those_of_what_the_task_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Embedding(8, 3)
    ids = Ragged.of([[i + at for at in range(len(tags))] for i, tags in enumerate(TAGS)])
    split = Split("made", Ragged.of(TAGS), lambda indices, _: {"ids": ids[indices].clamp(min=0)})
    monkeypatch.setattr(importance, "forward_of", lambda _, built: lambda batch: built(batch["ids"]))
    objective = Objective(TOKEN_CLASSIFICATION, ("a", "b", "c"), TOKEN_CLASSIFICATION.metrics[0])
    context: Any = SimpleNamespace(spec=None, objective=objective)
    losses = losses_over(context, model, Sample(split, CHOSEN, 3, torch.device("cpu"), "D_s"), silent)
    whole = split.batch(CHOSEN)
    mean = nn.functional.cross_entropy(model(whole["ids"]).flatten(0, 1), whole["labels"].flatten())
    for each, shares in ((False, [7 / 9, 2 / 9]), (True, [2 / 9, 5 / 9, 0.0, 2 / 9])):
        found = list(losses(each))
        assert [share for _, share in found] == pytest.approx(shares)
        assert all(loss.requires_grad for loss, _ in found)
        torch.testing.assert_close(sum((loss * share for loss, share in found), torch.zeros(())), mean)
