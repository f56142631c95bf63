"""What all trials of a backbone share. Plain values: it crosses processes, and a driver without torch makes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The data, the backbone and the training that the trials of one backbone have in common; `features` are URIs by cut."""

    backbone: str
    backbone_uri: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    num_classes: int
    num_groups: int
    features: tuple[tuple[int, str], ...]
    sources: tuple[tuple[int, int], ...]
    """(depth, the cut it starts from): its own, or a materialised one at a larger depth."""
    max_epochs: int
    class_weights: str
    seed: int
    precision: str = "auto"
    backbones: int = 1
    """How many the search has; a process keeps a warm worker for each."""

    @property
    def feature_uris(self) -> dict[int, str]:
        return dict(self.features)
