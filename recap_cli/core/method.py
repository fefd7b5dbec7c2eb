"""What a finetuning method is: a value, not a class to inherit from.

A method is a list of *rounds*, each a round of the same four stages. A round says which plan it prunes to, what is trainable,
and for what share of the run's steps. Most methods are nothing more. One that trains something else (the adapters of LoRA, the
scores of movement pruning) brings a training too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # so that `recap status` reads rounds without torch
    from torch import Tensor, nn

    from recap_cli.core.axes import Axis, UnitMask

Plan = Literal["importance", "same", "learned"]
Trains = Literal["mask", "head", "training", "teacher"]
Embeddings = bool | Literal["tokens"]
Option = bool | int | float | str | Sequence[str] | None


@dataclass(frozen=True)
class RoundPlan:
    """What one round does.

    Attributes:
        prune_ratio: r_p, a share of the prunable parameters.
        mask_ratio: r_f, the share of what is left that is frozen.
        plan: which groups stay: by `importance` down to a share `1 − prune_ratio`, the `same` as in the round before, or those
            of the highest scores that a training of the round before has `learned`.
        trains: what is trained: what the `mask` makes trainable (a share `1 − mask_ratio`, and what lies outside every group),
            the `head` alone, or what the method's `training` names. A recipe whose teacher is finetuned first
            (`distill.teacher`) puts a round before those of the method that trains the `teacher`; no method gives one.
        share: of the optimizer steps of the run.
        lr_window: the window of the learning-rate schedule, from its rise to its decay; (0, 1) is all of it.
        embeddings: whether they are trainable too, where the mask decides: True for all of them, "tokens" for the rows of those
            tokens that occur in the training data.
        product: whether this round's small model may be what the run is for.
        batch_parts: in how many micro-batches, at least, a batch is taken: more hold fewer activations at a time.
    """

    prune_ratio: float = 0.0
    mask_ratio: float = 0.0
    plan: Plan = "importance"
    trains: Trains = "mask"
    share: float = 1.0
    lr_window: tuple[float, float] = (0.0, 1.0)
    embeddings: Embeddings = False
    product: bool = True
    batch_parts: int = 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "lr_window": list(self.lr_window)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "RoundPlan":
        """The round that `to_json` wrote.

        Raises:
            TypeError: a key is none of a round's. Of a state `rounds.record.check` has refused it before.
        """
        return cls(**{**found, "lr_window": tuple(found["lr_window"])})


@dataclass(frozen=True)
class Settings:
    """What a recipe says to a method.

    Attributes:
        rounds: K.
        prune_ratio: r_p.
        mask_ratio: r_f.
        embeddings: whether they are trainable.
        restarts: True runs the learning-rate schedule in every round anew.
        hold_plan: in how many of the last rounds the plan stays as it is.
        ramp: the share of r_f's trainable entries that the first round begins with (1: all).
        entry_cost: what a trainable entry holds on the device beside its weight (gradient, moments, master), in weights.
        options: of the method.
    """

    rounds: int
    prune_ratio: float
    mask_ratio: float
    embeddings: Embeddings = False
    restarts: bool = False
    hold_plan: int = 0
    ramp: float = 1.0
    entry_cost: float = 3.0
    options: Mapping[str, Option] = field(default_factory=dict)


Scores = dict[str, "Tensor"]  # axis name → one score per group, shape (axis.size,)


@dataclass(frozen=True)
class TrainerHook:
    """What a training of its own has put into a small model.

    Attributes:
        trains: `trains(name)` says which parameters are trained, the new ones included.
        result: `result(values, small)` takes the trained values (name → fp32 tensor on the CPU) and the small model's tensors
            as they were. It gives what of them was trained, whole, and the scores that a later round prunes by (none for most).
        rate: `rate(name)` is a factor of a parameter's learning rate, or of the head's for those of the task head.
        before_step: `before_step(step, steps, value)` runs before each step; `value(name)` is what is trained, in fp32.
        keeps_tokens: True says that the model sees the tokens of the data and no others, so that the other rows of its token
            table need not be held.
    """

    trains: Callable[[str], bool]
    result: "Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], tuple[dict[str, Tensor], Scores]]"
    rate: Callable[[str], float] = lambda _: 1.0
    before_step: "Callable[[int, int, Callable[[str], Tensor]], None]" = lambda _step, _steps, _value: None
    keeps_tokens: bool = False


@dataclass(frozen=True)
class TrainContext:
    """What a training of its own is given: the small model, its axes, the names of its task head, this round and those after
    it, the peak learning rate, and the method's options.

    Attributes:
        choose: `choose(scores, keep_share)` says which groups a pruning to that share of the prunable parameters would keep.
    """

    model: "nn.Module"
    axes: "Sequence[Axis]"
    head: Sequence[str]
    round_plans: Sequence[RoundPlan]
    lr: float
    options: Mapping[str, Option]
    choose: "Callable[[Scores, float], UnitMask]"


Training = Callable[[TrainContext], TrainerHook]  # puts something into the model, in place


@dataclass(frozen=True)
class Method:
    """How a pretrained model is finetuned: the rounds of a run and, where it needs one, a training step of its own.

    `prunes` and `masks` say whether the ratios r_p and r_f mean anything to it. `options` are the method's own settings with
    their defaults; a recipe gives others under `options`. `extra` names the extra of recap-cli that its training needs. `lr` is
    the peak learning rate of AdamW that `finetune.lr: auto` stands for, of a small model.
    """

    title: str
    round_plans: Callable[[Settings], Iterable[RoundPlan]]
    prunes: bool = False
    masks: bool = False
    training: Training | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    extra: str | None = None
    lr: float = 2e-4
