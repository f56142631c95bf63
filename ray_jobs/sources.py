"""Where images come from: a folder, a zip, an s3:// prefix or a manifest, listed as items whose bytes can be read one by one.

Nothing is extracted to disk. What cannot be used is rejected by name and reason; only a source that is wrong as a whole raises.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from infra.errors import UserError
from infra.object_store import ObjectInfo, ObjectStore, join_uri, object_store
from ray_jobs.preprocessing import BadImageError
from ray_jobs.spec import DataSpec, digest_of

PREPARATION_VERSION = 2  # goes into the cache key: count it up when the same source would be prepared differently
MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "holdout", "holdout": "holdout"}
MAX_FILE_BYTES = 256 << 20
READ_THREADS = 8
_JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
_LAYOUT = "Put the images of each class into a folder named after it, or give a manifest .csv/.parquet with the columns image and label."

StoreFactory = Callable[[], ObjectStore]


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source; `location` is a path, an s3:// URI or a zip member's number; `slices` are the values of the named columns."""

    name: str
    label: str
    location: str
    size_bytes: int
    group: str | None = None
    split: str | None = None
    slices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """One file that cannot be used, and why."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Listing:
    """A source's items by name, what was rejected unread, and how this process reads an item (BadImageError where it cannot)."""

    items: list[Item]
    rejected: list[Rejected]
    read: Callable[[Item], bytes]


@dataclass(frozen=True, slots=True)
class Found:
    """One file of a source, by its path's parts."""

    parts: tuple[str, ...]
    location: str
    size_bytes: int


@dataclass
class _Walk:
    files: list[Found] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


@contextmanager
def open_source(data: DataSpec, make_store: StoreFactory = object_store, slices: Sequence[str] = ()) -> Iterator[Listing]:
    """List the source of `data`. Raises UserError where it is missing, empty, not laid out in classes, or without the columns `slices`."""
    source, limit = data.source, file_limit(data.max_megapixels)
    _require_columns(source, slices)
    if source.lower().endswith(MANIFEST_SUFFIXES):
        from ray_jobs.image_manifest import read_image_manifest

        items, rejected = read_image_manifest(source, make_store, slices)
        yield _listing(source, items, rejected, lambda item: read_location(item.location, limit, make_store))
    elif source.startswith("s3://"):
        items, rejected = by_class(source, [_found_object(source, info) for info in make_store().list(source)])
        yield _listing(source, items, rejected, lambda item: read_location(item.location, limit, make_store))
    elif _existing(source).is_dir():
        walk = walk_folder(Path(source))
        items, rejected = by_class(source, walk.files)
        yield _listing(source, items, walk.rejected + rejected, lambda item: read_location(item.location, limit, make_store))
    else:
        with _opened_zip(source) as archive:
            walk = _list_zip(archive)
            items, rejected = by_class(source, walk.files)
            yield _listing(source, items, walk.rejected + rejected, lambda item: _read_member(archive, item, limit))


def fingerprint(data: DataSpec, make_store: StoreFactory = object_store, slices: Sequence[str] = ()) -> str:
    """Digest of the source's content and of what else decides the prepared dataset. Raises UserError where it is missing or empty."""
    source = data.source
    _require_columns(source, slices)
    if source.lower().endswith(MANIFEST_SUFFIXES):
        from ray_jobs.image_manifest import fingerprint_of_manifest

        content = fingerprint_of_manifest(source, make_store, slices)
    elif source.startswith("s3://"):
        content = sorted([info.uri[len(source) :], info.size_bytes, info.etag] for info in make_store().list(source))
    elif _existing(source).is_dir():
        files = sorted(walk_folder(Path(source)).files, key=lambda found: found.parts)
        content = list(zip(["/".join(map(storable, f.parts)) for f in files], digests_of_files([f.location for f in files]), strict=True))
    else:
        _opened_zip(source).close()
        content = digests_of_files([source])
    if not content:
        raise _empty(source)
    named = [list(slices)] if slices else []
    return digest_of([PREPARATION_VERSION, content, data.val_fraction, data.holdout_fraction, data.max_megapixels, *named])


def file_limit(max_megapixels: float) -> int:
    """Bytes that a file of so many pixels can need: 16 bits of four channels each, and room for metadata."""
    return min(MAX_FILE_BYTES, int(max_megapixels * 8e6) + (1 << 20))


def read_location(location: str, limit: int, make_store: StoreFactory) -> bytes:
    """The bytes of a path or an s3:// URI. Raises BadImageError where there are none, or more than `limit`."""
    if location.startswith("s3://"):
        try:
            return make_store().read(location)
        except FileNotFoundError:
            raise BadImageError("missing", "there is no such object") from None
    try:
        if not stat.S_ISREG(os.stat(location).st_mode):  # opening a named pipe would wait for ever
            raise BadImageError("unsupported", "not a regular file")
        with open(location, "rb") as file:
            return _bounded(file.read(limit + 1), limit)
    except FileNotFoundError:
        raise BadImageError("missing", "there is no such file") from None
    except OSError as error:
        raise BadImageError("unreadable", error.strerror or type(error).__name__) from None
    except UnicodeError:
        raise BadImageError("missing", "a path that no file can have") from None


def storable(text: str) -> str:
    """Text for Parquet, JSON and terminals: bytes of a file name that are not UTF-8 are shown as \\xNN."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def as_label(text: str) -> str:
    """A class name, spelled alike whichever system wrote it (macOS decomposes accents)."""
    return unicodedata.normalize("NFC", storable(text)).strip()


def by_class(source: str, found: Iterable[Found]) -> tuple[list[Item], list[Rejected]]:
    """Files as items of the class that their first folder names; a single folder around the class folders is looked through."""
    files = [file for file in found if not any(_is_junk(part) for part in file.parts)]
    if not files:
        raise _empty(source)
    inside = [file for file in files if len(file.parts) > 1]
    if not inside:
        raise UserError(f"The {len(files)} files of {storable(source)} lie in no class folders.", _LAYOUT)
    depth = _depth_of_classes(inside)
    splits = _folders_are_splits({file.parts[depth] for file in inside if len(file.parts) > depth + 2})
    if splits and all(file.parts[depth].lower() in SPLITS for file in inside if len(file.parts) > depth + 1):
        depth += 1
    items = [_item(file, depth, is_split=splits) for file in files if len(file.parts) > depth + 1]
    stray = [file for file in files if len(file.parts) <= depth + 1]
    return items, [Rejected(storable("/".join(file.parts)), "no_label", "it lies in no class folder") for file in stray]


def walk_folder(root: Path) -> _Walk:
    """Every file below `root`, symbolic links followed unless they lead back up."""
    walk = _Walk()
    _walk_into(walk, str(root), (), ())
    return walk


def digests_of_files(paths: list[str]) -> list[str]:
    """Hex sha256 of each file, "missing" where there is none."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(_digest_of_file, paths))


def missing_source(source: str) -> UserError:
    """The error for a source that is not there."""
    way_out = "Mend data.source in the spec: a folder, a zip, an s3:// prefix or a manifest .csv/.parquet."
    return UserError(f"There is no {storable(source)!r}.", way_out)


def _require_columns(source: str, slices: Sequence[str]) -> None:
    if slices and not source.lower().endswith(MANIFEST_SUFFIXES):
        raise UserError(
            f"The slices {', '.join(slices)} are columns of a manifest, but {storable(source)!r} is none.",
            "Give data.source as a manifest .csv/.tsv/.parquet with these columns, or leave promotion.slices out.",
        )


def _unreadable(source: str, error: OSError) -> UserError:
    return UserError(f"{storable(source)!r} cannot be read: {error.strerror}.", "Give this user the right to read it.")


def _empty(source: str) -> UserError:
    if source.startswith("s3://") and source.lower().endswith(".zip"):
        return UserError(f"{source!r} is no prefix: a zip is read from this machine's disk only.", "Download it, or upload its files.")
    return UserError(f"The source {storable(source)!r} is empty: it holds no files.", _LAYOUT)


def _listing(source: str, items: list[Item], rejected: list[Rejected], read: Callable[[Item], bytes]) -> Listing:
    labels = sorted({item.label for item in items})
    if not items:
        first = f" The first: {rejected[0].name}: {rejected[0].detail}." if rejected else ""
        raise UserError(f"No file of {storable(source)!r} has a class.{first}", _LAYOUT)
    if len(labels) == 1:
        raise UserError(f"The source {storable(source)!r} has one class only: {labels[0]!r}.", "A classifier needs two or more. " + _LAYOUT)
    return Listing(sorted(items, key=lambda item: (item.name, item.location)), sorted(rejected, key=lambda r: r.name), read)


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise missing_source(source)
    return path


def _is_junk(part: str) -> bool:
    return part.startswith(".") or part.lower() in _JUNK


def _depth_of_classes(files: list[Found]) -> int:
    """How many folders stand around the class folders: each the only one of its level, holding folders rather than images."""
    depth = 0
    while True:
        level = [file for file in files if len(file.parts) > depth + 1]
        inner = {file.parts[depth + 1] for file in level if len(file.parts) > depth + 2}
        holds_images = any(len(file.parts) == depth + 2 for file in level)
        if len({file.parts[depth] for file in level}) != 1 or not inner or (len(inner) == 1 and holds_images):
            return depth
        depth += 1


def _folders_are_splits(names: set[str]) -> bool:
    """A tree like train/cat, val/cat: the folders name splits, and the classes are inside."""
    splits = {SPLITS.get(name.lower()) for name in names}
    return None not in splits and "train" in splits and len(splits) > 1


def _item(file: Found, depth: int, *, is_split: bool) -> Item:
    name = storable("/".join(file.parts))
    split = SPLITS[file.parts[depth - 1].lower()] if is_split else None
    return Item(name, as_label(file.parts[depth]), file.location, file.size_bytes, split=split)


def _walk_into(walk: _Walk, folder: str, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
    here = os.stat(folder)
    name = storable("/".join(parts))
    if (here.st_dev, here.st_ino) in above:
        walk.rejected.append(Rejected(name, "symlink_loop", "a symbolic link to a folder above it"))
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if not parts:
            raise _unreadable(folder, error) from None
        walk.rejected.append(Rejected(name, "unreadable", error.strerror or "the folder cannot be read"))
        return
    for entry in entries:
        if not _is_junk(entry.name):
            _walk_entry(walk, entry, (*parts, entry.name), (*above, (here.st_dev, here.st_ino)))


def _walk_entry(walk: _Walk, entry: os.DirEntry[str], parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
    try:
        status = entry.stat()
    except OSError as error:  # a link that leads nowhere, or to itself
        reason = "missing" if isinstance(error, FileNotFoundError) else "symlink_loop" if entry.is_symlink() else "unreadable"
        walk.rejected.append(Rejected(storable("/".join(parts)), reason, error.strerror or "it cannot be read"))
        return
    if stat.S_ISDIR(status.st_mode):
        _walk_into(walk, entry.path, parts, above)
    elif stat.S_ISREG(status.st_mode):
        walk.files.append(Found(parts, entry.path, status.st_size))
    else:
        walk.rejected.append(Rejected(storable("/".join(parts)), "unsupported", "not a regular file"))


def _found_object(prefix: str, info: ObjectInfo) -> Found:
    key = info.uri[len(join_uri(prefix)) + 1 :]
    return Found(tuple(part for part in key.split("/") if part), info.uri, info.size_bytes)


def _opened_zip(source: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except (zipfile.BadZipFile, EOFError):
        raise UserError(f"{storable(source)!r} is neither a folder nor a zip nor a manifest .csv/.parquet.", _LAYOUT) from None
    except UnicodeDecodeError:
        what = f"The zip {storable(source)!r} holds a file name that it calls UTF-8 but is not."
        raise UserError(what, "Unpack it, and give the folder.") from None
    except OSError as error:
        raise _unreadable(source, error) from None


def _list_zip(archive: zipfile.ZipFile) -> _Walk:
    walk = _Walk()
    for number, member in enumerate(archive.infolist()):
        name = _member_name(member)
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name):
            walk.rejected.append(Rejected(storable(name), "unsafe_path", "its path leads out of the zip"))
        elif parts and not member.is_dir():
            walk.files.append(Found(parts, str(number), member.file_size))
    return walk


def _member_name(member: zipfile.ZipInfo) -> str:
    name = member.filename.replace("\\", "/")
    if not member.flag_bits & 0x800 and not name.isascii():  # read as cp437, but most zip tools write UTF-8 without saying so
        try:
            return name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return name


def _read_member(archive: zipfile.ZipFile, item: Item, limit: int) -> bytes:
    if item.size_bytes > limit:  # as the zip says, which is also as far as it is unpacked
        raise BadImageError("oversized", f"more than {limit >> 20} MiB")
    try:
        with archive.open(archive.infolist()[int(item.location)]) as file:
            return _bounded(file.read(limit + 1), limit)
    except BadImageError:
        raise
    except Exception as error:  # zlib, lzma, bz2 and zipfile each raise their own; an encrypted member is a RuntimeError
        raise BadImageError("unreadable", f"in the zip: {error}") from None


def _bounded(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise BadImageError("oversized", f"more than {limit >> 20} MiB")
    return data


def _digest_of_file(path: str) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a file"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, UnicodeError):
        return "missing"


def with_group_splits(items: list[Item]) -> list[Item]:
    """Give every item of a group the split that any of them names. Raises UserError where they name two: that is a leak."""
    splits: dict[str, str] = {}
    for item in items:
        if item.group is not None and item.split and splits.setdefault(item.group, item.split) != item.split:
            raise UserError(
                f"The group {item.group!r} has images in two splits: {splits[item.group]} and {item.split} ({item.name}).",
                "Images of one group must be on one side, or the holdout is no longer unseen. Mend the manifest's split column.",
            )
    return [replace(item, split=splits[item.group]) if item.group in splits else item for item in items]
