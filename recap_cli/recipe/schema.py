"""The schema of a recipe: its sections and keys as frozen pydantic models. `recipe_conflicts` has what must hold between keys.

A description names the paper's symbol after `Paper:`, where there is one; `docs/reference/recipe.md` is generated from these.
"""

import math
import re
import unicodedata
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from recap_cli.recipe.conflicts import CONFLICTS, FAITHFUL, FAITHFUL_TO_IMAGES, FAITHFUL_UNLESS_SAID, conflicts_in

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
_FROZEN = ConfigDict(extra="forbid", frozen=True)


def _number(value: object) -> object:
    """Return `value` with `1e-4` as the number that it is in YAML 1.2; PyYAML, at YAML 1.1, hands over a string."""
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) and math.isfinite(number := float(value)):
        return number
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_number(item) for item in value]
    return value


def _whole(value: object) -> object:
    """Return `value` with `1e3` as the whole number that it is; `1.5e0` stays what it is."""
    number = _number(value) if isinstance(value, str) else value
    return int(number) if isinstance(value, str) and isinstance(number, float) and number.is_integer() else value


def _one_of(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Let a union of types fail once, at its key, and not once for each of them below it."""
    try:
        return handler(value)
    except ValidationError as error:
        raise PydanticCustomError("one_of", "none of the types fits") from error


def _path_part(name: str) -> str:
    """Return a name that can be that of one folder. Raises `PydanticCustomError` for any other."""
    odd = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, ends of lines
    if (
        name in (".", "..")
        or name != name.strip()
        or name.startswith(("-", "~"))
        or any(letter in "/\\" or unicodedata.category(letter) in odd for letter in name)
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise PydanticCustomError("path_part", "not the name of one folder")
    return name


_LONGEST_NAME = 200  # bytes: with what is put before and after it, a file's name still
_NAME_WORDS = (
    "text that can name a folder: no / or \\, no control characters, not . or .., neither - nor ~ at the front, no blanks at "
    f"either end, at most {_LONGEST_NAME} bytes"
)
# Strict, so that `true` is no number, "3" no integer and 2.0 no count. The upper limits are far above what makes sense: what
# is beyond them is a slip, or a recipe that is to hang the machine.
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Name = Annotated[str, Field(strict=True, min_length=1, json_schema_extra={"$comment": _NAME_WORDS}), AfterValidator(_path_part)]
Threads = Annotated[int, Field(strict=True, ge=0, le=1024), BeforeValidator(_whole)]
WarmUp = Annotated[int, Field(strict=True, ge=0, le=10**5), BeforeValidator(_whole)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1), BeforeValidator(_whole)]  # what numpy takes too
Count = Annotated[int, Field(strict=True, ge=1, le=10**9), BeforeValidator(_whole)]
Rounds = Annotated[int, Field(strict=True, ge=1, le=5000), BeforeValidator(_whole)]
PruneSteps = Annotated[int, Field(strict=True, ge=1, le=1000), BeforeValidator(_whole)]
Million = Annotated[int, Field(strict=True, ge=1, le=10**6), BeforeValidator(_whole)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=2**13), BeforeValidator(_whole)]
Epochs = Annotated[float, Field(strict=True, gt=0, le=10**5, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1), BeforeValidator(_number)]  # nobody means all of it
PartialShare = Annotated[float, Field(strict=True, gt=0, lt=1), BeforeValidator(_number)]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1), BeforeValidator(_number)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), BeforeValidator(_number)]
AutoPositive = Annotated[Positive | Literal["auto"], WrapValidator(_one_of)]
FlagOrTokens = Annotated[Flag | Literal["tokens"], WrapValidator(_one_of)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Device = Annotated[
    str,
    Field(strict=True, pattern=r"^(auto|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?)$", examples=["auto", "cpu", "mps", "cuda", "cuda:1"]),
]
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_AMOUNT = r"^([0-9]{1,12}(?:\.[0-9]{1,12})?) ?([KMGT]i?|)B$"
Bytes = Annotated[str, Field(strict=True, pattern=_AMOUNT, examples=["2GiB", "1500MB", "0.5GB"])]
Scope = Literal["per-kind", "global", "per-layer"]
MAX_HEAD_LR_RATIO = 10.0  # to the rate of the rest, with `auto`: more was not measured


def bytes_of(text: str) -> int:
    """How many bytes an amount such as `2GiB`, `1500 MB` or `0.5GB` is. Raises `ValueError` for anything else."""
    if (match := re.fullmatch(_AMOUNT, text)) is None:
        raise ValueError(f"expected an amount of memory, as in 2GiB or 1500MB; found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


class Model(BaseModel):
    """The pretrained weights, or the shape of a model with random ones: give `name` or `config`."""

    model_config = _FROZEN

    name: Text | None = Field(default=None, description="Hub id or folder of the weights; with timm also an architecture.")
    library: Literal["transformers", "timm"] = Field(default="transformers", description="The library that builds the model.")
    config: Annotated[dict[str, JsonValue], BeforeValidator(_number)] | None = Field(
        default=None,
        description="Instead of `name`: build with random weights. transformers: a config with its `model_type`; "
        "timm: arguments of `create_model` with its `architecture`.",
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit of `name` on the hub.")


class Task(BaseModel):
    """What the model learns, and the figure that says how well."""

    model_config = _FROZEN

    kind: Literal["text-classification", "image-classification"] = Field(description="What is classified.")
    metric: Literal["accuracy", "f1", "matthews", "loss"] = Field(
        default="accuracy",
        description="The validation metric that picks the best round. f1 is that of label 1 if there are two labels, as GLUE "
        "has it, and the mean over the labels (macro F1) if there are more; matthews is GLUE's. Of loss, less is better.",
    )


class Data(BaseModel):
    """Where the examples come from and what their columns are called: give `name`, `builtin` or `train`."""

    model_config = _FROZEN

    name: Text | None = Field(default=None, description="Hub id of a data set.")
    subset: Text | None = Field(default=None, description="Configuration of `name`, such as `cola` of `nyu-mll/glue`.")
    builtin: Literal["digits"] | None = Field(
        default=None, description="1,797 handwritten digits, 8 x 8; they come with recap."
    )
    train: Text | None = Field(
        default=None, description="A csv, jsonl or parquet file, or an image folder; relative to the working directory."
    )
    validation: Text | None = Field(default=None, description="The validation examples, in the same form as `train`.")
    train_split: Text = Field(default="train", description="The split that is trained on.")
    validation_split: Text = Field(default="validation", description="The split that is evaluated on.")
    validation_share: PartialShare | None = Field(
        default=None, description="Share of the training examples to hold out where there is no validation split."
    )
    text: Text | None = Field(default=None, description="Column of the sentence, or of the first of two.")
    text_pair: Text | None = Field(default=None, description="Column of the second sentence.")
    image: Text | None = Field(default=None, description="Column of the image; a folder of class folders has none.")
    label: Text = Field(default="label", description="Column of the class.")
    max_length: Million = Field(default=128, description="Tokens after which a text is cut.")
    image_size: Pixels | None = Field(default=None, description="Pixels along an image's edge; null is what the model expects.")
    train_samples: Count | None = Field(default=None, description="Train on the first so many after a seeded shuffle.")
    validation_samples: Count | None = Field(default=None, description="Evaluate on the first so many, likewise.")
    augment: Literal["none", "flip"] = Field(default="none", description="Random change of training images.")
    workers: Threads = Field(default=0, description="Threads that decode images beside the main one.")


class Head(BaseModel):
    """Warm-up of a new task head on frozen features, so that the first importance is not noise."""

    model_config = _FROZEN

    warmup_epochs: WarmUp = Field(default=1, description="Passes over the training data; 0 is the paper's plain algorithm.")
    lr: Positive = Field(
        default=1e-3, description="Learning rate of the warm-up, and what `finetune.head_lr: auto` gives a new head afterwards."
    )
    batch_size: Million = Field(default=32, description="Examples a step of the warm-up.")


class Importance(BaseModel):
    """The small random sample on which both importances are estimated."""

    model_config = _FROZEN

    batches: Million = Field(default=10, description="Batches in the sample. Paper: D_s.")
    batch_size: Million = Field(default=32, description="Examples a batch of the sample. Paper: D_s.")
    device: Device = Field(
        default="cpu",
        description="Where importance, the head's warm-up and the full model's scores are computed; "
        "an accelerator gets one block of the model at a time.",
    )


class Prune(BaseModel):
    """Step 2: from the full model to the small one."""

    model_config = _FROZEN

    ratio: Share = Field(default=0.333, description="Share of the prunable parameters that goes. Paper: r_p.")
    steps: PruneSteps = Field(default=4, description="Gradual steps, each with its own importance. Paper: N_p.")
    criterion: Text = Field(default="taylor", description="Plugin that scores groups; the default is eq. (1). Paper: I_m.")
    scope: Scope = Field(default="per-kind", description="What is ranked together: heads and neurons apart, all, or a layer.")
    floor: Share = Field(default=0.15, description="Share of each layer's heads and neurons that stays in any case.")
    hold_plan: Share = Field(
        default=0.5, description="Share of the rounds, the last ones, in which the plan stays as it is; 0 is the paper's."
    )
    ema: Share = Field(
        default=0.0, description="Weight of the rounds before in a round's importance, a moving average; 0 is the paper's."
    )
    uniform: Flag = Field(default=False, description="True leaves every layer with the same number of heads and neurons.")
    ramp: Fraction = Field(
        default=0.5,
        description="The first round moves this share of what the last does, and prunes as much less as that saves memory; "
        "1 is the paper's.",
    )
    round_to: Million = Field(default=1, description="What is kept of each matrix is a multiple of this many rows or columns.")


class Mask(BaseModel):
    """Step 3: which part of the small model may move."""

    model_config = _FROZEN

    ratio: Share = Field(
        default=0.5,
        description="Share of the small model's prunable parameters to freeze; the paper has 0.5 for texts, 0.875 for images. "
        "Paper: r_f.",
    )
    criterion: Text = Field(default="fisher", description="Plugin that scores groups; the default is eq. (4). Paper: I_n.")
    scope: Scope = Field(
        default="per-layer",
        description="What is ranked together, as in `prune.scope`; per-layer moves the same share of every layer, "
        "per-kind is the paper's.",
    )
    random: Share = Field(
        default=0.0, description="Share of what moves that is drawn at random, the rest by importance; 0 is the paper's."
    )
    train_embeddings: FlagOrTokens = Field(
        default=False,
        description="True lets patch, token and position embeddings move; tokens lets the rows of those tokens move that occur "
        "in the training data, and no other embedding.",
    )


class Finetune(BaseModel):
    """Step 4: train what may move."""

    model_config = _FROZEN

    epochs: Epochs | None = Field(default=2.0, description="Passes over the training data, each round.")
    steps: Count | None = Field(default=None, description="Optimizer steps each round; overrides `epochs`. Paper: N_f.")
    batch_size: Million = Field(default=32, description="Examples an optimizer step.")
    micro_batch_size: Million | None = Field(
        default=None,
        description="Examples a backward pass, a divisor of `batch_size`; null is the whole batch at once.",
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="The update rule.")
    lr: Positive = Field(default=1e-4, description="Learning rate at its peak.")
    head_lr: AutoPositive | None = Field(
        default="auto",
        description="Learning rate of the task head at its peak. auto is `head.lr`, but at least `lr` and at most ten times "
        "that; for a head that came with the checkpoint, that moves alone, or with sgd it is `lr`. null is `lr`.",
    )
    momentum: Share = Field(default=0.9, description="Momentum of sgd. Paper: beta.")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="Moment decays of adamw. Paper: beta_1, beta_2.")
    eps: Positive = Field(default=1e-8, description="Added to adamw's denominator.")
    weight_decay: NonNegative = Field(default=0.01, description="Decay of the weights that may move; of no others.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="The learning rate over its course."
    )
    lr_schedule_span: Literal["run", "round"] = Field(
        default="run", description="The learning rate runs its schedule once over the run, or (the paper) anew each round."
    )
    warmup_ratio: Share = Field(default=0.0, description="Share of a course's steps in which the learning rate rises.")
    max_grad_norm: Positive | None = Field(default=None, description="Clip gradients to this norm; not with `fused_backward`.")
    memory_budget: Bytes | None = Field(
        default=None,
        description="What the device may give, as in 2GiB: `init` changes settings until the prediction fits, and says which.",
    )
    weights: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="Type of the weights on the device (int8: of frozen matrices, the rest is bf16); "
        "what moves has fp32 masters.",
    )
    checkpointing: Flag = Field(default=False, description="True recomputes activations in the backward pass.")
    fused_backward: Flag = Field(default=False, description="True steps each tensor as soon as its gradient is complete.")
    offload: Flag = Field(
        default=False, description="True keeps masters and moments in main memory, and takes the optimizer's steps there."
    )
    carry_moments: Flag = Field(default=True, description="True keeps the moments from round to round. Paper: V.")
    device: Device = Field(default="auto", description="Where the small model trains; auto is an accelerator if there is one.")


class Evaluate(BaseModel):
    """Scoring on the validation data."""

    model_config = _FROZEN

    batch_size: Million = Field(default=64, description="Examples a batch.")


class Recipe(BaseModel):
    """A run of RECAP, or of a method to compare it with, from pretrained weights to a finetuned model."""

    model_config = _FROZEN

    name: Name = Field(
        default="recap", description="What the run is called, and its folder in `runs/` unless `--state` names another."
    )
    method: Text = Field(default="recap", description="Plugin that says what each round does; `recap plugins` lists them.")
    options: Annotated[dict[str, JsonValue], BeforeValidator(_number)] = Field(
        default_factory=dict, description="The method's own settings, as in {rank: 8}."
    )
    faithful: Flag = Field(
        default=False,
        description="True keeps the paper's plain algorithm: what it has no word for is off (`FAITHFUL`), and "
        "`mask.scope` and, for images, `mask.ratio` are its own where a recipe does not say them.",
    )
    seed: Seed = Field(default=0, description="Seed of every random choice.")
    rounds: Rounds = Field(
        default=10,
        description="Rounds of prune, mask, finetune and merge; other methods spend the same optimizer steps. Paper: K.",
    )
    patience: Rounds | None = Field(
        default=None, description="Rounds without a better metric after which to stop; null: never."
    )
    model: Model
    task: Task
    data: Data
    head: Head = Field(default_factory=Head)
    importance: Importance = Field(default_factory=Importance)
    prune: Prune = Field(default_factory=Prune)
    mask: Mask = Field(default_factory=Mask)
    finetune: Finetune = Field(default_factory=Finetune)
    evaluate: Evaluate = Field(default_factory=Evaluate)

    @field_validator("model", "task", "data", "head", "importance", "prune", "mask", "finetune", "evaluate", mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        return {} if value is None else value  # all of its keys are commented out

    @model_validator(mode="before")
    @classmethod
    def _faithful(cls, values: Any) -> Any:
        """Fill in the paper's settings where the recipe asks for them and says nothing itself."""
        if not isinstance(values, dict) or values.get("faithful") is not True:
            return values
        filled, task = dict(values), values.get("task")
        images = isinstance(task, dict) and task.get("kind") == "image-classification"
        for key, value in (FAITHFUL | FAITHFUL_UNLESS_SAID | (FAITHFUL_TO_IMAGES if images else {})).items():
            section, name = key.split(".")
            known = filled.get(section) or {}
            if isinstance(known, dict) and name not in known:
                filled[section] = {**known, name: value}
        return filled

    def head_lr(self, *, new: bool, alone: bool = False) -> float:
        """The peak learning rate of the task head while finetuning, if it is `new` or came with the checkpoint, and moves
        `alone` or beside other weights.
        """
        asked, rest = self.finetune.head_lr, self.finetune.lr
        if asked == "auto":
            own = new and not alone and self.finetune.optimizer == "adamw"  # as is the warm-up's
            return max(rest, min(self.head.lr, MAX_HEAD_LR_RATIO * rest)) if own else rest
        return rest if asked is None else asked

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(conflicts_in(self)):
            text = "; ".join(f"{conflict.keys[0]}: {conflict.text}" for conflict in found)
            raise PydanticCustomError(CONFLICTS, "{text}", {"text": text, "conflicts": found})
        return self
