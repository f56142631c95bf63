"""Every mistake in a spec is named, all at once, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import UserError
from ray_jobs.spec import Spec
from ray_jobs.spec_file import load_spec, parse_spec

MINIMAL = {"name": "pets", "data": {"source": "pets.zip"}, "backbone": {"name": "resnet18"}}


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_in_the_contract_is_valid() -> None:
    spec = load_spec(Path("examples/emoji.yaml"))
    assert spec.search.unfreeze_depth == (0, 1, 2, 3)
    assert spec.search.resolved_searcher == "random"
    assert Path(spec.data.source).is_file()


def test_all_mistakes_are_listed_at_once_with_the_path_of_each() -> None:
    wrong = {"data": {"sorce": "x", "image_size": "big"}, "backbone": {"name": "r"}, "search": {"lr": {"low": 1, "high": 0.1}}, "nme": 1}
    with pytest.raises(UserError) as caught:
        parse_spec(wrong)
    text = str(caught.value)
    assert "did you mean 'source'" in text
    assert "did you mean 'name'" in text
    for path in ("data.source: required", "data.image_size:", "search.lr: low must be below high"):
        assert path in text
    assert "Range" not in text
    assert "tuple" not in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("search.unfreeze_depth=[]", "search.unfreeze_depth"),
        ("search.unfreeze_depth=[0,0]", "different"),
        ("search.unfreeze_depth=[-1]", "search.unfreeze_depth"),
        ("search.lr=[0]", "search.lr"),
        ("search.lr=.nan", "search.lr"),
        ("search.searcher=grid", "grid needs lists"),
        ("data.holdout_fraction=0.9", "0.9"),
        ("name=a/b", "name"),
        ("storage=/tmp/x", "storage"),
        ("search.scheduler=asah", "search.scheduler"),
        ("fit.num_workers=0", "fit.num_workers"),
        ("fit.min_workers=9", "min_workers: 9 is more than num_workers"),
        ("search.augmentation_strength=1.1", "search.augmentation_strength"),
        ("search.augmentation_strength=[]", "search.augmentation_strength"),
        ("search.augmentation_strength={low: 0.5, high: 2}", "between 0 and 1"),
        ("search.augmentation_strength=[0.5, 1]", "search.views to 2 or more"),
        ("search.augmentation_strength={low: 0.5, high: 1}", "or give one value"),
        ("search.backbone=[tf_efficientnet_lite0]", "tf_efficientnet_lite0 is there twice; backbone.name is always searched"),
        ("search.backbone=[resnet18, {name: resnet18, weights: none}]", "resnet18 is there twice"),
        ("search.backbone=[{name: resnet18, weihgts: none}]", "search.backbone.0.weihgts: unknown key; did you mean 'weights'"),
        ("search.backbone=[{weights: none}]", "search.backbone.0.name: required"),
        ("search.backbone=['']", "search.backbone.0"),
        ("data=5", "data"),
        ("data.image_size.x=5", "image_size"),
    ],
)
def test_a_wrong_value_is_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_spec(Path("examples/emoji.yaml"), [override])


def test_overrides_take_yaml_values_and_reach_nested_keys() -> None:
    spec = load_spec(Path("examples/emoji.yaml"), ["search.lr=[1e-3, 0.01]", "fit.num_workers=1", "search.searcher=null"])
    assert spec.search.lr == (1e-3, 1e-2)
    assert spec.search.resolved_searcher == "grid"
    assert spec.fit.num_workers == 1


@pytest.mark.parametrize("override", ["nothing", "=1", "name=[", "search.lr: 5"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(UserError, match="--set"):
        load_spec(Path("examples/emoji.yaml"), [override])


@pytest.mark.parametrize("text", ["a: [", "- 1", "just words", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"spec\.yaml"):
        load_spec(write(tmp_path, text))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no spec file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(tmp_path)


def test_relative_paths_are_taken_from_the_specs_folder(tmp_path: Path) -> None:
    own = "name: a\ndata: {source: images}\nbackbone: {name: resnet18, weights: w.safetensors}\n"
    spec = load_spec(write(tmp_path, own + "search: {backbone: [{name: b, weights: v.pth}]}\n"))
    assert spec.backbones[1].weights == str(tmp_path / "v.pth")
    assert spec.data.source == str(tmp_path / "images")
    assert spec.backbone.weights == str(tmp_path / "w.safetensors")


def test_the_digest_knows_what_matters_and_not_where_things_lie() -> None:
    spec = parse_spec(MINIMAL)
    elsewhere = spec.model_copy(update={"storage": "s3://other", "data": spec.data.model_copy(update={"source": "elsewhere"})})
    other = spec.model_copy(update={"fit": spec.fit.model_copy(update={"num_workers": 2})})
    assert spec.digest == elsewhere.digest
    assert spec.digest != other.digest


@pytest.mark.parametrize("strength", [0.5, [0.5, 1.0], {"low": 0.0, "high": 1.0, "scale": "linear"}])
def test_a_strength_of_no_augmentation_is_refused_with_the_way_out(strength: object) -> None:
    content = {**MINIMAL, "search": {"augmentation_strength": strength}, "fit": {"augmentation": "none"}}
    with pytest.raises(UserError, match=r"augmentation_strength: nothing is augmented with fit\.augmentation: none; choose a preset"):
        parse_spec(content)


def test_a_strength_needs_views_only_where_it_is_searched() -> None:
    assert parse_spec({**MINIMAL, "search": {"augmentation_strength": 0}}).search.augmentation_strength == 0.0
    spec = parse_spec({**MINIMAL, "search": {"augmentation_strength": {"low": 0.25, "high": 1}, "views": 4}})
    assert spec.search.resolved_searcher == "random"


@pytest.mark.parametrize(("own", "taken"), [("timm", "timm"), ("none", "none"), ("s3://bucket/own.pth", "timm")])
def test_a_further_backbone_given_by_name_takes_the_own_ones_kind_of_weights(own: str, taken: str) -> None:
    listed = ["resnet34", {"name": "vit", "weights": "none"}, {"name": "regnet"}]
    spec = parse_spec({**MINIMAL, "backbone": {"name": "resnet18", "weights": own}, "search": {"backbone": listed}})
    found = [(backbone.name, backbone.weights) for backbone in spec.backbones]
    assert found == [("resnet18", own), ("resnet34", taken), ("vit", "none"), ("regnet", "timm")]


def test_the_spec_of_one_of_many_backbones_is_the_spec_of_a_search_over_it_alone() -> None:
    spec = parse_spec({**MINIMAL, "search": {"backbone": ["resnet34"]}})
    alone = parse_spec({**MINIMAL, "backbone": {"name": "resnet34"}})
    assert spec.with_backbone(spec.backbones[1]) == alone
    assert spec.with_backbone(spec.backbone) == parse_spec(MINIMAL)
    assert len({spec.digest, alone.digest, parse_spec(MINIMAL).digest}) == 3


def test_a_dimension_that_came_late_names_nothing_at_its_default() -> None:
    spec = parse_spec(MINIMAL)
    said = parse_spec({**MINIMAL, "search": {"augmentation_strength": 1, "backbone": []}})
    other = parse_spec({**MINIMAL, "search": {"augmentation_strength": 0.5}})
    assert not {"augmentation_strength", "backbone"} & set(spec.search.content)
    assert said.digest == spec.digest != other.digest


def test_the_schema_describes_every_key() -> None:
    schema = Spec.model_json_schema()
    for part in [schema, *schema["$defs"].values()]:
        for name, field in part["properties"].items():
            assert "description" in field or "$ref" in field or "allOf" in field, name
