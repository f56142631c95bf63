"""The part `promotion` of the spec: when a challenger replaces the champion, how sure that must be, and who has to agree."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Metric = Literal["accuracy", "balanced_accuracy", "macro_f1"]
NO_SLICES = ("image", "label", "split")  # of the manifest's own columns only group may be a slice: class_floor watches the labels


class PromotionSpec(BaseModel):
    """When the challenger replaces the champion."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: Metric = Field("accuracy", description="Holdout metric to compare.")
    min_gain: float = Field(0.0, ge=-1, le=1, description="The challenger must beat the champion by more than this, as a fraction of 1.")
    confidence: float = Field(
        0.95, ge=0.5, lt=1, description="How sure the gain must be: equal models are promoted in at most 1 - confidence of the cases."
    )
    class_floor: float = Field(
        0.05, ge=0, le=1, description="No class, and no value of a slice, may lose more recall than this beyond its noise; 1: rule off."
    )
    slices: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Columns of the manifest (data.source) whose values are each held to class_floor, e.g. [camera]."
    )
    ece_floor: float = Field(
        0.05, ge=0, le=1, description="The expected calibration error may not rise by more than this beyond its noise; 1: rule off."
    )
    log_loss_floor: float = Field(
        0.1, ge=0, le=35, description="The log loss may not rise by more than this beyond its noise, in nats an image; 35: rule off."
    )
    floor_confidence: float = Field(
        0.9, ge=0.5, lt=1, description="How sure a loss must be before it refuses; over all classes, or all slices, together."
    )
    probe: Literal["refuse", "warn", "off"] = Field(
        "refuse", description="What follows when the challenger loses to its own linear probe (negative transfer)."
    )
    max_overlap: float = Field(
        0.2, ge=0, le=1, description="Share of the holdout that may have been seen in training, and so removed, before nothing is judged."
    )
    min_images: int = Field(20, ge=1, description="Fewer holdout images than this judge nothing.")
    detectable_gain: float = Field(
        0.03, gt=0, le=1, description="Gain beyond min_gain for which the decision says how many images it takes to show it."
    )
    power: float = Field(0.8, ge=0.5, lt=1, description="How often such a gain should be shown, for that number of images.")
    approval: Literal["auto", "manual"] = Field(
        "auto", description="auto promotes at once what passes; manual asks a person, on Prefect's page or by `unfreeze promote --approve`."
    )
    approver_differs: bool = Field(False, description="Whoever asked for a promotion may not approve it too.")
    approval_hours: float = Field(168.0, gt=0, le=24 * 366, description="After so many hours an unanswered request expires.")
    webhook: str | None = Field(
        None,
        pattern=r"^https?://[^\s/@]+(/\S*)?$",
        description="URL, no secret in it, that gets each decision as JSON, signed with UNFREEZE_WEBHOOK_SECRET.",
    )

    @property
    def shown(self) -> dict[str, Any]:
        """As reports and evidence show it: of the webhook the host alone, because the path is often a secret all the same."""
        host = self.webhook and "/".join(self.webhook.split("/")[:3])
        return {**self.model_dump(mode="json"), "webhook": host}

    @field_validator("slices")
    @classmethod
    def _are_different_columns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """In the manifest's own spelling: its columns are read without regard to case and outer blanks."""
        columns = tuple(column.strip().lower() for column in value)
        if len(set(columns)) != len(columns) or "" in columns:
            raise ValueError("must be a list of different columns")
        taken = [column for column in columns if column in NO_SLICES]
        if taken:
            raise ValueError(f"{taken[0]!r} is no slice: the columns {', '.join(NO_SLICES)} mean something else; name a further column")
        return columns
