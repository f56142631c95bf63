"""Sources: what a folder, zip, s3:// prefix or manifest lists, what it rejects, and each mistake by its message."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from ray_jobs.preprocessing import BadImageError
from ray_jobs.sources import Listing, fingerprint, open_source
from ray_jobs.spec import DataSpec
from tests.fakes import MemoryObjectStore
from tests.strategies import below, data_spec, png, two_classes, write_folder, write_zip

FILES = {"cat/1.png": png(1), "cat/sub/2.png": png(2), "dog/3.png": png(3)}


def listed(source: Path | str, store: MemoryObjectStore | None = None, **changes: Any) -> Listing:
    with open_source(data_spec(source, **changes), lambda: store or MemoryObjectStore()) as listing:
        for item in listing.items:
            listing.read(item)
        return listing


def labels_by_name(listing: Listing) -> dict[str, str]:
    return {item.name: item.label for item in listing.items}


def rejections(listing: Listing) -> dict[str, str]:
    return {rejected.name: rejected.reason for rejected in listing.rejected}


def mistake(source: Path | str, store: MemoryObjectStore | None = None) -> str:
    with pytest.raises(UserError) as caught:
        listed(source, store)
    assert caught.value.way_out
    return caught.value.what


def test_folder_zip_prefix_and_manifest_list_the_same_images(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    store.objects = below("s3://data/pets", FILES)
    folder, archive = write_folder(tmp_path / "pets", FILES), write_zip(tmp_path / "pets.zip", FILES)
    (folder / "list.csv").write_text("image,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in FILES))
    expected = {"cat/1.png": "cat", "cat/sub/2.png": "cat", "dog/3.png": "dog"}
    for source in (folder / "list.csv", archive, "s3://data/pets", "s3://data/pets/", folder):
        if source == folder:
            (folder / "list.csv").unlink()
        with open_source(data_spec(source), lambda: store) as listing:
            assert labels_by_name(listing) == expected
            assert {item.name: listing.read(item) for item in listing.items} == FILES
            assert not listing.rejected


@pytest.mark.parametrize("wrapper", ["pets/", "pets/v1/"])
def test_a_single_folder_around_the_class_folders_is_looked_through(tmp_path: Path, wrapper: str) -> None:
    files = {wrapper + name: data for name, data in FILES.items()} | {"__MACOSX/pets/._1.png": b"junk", "README.md": b"hello"}
    for source in (write_zip(tmp_path / "pets.zip", files), write_folder(tmp_path / "folder", files)):
        listing = listed(source)
        assert labels_by_name(listing) == {wrapper + name: name.split("/")[0] for name in FILES}
        assert rejections(listing) == {"README.md": "no_label"}


def test_folders_named_after_splits_are_splits_and_the_classes_are_inside(tmp_path: Path) -> None:
    files = {f"{split}/{name}": data for split in ("train", "validation", "Test") for name, data in FILES.items()}
    listing = listed(write_folder(tmp_path, files))
    assert {item.label for item in listing.items} == {"cat", "dog"}
    assert {item.name.split("/")[0]: item.split for item in listing.items} == {"train": "train", "validation": "val", "Test": "holdout"}


def test_classes_that_are_called_like_splits_stay_classes(tmp_path: Path) -> None:
    listing = listed(write_folder(tmp_path, {"train/1.png": png(1), "test/2.png": png(2), "boat/3.png": png(3)}))
    assert {item.label for item in listing.items} == {"train", "test", "boat"}
    assert {item.split for item in listing.items} == {None}


def test_what_operating_systems_leave_behind_is_ignored(tmp_path: Path) -> None:
    junk = [".DS_Store", "cat/.hidden.png", "cat/Thumbs.db", "dog/desktop.ini", ".git/objects/1", "__MACOSX/cat/a"]
    listing = listed(write_folder(tmp_path, FILES | dict.fromkeys(junk, b"x")))
    assert set(labels_by_name(listing)) == set(FILES)
    assert not listing.rejected


def test_a_path_that_climbs_out_of_a_zip_is_quarantined(tmp_path: Path) -> None:
    unsafe = ["../evil.png", "cat/../../evil.png", "/etc/evil.png", "C:/evil.png", "..\\evil.png"]
    listing = listed(write_zip(tmp_path / "pets.zip", FILES | dict.fromkeys(unsafe, b"x")))
    assert set(labels_by_name(listing)) == set(FILES)
    assert rejections(listing) == {name.replace("\\", "/"): "unsafe_path" for name in unsafe} | {"../evil.png": "unsafe_path"}


def test_a_link_in_a_zip_is_no_way_to_another_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    path = tmp_path / "pets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("cat/link.png")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(secret))
    with open_source(data_spec(path)) as listing:
        (found,) = [item for item in listing.items if item.name == "cat/link.png"]
        assert listing.read(found) == str(secret).encode()  # its own bytes, which are no image


def test_zip_names_in_utf8_without_saying_so_and_in_cp437_are_both_readable(tmp_path: Path) -> None:
    path = tmp_path / "pets.zip"
    path.write_bytes(_with_names(["été/1.png".encode(), "été/2.png".encode(), b"caf\x82/3.png"]))
    assert {item.label for item in listed(path).items} == {"été", "café"}


def test_a_zip_that_lies_about_its_utf8_is_refused_with_a_way_out(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", {"été/1.png": png(1), "cat/2.png": png(2)})
    path.write_bytes(path.read_bytes().replace("été".encode(), b"\xff\xfe\xff\xfe\xff"))
    assert "calls UTF-8 but is not" in mistake(path)


def _with_names(names: list[bytes]) -> bytes:
    """A zip with these raw names, written as by a tool that sets no UTF-8 flag."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(zipfile.ZipInfo(chr(ord("a") + number) * len(name)), png(number))
    data = sink.getvalue()
    for number, name in enumerate(names):
        data = data.replace(bytes([ord("a") + number]) * len(name), name)
    return data


def test_a_damaged_zip_member_is_one_bad_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(png(1)) + 20] ^= 0xFF
    path.write_bytes(data)
    with open_source(data_spec(path)) as listing:
        with pytest.raises(BadImageError, match="CRC"):
            listing.read(listing.items[0])
        assert listing.read(listing.items[1]) == png(2)


def test_a_zip_bomb_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/bomb.png", bytes(12 << 20))
        archive.writestr("dog/1.png", png(1))
    with open_source(data_spec(path, max_megapixels=1)) as listing, pytest.raises(BadImageError) as caught:
        listing.read(listing.items[0])
    assert caught.value.reason == "oversized"


def test_links_to_files_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", FILES)
    (tmp_path / "elsewhere.png").write_bytes(png(9))
    (root / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "self.png").symlink_to("self.png")
    (root / "dog" / "broken.png").symlink_to("nowhere.png")
    os.mkfifo(root / "dog" / "pipe.png")
    listing = listed(root)
    assert set(labels_by_name(listing)) == {*FILES, "dog/linked.png"}
    assert rejections(listing) == {
        "dog/up": "symlink_loop", "dog/self.png": "symlink_loop", "dog/broken.png": "missing", "dog/pipe.png": "unsupported",
    }  # fmt: skip


def test_a_folder_that_is_itself_a_link_is_a_source(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", FILES)
    (tmp_path / "link").symlink_to("pets")
    assert set(labels_by_name(listed(tmp_path / "link"))) == set(FILES)


def test_names_that_are_not_utf8_are_shown_with_their_bytes(tmp_path: Path) -> None:
    root = write_folder(tmp_path, FILES)
    os.makedirs(os.fsencode(root) + b"/caf\xe9")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9/\xff.png")).write_bytes(png(7))
    listing = listed(root)
    assert labels_by_name(listing)["caf\\xe9/\\xff.png"] == "caf\\xe9"
    assert all(item.name.encode() and item.label.encode() for item in listing.items)
    assert fingerprint(data_spec(root))


def test_a_label_is_the_same_however_its_accents_are_composed(tmp_path: Path) -> None:
    spellings = unicodedata.normalize("NFC", "été"), unicodedata.normalize("NFD", "été")
    files = {f"{spelling}/{number}.png": png(number) for number, spelling in enumerate(spellings)}
    assert {item.label for item in listed(write_zip(tmp_path / "pets.zip", FILES | files)).items} == {"cat", "dog", "été"}


def test_a_manifest_names_labels_groups_and_splits_in_any_text(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", FILES)
    rows = ["validation,cat/1.png,🐈/cat,a", f"test,{root}/cat/sub/2.png,01,", ",dog/3.png,01,b", ",,01,", ",dog/3.png,,"]
    (root / "m.csv").write_text("\n".join(["\ufeffSplit,Image ,label,group", *rows]), encoding="utf-8")
    listing = listed(root / "m.csv")
    found = [(item.label, item.group, item.split) for item in listing.items]
    assert found == [("01", None, "holdout"), ("🐈/cat", "a", "val"), ("01", "b", None)]
    assert rejections(listing) == {"row 4": "missing", "dog/3.png": "no_label"}


def test_a_parquet_manifest_on_s3_names_images_relative_to_itself_and_elsewhere() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": ["cat/1.png", "../other/2.png", "s3://else/3.png"], "label": [0, 1, 1]}), sink)
    store = MemoryObjectStore()
    store.objects = {
        "s3://data/pets/m.parquet": sink.getvalue().to_pybytes(), "s3://data/pets/cat/1.png": png(1),
        "s3://data/other/2.png": png(2), "s3://else/3.png": png(3),
    }  # fmt: skip
    with open_source(data_spec("s3://data/pets/m.parquet"), lambda: store) as listing:
        assert {item.name: (item.label, listing.read(item)) for item in listing.items} == {
            "cat/1.png": ("0", png(1)), "../other/2.png": ("1", png(2)), "s3://else/3.png": ("1", png(3)),
        }  # fmt: skip
        assert all(item.size_bytes for item in listing.items)


def test_a_missing_image_of_a_manifest_is_one_bad_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", FILES)
    (root / "m.csv").write_text("image,label\ncat/1.png,cat\nnowhere.png,dog\n")
    with open_source(data_spec(root / "m.csv")) as listing, pytest.raises(BadImageError) as caught:
        listing.read(listing.items[1])
    assert caught.value.reason == "missing"


@pytest.mark.parametrize("image", ["nowhere.png", "a\0b.png", "cat", "pipe", "x" * 5000, "\udcff.png", "../../../../../x.png"])
def test_whatever_a_manifest_names_is_an_image_or_a_reason(tmp_path: Path, image: str) -> None:
    root = write_folder(tmp_path, FILES)
    os.mkfifo(root / "pipe")
    rows = f'image,label\ncat/1.png,cat\n"{image}",dog\n'
    (root / "m.csv").write_bytes(rows.encode("utf-8", "surrogateescape"))
    with open_source(data_spec(root / "m.csv")) as listing:
        bad = next(item for item in listing.items if item.label == "dog")
        with pytest.raises(BadImageError) as caught:
            listing.read(bad)
    assert caught.value.reason in {"missing", "unreadable", "unsupported"}
    assert fingerprint(data_spec(root / "m.csv"))


def test_a_path_in_a_manifest_on_s3_does_not_climb_out_of_its_bucket() -> None:
    store = MemoryObjectStore()
    store.objects = {"s3://data/a/m.csv": b"image,label\n../../../../x.png,cat\ny.png,dog\n", "s3://data/x.png": png(1)}
    with open_source(data_spec("s3://data/a/m.csv"), lambda: store) as listing:
        assert [item.location for item in listing.items] == ["s3://data/x.png", "s3://data/a/y.png"]


def test_a_manifest_on_s3_names_no_file_of_this_machine(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    store = MemoryObjectStore()
    rows = f"image,label\n{secret},cat\ny.png,dog\nz.png,cat\nfile://{secret},dog\n"
    store.objects = {"s3://data/a/m.csv": rows.encode(), "s3://data/a/y.png": png(1)}
    with open_source(data_spec("s3://data/a/m.csv"), lambda: store) as listing:
        assert rejections(listing) == {str(secret): "unsafe_path"}
        for item in listing.items:
            assert item.location.startswith("s3://data/a/")
    known = fingerprint(data_spec("s3://data/a/m.csv"), lambda: store)
    secret.write_bytes(png(10))
    assert fingerprint(data_spec("s3://data/a/m.csv"), lambda: store) == known, "it was looked at"


def test_every_image_of_a_group_takes_the_split_that_one_of_them_names(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("image,label,group,split\na,cat,g,holdout\nb,dog,g,\nc,dog,h,\n")
    with open_source(data_spec(tmp_path / "m.csv")) as listing:
        assert [item.split for item in listing.items] == ["holdout", "holdout", None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,label,group,split\na,cat,g,train\nb,dog,g,holdout\n", "The group 'g' has images in two splits: train and holdout"),
        ("image,label,split\na,cat,train\nb,dog,dev\n", "unknown split 'dev' in row 2"),
        ("file;class\n1;2\n", "lacks 'image' and 'label'; its columns are: 'file;class'."),
        ("image,class\n1,2\n", "lacks 'label'; its columns are: 'image', 'class'."),
        ("", "its columns are: none"),
        ("image,label\n", "is empty: it has no rows"),
        ("image,label\na,cat\nb,cat\n", "has one class only: 'cat'"),
        ("image,label\na,\n", "No file of"),
    ],
)
def test_a_manifest_that_is_wrong_as_a_whole_says_what_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert expected in mistake(tmp_path / "m.csv")


def test_a_parquet_manifest_that_is_not_parquet_or_holds_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"not parquet at all")
    assert "cannot be read" in mistake(tmp_path / "m.parquet")
    pq.write_table(pa.table({"image": [b"\xff"], "label": ["cat"]}), tmp_path / "m.parquet")
    assert "column image holds binary, not paths" in mistake(tmp_path / "m.parquet")


def test_each_wrong_source_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    assert "There is no" in mistake(tmp_path / "nowhere")
    assert "There is no" in mistake(tmp_path / "nowhere.csv")
    assert "There is no" in mistake("s3://data/nowhere.csv")
    assert "is empty" in mistake("s3://data/nowhere")
    assert "read from this machine's disk only" in mistake("s3://data/pets.zip")
    assert "is empty" in mistake(write_folder(tmp_path / "empty", {".hidden/1": b"", "a/.DS_Store": b""}))
    assert "is empty" in mistake(write_zip(tmp_path / "empty.zip", {}))
    assert "lie in no class folders" in mistake(write_folder(tmp_path / "flat", {"1.png": png(), "2.png": png()}))
    assert "has one class only: 'cat'" in mistake(write_folder(tmp_path / "one", {"cat/1.png": png(), "cat/sub/2.png": png()}))
    (tmp_path / "text.txt").write_text("hello")
    assert "neither a folder nor a zip" in mistake(tmp_path / "text.txt")
    assert "neither a folder nor a zip" in mistake(_cut(write_zip(tmp_path / "cut.zip", FILES)))


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-30])
    return path


@pytest.mark.parametrize("source", ["nowhere", "nowhere.zip", "nowhere.csv", "s3://data/nowhere", "s3://data/nowhere.csv"])
def test_the_fingerprint_of_a_missing_source_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError):
        fingerprint(data_spec(source if "://" in source else tmp_path / source), MemoryObjectStore)


@pytest.mark.parametrize("kind", ["folder", "zip", "s3", "manifest", "s3 manifest"])
def test_the_fingerprint_changes_with_the_content_and_with_nothing_else(tmp_path: Path, kind: str) -> None:
    def of(place: str, files: dict[str, bytes]) -> str:
        store, folder, manifest = MemoryObjectStore(), tmp_path / place, tmp_path / place / "m.csv"
        rows = "image,label\n" + "".join(f"{name},x\n" for name in files)
        if kind in ("folder", "manifest"):
            write_folder(folder, files | ({"m.csv": rows.encode()} if kind == "manifest" else {}))
        store.objects = below(f"s3://{place}/pets", files | ({"m.csv": rows.encode()} if kind == "s3 manifest" else {}))
        sources: dict[str, Path | str] = {
            "folder": folder, "manifest": manifest, "s3": f"s3://{place}/pets", "s3 manifest": f"s3://{place}/pets/m.csv",
        }  # fmt: skip
        source = write_zip(tmp_path / f"{place}.zip", files) if kind == "zip" else sources[kind]
        return fingerprint(data_spec(source), lambda: store)

    files = two_classes(3)
    original = of("a", files)
    assert kind == "zip" or of("b", files) == original  # a zip also records when it was written
    assert of("c", files | {"cat/000.png": png(99)}) != original
    assert of("d", files | {"cat/more.png": png(99)}) != original


def test_the_fingerprint_counts_what_decides_the_preparation_only(tmp_path: Path) -> None:
    root = write_folder(tmp_path, FILES)
    original = fingerprint(data_spec(root))
    assert fingerprint(data_spec(root, image_size=64)) == original
    for change in ({"val_fraction": 0.3}, {"holdout_fraction": 0.3}, {"max_megapixels": 5.0}):
        assert fingerprint(data_spec(root, **change)) != original


def test_an_image_that_goes_missing_changes_the_manifests_fingerprint(tmp_path: Path) -> None:
    root = write_folder(tmp_path, FILES | {"m.csv": b"image,label\ncat/1.png,cat\ndog/3.png,dog\n"})
    original = fingerprint(data_spec(root / "m.csv"))
    (root / "dog/3.png").unlink()
    assert fingerprint(data_spec(root / "m.csv")) != original


def test_importing_sources_loads_nothing_heavy() -> None:
    code = "import sys, ray_jobs.sources; print([m for m in ('torch', 'ray', 'pandas', 'pyarrow', 'boto3') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_bundled_zip_needs_no_warning_to_be_listed() -> None:
    bundled = Path(__file__).parents[2] / "examples" / "emoji-noto.zip"
    with open_source(DataSpec(source=str(bundled))) as listing:
        assert (len(listing.items), len({item.label for item in listing.items}), listing.rejected) == (1906, 9, [])
