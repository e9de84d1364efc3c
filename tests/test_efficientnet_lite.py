"""Test EfficientNet-Lite: published layout, converter, packages, use alone."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from common import PretrainedTester, check_published, random_weights, says
from huggingface_hub.errors import StrictDataclassError

from unconceal import EfficientNetLiteBackbone, EfficientNetLiteConfig, RunConfig, RunForImageSegmentation
from unconceal.__main__ import main
from unconceal.hub.convert import convert_efficientnet_lite, load_published
from unconceal.hub.encoders import PACKAGED, find_packaged
from unconceal.models.configuration_efficientnet_lite import SIZES
from unconceal.models.modeling_efficientnet_lite import pad_same
from unconceal.utils.errors import UserError


TINY = {"width_ratio": 0.25, "depth_ratio": 0.5}
# Kernel size, stride and width of each block of lite0 and lite2. Their first block has no expansion.
LITE0 = [
    (3, 1, 16),
    *[(3, 2, 24), (3, 1, 24)],
    *[(5, 2, 40), (5, 1, 40)],
    *[(3, 2, 80), (3, 1, 80), (3, 1, 80)],
    *[(5, 1, 112), (5, 1, 112), (5, 1, 112)],
    *[(5, 2, 192), (5, 1, 192), (5, 1, 192), (5, 1, 192)],
    (3, 1, 320),
]
LITE1 = [
    (3, 1, 16),
    *[(3, 2, 24), *[(3, 1, 24)] * 2],
    *[(5, 2, 40), *[(5, 1, 40)] * 2],
    *[(3, 2, 80), *[(3, 1, 80)] * 3],
    *[(5, 1, 112)] * 4,
    *[(5, 2, 192), *[(5, 1, 192)] * 4],
    (3, 1, 320),
]
WIDER = {16: 16, 24: 24, 40: 48, 80: 88, 112: 120, 192: 208, 320: 352}
BLOCKS = {0: LITE0, 1: LITE1, 2: [(kernel, stride, WIDER[width]) for kernel, stride, width in LITE1]}


def published_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published state dict."""
    shapes = {}

    def conv_norm(conv, norm, out, into, kernel):
        shapes[f"{conv}.weight"] = (out, into, kernel, kernel)
        shapes.update({f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_norm("_conv_stem", "_bn0", 32, 3, 3)
    into = 32
    for i, (kernel, _, width) in enumerate(BLOCKS[size]):
        block, inner = f"_blocks.{i}", 6 * into if i else into
        if i:
            conv_norm(f"{block}._expand_conv", f"{block}._bn0", inner, into, 1)
        conv_norm(f"{block}._depthwise_conv", f"{block}._bn1", inner, 1, kernel)
        conv_norm(f"{block}._project_conv", f"{block}._bn2", width, inner, 1)
        into = width
    conv_norm("_conv_head", "_bn1", 1280, into, 1)
    shapes.update({"_fc.weight": (1000, 1280), "_fc.bias": (1000,)})
    return shapes


def published_features(state: dict[str, torch.Tensor], image: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Yield the features of the published network at strides 4, 8, 16 and 32."""

    def conv_norm(conv, norm, x, stride=1, depthwise=False):
        weight = state[f"{conv}.weight"]
        kernel = weight.shape[-1]
        padding = []
        for side in (x.shape[-1], x.shape[-2]):  # TensorFlow's rule, "SAME"
            total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, padding), weight, stride=stride, groups=x.shape[1] if depthwise else 1)
        statistics = (state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=1e-3)

    x = F.relu6(conv_norm("_conv_stem", "_bn0", image, stride=2))
    blocks = BLOCKS[size]
    for i, (_, stride, width) in enumerate(blocks):
        block, before = f"_blocks.{i}", x
        if i:
            x = F.relu6(conv_norm(f"{block}._expand_conv", f"{block}._bn0", x))
        x = F.relu6(conv_norm(f"{block}._depthwise_conv", f"{block}._bn1", x, stride, depthwise=True))
        x = conv_norm(f"{block}._project_conv", f"{block}._bn2", x)
        if stride == 1 and before.shape[1] == width:
            x = x + before
        if i + 1 == len(blocks) or (blocks[i + 1][1] == 2 and i > 0):
            yield x


# ---- the published network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BLOCKS)
def test_names_and_shapes_are_the_published_ones(size):
    shapes = {name: "x".join(map(str, shape)) or "scalar" for name, shape in published_shapes(size).items()}
    check_published(f"efficientnet_lite{size}", shapes)


@pytest.mark.parametrize("size", BLOCKS)
def test_converted_network_has_every_tensor_and_equal_features(size):
    state = random_weights(published_shapes(size), seed=0, bias=0.3)
    model, dropped = convert_efficientnet_lite(state)
    assert dropped == ["_conv_head", "_bn1", "_fc"]
    assert model.config.to_diff_dict() == EfficientNetLiteConfig.from_size(f"lite{size}").to_diff_dict()
    for height, width in ((64, 96), (65, 43)):
        image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            features = model(image).feature_maps
        sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (4, 8, 16, 32)]
        assert [tuple(feature.shape[2:]) for feature in features] == sizes
        expected = list(published_features(state, image, size))
        assert min(theirs.std() for theirs in expected) > 0.1
        torch.testing.assert_close(list(features), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PACKAGED)
def test_weights_of_the_packages_have_equal_features(name):
    try:
        state = load_published(find_packaged(name))
    except UserError as error:
        pytest.skip(str(error))
    size = int(name[-1])
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == published_shapes(size)
    image = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = convert_efficientnet_lite(state)[0](image).feature_maps
    torch.testing.assert_close(list(features), list(published_features(state, image, size)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("_blocks.2._bn1.bias"), "1 missing ._blocks.2._bn1.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 left over .extra"),
        (lambda state: state.update({"_bn0.bias": torch.zeros(3)}), "1 of another shape ._bn0.bias .3,. instead of"),
        (lambda state: state.clear(), "missing"),
    ],
)
def test_other_files_are_rejected(change, said):
    state = random_weights(published_shapes(0), seed=0, bias=0.3)
    change(state)
    with pytest.raises(UserError, match=said):
        convert_efficientnet_lite(state)


def test_converted_folder_starts_a_network(tmp_path):
    state = random_weights(published_shapes(0), seed=0, bias=0.3)
    torch.save(state, tmp_path / "published.pth")
    main(["convert", "efficientnet-lite", str(tmp_path / "published.pth"), "--out", str(tmp_path / "encoder")])
    model = RunForImageSegmentation.from_backbone(str(tmp_path / "encoder"), hidden_size=8, state_size=2)
    assert torch.equal(model.backbone.stem[0].weight, state["_conv_stem.weight"])
    other = RunForImageSegmentation(
        RunConfig(backbone_config=EfficientNetLiteConfig(width_ratio=1.1), hidden_size=8, state_size=2)
    )
    with says("do not fit EfficientNetLiteBackbone"):
        other.load_backbone(str(tmp_path / "encoder"))


@pytest.mark.parametrize(("size", "millions"), list(zip(SIZES, (4.7, 5.4, 6.1, 8.2, 13.0), strict=True)))
def test_sizes_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = EfficientNetLiteBackbone(EfficientNetLiteConfig.from_size(size))
    head = 1280 * (model.num_features[-1] + 2) + 1000 * 1281  # of the classifier
    assert (model.num_parameters() + head) / 1e6 == pytest.approx(millions, abs=0.05)


class TestEfficientNetLiteBackbone(PretrainedTester):
    model_class = EfficientNetLiteBackbone
    tiny = TINY
    main_output = "feature_maps"

    def predict(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().predict(model, pixel_values)[-1]


# ---- alone ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("side", range(1, 12))
def test_padding_gives_half_the_side_rounded_up(side, kernel_size):
    conv = torch.nn.Conv2d(1, 1, kernel_size, stride=2)
    assert conv(pad_same(torch.zeros(1, 1, side, side + 1), kernel_size)).shape[2:] == ((side + 1) // 2, side // 2 + 1)


def test_drop_path_rises_and_drops_whole_images_in_training():
    torch.manual_seed(0)
    model = EfficientNetLiteBackbone(EfficientNetLiteConfig(drop_path_rate=0.8)).train()
    rates = [block.drop_path_rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.8 * i / 16 for i in range(16)])
    block, hidden_states = model.stages[3][3], torch.rand(200, 192, 2, 2)
    assert block.is_residual
    skipped = (block(hidden_states) == hidden_states).flatten(1).all(dim=1).float().mean()
    assert skipped == pytest.approx(block.drop_path_rate, abs=0.15)
    assert not torch.equal(block.eval()(hidden_states)[0], hidden_states[0])


def test_wrong_configurations_and_images_are_rejected():
    with says("EfficientNet-Lite size 'lite9'", "lite0, lite1"):
        EfficientNetLiteConfig.from_size("lite9")
    for change, said in (({"drop_path_rate": 1.0}, "below 1"), ({"width_ratio": 0}, "width_ratio")):
        with pytest.raises(StrictDataclassError, match=said):
            EfficientNetLiteConfig(**change)
    with says("pixel_values", "3", "(1, 4, 64, 64)"):
        EfficientNetLiteBackbone(EfficientNetLiteConfig(**TINY))(torch.zeros(1, 4, 64, 64))
