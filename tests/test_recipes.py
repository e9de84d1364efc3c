"""Every shipped recipe loads, builds its network and names its source."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from common import rejected

from unconceal.__main__ import main
from unconceal.data.sources import SOURCES
from unconceal.models.configuration_run import REMOVED_SWITCHES
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.networks import NETWORKS
from unconceal.training.recipe import load_recipe, read_data_recipe, restore_recipe
from unconceal.training.start import check_folder, claim_folder
from unconceal.utils.errors import UserError


ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for name in NETWORKS for path in ROOT.glob(f"configs/{name}/*.yaml"))
SMOKE = ROOT / "configs/srs/smoke.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_builds_its_network_and_names_its_source(path):
    recipe = load_recipe(path)
    assert recipe.network == path.parent.name
    config = NETWORKS[recipe.network].config_class(**recipe.model)
    with torch.device("meta"):
        for task in recipe.phases:
            NETWORKS[recipe.network].tasks[task](config)
    UnconcealImageProcessor(**recipe.processor)

    header = re.match(r"(?:#.*\n)+", path.read_text()).group()
    for line in ("# Source:", "# Command:", "# Took:", "# Result:"):
        assert line in header, f"{path.name} does not state its {line}"
    assert re.search(rf"(scripts/train.py|unconceal train) {path.relative_to(ROOT)}", header)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_recipe_chooses_on_a_test_split(path):
    tests = {split for source in SOURCES.values() for split in source.test_splits}
    assert load_recipe(path).data.eval_split not in tests


def test_every_network_has_a_smoke_recipe():
    assert {path.parent.name for path in RECIPES if path.stem == "smoke"} == set(NETWORKS)


def test_every_run_has_its_own_output_folder():
    folders = [load_recipe(path).output_dir for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "unknown key sed; expected one of network"),
        ("base=other.yaml", "unknown key base"),
        ("phases.segmentation.optimizer.lr=1", "unknown key phases.segmentation.optimizer.lr"),
        ("model.hidden_size=[1]", "model is 'hidden_size'"),
        ("processor.sise=1", "processor is 'sise'"),
        ("phases.segmentation.epochs=many", "phases.segmentation.epochs: Value 'many'"),
        ("phases.segmentation.epochs=0", "phases.segmentation.epochs is 0, expected more than 0"),
        ("phases.segmentation.ema_decay=1.5", "phases.segmentation.ema_decay is 1.5"),
        ("phases.segmentation.optimizer.name=lion", "expected one of sgd, adam, adamw"),
        ("phases.segmentation.schedule.name=step", "expected one of polynomial, cosine, constant"),
        ("phases.detection.epochs=1", "phases is 'detection', expected only reconstruction, segmentation"),
        ("mixed_precision=fp8", "mixed_precision is 'fp8', expected one of None, no, fp16, bf16, auto"),
        ("protocol=coco", "protocol is 'coco', expected one of segmentation, cod, dis"),
        ("best_metric=mae", "best_metric is 'mae', expected one of iou, niou, f1, mean_f1 (protocol segmentation)"),
        ("model.backbone_config.depth=[1]", "model is 'backbone_config'"),
        ("network=unet", "network is 'unet', expected one of opds, run, srs"),
        (
            "phases.segmentation.init_backbone_from=microsoft/resnet-50",
            "phases.segmentation.init_backbone_from is 'microsoft/resnet-50', expected null, as srs has no backbone",
        ),
        ("data.transforms.crop_size=8", "data.transforms.crop_size is 8, expected at least 32"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("data.split_seed=-1", "data.split_seed is -1, expected from 0 to below 2^32"),
        ("data.transforms.flip_probability=2", "data.transforms.flip_probability is 2.0, expected from 0 to 1"),
        ("data.transforms.max_crop_ratio=1", "data.transforms.max_crop_ratio is 1.0, expected from 0 to below 1"),
        ("data.transforms.brightness=-0.5", "data.transforms.brightness is -0.5, expected 0 or more"),
        ("data.transforms.sharpness=inf", "data.transforms.sharpness is inf, expected 0 or more"),
        ("data.transforms.saturation=much", "data.transforms.saturation: Value 'much'"),
        ("data.transforms.max_rotation=181", "data.transforms.max_rotation is 181.0, expected from 0 to 180 degrees"),
        ("phases.segmentation.optimizer.learning_rate=nan", "learning_rate is nan, expected more than 0"),
        ("phases.reconstruction.optimizer.weight_decay=-1", "weight_decay is -1.0, expected 0 or more"),
        ("data.path=[]", "data.path is [], expected a folder, the id of a data set on the Hub, or a list of them"),
        ("data.path=[a,b,a]", "data.path is ['a', 'b', 'a'], expected different data sets"),
        ("data.weights=[1,2]", "data.weights is [1.0, 2.0], expected a number above 0 for each of 1 data sets"),
        ("data.weights=[0]", "data.weights is [0.0], expected a number above 0"),
        ("data.weights=[inf]", "data.weights is [inf], expected a number above 0"),
        ("data.weights=[much]", "data.weights[0]: Value 'much'"),
        ("data.transforms.min_zoom=0", "data.transforms.min_zoom is 0.0, expected more than 0"),
        ("data.transforms.min_zoom=1.5", "data.transforms.min_zoom is 1.5, expected at most max_zoom, 1.0"),
        ("data.transforms.max_zoom=inf", "data.transforms.max_zoom is inf, expected more than 0"),
        ("data.transforms.max_stretch=0.9", "data.transforms.max_stretch is 0.9, expected 1 or more"),
        ("data.transforms.hue=0.6", "data.transforms.hue is 0.6, expected from 0 to 0.5"),
        ("data.transforms.gray_probability=-1", "gray_probability is -1.0, expected from 0 to 1"),
        ("data.transforms.blur_probability=2", "blur_probability is 2.0, expected from 0 to 1"),
        ("data.transforms.max_blur=-1", "data.transforms.max_blur is -1.0, expected 0 or more"),
        ("data.transforms.noise=nan", "data.transforms.noise is nan, expected 0 or more"),
        (
            "phases.segmentation.freeze_encoder_epochs=1",
            "freeze_encoder_epochs is 1, expected 0, as srs has no",
        ),
        ("phases.segmentation.freeze_norms_epochs=1", "freeze_norms_epochs is 1, expected 0, as srs has no backbone"),
        ("phases.segmentation.optimizer.encoder_lr_ratio=0.1", "encoder_lr_ratio is 0.1, expected 1, as srs has no"),
        ("trackers=[foo]", "trackers is 'foo', expected one that is installed: tensorboard"),
        ("processor.preprocess=3", "processor is 'preprocess'"),
        ("data.eval_split=train", "data.eval_split is 'train', expected another split than data.train_split"),
        ("output_dir=", "output_dir is '', expected a folder"),
        ("output_dir=' '", "output_dir is ' ', expected a folder"),
        ("nonsense", "got override 'nonsense', expected key=value"),
        ("trackers[0]=3", "got override 'trackers[0]=3', expected key=value"),
    ],
)
def test_mistakes_name_the_key(override, expected):
    with rejected(re.escape(expected)):
        load_recipe(SMOKE, [override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("network: [srs\nx", "is not valid YAML"),
        ("- network\n- srs", "is a list, expected key: value lines"),
        ("", "lacks"),
        ("network: srs\nnetwork: run", "is not valid YAML"),
        ("base: absent.yaml", "absent.yaml of recipe"),
        ("base: recipe.yaml", "`base` goes in a circle"),
        ("base: 5", "base is 5, expected the path of another recipe"),
        ("base: ''", "base is '', expected the path of another recipe"),
        ("base: .", "is a folder, expected a YAML file"),
        ("base: ${x}", "recipe.yaml: base: "),
        (f"base: {SMOKE}\nsed: 1", "recipe.yaml: unknown key sed"),
    ],
    ids=[
        *("syntax", "list", "empty", "repeated key", "no base", "circle", "number", "empty base", "folder"),
        *("interpolation", "unknown key"),
    ],
)
def test_broken_files_are_rejected(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with rejected(re.escape(expected)):
        load_recipe(path)


def test_bare_no_is_not_read_as_false():
    assert load_recipe(SMOKE, ["mixed_precision=no"]).mixed_precision == "no"


def test_recipe_starts_from_its_bases(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    middle = {"base": str(SMOKE), "model": {"depths": [2, 2, 2, 2]}, "phases": {"segmentation": {"epochs": 3}}}
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump(middle))
    top = {"base": "../middle.yaml", "seed": 4, "phases": {"segmentation": {"batch_size": 2}}}
    (tmp_path / "sub" / "top.yaml").write_text(yaml.safe_dump(top))
    monkeypatch.chdir(tmp_path / "sub")
    overrides = ["phases.segmentation.epochs=5", "processor.size={height: 32, width: 64}"]
    recipe, plain = load_recipe("top.yaml", overrides), load_recipe(SMOKE)
    assert recipe.processor["size"] == {"height": 32, "width": 64}
    assert (recipe.seed, recipe.model["depths"], recipe.model["stem_size"]) == (4, [2, 2, 2, 2], 8)
    assert (recipe.phases["segmentation"].batch_size, recipe.phases["segmentation"].epochs) == (2, 5)
    assert recipe.phases["reconstruction"] == plain.phases["reconstruction"]

    # A mistake in a base names that file.
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump({**middle, "sed": 1}))
    with pytest.raises(UserError, match=r"middle.yaml: unknown key sed"):
        load_recipe("top.yaml")
    (tmp_path / "middle.yaml").write_text("base: sub/top.yaml")
    with pytest.raises(UserError, match="top.yaml -> .*middle.yaml -> .*top.yaml"):
        load_recipe("top.yaml")


def test_several_data_sets_replace_one_and_are_read_again(tmp_path):
    recipe = load_recipe(SMOKE, ["data.path=[data/a, org/b]", "data.weights=[1, 2.5]", f"output_dir={tmp_path}"])
    assert (recipe.data.path, recipe.data.weights) == (["data/a", "org/b"], [1.0, 2.5])
    claim_folder(tmp_path, recipe, resume=False)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert read_data_recipe(tmp_path / "recipe.yaml") == recipe.data
    check_folder(tmp_path, recipe, resume=True, overwrite=False)
    for change in ({"weights": [1.0, 2.0]}, {"path": ["org/b", "data/a"]}):
        other = replace(recipe, data=replace(recipe.data, **change))
        with rejected(f"was started with another data.{next(iter(change))};"):
            check_folder(tmp_path, other, resume=True, overwrite=False)
    assert load_recipe(SMOKE).data.paths == ["data/synthetic"]


@pytest.mark.parametrize("key", ["freeze_encoder_epochs", "freeze_norms_epochs", "optimizer.encoder_lr_ratio"])
def test_settings_of_the_encoder_are_not_negative(key):
    with rejected(f"phases.segmentation.{key} is -1.*, expected 0 or more"):
        load_recipe(ROOT / "configs/run/smoke.yaml", [f"phases.segmentation.{key}=-1"])


def test_fields_of_an_encoder_are_checked():
    with rejected("model.backbone_config is 'depth', expected a field of the configuration of resnet"):
        load_recipe(ROOT / "configs/run/smoke.yaml", ["model.backbone_config.depth=[1,1,1,1]"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=[]", r"model: got \[\], expected keys with values"),
        ("phases=[]", r"phases: got \[\], expected keys with values"),
        ("phases.segmentation=3", "phases.segmentation: got 3, expected keys with values"),
        ("processor.size=[32,32,3]", "processor: got a list in place of keys"),
        ("model.hidden_sizes={a: 1}", "model: got a list in place of keys with values, or the reverse"),
    ],
)
def test_lists_in_place_of_keys_are_refused(override, expected):
    with rejected(f"recipe .*smoke.yaml: {expected}"):
        load_recipe(SMOKE, ["processor.size={height: 32, width: 32}", override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "is '42', expected key: value"),
        ("srs", "is 'srs', expected"),
        ("model: []", r": model: got \[\], expected"),
    ],
)
def test_a_file_of_a_recipe_is_keys_with_values(text, expected, tmp_path):
    (tmp_path / "other.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text("base: other.yaml")
    with rejected(f"^recipe .*other.yaml ?{expected}"):
        load_recipe(tmp_path / "other.yaml")
    with rejected(f"^base .*other.yaml of recipe .*recipe.yaml ?{expected}"):
        load_recipe(tmp_path / "recipe.yaml")


def test_switches_of_older_recipes_are_dropped():
    smoke = ROOT / "configs/run/smoke.yaml"
    switches = [f"model.{name}=true" for name in REMOVED_SWITCHES]
    assert load_recipe(smoke, switches) == load_recipe(smoke)
    with pytest.raises(UserError, match="model: `use_background`: got false, expected true; RUN without this part"):
        load_recipe(smoke, ["model.use_background=false"])
    with pytest.raises(UserError, match="model is 'use_background', expected a field"):
        load_recipe(SMOKE, ["model.use_background=true"])


def test_run_with_switches_of_older_recipes_is_resumed(tmp_path):
    recipe = load_recipe(ROOT / "configs/run/smoke.yaml", [f"output_dir={tmp_path}"])
    claim_folder(tmp_path, recipe, resume=False)
    kept = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    kept["model"] |= dict.fromkeys(REMOVED_SWITCHES, True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(kept))
    for again in (recipe, load_recipe(tmp_path / "recipe.yaml")):
        check_folder(tmp_path, again, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0", "1", "x.yaml"], "got 'x.yaml', expected a whole number from 0; put --seeds last\n"),
        ([], "the following arguments are required: recipe\n"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["train", *arguments])
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["segment", "x.png", "--model", "m", "--out", ""], "--out"),
        (["segment", "", "--model", "m", "--out", "o"], "PATH"),
        (["export", "m", "--out= "], "--out"),
        (["evaluate", "--model", "m", "--data", "", "--split", "val"], "--data"),
    ],
    ids=str,
)
def test_empty_arguments_are_refused(arguments, name):
    """An unset variable of a shell would mean the working folder."""
    with rejected(f"{name} is empty; give a value, or leave it out"):
        main(arguments)


def test_a_recipe_is_no_device():
    with rejected("recipe /dev/full is a device, expected a YAML file"):
        load_recipe(Path("/dev/full"))


PLAIN = ["007", "1e3", "0x1f", "no", "2026-01-02", "runs/${seed}", "${oc.env:HOME}", "a${b", "???", "~x"]


@pytest.mark.parametrize("text", [*PLAIN, "runs/exp #3", "@x", "a: b", "[x", "{y}"])
def test_texts_are_taken_as_they_are_typed(text):
    """YAML would read a comment, a number, a switch, nothing or a mistake, OmegaConf another value."""
    keys = ("output_dir", "data.train_split", "phases.segmentation.init_from", "best_metric")
    recipe = load_recipe(SMOKE, [f"{key}={text}" for key in keys[:3]])
    assert (recipe.output_dir, recipe.data.train_split) == (text, text)
    assert recipe.phases["segmentation"].init_from == text
    if not text.startswith("["):
        assert load_recipe(SMOKE, [f"data.path={text}"]).data.paths == [text]
    assert load_recipe(SMOKE, [f"data.path=[a, '{text}']"]).data.paths == ["a", text]


@pytest.mark.parametrize("text", PLAIN)
def test_texts_of_a_file_are_taken_as_they_are_typed(tmp_path, text):
    """Also from a base, an alias, the recipe of a run and a record."""
    (tmp_path / "base.yaml").write_text(
        f"network: srs\noutput_dir: {text}\ndata: {{train_split: '{text}', path: ['{text}', b]}}\n"
        f"phases:\n  reconstruction: &one\n    epochs: 1\n    init_from: {text}\n  segmentation: *one\n"
    )
    (tmp_path / "top.yaml").write_text("base: base.yaml\nphases: {reconstruction: {init_from: }}\nseed: 0x10\n")
    recipe = load_recipe(tmp_path / "top.yaml")
    assert (recipe.output_dir, recipe.data.train_split, recipe.data.path) == (text, text, [text, "b"])
    assert [phase.init_from for phase in recipe.phases.values()] == [None, text]
    assert (recipe.seed, recipe.save_every) == (16, "10min")
    claim_folder(tmp_path / "run", recipe, resume=False)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert read_data_recipe(tmp_path / "run" / "recipe.yaml") == recipe.data
    assert restore_recipe(asdict(recipe)) == recipe
    check_folder(tmp_path / "run", recipe, resume=True, overwrite=False)


def test_quotes_around_a_text_are_left_out():
    recipe = load_recipe(SMOKE, ["output_dir='a b'", 'mixed_precision="bf16"', "data.path='it''s'"])
    assert (recipe.output_dir, recipe.mixed_precision) == ("a b", "bf16")
    assert recipe.data.path == "it''s"


def test_values_of_other_types_are_yaml():
    changes = ["seed=0x10", "phases.segmentation.init_from=null", "mixed_precision=no", "trackers=[tensorboard]"]
    changes += ["phases.segmentation.optimizer.learning_rate=1e-3", "processor.do_resize=no", "data.path=[007, no]"]
    recipe = load_recipe(SMOKE, changes)
    assert (recipe.seed, recipe.mixed_precision, recipe.trackers) == (16, "no", ["tensorboard"])
    assert recipe.phases["segmentation"].init_from is None
    assert recipe.phases["segmentation"].optimizer.learning_rate == 1e-3
    assert recipe.processor["do_resize"] is False
    assert recipe.data.paths == ["007", "no"]


def test_home_folder_of_a_recipe_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(ROOT / "configs/run/smoke.yaml", ["output_dir=~/run", "data.path=[~/a,owner/~b]"])
    assert (recipe.output_dir, recipe.data.path) == (f"{tmp_path}/run", [f"{tmp_path}/a", "owner/~b"])
    (tmp_path / "base.yaml").write_text(SMOKE.read_text())
    (tmp_path / "top.yaml").write_text("base: ~/base.yaml")
    assert load_recipe(tmp_path / "top.yaml") == load_recipe(SMOKE)


@pytest.mark.parametrize(
    ("name", "processes", "machines"), [("one_gpu", 1, 1), ("one_node", 4, 1), ("several_nodes", 8, 2)]
)
def test_examples_for_accelerate_launch(name, processes, machines):
    config = load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert (config.distributed_type == "MULTI_GPU") == (processes > 1)
    assert config.mixed_precision == "no" and not config.use_cpu
