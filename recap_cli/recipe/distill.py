"""The section `distill` of a recipe: who teaches, and how much is learned from it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from recap_cli.recipe.values import AutoPositive, Fraction, NonNegative, PartialShare, Positive, Text

SELF = "self"  # as a teacher: the model itself
OWN_TEACHERS = ("lora", "full")  # which a run finetunes itself


class Distill(BaseModel):
    """Learning from a finetuned model as well as from the labels (Hinton et al., 2015); the paper has no teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: Text | None = Field(
        default=None,
        examples=[SELF, *OWN_TEACHERS, "DIR", None],
        description="self is the model itself, which is finetuned already. With lora or full the first round finetunes the "
        "full model, by LoRA or whole, a block at a time on the device; the others begin there. Else the hub id or the folder "
        "of a model that is finetuned for these labels, of any size. null is no teacher.",
    )
    steps_share: PartialShare = Field(
        default=0.5, description="With teacher: lora or full, the share of the run's optimizer steps that the teacher takes."
    )
    teacher_lr: AutoPositive = Field(
        default="auto", description="Peak learning rate of a teacher: lora or full; auto is that of lora-ft, or of full-ft."
    )
    library: Literal["transformers", "timm"] | None = Field(
        default=None, description="The library that builds the teacher; null is that of the model."
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit of the teacher on the hub.")
    temperature: Positive = Field(default=2.0, description="What the logits of both are divided by. Hinton et al.: T.")
    weight: Fraction = Field(default=0.7, description="Weight of the teacher's outputs in the loss; the labels have the rest.")
    hidden_weight: NonNegative = Field(
        default=0.0,
        description="Weight of the squared distance between the hidden states of both, averaged over tokens, and over "
        "blocks; it is added to the loss. 0: they are not learned. As in Sun et al. (2019), who add up over blocks.",
    )

    @property
    def is_own(self) -> bool:
        """Whether the run finetunes its teacher itself."""
        return self.teacher in OWN_TEACHERS
