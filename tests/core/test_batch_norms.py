"""Batch norms: what is estimated against plain means, and what training leaves alone."""

import torch
from torch import Tensor, nn

from recap_cli.core.batch_norms import estimate_statistics, new_norms, train_mode
from recap_cli.core.streaming import streamed

BATCHES = [torch.randn(size, 3, 5, 4, generator=torch.Generator().manual_seed(size)) * size + 1 for size in (2, 4, 3)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.BatchNorm2d(2, track_running_stats=False)).eval()


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats]


def plain_statistics(model: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    """The mean and the unbiased variance of each channel of each batch, averaged over the batches, norm after norm."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for batch in BATCHES:
        x = batch
        for place, layer in enumerate(model[:5]):
            if isinstance(layer, nn.BatchNorm2d):
                rows = x.movedim(1, 0).flatten(1)  # (channels, all else)
                mean, centred = rows.mean(1), rows - rows.mean(1, keepdim=True)
                square = (centred**2).sum(1)
                found.setdefault(place, []).append((mean, square / (rows.shape[1] - 1)))
                scale = layer.weight / torch.sqrt(square / rows.shape[1] + layer.eps)
                x = (x - mean[:, None, None]) * scale[:, None, None] + layer.bias[:, None, None]
            else:
                x = layer(x)
    mean_of = [torch.stack([one for one, _ in of]).mean(0) for of in found.values()]
    return list(zip(mean_of, [torch.stack([one for _, one in of]).mean(0) for of in found.values()], strict=True))


def test_statistics_are_the_mean_over_batches_of_their_means_and_variances() -> None:
    model = network()
    before = {name: param.clone() for name, param in model.named_parameters()}
    norms = norms_of(model)
    for norm in norms:
        norm.running_mean.fill_(7.0)  # type: ignore[union-attr]
        norm.running_var.fill_(7.0)  # type: ignore[union-attr]
    with torch.no_grad():
        wanted = plain_statistics(model)
    estimate_statistics(norms, model, BATCHES)
    for norm, (mean, variance) in zip(norms, wanted, strict=True):
        torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, variance))
    assert [norm.momentum for norm in norms] == [0.3, 0.1]
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_model_on_a_device_keeps_the_statistics_that_were_estimated_there() -> None:
    plain, model = network(), network()
    estimate_statistics(norms_of(plain), plain, BATCHES)
    with streamed(model, ["3"], "cpu"):
        estimate_statistics(norms_of(model), model, BATCHES)
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_training_leaves_running_statistics_alone_and_all_else_trains() -> None:
    model = network()
    estimate_statistics(norms_of(model), model, BATCHES)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train_mode(model)
    model(BATCHES[0]).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert [name for name, module in model.named_modules() if not module.training] == ["1", "4"]
    assert not any(module.training for module in train_mode(model, on=False).modules())


def test_new_norms_are_those_of_new_parameters_that_have_statistics() -> None:
    model = network()
    assert new_norms(model, {"4.weight", "4.bias", "6.weight", "0.weight"}) == [model[4]]
    assert new_norms(model, set()) == []
