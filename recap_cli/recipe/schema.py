"""The schema of a recipe: its sections and keys as frozen pydantic models. `conflicts` has what must hold between keys.

A description names the paper's symbol, if any, after `Paper:`. `docs/reference/recipe.md` is generated from the descriptions.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator
from pydantic_core import PydanticCustomError

from recap_cli.core.task import Metric
from recap_cli.recipe.conflicts import (
    CONFLICTS,
    FAITHFUL,
    FAITHFUL_DEFAULTS,
    FAITHFUL_IMAGE_DEFAULTS,
    conflicts_in,
    task_of,
)
from recap_cli.recipe.distill import Distill
from recap_cli.recipe.values import (
    AutoPositive,
    AutoPositiveOrFalse,
    Bytes,
    Classes,
    Count,
    Device,
    Epochs,
    Flag,
    FlagOrAttention,
    FlagOrTokens,
    Fraction,
    Million,
    Name,
    NonNegative,
    OneOrMore,
    PartialShare,
    Pixels,
    Positive,
    PruneSteps,
    RankBy,
    Rounds,
    Scope,
    Seed,
    Share,
    Text,
    TextOrTexts,
    Threads,
    WarmUp,
    as_number,
)
from recap_cli.tasks.calls import task_named

_FROZEN = ConfigDict(extra="forbid", frozen=True)
MAX_HEAD_LR_RATIO = 10.0  # to `lr`, with `auto`: larger ratios were not measured


class Model(BaseModel):
    """The pretrained weights, or the configuration of a model with random weights: set `name` or `config`."""

    model_config = _FROZEN

    name: Text | None = Field(default=None, description="Hub id or folder of the weights; for timm also an architecture.")
    library: Literal["transformers", "timm"] = Field(default="transformers", description="The library that builds the model.")
    config: Annotated[dict[str, JsonValue], BeforeValidator(as_number)] | None = Field(
        default=None,
        description="Instead of `name`: a model with random weights. For transformers, a config with its `model_type`; "
        "for timm, arguments of `create_model` with its `architecture`.",
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit of `name` on the hub.")


class Task(BaseModel):
    """What the model learns, and the metric that measures it."""

    model_config = _FROZEN

    kind: Text = Field(
        examples=["text-classification", "image-classification", "token-classification"],
        json_schema_extra={"plugins": "tasks"},
        description="Plugin that says what the model learns; `recap plugins` lists them.",
    )
    metric: Annotated[Text, Field(examples=["accuracy", "f1", "pearson", "loss"])] | None = Field(
        default=None,
        description="The validation metric that selects the best round; null is the first of the task. "
        "docs/guide/tasks.md lists them. loss is a metric of every task, and less of it is better.",
    )


class Data(BaseModel):
    """Where the examples come from and the names of their columns: set `name`, `builtin` or `train`."""

    model_config = _FROZEN

    name: Text | None = Field(default=None, description="Hub id of a data set.")
    subset: Text | None = Field(default=None, description="Configuration of `name`, such as `cola` of `nyu-mll/glue`.")
    builtin: Literal["digits"] | None = Field(
        default=None, description="1,797 handwritten digits, 8 x 8; they come with recap."
    )
    train: Text | None = Field(
        default=None, description="A csv, jsonl or parquet file, or an image folder; relative to the working directory."
    )
    validation: Text | None = Field(default=None, description="Validation examples, in the same form as `train`.")
    train_split: Text = Field(default="train", description="The split for training.")
    validation_split: Text = Field(default="validation", description="The split for validation.")
    validation_share: PartialShare | None = Field(
        default=None, description="Share of the training examples to hold out, for data without a validation split."
    )
    text: Text | None = Field(default=None, description="Column of the text, or of the first of two.")
    text_pair: Text | None = Field(default=None, description="Column of the second text.")
    image: Text | None = Field(
        default=None,
        description="Column of the image; a folder of class folders has none. Of a folder with label maps, the folder of the "
        "images in it, or a pattern; {split} stands for the split.",
    )
    label_map: Text | None = Field(
        default=None,
        description="Column of the label maps, which have a class for each pixel; null is that of `label`. Of a folder, their "
        "folder in it, or a pattern.",
    )
    classes: Classes | None = Field(
        default=None,
        description="The classes of label maps, or a JSON file of them: a list of names, an id2label, or objects with name, "
        "color and id. null takes the values that occur.",
    )
    ignore_index: OneOrMore | None = Field(
        default=255, description="Value of label maps, or a list of values, that are no class and not counted; null is none."
    )
    label: TextOrTexts = Field(
        default="label", description="Column of the label; a list of columns of 0 and 1 for a task with several classes."
    )
    max_length: Million = Field(default=128, description="The most tokens of a text; longer ones are truncated.")
    image_size: Pixels | None = Field(default=None, description="Side of an image in pixels; null is the model's.")
    train_samples: Count | None = Field(default=None, description="Train on so many examples, after a seeded shuffle.")
    validation_samples: Count | None = Field(default=None, description="Validate on so many examples, likewise.")
    augment: Literal["none", "flip", "crop"] = Field(
        default="none",
        description="Random flips of training images. crop is for label maps: a random resize by 0.5 to 2, a crop and a flip.",
    )
    workers: Threads = Field(default=0, description="Threads that decode images; 0 is the main thread.")


class Head(BaseModel):
    """Warm-up of a new task head on frozen features, so that the first importance is meaningful."""

    model_config = _FROZEN

    warmup_epochs: WarmUp = Field(default=1, description="Passes over the training data; 0 is the paper's plain algorithm.")
    lr: Positive = Field(
        default=1e-3, description="Learning rate of the warm-up, and of a new head with `finetune.head_lr: auto`."
    )
    batch_size: Million = Field(default=32, description="Examples per step of the warm-up.")


class Importance(BaseModel):
    """The small random sample on which both importances are estimated."""

    model_config = _FROZEN

    batches: Million = Field(default=10, description="Batches in the sample. Paper: D_s.")
    batch_size: Million = Field(default=32, description="Examples per batch of the sample. Paper: D_s.")
    device: Device = Field(
        default="cpu",
        description="Device for importance, the warm-up of the head and evaluations of the full model. "
        "An accelerator gets one block of the model at a time.",
    )


class Prune(BaseModel):
    """Step 2: prune the full model to the small one."""

    model_config = _FROZEN

    ratio: Share = Field(default=0.333, description="Share of the prunable parameters to prune. Paper: r_p.")
    steps: PruneSteps = Field(default=4, description="Gradual steps, each with a new importance. Paper: N_p.")
    criterion: Text = Field(default="taylor", description="Plugin that scores groups; the default is eq. (1). Paper: I_m.")
    scope: Scope = Field(
        default="per-kind", description="What is ranked together: groups of one kind, all, or those of one layer."
    )
    rank_by: RankBy = Field(
        default="parameter",
        description="How groups of different size compete: by importance per parameter, by the sum over the group (the "
        "paper's), in relation to the mean of their layer, or only with groups of their size.",
    )
    floor: Share = Field(default=0.15, description="Share of each layer's heads and neurons that is always kept.")
    hold_plan: Share = Field(
        default=0.5, description="Share of the rounds, at the end, that keep the plan of the round before; the paper has 0."
    )
    ema: Share = Field(
        default=0.0, description="Weight of earlier rounds in the importance, a moving average; the paper has 0."
    )
    uniform: Flag = Field(default=False, description="True keeps the same number of heads and of neurons in every layer.")
    ramp: Fraction = Field(
        default=0.5,
        description="In the first round, the trainable share relative to that of the last round. "
        "The memory this saves allows a lower prune ratio. The paper has 1.",
    )
    compensate: AutoPositiveOrFalse = Field(
        default=False,
        description="Let output matrices absorb what their pruned inputs contributed, by ridge regression on D_s, after each "
        "gradual step. A number is the ridge, relative to the mean square of an input. auto finds one for each matrix. The "
        "paper has false.",
    )
    round_to: Million = Field(default=1, description="Keep a multiple of this many rows or columns of each matrix.")


class Mask(BaseModel):
    """Step 3: choose which part of the small model is trainable."""

    model_config = _FROZEN

    ratio: Share = Field(
        default=0.5,
        description="Share of the small model's prunable parameters to freeze. The paper has 0.5 for texts, 0.875 for images. "
        "Paper: r_f.",
    )
    criterion: Text = Field(default="fisher", description="Plugin that scores groups; the default is eq. (4). Paper: I_n.")
    scope: Scope = Field(
        default="per-layer",
        description="What is ranked together, as in `prune.scope`. With per-layer, the same share of every layer is trainable. "
        "The paper has per-kind.",
    )
    rank_by: RankBy = Field(default="parameter", description="How units of different size compete, as in `prune.rank_by`.")
    random: Share = Field(
        default=0.0,
        description="Share of the trainable parameters that is chosen at random, not by importance; the paper has 0.",
    )
    train_embeddings: FlagOrTokens = Field(
        default=False,
        description="True makes patch, token and position embeddings trainable. tokens makes only the rows of tokens trainable "
        "that occur in the training data.",
    )


class Finetune(BaseModel):
    """Step 4: train the trainable part of the small model."""

    model_config = _FROZEN

    epochs: Epochs | None = Field(default=2.0, description="Passes over the training data per round.")
    steps: Count | None = Field(default=None, description="Optimizer steps per round; overrides `epochs`. Paper: N_f.")
    batch_size: Million = Field(default=32, description="Examples per optimizer step.")
    micro_batch_size: Million | None = Field(
        default=None,
        description="Examples per backward pass, a divisor of `batch_size`; null is the whole batch.",
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="The update rule.")
    lr: AutoPositive = Field(
        default=1e-4, description="Peak learning rate; auto is the method's own for adamw, and less for a model wider than 384."
    )
    head_lr: AutoPositive | None = Field(
        default="auto",
        description="Peak learning rate of the task head; null is `lr`. auto is `head.lr`, but at least `lr` and at most ten "
        "times `lr`. auto is `lr` with sgd, for a head of the checkpoint, or if only the head is trainable.",
    )
    momentum: Share = Field(default=0.9, description="Momentum of sgd. Paper: beta.")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="Moment decays of adamw. Paper: beta_1, beta_2.")
    eps: Positive = Field(default=1e-8, description="Added to adamw's denominator.")
    weight_decay: NonNegative = Field(default=0.01, description="Weight decay; of trainable weights only.")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="Learning-rate schedule.")
    lr_schedule_span: Literal["run", "round"] = Field(
        default="run", description="The schedule spans the whole run, or restarts in each round, as in the paper."
    )
    warmup_ratio: Share = Field(default=0.0, description="Share of the schedule's steps in which the learning rate rises.")
    max_grad_norm: Positive | None = Field(default=None, description="Clip gradients to this norm; not with `fused_backward`.")
    memory_budget: Bytes | None = Field(
        default=None,
        description="The device memory to use, as in 2GiB: `init` changes settings until the prediction fits, and lists them.",
    )
    weights: Text = Field(
        default="fp32",
        description="Plugin that holds the weights on the device. With int8 and nf4, frozen matrices are quantized and the "
        "rest is bf16. Trainable weights have fp32 masters.",
    )
    checkpointing: FlagOrAttention = Field(
        default=False,
        description="True recomputes the activations of each block in the backward pass; attention those of its attention.",
    )
    fused_backward: Flag = Field(default=False, description="True updates each tensor as soon as its gradient is complete.")
    offload: Flag = Field(
        default=False, description="True keeps masters and moments in main memory, and runs the optimizer there."
    )
    carry_moments: Flag = Field(default=True, description="True keeps the optimizer's moments from round to round. Paper: V.")
    log_every: Million = Field(
        default=10, description="Optimizer steps between two looks at the loss, for which a device is waited."
    )
    device: Device = Field(
        default="auto", description="Device that trains the small model; auto is an accelerator if there is one."
    )


class Evaluate(BaseModel):
    """Evaluation on the validation data."""

    model_config = _FROZEN

    batch_size: Million = Field(default=64, description="Examples per batch.")


class Recipe(BaseModel):
    """A run of RECAP or of another method, from pretrained weights to a finetuned model."""

    model_config = _FROZEN

    name: Name = Field(
        default="recap", description="Name of the run, and of its folder in `runs/` unless `--state` names another."
    )
    method: Text = Field(default="recap", description="Plugin that plans the rounds; `recap plugins` lists them.")
    options: Annotated[dict[str, JsonValue], BeforeValidator(as_number)] = Field(
        default_factory=dict, description="Options of the method, as in {rank: 8}."
    )
    faithful: Flag = Field(
        default=False,
        description="True runs the paper's plain algorithm: settings that it does not have are off (`FAITHFUL`). "
        "The defaults of `mask.scope`, of both `rank_by` and, for images, of `mask.ratio` are the paper's.",
    )
    seed: Seed = Field(default=0, description="Seed of all random numbers.")
    rounds: Rounds = Field(
        default=10,
        description="Rounds of prune, mask, finetune and merge. Other methods take as many optimizer steps in total. Paper: K.",
    )
    patience: Rounds | None = Field(
        default=None, description="Stop after this many rounds without a better metric; null never stops early."
    )
    model: Model
    task: Task
    data: Data
    head: Head = Field(default_factory=Head)
    importance: Importance = Field(default_factory=Importance)
    prune: Prune = Field(default_factory=Prune)
    mask: Mask = Field(default_factory=Mask)
    finetune: Finetune = Field(default_factory=Finetune)
    distill: Distill = Field(default_factory=Distill)
    evaluate: Evaluate = Field(default_factory=Evaluate)

    @field_validator(
        "model", "task", "data", "head", "importance", "prune", "mask", "finetune", "distill", "evaluate", mode="before"
    )
    @classmethod
    def _empty_section(cls, value: object) -> object:
        return {} if value is None else value  # None: all of its keys are commented out

    @model_validator(mode="before")
    @classmethod
    def _first_metric(cls, values: Any) -> Any:
        """Fill in the first metric of the task, if the recipe names none."""
        if (task := task_of(values)) is None:
            return values
        section = values["task"].model_dump() if isinstance(values["task"], Task) else values["task"]
        if section.get("metric") is not None:
            return values
        return {**values, "task": {**section, "metric": task.all_metrics[0].name}}

    @model_validator(mode="before")
    @classmethod
    def _faithful(cls, values: Any) -> Any:
        """Fill in the paper's settings that the recipe does not set, if it asks for them."""
        if not isinstance(values, dict) or values.get("faithful") is not True:
            return values
        filled, task = dict(values), task_of(values)
        images = task is not None and task.inputs == "image"
        for key, value in (FAITHFUL | FAITHFUL_DEFAULTS | (FAITHFUL_IMAGE_DEFAULTS if images else {})).items():
            section, name = key.split(".")
            known = filled.get(section) or {}
            if isinstance(known, dict) and name not in known:
                filled[section] = {**known, name: value}
        return filled

    @property
    def metric(self) -> Metric:
        """The metric that decides which round is best."""
        return task_named(self.task.kind).metric(self.task.metric or "")  # never null: `_first_metric` has filled it in

    def head_lr(self, lr: float, *, new: bool, alone: bool = False) -> float:
        """Return the peak learning rate of the task head while finetuning.

        Args:
            lr: That of the rest.
            new: True for a new head, False for that of the checkpoint.
            alone: True if only the head is trainable.
        """
        head_lr = self.finetune.head_lr
        if head_lr == "auto":
            is_raised = new and not alone and self.finetune.optimizer == "adamw"  # the optimizer of the warm-up
            return max(lr, min(self.head.lr, MAX_HEAD_LR_RATIO * lr)) if is_raised else lr
        return lr if head_lr is None else head_lr

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(conflicts_in(self)):
            text = "; ".join(f"{conflict.keys[0]}: {conflict.text}" for conflict in found)
            raise PydanticCustomError(CONFLICTS, "{text}", {"text": text, "conflicts": found})
        return self
