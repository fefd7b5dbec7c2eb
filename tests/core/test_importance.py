"""Eq. (1) and (4) against a naive double loop over groups and entries, on every pico model; other criteria; what is freed."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from recap_cli import registry
from recap_cli.core.adapter import find_axes
from recap_cli.core.axes import Axis, Cut, mask_axes
from recap_cli.core.criterion import Criterion
from recap_cli.core.importance import averaged, group_scores
from recap_cli.errors import PluginError
from recap_cli.models import build
from tests.pico import LABELS, PICO, logits_for, pico

BATCHES = 3


def prepared(name: str) -> tuple[nn.Module, list[Axis], list[tuple[dict[str, Tensor], Tensor]], build.ModelSpec]:
    model, spec = pico(name)
    axes = find_axes(build.adapter_of(spec), model)
    inputs = [build.example_batch(spec, batch=2 + i, seed=i) for i in range(BATCHES)]
    labels = [torch.arange(2 + i) % len(LABELS) for i in range(BATCHES)]
    return model.eval(), axes, list(zip(inputs, labels, strict=True)), spec


def losses_of(model: nn.Module, spec: build.ModelSpec, data: list[tuple[dict[str, Tensor], Tensor]]):  # type: ignore[no-untyped-def]
    forward = logits_for(spec)
    total = sum(len(labels) for _, labels in data)

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        for inputs, labels in data:
            rows = [slice(i, i + 1) for i in range(len(labels))] if each else [slice(None)]
            for row in rows:
                part = {name: tensor[row] for name, tensor in inputs.items()}
                yield nn.functional.cross_entropy(forward(model, part), labels[row]), len(labels[row]) / total

    return losses


def naive_gradients(model: nn.Module, spec: build.ModelSpec, data: list[tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
    """The mean derivative over all examples, from one loss over all of them, example by example."""
    forward = logits_for(spec)
    model.zero_grad()
    total = sum(len(labels) for _, labels in data)
    for inputs, labels in data:
        for i in range(len(labels)):
            part = {name: tensor[i : i + 1] for name, tensor in inputs.items()}
            (nn.functional.cross_entropy(forward(model, part), labels[i : i + 1]) / total).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def naive_scores(model: nn.Module, axes: list[Axis], grads: dict[str, Tensor], *, taylor: bool) -> dict[str, list[float]]:
    params = dict(model.named_parameters())
    scores: dict[str, list[float]] = {}
    for axis in axes:
        scores[axis.name] = []
        for unit in range(axis.size):
            total = 0.0
            for cut in axis.cuts:
                for index in range(cut.offset + unit * cut.width, cut.offset + (unit + 1) * cut.width):
                    grad = grads[cut.param].select(cut.dim, index).double()
                    weight = params[cut.param].detach().select(cut.dim, index).double()
                    total += float(((grad * weight) ** 2 if taylor else grad**2).sum())
            scores[axis.name].append(total)
    return scores


@pytest.mark.parametrize("name", sorted(PICO))
@pytest.mark.parametrize("equation", ["1", "4"])
def test_importance_is_that_of_a_naive_double_loop(name: str, equation: str) -> None:
    model, axes, data, spec = prepared(name)
    axes = axes if equation == "1" else mask_axes(axes)
    criterion = registry.load("criteria", "taylor" if equation == "1" else "fisher")
    assert isinstance(criterion, Criterion)
    expected = naive_scores(model, axes, naive_gradients(model, spec, data), taylor=equation == "1")
    found = group_scores(model, axes, criterion, losses_of(model, spec, data))
    for axis in axes:
        torch.testing.assert_close(found[axis.name].double(), torch.tensor(expected[axis.name]).double(), rtol=1e-3, atol=1e-12)


def test_per_example_fisher_is_the_mean_of_squared_gradients() -> None:
    model, axes, data, spec = prepared("vit")
    criterion = registry.load("criteria", "fisher-per-example")
    assert isinstance(criterion, Criterion)
    found = group_scores(model, axes, criterion, losses_of(model, spec, data))
    singles = [({n: t[i : i + 1] for n, t in x.items()}, y[i : i + 1]) for x, y in data for i in range(len(y))]
    sums = [naive_scores(model, axes, naive_gradients(model, spec, [single]), taylor=False) for single in singles]
    for axis in axes:
        mean = torch.tensor([s[axis.name] for s in sums]).mean(0)
        torch.testing.assert_close(found[axis.name], mean, rtol=1e-3, atol=1e-10)


def test_magnitude_needs_no_loss() -> None:
    model, axes, _, _ = prepared("bert")
    criterion = registry.load("criteria", "magnitude")
    assert isinstance(criterion, Criterion)

    def never(each: bool) -> Iterator[tuple[Tensor, float]]:
        raise AssertionError("magnitude looked at the data")

    found = group_scores(model, axes, criterion, never)
    params = dict(model.named_parameters())
    axis = axes[0]
    first = sum(float(params[c.param].detach().narrow(c.dim, c.offset, c.width).square().sum()) for c in axis.cuts)
    assert found[axis.name][0].item() == pytest.approx(first, rel=1e-4)


def test_scoring_leaves_flags_as_they_were_and_no_gradient() -> None:
    model, axes, data, spec = prepared("vit")
    model.requires_grad_(False)
    model.get_parameter("classifier.weight").requires_grad_(True)
    criterion = registry.load("criteria", "taylor")
    assert isinstance(criterion, Criterion)
    group_scores(model, axes, criterion, losses_of(model, spec, data))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["classifier.weight"]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batches", [1, 3])
def test_a_gradient_is_freed_once_the_last_batch_has_reached_it(batches: int) -> None:
    model, axes, data, spec = prepared("vit")
    held: list[int] = []

    def score(weight: Tensor, grad: Tensor) -> Tensor:
        held.append(sum(p.grad is not None for p in model.parameters()))
        return grad.square()

    group_scores(model, axes, Criterion("mean", score), losses_of(model, spec, data[:batches]))
    assert max(held) <= (2 if batches == 1 else len(held))  # a weight and its bias become complete together
    assert held[-1] <= 2  # those of the first layer, which the backward reaches last


def test_a_criterion_may_score_whole_groups() -> None:
    model, axes, data, spec = prepared("vit")

    def by_loss(model: nn.Module, axes: list[Axis], losses):  # type: ignore[no-untyped-def]
        loss = sum(float(part.detach()) * share for part, share in losses(False))
        return {axis.name: torch.full((axis.size,), loss) for axis in axes}

    found = group_scores(model, axes, Criterion(score_groups=by_loss), losses_of(model, spec, data))
    assert all(scores.min() == scores.max() > 0 for scores in found.values())


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda w, g: g.sum(), r"gave shape \(\) for a weight of shape"),
        (lambda w, g: None, "gave NoneType"),
        (lambda w, g: {}["oops"], "KeyError: 'oops'"),
    ],
)
def test_a_criterion_that_misbehaves_is_named_as_such(score, message: str) -> None:  # type: ignore[no-untyped-def]
    model, axes, data, spec = prepared("vit")
    with pytest.raises(PluginError, match=message) as caught:
        group_scores(model, axes, Criterion("mean", score), losses_of(model, spec, data[:1]))
    assert str(caught.value.hint).startswith(
        "`score(weight, grad)` returns a tensor of the weight's shape; see docs/plugins/criterion.md"
    )


def test_group_scores_of_the_wrong_shape_are_refused() -> None:
    model, axes, data, spec = prepared("vit")
    wrong = Criterion(score_groups=lambda model, axes, losses: {axis.name: torch.ones(1) for axis in axes})
    with pytest.raises(PluginError, match="scores wanted"):
        group_scores(model, axes, wrong, losses_of(model, spec, data))


def test_an_average_weighs_importances_relative_to_their_mean() -> None:
    a, b, c = (Axis(name, "heads", 0, size, ()) for name, size in (("a", 2), ("b", 1), ("c", 2)))
    now = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0]), "c": torch.tensor([9.0, 1.0])}  # means 2 and 5
    before = {"a": torch.tensor([30.0, 10.0]), "b": torch.tensor([20.0]), "c": torch.tensor([1.0, 1.0])}  # means 20 and 1
    found = averaged([[a, b], [c]], now, before, 0.25)
    assert found["a"].tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 1.5, 0.75 * 1.5 + 0.25 * 0.5])
    assert found["b"].tolist() == pytest.approx([1.0])
    assert found["c"].tolist() == pytest.approx([0.75 * 1.8 + 0.25, 0.75 * 0.2 + 0.25])


@pytest.mark.parametrize("now", [[0.0, 0.0], [-1.0, -3.0]])
def test_importances_of_any_sign_and_size_can_be_averaged(now: list[float]) -> None:
    axis = Axis("a", "heads", 0, 2, ())
    found = averaged([[axis]], {"a": torch.tensor(now)}, {"a": torch.tensor([0.0, 2.0])}, 0.5)["a"]
    assert found.tolist() == pytest.approx([now[0] / 4, 1.0 + now[1] / 4])


@pytest.mark.parametrize("write", [lambda t: t.zero_(), lambda t: t.data.zero_(), lambda t: t.numpy().fill(0)])
@pytest.mark.parametrize("needs", ["none", "mean", "each"])
def test_a_score_that_writes_to_its_arguments_writes_to_copies(write, needs: str) -> None:  # type: ignore[no-untyped-def]
    model, axes, data, spec = prepared("bert")
    before = {name: tensor.clone() for name, tensor in build.tensors_of(model).items()}

    def score(weight: Tensor, grad: Tensor) -> Tensor:
        found = (weight * grad).square()
        write(weight)
        if needs != "none":  # zeros of no memory, which refuse it themselves
            write(grad)
        return found

    found = group_scores(model, axes, Criterion(needs, score), losses_of(model, spec, data))
    plain = group_scores(model, axes, Criterion(needs, lambda w, g: (w * g).square()), losses_of(model, spec, data))
    assert all(torch.equal(tensor, before[name]) for name, tensor in build.tensors_of(model).items())
    assert all(torch.equal(found[name], scores) for name, scores in plain.items())


def writing(model: nn.Module, how: str) -> None:
    weight = model.get_parameter("bert.encoder.layer.1.attention.self.query.weight")
    if how == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    elif how == "data":
        weight.data.mul_(1.5)
    elif how == "a buffer of no checkpoint":
        layer = model.get_submodule("bert.encoder.layer.1.attention")
        layer.get_buffer("scale").mul_(1.5)
    elif how == "moved within":
        weight.data.copy_(weight.data.flip(0))
    else:
        model.get_submodule("bert.encoder.layer.1.attention.self").query = nn.Linear(32, 32)  # type: ignore[assignment]


@pytest.mark.parametrize("how", ["in place", "data", "moved within", "replaced", "a buffer of no checkpoint"])
def test_group_scores_that_change_the_model_are_refused_by_name(how: str) -> None:
    model, axes, data, spec = prepared("bert")
    model.get_submodule("bert.encoder.layer.1.attention").register_buffer("scale", torch.ones(2), persistent=False)

    def spoil(model: nn.Module, axes: list[Axis], losses):  # type: ignore[no-untyped-def]
        writing(model, how)
        return {axis.name: torch.ones(axis.size) for axis in axes}

    with pytest.raises(
        PluginError, match=r"the criterion 'spoil' has changed the model: bert\.encoder\.layer\.1\.attention"
    ) as caught:
        group_scores(model, axes, Criterion(score_groups=spoil), losses_of(model, spec, data), named="spoil")
    assert ("and 1 more tensors" in str(caught.value)) == (how == "replaced")  # a weight and its bias


@pytest.mark.parametrize("fails", [False, True])
def test_group_scores_leave_every_module_in_the_mode_it_was_in(fails: bool) -> None:
    model, axes, data, spec = prepared("bert")
    model.get_submodule("classifier").train()
    before = {name: module.training for name, module in model.named_modules()}

    def flip(model: nn.Module, axes: list[Axis], losses):  # type: ignore[no-untyped-def]
        model.train()
        model.get_submodule("classifier").eval()
        if fails:
            raise RuntimeError("on the way")
        return {axis.name: torch.ones(axis.size) for axis in axes}

    with pytest.raises(PluginError, match="on the way") if fails else nullcontext():
        group_scores(model, axes, Criterion(score_groups=flip), losses_of(model, spec, data))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_group_scores_leave_no_gradients_and_no_flags_behind() -> None:
    model, axes, data, spec = prepared("bert")
    flags = {name: param.requires_grad for name, param in model.named_parameters()}

    def derive(model: nn.Module, axes: list[Axis], losses):  # type: ignore[no-untyped-def]
        for param in model.parameters():
            param.requires_grad_(param.ndim > 1)
        for loss, _ in losses(False):
            loss.backward()
        return {axis.name: torch.ones(axis.size) for axis in axes}

    group_scores(model, axes, Criterion(score_groups=derive), losses_of(model, spec, data))
    assert {name: param.requires_grad for name, param in model.named_parameters()} == flags
    assert all(param.grad is None for param in model.parameters())


NO_SCORES = [
    (lambda t: -t.abs() - 1, "scores below zero"),
    (lambda t: t.abs().to(torch.complex64), "complex64"),
    (lambda t: torch.ones_like(t, dtype=torch.int64), "int64"),
    (lambda t: torch.ones_like(t, device="meta"), "meta"),
    (lambda t: t.abs().to_sparse(), "sparse"),
]


@pytest.mark.parametrize(("made", "told"), NO_SCORES)
def test_scores_that_are_no_importances_are_refused_by_the_criterions_name(made, told: str) -> None:  # type: ignore[no-untyped-def]
    model, axes, data, spec = prepared("vit")
    losses = losses_of(model, spec, data[:1])
    with pytest.raises(PluginError, match=f"the criterion 'odd' gave .*{told}"):
        group_scores(model, axes, Criterion("none", lambda w, g: made(w)), losses, named="odd")
    grouped = Criterion(score_groups=lambda model, axes, losses: {a.name: made(torch.ones(a.size)) for a in axes})
    with pytest.raises(PluginError, match=f"the criterion 'odd' gave .*{told}") as caught:
        group_scores(model, axes, grouped, losses, named="odd")
    assert "`score_groups` returns a tensor for every axis" in str(caught.value.hint)


@pytest.mark.parametrize("needs", ["none", "mean"])
def test_a_score_that_ends_the_process_is_named(needs: str) -> None:
    model, axes, data, spec = prepared("vit")

    def leave(weight: Tensor, grad: Tensor) -> Tensor:
        raise SystemExit(4)

    with pytest.raises(PluginError, match="the criterion 'leave' failed: SystemExit: 4"):
        group_scores(model, axes, Criterion(needs, leave), losses_of(model, spec, data[:1]), named="leave")  # type: ignore[arg-type]


def test_what_a_score_prints_and_where_it_goes_stay_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    model, axes, data, spec = prepared("vit")

    def loud(weight: Tensor, grad: Tensor) -> Tensor:
        print("from python")
        os.write(1, b"past python")
        os.chdir("/")
        return weight.abs()

    before = os.getcwd()
    group_scores(model, axes, Criterion("mean", loud), losses_of(model, spec, data[:1]))
    out, err = capfd.readouterr()
    assert out == ""
    assert "from python" in err
    assert "past python" in err
    assert os.getcwd() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_the_criterions_fault_where_its_inputs_are(value: float) -> None:
    model, axes, data, spec = prepared("bert")
    losses = losses_of(model, spec, data)
    odd = Criterion(score=lambda weight, grad: weight.abs() * value)
    with pytest.raises(PluginError, match="the criterion 'odd' gave scores that are not finite"):
        group_scores(model, axes, odd, losses, named="odd")


def test_scores_of_a_gradient_that_is_not_finite_are_nobodys_fault_here() -> None:
    model, axes, data, spec = prepared("bert")

    def broken(each: bool) -> Iterator[tuple[Tensor, float]]:
        for loss, share in losses_of(model, spec, data)(each):
            yield loss * float("nan"), share

    taylor = Criterion(score=lambda weight, grad: (weight * grad) ** 2)
    scores = group_scores(model, axes, taylor, broken, named="taylor")
    assert any(bool(found.isnan().any()) for found in scores.values())  # the selection refuses them, and says: check the data


@pytest.mark.parametrize("found", [{}, None, {"a": 1.0}], ids=["of none", "nothing", "a number"])
def test_group_scores_that_lack_an_axis_are_refused_with_its_name(found: object) -> None:
    model, axes, data, spec = prepared("bert")
    criterion = Criterion(score_groups=lambda *_: found)  # type: ignore[arg-type, return-value]
    with pytest.raises(PluginError, match=rf"no scores for {axes[0].name} \({len(axes)} of {len(axes)} axes\)") as caught:
        group_scores(model, axes, criterion, losses_of(model, spec, data))
    assert "`score_groups` returns a tensor for every axis" in str(caught.value.hint)


class Skips(nn.Module):
    """Two matrices side by side, the second of which the last batch does not use, as with layer drop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor, *, whole: bool) -> Tensor:
        return self.a(x).sum() + (self.b(x).square().sum() if whole else 0.0)


def test_a_gradient_that_the_last_batch_does_not_reach_counts() -> None:
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(2, 3)
    axes = [Axis(name, "neurons", 0, 4, (Cut(f"{name}.weight", 0),)) for name in "ab"]
    found = group_scores(
        model,
        axes,
        Criterion("mean", lambda weight, grad: grad.square()),
        lambda _: ((model(x, whole=whole), 0.5) for whole in (True, False)),
    )
    (0.5 * model(x, whole=True) + 0.5 * model(x, whole=False)).backward()
    for name in "ab":
        torch.testing.assert_close(found[name], model.get_parameter(f"{name}.weight").grad.square().sum(1))  # type: ignore[union-attr]


def naive_inputs(
    model: nn.Module, spec: build.ModelSpec, data: list[tuple[dict[str, Tensor], Tensor]]
) -> dict[str, list[Tensor]]:
    """What each module with a weight reads, call by call, example by example: (tokens, in), or (windows, tokens, in)."""
    seen: dict[str, list[Tensor]] = {}

    def alone(read: Tensor) -> Tensor:
        return read.detach()[0] if len(read) == 1 else read.detach()

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(alone(args[0])))
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    ]
    for inputs, labels in data:
        for i in range(len(labels)):
            before = {name: len(calls) for name, calls in seen.items()}
            logits_for(spec)(model, {name: tensor[i : i + 1] for name, tensor in inputs.items()})
            counts = inputs["attention_mask"][i].bool() if "attention_mask" in inputs else None
            for name, calls in seen.items():
                for at in range(before.get(name, 0), len(calls)):
                    if counts is not None and calls[at].ndim > 1 and len(calls[at]) == len(counts):
                        calls[at] = calls[at][counts]
    for handle in handles:
        handle.remove()
    return seen


def naive_wanda(model: nn.Module, axis: Axis, unit: int, inputs: dict[str, list[Tensor]]) -> float:
    """Σ |W_ij| · ‖x_j‖ over the columns that read a unit; over its own rows where no column does."""
    ways: dict[bool, float] = {}
    for cut in axis.cuts:
        path, _, attribute = cut.param.rpartition(".")
        module, weight = model.get_submodule(path), model.get_parameter(cut.param).detach().double()
        if attribute != "weight" or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        is_conv1d = type(module).__name__ == "Conv1D"  # GPT-2's, (in, out)
        norm = sum(call.reshape(-1, call.shape[-1]).double().square().sum(0) for call in inputs[path]).sqrt()
        reads = cut.dim == (0 if is_conv1d else 1)
        for index in range(cut.offset + unit * cut.width, cut.offset + (unit + 1) * cut.width):
            row = weight.select(cut.dim, index).abs()
            ways[reads] = ways.get(reads, 0.0) + float((row * (norm[index] if reads else norm)).sum())
    return ways[True] if True in ways else ways[False]


@pytest.mark.parametrize("name", sorted(PICO))
def test_wanda_is_a_naive_sum_over_what_reads_each_group_and_runs_no_backward(name: str) -> None:
    model, axes, data, spec = prepared(name)
    inputs = naive_inputs(model, spec, data)
    tables = frozenset(cut.param for axis in axes for cut in axis.cuts if cut.param.endswith("bias_table"))
    for of in (axes, mask_axes(axes, tables)):  # Swin's tables of biases are trained or frozen whole
        with torch.no_grad():  # a backward would fail
            scores = group_scores(model, of, registry.load("criteria", "wanda"), losses_of(model, spec, data))
        for axis in of:
            wanted = [naive_wanda(model, axis, unit, inputs) for unit in range(axis.size)]
            torch.testing.assert_close(
                scores[axis.name].double(), torch.tensor(wanted, dtype=torch.double), rtol=1e-4, atol=1e-7
            )


def test_wanda_does_not_count_what_pads_a_text_so_that_batches_do_not_matter() -> None:
    model, axes, _, spec = prepared("bert")
    torch.manual_seed(0)
    ids, lengths = torch.randint(5, 60, (6, 12)), torch.tensor([3, 12, 5, 8, 4, 10])
    mask, labels = (torch.arange(12) < lengths[:, None]).long(), torch.zeros(6, dtype=torch.int64)
    texts = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": 0 * ids}
    wanda = registry.load("criteria", "wanda")
    whole = group_scores(model, axes, wanda, losses_of(model, spec, [(texts, labels)]))
    alone = [
        ({name: tensor[at : at + 1, :length] for name, tensor in texts.items()}, labels[:1])
        for at, length in enumerate(lengths.tolist())
    ]
    one_by_one = group_scores(model, axes, wanda, losses_of(model, spec, alone))
    for axis in axes:
        torch.testing.assert_close(whole[axis.name], one_by_one[axis.name], rtol=1e-4, atol=1e-6)
    padded = group_scores(model, axes, wanda, losses_of(model, spec, [({**texts, "attention_mask": 0 * mask + 1}, labels)]))
    assert any(not torch.allclose(whole[axis.name], padded[axis.name], rtol=1e-2) for axis in axes)


def test_wanda_scores_the_rows_of_what_no_layer_reads_and_refuses_what_is_no_matrix() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    x = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]])

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        yield model(x).sum(), 1.0

    wanda = registry.load("criteria", "wanda")
    rows = Axis("0.keys", "keys", 0, 2, (Cut("0.weight", 0, width=2), Cut("0.bias", 0, width=2)))
    entries = model[0].weight.detach().abs() * torch.tensor([2.0**0.5, 0.0, 2.0])
    torch.testing.assert_close(group_scores(model, [rows], wanda, losses)["0.keys"], entries.sum(1).view(2, 2).sum(1))
    with pytest.raises(PluginError, match="meets no linear layer"):
        group_scores(model, [Axis("1.gains", "gains", 0, 4, (Cut("1.weight", 0),))], wanda, losses)


def test_a_criterion_without_a_name_is_called_the_criterion() -> None:
    model, axes, data, spec = prepared("vit")

    def fails(*_: object) -> Tensor:
        raise ValueError("no")

    with pytest.raises(PluginError, match=r"^the criterion failed"):
        group_scores(model, axes, Criterion("mean", fails), losses_of(model, spec, data))
