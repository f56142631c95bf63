"""A spec read: from a YAML file with overrides, or from plain values, with every mistake named at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from infra.errors import UserError
from ray_jobs.spec import TAGS, BackboneSpec, Spec


def load_spec(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec from YAML, with `a.b=value` overrides; a relative source or weights path is taken from the file's folder.

    Raises UserError listing every mistake at once, each with its path.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no spec file {str(path)!r}.", "Give the path of a YAML file; examples/emoji.yaml is one to copy."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The spec {str(path)!r} cannot be read: {error}", "Give the path of a YAML text file.") from None
    except yaml.YAMLError as error:
        raise UserError(f"The spec {str(path)!r} is not valid YAML: {error}", "Mend the line it names.") from None
    if not isinstance(content, dict):
        raise UserError(f"The spec {str(path)!r} is not a mapping of keys to values.", "Start from examples/emoji.yaml.")
    for override in overrides:
        _set(content, override)
    return _with_absolute_paths(parse_spec(content, named=str(path)), path.resolve().parent)


def parse_spec(content: dict[str, Any], named: str = "spec") -> Spec:
    """A spec from plain values. Raises UserError listing every mistake at once, each with its path."""
    try:
        return Spec.model_validate(content)
    except ValidationError as error:
        lines = sorted({f"  {_describe(mistake)}" for mistake in error.errors()})
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError(f"{named} has {count}:\n" + "\n".join(lines), "`unfreeze schema` prints every key with its meaning.") from None


def _describe(mistake: Any) -> str:
    location = [part for part in mistake["loc"] if part not in TAGS]
    where = ".".join(str(part) for part in location) or "spec"
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{where}: unknown key" + (f"; did you mean {nearest[0]!r}?" if nearest else f"; known here: {', '.join(known)}")
    if mistake["type"] == "missing":
        return f"{where}: required, but not given"
    got = "" if isinstance(mistake["input"], dict | BaseModel) else f" (got {mistake['input']!r})"
    return f"{where}: {mistake['msg'].removeprefix('Value error, ')}{got}"


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Spec
    for part in (name for name in location if isinstance(name, str)):  # a number is a place in a list
        field = model.model_fields.get(part)
        inner = _models_in(field.annotation) if field else []
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _set(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form a.b=value.", "Write for example --set search.num_trials=32.")
    *parents, last = path.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {path}: {parent!r} holds a value, not keys.", "`unfreeze schema` prints every key.")
    try:
        content[last] = _plain(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML: {error}", "Quote it.") from None


def _plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; in a spec it is a number."""
    if isinstance(value, str):
        try:
            return float(value) if any(c in value for c in "eE") else value
        except ValueError:
            return value
    return value


def _with_absolute_paths(spec: Spec, folder: Path) -> Spec:
    data, search = spec.data, spec.search
    if not data.source.startswith("s3://"):
        data = data.model_copy(update={"source": str((folder / Path(data.source).expanduser()).absolute())})
    listed = tuple(one if isinstance(one, str) else _with_absolute_weights(one, folder) for one in search.backbone)
    return spec.model_copy(update={
        "data": data, "backbone": _with_absolute_weights(spec.backbone, folder), "search": search.model_copy(update={"backbone": listed}),
    })  # fmt: skip


def _with_absolute_weights(backbone: BackboneSpec, folder: Path) -> BackboneSpec:
    if backbone.weights in ("timm", "none") or backbone.weights.startswith(("s3://", "package:")):
        return backbone
    return backbone.model_copy(update={"weights": str((folder / Path(backbone.weights).expanduser()).absolute())})
