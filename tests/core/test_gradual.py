"""Gradual steps by themselves: what each is given, and what becomes of what they absorb."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, Cut, UnitMask
from recap_cli.core.gradual import Step, prune
from recap_cli.core.ranking import Limits
from recap_cli.core.surgery import IndexMap

AXES = (
    Axis("first", "neurons", 0, 4, (Cut("0.weight", 0), Cut("0.bias", 0), Cut("1.weight", 1))),
    Axis("second", "neurons", 1, 4, (Cut("2.weight", 0), Cut("2.bias", 0), Cut("3.weight", 1))),
)


def model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2))
    for param in layers.parameters():
        param.data = torch.randn(param.shape, generator=generator)
    return layers


def test_what_steps_absorb_is_cut_by_those_after_them_and_added_up() -> None:
    """Two units of the first axis go in the first step, two of the second in the second, which the first layers do not feel."""
    small, full = model(), model()
    seen: list[tuple[dict[str, Tensor], list[str]]] = []
    scores = iter([{"first": [0.0, 0, 9, 9], "second": [9.0] * 4}, {"first": [9.0, 9], "second": [0.0, 9, 0, 9]}])
    changes: list[dict[str, Tensor]] = [
        {"1.weight": torch.tensor([[1.0, 2], [3, 4], [5, 6]]), "1.bias": torch.tensor([1.0, 2, 3])},
        {"3.weight": torch.full((2, 2), 0.5)},
    ]

    def score(model: nn.Module, axes: Sequence[Axis], plan: UnitMask) -> dict[str, Tensor]:
        seen.append(({name: param.detach().clone() for name, param in model.named_parameters()}, [a.name for a in axes]))
        return {name: torch.tensor(of) for name, of in next(scores).items()}

    def absorb(model: nn.Module, axes: Sequence[Axis], index_map: IndexMap) -> Mapping[str, Tensor]:
        assert [axis.size for axis in axes] == [[4, 4], [2, 4]][len(seen) - 1]
        assert ("1.weight" in index_map) == (len(seen) == 1)
        return changes[len(seen) - 1]

    step = Step(score, lambda model, sizes: None, absorb)  # type: ignore[arg-type]
    plan, absorbed = prune(small, AXES, step, keep_shares=[0.75, 0.5], limits=Limits())
    assert {name: kept.tolist() for name, kept in plan.items()} == {
        "first": [False, False, True, True],
        "second": [False, True, False, True],
    }
    assert absorbed.keys() == {"1.weight", "1.bias", "3.weight"}
    params, (_, (second, _)) = dict(full.named_parameters()), seen
    torch.testing.assert_close(second["1.weight"], params["1.weight"][:, 2:] + changes[0]["1.weight"])  # what the step scores
    torch.testing.assert_close(second["1.bias"], params["1.bias"] + changes[0]["1.bias"])
    now = dict(small.named_parameters())
    torch.testing.assert_close(now["3.weight"], params["3.weight"][:, [1, 3]] + changes[1]["3.weight"])
    assert all(torch.equal(absorbed[name], tensor) for change in changes for name, tensor in change.items())


def test_a_weight_that_both_steps_cut_has_both_changes_and_the_full_model_neither() -> None:
    small, full = model(), model()
    shared = {name: param.data for name, param in small.named_parameters()}  # as a state's tensors share a model's memory
    left = iter([3, 2])

    def absorb(model: nn.Module, axes: Sequence[Axis], index_map: IndexMap) -> dict[str, Tensor]:
        return {"1.weight": torch.arange(3.0 * (many := next(left))).reshape(3, many), "1.bias": torch.ones(3)}

    rising = Step(lambda model, axes, plan: {"first": torch.arange(float(axes[0].size))}, lambda model, sizes: None, absorb)
    plan, absorbed = prune(small, AXES[:1], rising, keep_shares=[0.75, 0.5], limits=Limits())
    assert plan["first"].tolist() == [False, False, True, True]
    first = torch.arange(9.0).reshape(3, 3)[:, 1:]  # the second step has cut its first input
    torch.testing.assert_close(absorbed["1.weight"], first + torch.arange(6.0).reshape(3, 2))
    assert absorbed["1.bias"].tolist() == [2.0, 2.0, 2.0]
    torch.testing.assert_close(small[1].weight.data, full[1].weight.data[:, 2:] + absorbed["1.weight"])
    assert all(torch.equal(shared[name], param) for name, param in full.named_parameters())
