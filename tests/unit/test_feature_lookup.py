"""What must be computed, and where each row lies: an image once, whatever the cuts, views and datasets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.feature_batches import Batch
from ray_jobs.feature_lookup import Wanted, selection_of, work_of
from ray_jobs.feature_set import Cell

IMAGES = [f"{i:064x}" for i in range(8)]
CELLS = [Cell(0, 0), Cell(0, 1), Cell(1, 0), Cell(1, 1)]
batches = st.lists(st.lists(st.sampled_from(IMAGES), unique=True), max_size=3)


def wanted_of(images: list[str], train: int) -> Wanted:
    return Wanted(images, list(range(len(images))), train, 2)


def made(rows: list[list[str]]) -> list[Batch]:
    return [Batch(f"s3://b/{number}", "digest", [bytes.fromhex(image) for image in images]) for number, images in enumerate(rows)]


@given(st.permutations(IMAGES), st.integers(1, 7), st.fixed_dictionaries(dict.fromkeys(CELLS, batches)))
def test_exactly_what_is_missing_is_computed_and_each_image_in_one_task(
    images: list[str], train: int, there: dict[Cell, list[list[str]]]
) -> None:
    wanted = wanted_of(images, train)
    work = work_of(wanted, {cell: made(rows) for cell, rows in there.items()})
    computed = [row for rows in work.values() for row in rows]
    assert len(computed) == len(set(computed))
    for cell in CELLS:
        has = {image for rows in there[cell] for image in rows}
        needs = {row for row in wanted.rows(cell.view) if images[row] not in has}
        assert needs == {row for cells, rows in work.items() if cell in cells for row in rows}


@given(st.permutations(IMAGES), st.integers(1, 7), batches, batches)
def test_a_selection_leads_each_row_of_each_view_to_its_image(
    images: list[str], train: int, one: list[list[str]], two: list[list[str]]
) -> None:
    wanted = wanted_of(images, train)
    by_view = [made([*one, IMAGES]), made([*two, IMAGES])]
    selection = selection_of(wanted, by_view)
    uris = [(batch, view) for view, found in enumerate(by_view) for batch in found]
    found = []
    for position, (number, row) in enumerate(zip(selection.batch_of, selection.row_of, strict=True)):
        view = int(position >= len(images))
        batch = next(batch for batch, of in uris if of == view and batch.uri == selection.batches[number][0])
        found.append(batch.images[row].hex())
    assert found == [*images, *images[:train]]
    assert selection.labels.tolist() == wanted.labels
