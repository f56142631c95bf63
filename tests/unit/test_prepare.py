"""Preparation: the laws of versions and splits, what is quarantined and why, and what lies on S3 afterwards."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from infra.committed_folder import MANIFEST, commit, verify
from infra.errors import UserError
from infra.progress import ignore
from ray_jobs import dataset_tables, prepare, sources
from ray_jobs.dataset import Dataset, open_dataset
from ray_jobs.fingerprints import FINGERPRINT_BYTES, fingerprint
from ray_jobs.prepare import Facts, Row, assemble, shards_of, split_of, version_of
from ray_jobs.promotion_spec import PromotionSpec
from ray_jobs.sources import Item, Listing, Rejected
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tests import strategies
from tests.fakes import MemoryObjectStore
from tests.strategies import SPLITS, data_spec, encoded, png, two_classes, write_folder, write_zip

Job = TypeVar("Job")
Result = TypeVar("Result")
MANIFEST_COLUMNS = ["sha256", "label", "split", "group", "name", "width", "height", "mode", "format", "size_bytes", "shard", "row"]


def spec_of(source: Path | str, **changes: Any) -> Spec:
    data = data_spec(source, **changes).model_dump()
    return parse_spec({"name": "pets", "data": data, "backbone": {"name": "resnet18"}, "storage": "s3://bucket/lab"})


def prepared(source: Path | str, store: MemoryObjectStore, cache: Path, **changes: Any) -> Dataset:
    result = prepare.prepare(spec_of(source, **changes), ignore, make_store=lambda: store)
    return open_dataset(result["uri"], store, cache)


def quarantine(dataset: Dataset) -> dict[str, str]:
    return dict(zip(dataset.quarantine.column("name").to_pylist(), dataset.quarantine.column("reason").to_pylist(), strict=True))


def facts(sha256: str) -> Facts:
    return Facts(sha256, 4, 4, "RGB", "PNG", 100, bytes(FINGERPRINT_BYTES))


def assembled(pairs: list[tuple[Item, str]], data: Any) -> prepare.Assembled:
    listing = Listing([item for item, _ in pairs], [], lambda item: b"")
    return assemble(listing, [facts(sha256) for _, sha256 in pairs], data)


def rows_of(pairs: list[tuple[Item, str]], data: Any) -> list[Row]:
    return [Row(item, facts(sha256), split_of(item, sha256, data)) for item, sha256 in pairs]


images = st.lists(st.tuples(strategies.items(), strategies.digests), min_size=1, max_size=20, unique_by=lambda pair: pair[1])


@given(images, st.randoms(use_true_random=False))
def test_the_version_does_not_depend_on_the_listing_order(pairs: list[tuple[Item, str]], random: Any) -> None:
    shuffled = random.sample(pairs, len(pairs))
    assert version_of(rows_of(pairs, data_spec("x"))) == version_of(rows_of(shuffled, data_spec("x")))


@given(images, st.data())
def test_the_version_changes_with_any_label_group_split_or_image(pairs: list[tuple[Item, str]], drawn: st.DataObject) -> None:
    rows = rows_of(pairs, data_spec("x"))
    number = drawn.draw(st.integers(0, len(rows) - 1))
    row = rows[number]
    for changed in (
        replace(row, item=replace(row.item, label=row.item.label + "x")),
        replace(row, item=replace(row.item, group=(row.item.group or "") + "x")),
        replace(row, split=SPLITS[SPLITS.index(row.split) - 1]),
        replace(row, facts=facts(row.facts.sha256[::-1] + "0")),
    ):
        assert version_of([*rows[:number], changed, *rows[number + 1 :]]) != version_of(rows)
    assert version_of(rows[:-1]) != version_of(rows)


@given(images, strategies.fractions)
def test_an_image_never_changes_sides_when_the_data_grows(pairs: list[tuple[Item, str]], fractions: tuple[float, float]) -> None:
    data = data_spec("x", val_fraction=fractions[0], holdout_fraction=fractions[1])
    anchors = [(Item(f"{label}{split}{n}", label, "", 0, split=split), hashlib.sha256(f"{label}{split}{n}".encode()).hexdigest())
               for label in ("cat", "dog", "🦜/a") for split in SPLITS for n in range(3)]  # fmt: skip
    small = {row.facts.sha256: row.split for row in assembled([*anchors, *pairs[: len(pairs) // 2]], data).rows}
    grown = {row.facts.sha256: row.split for row in assembled([*pairs, *anchors], data).rows}
    assert small.items() <= grown.items()


@given(images, strategies.fractions)
def test_a_group_never_straddles_two_splits(pairs: list[tuple[Item, str]], fractions: tuple[float, float]) -> None:
    data = data_spec("x", val_fraction=fractions[0], holdout_fraction=fractions[1])
    sides: dict[str, set[str]] = {}
    for row in rows_of(pairs, data):
        if row.item.group is not None:
            sides.setdefault(row.item.group, set()).add(row.split)
    assert all(len(splits) == 1 for splits in sides.values())


@given(strategies.digests, strategies.fractions)
def test_the_side_of_an_image_is_what_its_first_four_bytes_say(sha256: str, fractions: tuple[float, float]) -> None:
    val, holdout = fractions
    x = int.from_bytes(bytes.fromhex(sha256)[:4], "big") / 2**32
    expected = "val" if x < val else "holdout" if x < val + holdout else "train"
    data = data_spec("x", val_fraction=val, holdout_fraction=holdout)
    assert split_of(Item("a", "cat", "", 0), sha256, data) == expected
    in_group = hashlib.sha256("ü".encode()).hexdigest()
    assert split_of(Item("a", "cat", "", 0, group="ü"), sha256, data) == split_of(Item("b", "cat", "", 0), in_group, data)


def test_the_sides_have_about_the_sizes_that_were_asked_for() -> None:
    digests = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(4000)]
    sides = [split_of(Item("a", "cat", "", 0), digest, data_spec("x")) for digest in digests]
    assert {split: round(sides.count(split) / 4000, 1) for split in SPLITS} == {"train": 0.6, "val": 0.2, "holdout": 0.2}


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_shards_keep_the_order_and_their_bound(sizes: list[int], shard_bytes: int) -> None:
    rows = [Row(Item(str(n), "cat", "", 0), replace(facts("0" * 64), size_bytes=size), "train") for n, size in enumerate(sizes)]
    shards = shards_of(rows, shard_bytes)
    assert [row for shard in shards for row in shard] == rows
    assert all(shard for shard in shards)
    assert all(len(shard) == 1 or sum(row.facts.size_bytes for row in shard) <= shard_bytes for shard in shards)


@given(st.lists(st.none() | st.text(st.characters(codec="utf-8"))))
def test_text_columns_hold_what_was_put_in(values: list[str | None]) -> None:
    assert dataset_tables._texts(values).to_pylist() == values


def test_duplicates_count_once_and_conflicting_labels_go_out() -> None:
    digests = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(60)]
    good = [(Item(f"{label}/{n}", label, "", 0), digests[n]) for n, label in enumerate(["cat", "dog"] * 20)]
    copies = [(Item("cat/zzz", "cat", "", 0), digests[0]), (Item("cat/!", "cat", "", 0), digests[0])]
    conflicting = [(Item("dog/same", "dog", "", 0), digests[2])]
    result = assembled([*good, *copies, *conflicting], data_spec("x"))
    assert result.duplicates == 2
    assert [row.item.name for row in result.rows if row.facts.sha256 == digests[0]] == ["cat/!"]
    assert [(q.name, q.reason) for q in result.quarantined] == [("cat/2", "conflicting_labels"), ("dog/same", "conflicting_labels")]
    assert len(result.rows) == 39


def test_what_lies_on_s3_is_the_contract(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    files = two_classes() | {"cat/wide.jpg": encoded(Image.new("L", (30, 20), 9), "JPEG")}
    result = prepare.prepare(spec_of(write_folder(tmp_path / "pets", files)), ignore, make_store=lambda: store)
    uri = f"s3://bucket/lab/datasets/pets/{result['version']}"
    assert result["uri"] == uri
    assert verify(store, uri) == []
    keys = {"shards/00000.parquet", "manifest.parquet", "fingerprints.parquet", "quarantine.parquet", "stats.json", MANIFEST}
    assert {key[len(uri) + 1 :] for key in store.objects} == keys
    shard = pq.ParquetFile(io.BytesIO(store.objects[f"{uri}/shards/00000.parquet"])).read()
    manifest = pq.ParquetFile(io.BytesIO(store.objects[f"{uri}/manifest.parquet"])).read()
    assert shard.column_names == ["sha256", "label", "split", "group", "name", "image"]
    assert manifest.column_names == MANIFEST_COLUMNS
    assert (shard.schema.field("image").type, manifest.schema.field("shard").type) == (pa.binary(), pa.int32())
    for row, in_manifest in zip(shard.to_pylist(), manifest.to_pylist(), strict=True):
        assert row["image"] == files[row["name"]]
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
        assert {key: row[key] for key in MANIFEST_COLUMNS[:5]} == {key: in_manifest[key] for key in MANIFEST_COLUMNS[:5]}
    order = [(SPLITS.index(row["split"]), row["sha256"]) for row in manifest.to_pylist()]
    assert order == sorted(order)
    stats = json.loads(store.objects[f"{uri}/stats.json"])
    assert stats["modes"] == {"L": 1, "RGB": 40}
    assert stats["width"] == {"min": 4, "median": 4, "max": 30}
    assert {label: sum(counts.values()) for label, counts in stats["counts"].items()} == {"cat": 21, "dog": 20}
    assert stats["imbalance_ratio"] == 1.05
    assert result.items() >= {key: stats[key] for key in ("version", "images", "classes", *SPLITS, "quarantined", "duplicates")}.items()
    assert result["bytes"] == sum(len(data) for key, data in store.objects.items() if not key.endswith(MANIFEST))


def test_each_kind_of_bad_file_is_quarantined_by_its_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    noise = encoded(Image.effect_noise((64, 64), 90), "PNG")
    bad = {
        "cat/empty.png": (b"", "empty"),
        "cat/text.png": (b"not an image", "unsupported"),
        "cat/drawing.svg": (b"<svg/>", "unsupported"),
        "cat/cut.png": (noise[: len(noise) // 2], "truncated"),
        "cat/broken.png": (png()[:12] + b"XXXX" + png()[16:], "unreadable"),
        "dog/huge.png": (png(5, size=(1001, 1000)), "oversized"),
        "dog/same.png": (png(0), "conflicting_labels"),
        "cat/000.png": (png(0), "conflicting_labels"),
    }
    store = MemoryObjectStore()
    source = write_zip(tmp_path / "pets.zip", two_classes() | {name: data for name, (data, _) in bad.items()} | {"../out.png": png(77)})
    dataset = prepared(source, store, tmp_path / "cache", max_megapixels=1)
    assert quarantine(dataset) == {name: reason for name, (_, reason) in bad.items()} | {"../out.png": "unsafe_path"}
    assert dataset.stats["quarantined"] == 9
    assert dataset.stats["quarantine_reasons"]["unsupported"] == 2
    assert dataset.stats["images"] == 39


def test_sizes_in_the_manifest_are_those_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = two_classes() | {"cat/turned.jpg": encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)}
    dataset = prepared(write_folder(tmp_path / "pets", files), MemoryObjectStore(), tmp_path / "cache")
    turned = next(row for row in dataset.manifest.to_pylist() if row["name"] == "cat/turned.jpg")
    assert (turned["width"], turned["height"], turned["format"]) == (20, 30, "JPEG")


def test_folder_zip_and_s3_give_one_version_and_a_second_preparation_sends_nothing(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    store.objects = strategies.below("s3://data/pets", two_classes())
    archive = write_zip(tmp_path / "pets.zip", dict(reversed(two_classes().items())))
    sources: list[Path | str] = [write_folder(tmp_path / "pets", two_classes()), archive, "s3://data/pets"]
    first = prepare.prepare(spec_of(sources[0]), ignore, make_store=lambda: store)
    writes = store.writes
    for source in sources:
        for image_size in (64, 128):
            assert prepare.prepare(spec_of(source, image_size=image_size), ignore, make_store=lambda: store) == first
    assert store.writes == writes


def test_shards_written_by_tasks_from_s3_are_those_the_driver_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_of, "__defaults__", (1000,))
    local, remote = MemoryObjectStore(), MemoryObjectStore()
    remote.objects = strategies.below("s3://data/pets", two_classes())
    dataset = prepared(write_folder(tmp_path / "pets", two_classes()), local, tmp_path / "cache")
    prepared("s3://data/pets", remote, tmp_path / "cache")
    assert len(dataset.shards()) > 2
    assert {key: data for key, data in remote.objects.items() if key.startswith("s3://bucket")} == local.objects


def test_a_crash_at_any_write_leaves_no_committed_dataset_and_the_next_run_completes_it(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pets", two_classes())
    undisturbed = MemoryObjectStore()
    uri = prepared(source, undisturbed, tmp_path / "cache").uri
    for survived in range(undisturbed.writes):
        store = MemoryObjectStore()
        store.before_write = _dying_after(survived)
        with pytest.raises(KeyboardInterrupt):
            prepared(source, store, tmp_path / "cache")
        assert f"{uri}/{MANIFEST}" not in store.objects
        store.before_write = lambda uri: None
        prepared(source, store, tmp_path / "cache")
        assert store.objects == undisturbed.objects


def _dying_after(writes: int) -> Callable[[str], None]:
    left = [writes]

    def before_write(uri: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1

    return before_write


def test_a_source_that_changes_under_the_preparation_is_refused_and_nothing_is_committed(tmp_path: Path) -> None:
    source, store = write_folder(tmp_path / "pets", two_classes()), MemoryObjectStore()

    def run(function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
        yield from list(map(function, jobs))
        (source / "cat" / "003.png").write_bytes(png(12345))

    with pytest.raises(UserError, match=r"changed while it was being prepared: cat/003.png"):
        prepare.prepare(spec_of(source), ignore, run=run, make_store=lambda: store)
    assert not any(key.endswith(MANIFEST) for key in store.objects)


def test_results_may_come_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_ITEMS", 3)

    def backwards(function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]:
        return reversed([function(job) for job in jobs])

    spec, stores = spec_of(write_folder(tmp_path / "pets", two_classes())), [MemoryObjectStore(), MemoryObjectStore()]
    prepare.prepare(spec, ignore, make_store=lambda: stores[0])
    prepare.prepare(spec, ignore, run=backwards, make_store=lambda: stores[1])
    assert stores[0].objects == stores[1].objects


def test_progress_rises_to_its_total(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    spec = spec_of(write_folder(tmp_path / "pets", two_classes()))
    prepare.prepare(spec, lambda done, total: seen.append((done, total)), make_store=MemoryObjectStore)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {seen[-1][0]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"bird/1.png": png(901), "bird/2.png": png(902)}, "  'bird': 2 files, 2 usable images, "),
        ({"bird/1.png": b"", "bird/2.png": b"x", "bird/3.png": png(903), "bird/4.png": png(903)}, "  'bird': 4 files, 1 usable images, "),
    ],
)
def test_a_class_too_small_is_named_with_its_counts(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    store = MemoryObjectStore()
    with pytest.raises(UserError, match=r"1 of 3 classes is too small") as caught:
        prepared(write_folder(tmp_path / "pets", two_classes() | files), store, tmp_path / "cache")
    assert expected in caught.value.what
    assert not store.objects


def test_a_class_with_nothing_left_to_train_on_is_named(tmp_path: Path) -> None:
    rows = [f"{name},{name[:3]},{'val' if name < 'cat/01' else 'holdout' if name < 'd' else 'train'}" for name in two_classes()]
    write_folder(tmp_path, two_classes() | {"m.csv": "\n".join(["image,label,split", *rows]).encode()})
    with pytest.raises(UserError, match=r"'cat': 20 files, 20 usable images, 0 in train"):
        prepared(tmp_path / "m.csv", MemoryObjectStore(), tmp_path / "cache")


def test_a_split_without_any_image_is_named(tmp_path: Path) -> None:
    rows = [f"{name},{name[:3]},{'val' if name.endswith('0.png') else 'train'}" for name in two_classes()]
    write_folder(tmp_path, two_classes() | {"m.csv": "\n".join(["image,label,split", *rows]).encode()})
    with pytest.raises(UserError, match=r"None of the 40 images is in holdout"):
        prepared(tmp_path / "m.csv", MemoryObjectStore(), tmp_path / "cache")


def test_a_source_without_any_usable_image_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"None of the 2 files is a usable image. The first: cat/1.png: unsupported"):
        prepared(write_folder(tmp_path / "pets", {"cat/1.png": b"x", "dog/1.png": b"y"}), MemoryObjectStore(), tmp_path / "cache")


def test_labels_and_names_in_any_text_come_back_as_they_were(tmp_path: Path) -> None:
    files = {
        f"{label}/{number:03}.png": png(number * 2 + index) for index, label in enumerate(("🦜 papagáj", "犬")) for number in range(20)
    }
    dataset = prepared(write_folder(tmp_path / "pets", files), MemoryObjectStore(), tmp_path / "cache")
    assert dataset.classes == sorted(("🦜 papagáj", "犬"))
    assert {row.name: data for row, data in dataset.images(SPLITS)} == files


def test_a_dataset_reads_the_shards_it_needs_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_of, "__defaults__", (500,))
    store, files = MemoryObjectStore(), two_classes()
    dataset = prepared(write_folder(tmp_path / "pets", files), store, tmp_path / "cache")
    first, *others = dataset.shards()
    for shard in others:
        del store.objects[f"{dataset.uri}/{shard.key}"]
    assert list(dataset.image_bytes(0, first.stop)) == [files[row.name] for row in dataset.all_rows[: first.stop]]
    with pytest.raises(FileNotFoundError):
        list(dataset.image_bytes(first.stop, first.stop + 1))
    store.objects.clear()
    assert len(list(dataset.image_bytes(1, 2))) == 1  # from the local copy


def test_an_altered_shard_is_not_read(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    dataset = prepared(write_folder(tmp_path / "pets", two_classes()), store, tmp_path / "cache")
    key = f"{dataset.uri}/{dataset.shards()[0].key}"
    store.objects[key] = store.objects[key][:-1] + b"?"
    with pytest.raises(ValueError, match="does not match"):
        next(dataset.images(["train"]))


@pytest.fixture(scope="module")
def in_many_shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of several shards with several row groups each."""
    root = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_of, "__defaults__", (1000,))
        patch.setattr(dataset_tables, "ROW_GROUP_BYTES", 300)
        return prepared(write_folder(root / "pets", two_classes()), MemoryObjectStore(), root / "cache")


@given(st.integers(0, 40), st.integers(0, 40))
def test_any_range_of_rows_has_its_own_images(in_many_shards: Dataset, some: int, other: int) -> None:
    start, stop = min(some, other), max(some, other)
    files = two_classes()
    assert list(in_many_shards.image_bytes(start, stop)) == [files[row.name] for row in in_many_shards.all_rows[start:stop]]


def test_a_missing_dataset_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared dataset"):
        open_dataset("s3://bucket/datasets/pets/x", MemoryObjectStore(), tmp_path)


def test_preparing_and_reading_load_neither_torch_nor_ray_nor_pandas(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pets", two_classes())
    code = "\n".join([
        "import sys; from pathlib import Path",
        "from ray_jobs import prepare; from ray_jobs.spec_file import parse_spec; from ray_jobs.dataset import open_dataset",
        "from tests.fakes import MemoryObjectStore",
        f"spec = parse_spec({spec_of(source).model_dump(mode='json', exclude_none=True)!r})",
        "store = MemoryObjectStore(); result = prepare.prepare(spec, print, make_store=lambda: store)",
        f"dataset = open_dataset(result['uri'], store, Path({str(tmp_path / 'cache')!r}))",
        "print(len(list(dataset.images(['train', 'val', 'holdout']))))",
        "print([m for m in ('torch', 'ray', 'pandas') if m in sys.modules])",
    ])  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[-3:-1] == [
        "40",
        "[]",
    ]


def test_a_rejection_is_listed_whatever_its_name_holds() -> None:
    rejected = [Rejected("caf\\xe9/🦜\n.png", "unsafe_path", "detail\t")]
    table = pq.ParquetFile(io.BytesIO(dataset_tables.quarantine_bytes(rejected))).read()
    assert table.to_pylist() == [{"name": "caf\\xe9/🦜\n.png", "reason": "unsafe_path", "detail": "detail\t"}]


def decoded_while(action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many images are decoded meanwhile."""
    seen = []
    with monkeypatch.context() as patch:
        decode = prepare.preprocessing.decode_file
        patch.setattr(prepare.preprocessing, "decode_file", lambda data, limit: (seen.append(1), decode(data, limit))[1])
        action()
    return len(seen)


def test_the_next_night_decodes_the_new_images_alone_and_prepares_the_same_as_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, files = MemoryObjectStore(), two_classes()
    root = write_folder(tmp_path / "pets", files | {"cat/broken.png": png()[:40]})
    assert decoded_while(lambda: prepared(root, store, tmp_path / "cache"), monkeypatch) == 41
    write_folder(root, {"cat/new.png": png(4000), "dog/again.png": png(0)})
    found: list[Dataset] = []
    assert decoded_while(lambda: found.append(prepared(root, store, tmp_path / "cache")), monkeypatch) == 2  # the new and the broken one
    fresh = prepared(root, MemoryObjectStore(), tmp_path / "other")
    assert found[0].version == fresh.version
    assert found[0].manifest.equals(fresh.manifest)
    assert found[0].stats == fresh.stats
    assert quarantine(found[0]) == quarantine(fresh)


def test_an_image_known_from_before_that_is_too_large_for_todays_limit_goes_to_quarantine(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    root = write_folder(tmp_path / "pets", two_classes() | {"cat/large.png": png(5, (2000, 2000))})
    assert prepared(root, store, tmp_path / "cache").quarantine.num_rows == 0
    assert quarantine(prepared(root, store, tmp_path / "cache", max_megapixels=1.0)) == {"cat/large.png": "oversized"}


@pytest.mark.parametrize("key", ["manifest.parquet", "stats.json", MANIFEST])
def test_a_damaged_dataset_of_before_is_not_believed(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryObjectStore()
    root = write_folder(tmp_path / "pets", two_classes())
    uri = prepared(root, store, tmp_path / "cache").uri
    store.objects[f"{uri}/{key}"] = store.objects[f"{uri}/{key}"][:-7] + b"altered"
    write_folder(root, {"cat/new.png": png(4000)})
    assert decoded_while(lambda: prepared(root, store, tmp_path / "cache"), monkeypatch) == 41


def test_each_image_has_the_fingerprint_of_what_it_shows_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    files = two_classes()
    dataset = prepared(write_folder(tmp_path / "pets", files), MemoryObjectStore(), tmp_path / "cache")
    looks = dataset.fingerprints()
    assert looks is not None
    for name, look in zip(dataset.manifest.column("name").to_pylist(), looks, strict=True):
        assert look.tobytes() == fingerprint(Image.open(io.BytesIO(files[name])).convert("RGB"))


def test_a_dataset_of_former_code_is_written_anew_under_the_same_version(tmp_path: Path) -> None:
    source, store = write_folder(tmp_path / "pets", two_classes()), MemoryObjectStore()
    dataset = prepared(source, store, tmp_path / "cache")
    now = dict(store.objects)
    stats = json.loads(store.objects[f"{dataset.uri}/stats.json"]) | {"preparation": 1}
    names = ("manifest.parquet", "quarantine.parquet", "shards/00000.parquet")
    former = {name: store.objects[f"{dataset.uri}/{name}"] for name in names} | {"stats.json": json.dumps(stats).encode()}
    commit(store, dataset.uri, former)
    assert open_dataset(dataset.uri, store, tmp_path / "cache").fingerprints() is None
    assert prepared(source, store, tmp_path / "cache").uri == dataset.uri
    assert store.objects == now


def sliced(root: Path, cells: str, slices: list[str]) -> Spec:
    """Pets with a column camera, the images 0 to 19 of each class; `cells` are written in turn."""
    write_folder(root, two_classes())
    lines = [f"{name},{name[:3]},{cells[number % len(cells)].strip()}" for number, name in enumerate(two_classes())]
    (root / "list.csv").write_text("\n".join(["image,label, Camera", *lines]))
    spec = spec_of(root / "list.csv").model_dump() | {"promotion": {"slices": slices}}
    return parse_spec(spec)


def test_named_slices_are_kept_with_each_image_and_an_empty_cell_is_a_value(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    result = prepare.prepare(sliced(tmp_path / "pets", "ab ", ["CAMERA "]), ignore, make_store=lambda: store)
    dataset = open_dataset(result["uri"], store, tmp_path / "cache")
    values = dict(zip(dataset.manifest.column("name").to_pylist(), dataset.manifest.column("slice:camera").to_pylist(), strict=True))
    assert [values[name] for name in list(two_classes())[:4]] == ["a", "b", "(empty)", "a"]
    assert dataset.stats["slices"] == ["camera"]


def test_slices_change_the_version_only_where_they_are_named(tmp_path: Path) -> None:
    def version(folder: str, cells: str, slices: list[str]) -> tuple[str, str]:
        spec = sliced(tmp_path / folder, cells, slices)
        made = prepare.prepare(spec, ignore, make_store=MemoryObjectStore)
        return made["version"], sources.fingerprint(spec.data, slices=spec.promotion.slices)

    unnamed, named = version("a", "ab", []), version("b", "ab", ["camera"])
    assert version("c", "ba", []) == unnamed
    assert (
        prepare.prepare(spec_of(write_folder(tmp_path / "d", two_classes())), ignore, make_store=MemoryObjectStore)["version"] == unnamed[0]
    )
    assert len({unnamed, named, version("e", "ba", ["camera"])}) == 3


def test_a_slice_that_the_manifest_lacks_or_that_has_no_manifest_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    spec = sliced(tmp_path / "pets", "ab", ["site"])
    for source in (spec.data.source, str(tmp_path / "pets")):
        data = spec.data.model_copy(update={"source": source})
        with pytest.raises(UserError, match="site") as caught:
            sources.fingerprint(data, slices=spec.promotion.slices)
        assert caught.value.way_out
        with pytest.raises(UserError, match="site"):
            prepare.prepare(spec.model_copy(update={"data": data}), ignore, make_store=MemoryObjectStore)


@pytest.mark.parametrize("slices", [["label"], ["image"], ["Split"], ["camera", "Camera "], [" "]])
def test_slices_that_mean_something_else_or_come_twice_are_refused(slices: list[str]) -> None:
    with pytest.raises(ValidationError):
        PromotionSpec(slices=tuple(slices))
