"""What is heard of a block: its average over the tokens that are no padding."""

import torch
from torch import nn

from recap_cli.core.hidden_states import watched


def test_padding_has_no_part_in_the_average() -> None:
    model = nn.Sequential(nn.Identity())
    states = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))  # (examples, tokens, width)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"labels": torch.zeros(2), "attention_mask": mask}
    with watched(model, ["0"]) as heard:
        heard.heard(lambda _: model(states))(batch)
        (found,) = heard.take()
    naive = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
    torch.testing.assert_close(found, naive / naive.norm(dim=1, keepdim=True))
