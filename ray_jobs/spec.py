"""The spec: what a user asks for, as one frozen model read from one YAML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from ray_jobs.promotion_spec import PromotionSpec

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
Augmentation = Literal["none", "photo", "symbol", "aerial"]
FeatureDtype = Literal["float32", "float16", "bfloat16"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSpec(_Part):
    """The images, and how they are split."""

    source: str = Field(
        min_length=1,
        description="Folder or zip with a folder per class, s3:// prefix, or manifest .csv/.parquet (image, label[, group, split]).",
    )
    image_size: int = Field(224, ge=16, le=1024, description="Side of the square image that the backbone sees, in pixels.")
    val_fraction: float = Field(0.15, gt=0, lt=1, description="Share of the images that chooses trials and stops training.")
    holdout_fraction: float = Field(0.15, gt=0, lt=1, description="Share of the images that judges champion against challenger.")
    max_megapixels: float = Field(100.0, gt=0, description="Larger images go to quarantine (decompression bombs), in megapixels.")

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> DataSpec:
        if self.val_fraction + self.holdout_fraction >= 0.9:
            raise ValueError("val_fraction and holdout_fraction together must stay below 0.9, or nothing is left to train on")
        return self


class BackboneSpec(_Part):
    """The pretrained network that is reused."""

    name: str = Field(min_length=1, description="Any timm model name.")
    weights: str = Field("timm", min_length=1, description="timm (hub) | package:NAME | path or s3:// URI of .safetensors or .pth | none.")


class Range(_Part):
    """A range of values to draw from."""

    low: float = Field(ge=0, le=10, description="Smallest value.")
    high: float = Field(gt=0, le=10, description="Largest value.")
    scale: Literal["log", "linear"] = Field("log", description="How to draw between them.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if self.low == 0 and self.scale == "log":
            raise ValueError("a log scale cannot start at 0; give scale: linear, or a low above 0")
        return self

    def at(self, share: float) -> float:
        """The value `share` of the way from low to high, on the range's own scale."""
        if self.scale == "log":
            return float(self.low * (self.high / self.low) ** share)
        return self.low + (self.high - self.low) * share


def _kind(value: Any) -> str:
    if isinstance(value, dict | Range):
        return "range"
    return "list" if isinstance(value, list | tuple) else "value"


LearningRate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, lt=1)]
Strength = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(gt=0, le=1)]
BatchSize = Annotated[int, Field(ge=2, le=4096)]
Optimizer = Literal["adamw", "sgd"]
TAGS = {"range", "list", "value", "mapping"}


LearningRates = Annotated[
    Annotated[Range, Tag("range")] | Annotated[tuple[LearningRate, ...], Tag("list")],
    Discriminator(_kind),
    BeforeValidator(lambda value: [value] if isinstance(value, int | float) else value),
]
Shares = Annotated[
    Annotated[Share, Tag("value")] | Annotated[tuple[Share, ...], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]
Strengths = Annotated[
    Annotated[Strength, Tag("value")] | Annotated[tuple[Strength, ...], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]
Decays = Annotated[
    Annotated[Decay, Tag("value")] | Annotated[tuple[Decay, ...], Tag("list")] | Annotated[Range, Tag("range")], Discriminator(_kind)
]
Optimizers = Annotated[Annotated[Optimizer, Tag("value")] | Annotated[tuple[Optimizer, ...], Tag("list")], Discriminator(_kind)]
BatchSizes = Annotated[Annotated[BatchSize, Tag("value")] | Annotated[tuple[BatchSize, ...], Tag("list")], Discriminator(_kind)]


Backbone = Annotated[
    Annotated[str, Field(min_length=1), Tag("value")] | Annotated[BackboneSpec, Tag("mapping")],
    Discriminator(lambda value: "value" if isinstance(value, str) else "mapping"),
]


class SearchSpec(_Part):
    """The search over unfreeze depth and learning rate."""

    unfreeze_depth: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="Depths to try: 0 is a linear probe, the number of groups is full fine-tuning."
    )
    lr: LearningRates = Field(Range(low=1e-4, high=1e-2), description="Peak learning rates: a range {low, high, scale}, or a list.")
    num_trials: int = Field(16, ge=1, le=100_000, description="Trials to run; a grid runs each combination once instead.")
    max_epochs: int = Field(8, ge=1, le=10_000, description="Epochs of a trial that is not stopped early.")
    searcher: Literal["grid", "random", "optuna"] | None = Field(
        None, description="How to choose trials; by default grid where every dimension is a list, else random."
    )
    scheduler: Literal["fifo", "asha", "ladder"] = Field(
        "asha",
        description="fifo runs every trial to its end; asha stops the weak ones early; ladder climbs to a deeper depth only where it pays.",
    )
    budget_s: float | None = Field(None, gt=0, description="Seconds after which the search ends at the next epoch, restarts included.")
    budget_gpu_s: float | None = Field(None, gt=0, description="The same, in GPU-seconds of the trials.")
    warm_start: bool = Field(False, description="Try the best points of this model's past searches first.")
    fresh_share: float = Field(0.3, ge=0, le=1, description="Share of the trials of a warm-started search that are fresh points.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the sampling and of every trial.")
    batch_size: BatchSizes = Field(32, description="Images a step in a trial; one value or a list to search over.")
    weight_decay: Shares = Field(1e-4, description="Weight decay, in trials and in the fit; one value, a list or a range to search over.")
    label_smoothing: Shares = Field(0.0, description="Label smoothing, in trials and in the fit; one value, a list or a range.")
    layer_decay: Decays = Field(
        1.0, description="Factor on the learning rate from one group to the one before; one value, a list or a range."
    )
    optimizer: Optimizers = Field("adamw", description="adamw, sgd (with Nesterov momentum 0.9), or a list of both to search over.")
    augmentation_strength: Strengths = Field(
        1.0,
        description="Share of the augmented views (in trials) and images (in the fit) that are used; one value, a list or a range. "
        "1 uses all, 0 none; to search over it, set views above 1.",
    )
    backbone: tuple[Backbone, ...] = Field(
        (),
        description="Further backbones to search over, besides the spec's own: timm names, or {name, weights} as there. "
        "A bare name has the own one's weights where those are timm or none, else timm.",
    )
    class_weights: Literal["auto", "none"] = Field("auto", description="auto weights rare classes up when the classes are imbalanced.")
    views: int = Field(
        1, ge=1, le=64, description="Fixed views of each train image in the cache: 1 as val sees it, the others by fit.augmentation."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the products in a trial; auto: bfloat16 where the processor has it. Sums stay in float32."
    )
    feature_dtype: FeatureDtype = Field("float32", description="How cached features are stored; computing stays in float32.")

    @field_validator(
        "unfreeze_depth", "lr", "batch_size", "weight_decay", "label_smoothing", "layer_decay", "optimizer", "augmentation_strength"
    )
    @classmethod
    def _has_no_duplicates(cls, value: Any) -> Any:
        if isinstance(value, tuple) and (not value or len(set(value)) != len(value)):
            raise ValueError("must be a list of different values")
        return value

    @field_validator("lr", "weight_decay", "label_smoothing", "layer_decay", "augmentation_strength")
    @classmethod
    def _range_is_within_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        least, most = BOUNDS[str(info.field_name)]
        if isinstance(value, Range) and not least <= value.low < value.high <= most:
            raise ValueError(f"the range must lie between {least:g} and {most:g}")
        return value

    @model_validator(mode="after")
    def _searcher_fits_the_space(self) -> SearchSpec:
        ranges = [name for name in SEARCHED if isinstance(getattr(self, name), Range)]
        if self.searcher == "grid" and ranges:
            raise ValueError(f"searcher: grid needs lists, not a range, for {', '.join(ranges)}")
        if self.scheduler == "ladder" and self.searcher == "optuna":
            raise ValueError("scheduler: ladder chooses its trials itself; leave searcher out, or choose asha for optuna")
        return self

    @property
    def content(self) -> dict[str, Any]:
        """What names this search in keys."""
        return named_by(self.model_dump(mode="json"))

    @property
    def needs_tune(self) -> bool:
        """Whether anything is left to run once the linear probes that are known at the start have trained, all at once."""
        return self.resolved_searcher == "optuna" or max(self.unfreeze_depth) > 0

    @property
    def resolved_searcher(self) -> Literal["grid", "random", "optuna"]:
        """The searcher in force where the spec leaves it open."""
        return self.searcher or ("random" if any(isinstance(getattr(self, name), Range) for name in SEARCHED) else "grid")


SEARCHED = ("lr", "weight_decay", "label_smoothing", "layer_decay", "optimizer", "batch_size", "augmentation_strength")
"""The dimensions of the search besides the unfreeze depth."""

BOUNDS = {
    "lr": (1e-12, 10.0), "weight_decay": (0.0, 1.0), "label_smoothing": (0.0, 0.99), "layer_decay": (1e-6, 1.0),
    "augmentation_strength": (0.0, 1.0),
}  # fmt: skip


class FitSpec(_Part):
    """The final training of the winner."""

    num_workers: int = Field(1, ge=1, le=1024, description="Ray Train workers (data-parallel ranks).")
    min_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Workers that are enough to begin with (by default all), or to go on with when machines go (by default one).",
    )
    max_epochs: int | None = Field(None, ge=1, le=10_000, description="Epochs at most; by default the search's max_epochs.")
    patience: int = Field(3, ge=1, description="Epochs without a better val accuracy before the fit stops early.")
    batch_size_per_worker: int | None = Field(
        None,
        ge=2,
        le=4096,
        description="Images a step on each worker; by default the workers share the winning trial's batch, 8 each at least.",
    )
    augmentation: Augmentation = Field(
        "photo",
        description="photo: crop, mirror, colour; symbol: never mirrors (text, signs); aerial: any turn and mirror; none. "
        "A fit that falls short of its trial in the search is made once more without.",
    )

    @model_validator(mode="after")
    def _fewer_are_enough(self) -> FitSpec:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than num_workers: {self.num_workers}")
        return self

    @property
    def workers_to_begin(self) -> int:
        return self.min_workers or self.num_workers

    @property
    def workers_to_go_on(self) -> int:
        return self.min_workers or 1


class Spec(_Part):
    """One model to keep retrained: data, backbone, search, fit, promotion, storage."""

    name: str = Field(pattern=NAME_PATTERN, description="Registered model, MLflow experiment and S3 prefix.")
    data: DataSpec
    backbone: BackboneSpec
    search: SearchSpec = SearchSpec()
    fit: FitSpec = FitSpec()
    promotion: PromotionSpec = PromotionSpec()
    storage: str = Field("s3://unfreeze", pattern=r"^s3://[^/]+(/.*)?$", description="Bucket and optional prefix, as an s3:// URI.")

    @model_validator(mode="after")
    def _views_have_an_augmentation(self) -> Spec:
        if self.search.views > 1 and self.fit.augmentation == "none":
            raise ValueError(f"search.views: {self.search.views} views would all be the same with fit.augmentation: none")
        return self

    @model_validator(mode="after")
    def _strength_has_something_to_act_on(self) -> Spec:
        strength = self.search.augmentation_strength
        if self.fit.augmentation == "none" and strength != 1.0:
            raise ValueError(
                "search.augmentation_strength: nothing is augmented with fit.augmentation: none; choose a preset there, or leave it out"
            )
        if self.search.views == 1 and not isinstance(strength, float):
            raise ValueError(
                "search.augmentation_strength: trials differ in it only by the cached views; set search.views to 2 or more, "
                "or give one value, which then acts in the fit alone"
            )
        return self

    @model_validator(mode="after")
    def _backbones_differ(self) -> Spec:
        names = [backbone.name for backbone in self.backbones]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"search.backbone: {', '.join(twice)} is there twice; backbone.name is always searched, so list only others, once each"
            )
        return self

    @property
    def backbones(self) -> tuple[BackboneSpec, ...]:
        """Every backbone of the search, the spec's own first."""
        weights = self.backbone.weights if self.backbone.weights in ("timm", "none") else "timm"
        listed = (BackboneSpec(name=one, weights=weights) if isinstance(one, str) else one for one in self.search.backbone)
        return (self.backbone, *listed)

    def with_backbone(self, backbone: BackboneSpec) -> Spec:
        """The spec of a search over this backbone alone."""
        return self.model_copy(update={"backbone": backbone, "search": self.search.model_copy(update={"backbone": ()})})

    @property
    def digest(self) -> str:
        """Hex digest of everything but where the data and the results lie."""
        content = self.model_dump(mode="json", exclude={"storage": True, "data": {"source"}})
        return digest_of({**content, "search": self.search.content})

    @property
    def fit_max_epochs(self) -> int:
        return self.fit.max_epochs or self.search.max_epochs


def named_by(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as they enter a key: dimensions that came late are left out at their defaults, so that earlier work is still found."""
    defaults: dict[str, tuple[Any, ...]] = {"augmentation_strength": (1.0,), "backbone": ("", [])}
    return {name: value for name, value in values.items() if value not in defaults.get(name, ())}


def digest_of(content: Any) -> str:
    """32 hex digits of sha256 over the canonical JSON of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
