"""Every recipe that ships parses, builds its network, and says where it comes from."""

import re
from pathlib import Path

import pytest
import torch
from transformers.utils import is_timm_available

from unconceal.models import NETWORKS
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.training import load_recipe
from unconceal.utils.errors import UserError


ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe(path):
    recipe = load_recipe(path)
    assert recipe.network == path.parent.name
    config = NETWORKS[recipe.network].config_class(**recipe.model)
    if "timm" in str(recipe.model) and not is_timm_available():
        pytest.skip("timm, which gives this recipe its encoder, is not installed")
    with torch.device("meta"):
        for task in recipe.phases:
            NETWORKS[recipe.network].tasks[task](config)
    UnconcealImageProcessor(**recipe.processor)

    header = re.match(r"(?:#.*\n)+", path.read_text()).group()
    for line in ("# Source:", "# Command:", "# Took:", "# Result:"):
        assert line in header, f"{path.name} does not say its {line}"
    assert f"scripts/train.py {path.relative_to(ROOT)}" in header


def test_every_network_has_a_smoke_recipe():
    assert {path.parent.name for path in RECIPES if path.stem == "smoke"} == set(NETWORKS)


SMOKE = ROOT / "configs/srs/smoke.yaml"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", "unknown key sed; expected one of network"),
        ("data.transform.crop_size=64", "unknown key data.transform"),
        ("phases.segmentation.optimizer.lr=1", "unknown key phases.segmentation.optimizer.lr"),
        ("model.hidden_size=[1]", "model is 'hidden_size'"),
        ("processor.sise=1", "processor is 'sise'"),
        ("phases.segmentation.epochs=many", "phases.segmentation.epochs: Value 'many'"),
        ("phases.segmentation.epochs=0", "phases.segmentation.epochs is 0, expected more than 0"),
        ("phases.segmentation.ema_decay=1.5", "phases.segmentation.ema_decay is 1.5"),
        ("phases.segmentation.optimizer.name=lion", "expected one of sgd, adam, adamw"),
        ("phases.segmentation.schedule.name=step", "expected one of polynomial, cosine, constant"),
        ("phases.detection.epochs=1", "phases is 'detection', expected only reconstruction, segmentation"),
        ("mixed_precision=fp8", "mixed_precision is 'fp8', expected one of None, no, fp16, bf16"),
        ("best_metric=dice", "best_metric is 'dice'"),
        ("model.backbone_config.depth=[1]", "model is 'backbone_config'"),
        ("network=unet", "network is 'unet', expected one of opds, run, srs"),
        (
            "phases.segmentation.init_backbone_from=microsoft/resnet-50",
            "phases.segmentation.init_backbone_from is 'microsoft/resnet-50', expected null, as srs has no backbone",
        ),
        ("data.transforms.crop_size=8", "data.transforms.crop_size is 8, expected at least 32"),
        ("data.num_workers=-1", "data.num_workers is -1"),
        ("data.transforms.flip_probability=2", "data.transforms.flip_probability is 2.0, expected from 0 to 1"),
        ("seed=-1", "seed is -1, expected 0 or more"),
        ("phases.segmentation.optimizer.learning_rate=nan", "learning_rate is nan, expected more than 0"),
        ("phases.segmentation.optimizer.weight_decay=-1", "weight_decay is -1.0, expected 0 or more"),
        ("phases.segmentation.schedule.warmup_steps=-5", "warmup_steps is -5, expected 0 or more"),
        ("trackers=[foo]", "trackers is 'foo', expected one that is installed: tensorboard"),
        ("processor.preprocess=3", "processor is 'preprocess'"),
        ("nonsense", "got override 'nonsense', expected key=value"),
    ],
)
def test_mistakes_name_the_key(override, expected):
    with pytest.raises(UserError) as raised:
        load_recipe(SMOKE, [override])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("network: [srs\nx", "is not valid YAML"),
        ("- network\n- srs", "is a list"),
        ("", "lacks"),
        ("network: srs\nnetwork: run", "is not valid YAML"),
    ],
    ids=["syntax", "list", "empty", "repeated key"],
)
def test_broken_files(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_recipe(path)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_fields_of_an_encoder_are_checked():
    with pytest.raises(
        UserError, match="model.backbone_config is 'depth', expected a field of the configuration of resnet"
    ):
        load_recipe(ROOT / "configs/run/smoke.yaml", ["model.backbone_config.depth=[1,1,1,1]"])


def test_missing_file():
    with pytest.raises(UserError, match="cannot read recipe nowhere.yaml"):
        load_recipe("nowhere.yaml")


def test_overrides_win():
    recipe = load_recipe(SMOKE, ["phases.segmentation.epochs=7", "processor.size={height: 32, width: 64}"])
    assert recipe.phases["segmentation"].epochs == 7
    assert recipe.processor["size"] == {"height": 32, "width": 64}
    assert load_recipe(SMOKE).phases["segmentation"].epochs != 7
