"""What all trials of a search share. Plain values: it crosses processes, and a driver without torch makes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The data, the backbone and the training that trials have in common; `features` are URIs by cut."""

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
    precision: str = "float32"

    @property
    def feature_uris(self) -> dict[int, str]:
        return dict(self.features)
