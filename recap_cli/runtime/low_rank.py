"""LoRA (2106.09685) as the library peft has it: adapters of rank 8 on the query and the value, as in the paper's baseline."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from recap_cli.core.groups import Axis
from recap_cli.core.surgery import owner_of
from recap_cli.runtime.checkpoints import quiet

RANK = 8
MARK = "lora_"  # of the names that peft gives


def inject(
    model: nn.Module, axes: Sequence[Axis], like: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], rank: int = RANK
) -> None:
    """Put adapters beside the query and the value of every attention block, in place; `like` makes the tensors they hold."""
    from peft import LoraConfig, inject_adapter_in_model

    with quiet():
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets(axes)), model)
    new = {name: param for name, param in model.named_parameters() if is_adapter(name)}
    for name, tensor in like(new).items():
        owner, attribute = owner_of(model, name)
        owner.register_parameter(attribute, nn.Parameter(tensor))


def targets(axes: Sequence[Axis]) -> list[str]:
    """The layers that make query and value (one layer where one matrix makes all), by path."""
    found: list[str] = []
    for axis in axes:
        if axis.kind == "heads":
            rows = [cut.param.removesuffix(".weight") for cut in axis.cuts if cut.param.endswith(".weight")][:-1]  # then out
            found += list(dict.fromkeys((rows[0], rows[-1])))
    return found


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of LoRA's."""
    return MARK in name
