"""The name of features changes if and only if something that changes features does."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.feature_set import Cell, Transform, cells_of, feature_set

NUM_GROUPS = 3
three = st.tuples(*[st.sampled_from([0.25, 0.5])] * 3)
transforms = st.builds(Transform, st.sampled_from([64, 96]), three, three, st.sampled_from(["bicubic", "bilinear"]))
arguments = st.fixed_dictionaries({
    "cell": st.builds(Cell, st.integers(0, NUM_GROUPS), st.integers(0, 2)), "backbone_digest": st.sampled_from(["a" * 32, "b" * 32]),
    "transform": transforms, "augmentation": st.sampled_from(["photo", "symbol"]),
    "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
})  # fmt: skip


def what_counts(given: dict[str, Any]) -> tuple[Any, ...]:
    """What the values depend on: the centre is not augmented; the input itself has seen no backbone, no mean and no storage type."""
    cell, transform = given["cell"], given["transform"]
    pixels = transform.image_size, transform.interpolation, cell.view and (given["augmentation"], cell.view)
    if cell.depth == NUM_GROUPS:
        return pixels
    return *pixels, given["backbone_digest"], cell.depth, transform.mean, transform.std, given["dtype"]


@given(arguments, arguments)
def test_two_keys_are_equal_exactly_where_the_features_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    keys = [feature_set(**given, num_groups=NUM_GROUPS).digest for given in (one, other)]
    assert (keys[0] == keys[1]) == (what_counts(one) == what_counts(other))


@given(arguments, st.data())
def test_changing_one_thing_changes_the_key_exactly_where_it_counts(one: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(one)))
    other = {**one, name: data.draw(arguments)[name]}
    keys = [feature_set(**given, num_groups=NUM_GROUPS).digest for given in (one, other)]
    assert (keys[0] == keys[1]) == (what_counts(one) == what_counts(other))


def test_a_search_has_a_cell_for_each_depth_and_view() -> None:
    assert cells_of([2, 0, 2], 2) == [Cell(0, 0), Cell(0, 1), Cell(2, 0), Cell(2, 1)]
