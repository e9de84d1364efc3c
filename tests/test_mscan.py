"""Test MSCAN: published layout, converter, use alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from common import PretrainedTester, aligned, check_published, random_weights, says
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

from unconceal import MscanBackbone, MscanConfig
from unconceal.__main__ import main
from unconceal.hub.convert import convert_mscan, load_published
from unconceal.models.configuration_mscan import SIZES
from unconceal.utils.errors import UserError


TINY = {"hidden_sizes": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "mlp_ratios": (4, 2, 2, 2)}
BASE = {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 3, 12, 3), "mlp_ratios": (8, 8, 4, 4)}
STRIPS = ((1, 7), (7, 1)), ((1, 11), (11, 1)), ((1, 21), (21, 1))


def published_shapes(hidden_sizes, depths, mlp_ratios) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published state dict."""
    shapes = {}

    def conv(name, out, into, kernel):
        shapes.update({f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)})

    def batch_norm(name, width):
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    for i, (width, depth, ratio) in enumerate(zip(hidden_sizes, depths, mlp_ratios, strict=True), start=1):
        if i == 1:
            conv("patch_embed1.proj.0", width // 2, 3, (3, 3))
            batch_norm("patch_embed1.proj.1", width // 2)
            conv("patch_embed1.proj.3", width, width // 2, (3, 3))
            batch_norm("patch_embed1.proj.4", width)
        else:
            conv(f"patch_embed{i}.proj", width, hidden_sizes[i - 2], (3, 3))
            batch_norm(f"patch_embed{i}.norm", width)
        for j in range(depth):
            block = f"block{i}.{j}"
            shapes.update({f"{block}.layer_scale_{k}": (width,) for k in (1, 2)})
            gate = f"{block}.attn.spatial_gating_unit"
            batch_norm(f"{block}.norm1", width)
            conv(f"{block}.attn.proj_1", width, width, (1, 1))
            conv(f"{gate}.conv0", width, 1, (5, 5))
            for k, pair in enumerate(STRIPS):
                conv(f"{gate}.conv{k}_1", width, 1, pair[0])
                conv(f"{gate}.conv{k}_2", width, 1, pair[1])
            conv(f"{gate}.conv3", width, width, (1, 1))
            conv(f"{block}.attn.proj_2", width, width, (1, 1))
            batch_norm(f"{block}.norm2", width)
            conv(f"{block}.mlp.fc1", ratio * width, width, (1, 1))
            conv(f"{block}.mlp.dwconv.dwconv", ratio * width, 1, (3, 3))
            conv(f"{block}.mlp.fc2", width, ratio * width, (1, 1))
        shapes.update({f"norm{i}.weight": (width,), f"norm{i}.bias": (width,)})
    return shapes


def random_state(sizes: dict) -> dict[str, torch.Tensor]:
    return random_weights(published_shapes(**sizes), seed=0, bias=0.3)


def published_features(state: dict[str, torch.Tensor], image: torch.Tensor, depths) -> list[torch.Tensor]:
    """Compute the features of the published encoder in evaluation."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def depthwise(name, x):
        height, width = state[f"{name}.weight"].shape[-2:]
        return conv(name, x, padding=(height // 2, width // 2), groups=x.shape[1])

    def batch_norm(name, x):
        mean, var, weight, bias = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    features, x = [], image
    for i, depth in enumerate(depths, start=1):
        if i == 1:
            x = batch_norm("patch_embed1.proj.1", conv("patch_embed1.proj.0", x, stride=2, padding=1))
            x = batch_norm("patch_embed1.proj.4", conv("patch_embed1.proj.3", F.gelu(x), stride=2, padding=1))
        else:
            x = batch_norm(f"patch_embed{i}.norm", conv(f"patch_embed{i}.proj", x, stride=2, padding=1))
        for j in range(depth):
            block, gate = f"block{i}.{j}", f"block{i}.{j}.attn.spatial_gating_unit"
            normed = batch_norm(f"{block}.norm1", x)
            gated = F.gelu(conv(f"{block}.attn.proj_1", normed))
            near = depthwise(f"{gate}.conv0", gated)
            strips = [depthwise(f"{gate}.conv{k}_2", depthwise(f"{gate}.conv{k}_1", near)) for k in range(3)]
            attended = conv(f"{block}.attn.proj_2", conv(f"{gate}.conv3", near + sum(strips)) * gated) + normed
            x = x + state[f"{block}.layer_scale_1"][:, None, None] * attended
            inner = depthwise(f"{block}.mlp.dwconv.dwconv", conv(f"{block}.mlp.fc1", batch_norm(f"{block}.norm2", x)))
            x = x + state[f"{block}.layer_scale_2"][:, None, None] * conv(f"{block}.mlp.fc2", F.gelu(inner))
        mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
        weight, bias = (state[f"norm{i}.{part}"][:, None, None] for part in ("weight", "bias"))
        x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        features.append(x)
    return features


# ---- the published network ------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_published_ones():
    check_published("mscan_b", published_shapes(**BASE))


def test_converted_base_has_every_tensor_and_equal_features():
    state, image = random_state(BASE), torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(1))
    model, dropped = convert_mscan(state)
    assert dropped == []
    assert sum(p.numel() for p in model.parameters()) == 26_277_824
    assert model.config.to_diff_dict() == MscanConfig(out_indices=[0, 1, 2, 3]).to_diff_dict()
    with torch.no_grad():
        features = model(image).feature_maps
    expected = published_features(state, image, BASE["depths"])
    assert [tuple(f.shape) for f in features] == [(1, 64, 17, 25), (1, 128, 9, 13), (1, 320, 5, 7), (1, 512, 3, 4)]
    assert min(theirs.std() for theirs in expected) > 0.1
    torch.testing.assert_close(list(features), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrapped", ["imagenet", "segnext"])
def test_heads_are_dropped_and_reported(wrapped, tmp_path):
    state = random_state(TINY)
    if wrapped == "imagenet":
        published = {**state, "head.weight": torch.zeros(1000, 24), "head.bias": torch.zeros(1000)}
        heads = ["head"]
    else:
        published = {f"backbone.{name}": tensor for name, tensor in state.items()}
        published["decode_head.conv_seg.weight"] = torch.zeros(2, 8, 1, 1)
        heads = ["decode_head.conv_seg"]
    torch.save({"state_dict": published}, tmp_path / "published.pth")
    main(["convert", "mscan", str(tmp_path / "published.pth"), "--out", str(tmp_path / "out")])
    model = MscanBackbone.from_pretrained(tmp_path / "out").eval()
    assert tuple(model.config.depths) == TINY["depths"]
    assert tuple(model.config.mlp_ratios) == TINY["mlp_ratios"]
    assert convert_mscan(load_published(tmp_path / "published.pth"))[1] == heads
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model(image).feature_maps
    expected = published_features(state, image, TINY["depths"])
    torch.testing.assert_close(list(features), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("block2.1.norm1.bias"), "1 missing .block2.1.norm1.bias"),
        (lambda state: state.update({"block2.0.extra.weight": torch.zeros(1)}), "1 left over .block2.0.extra.weight"),
        (lambda state: state.update({"norm2.bias": torch.zeros(3)}), "1 of another shape .norm2.bias .3,. instead of"),
        (lambda state: [state.pop(name) for name in list(state) if name.startswith("block4")], "has 4 stages"),
        (lambda state: state.update({"norm1.weight": torch.tensor(1.0)}), "has 4 stages"),
        (lambda state: state.update({"block1.0.mlp.fc1.weight": torch.zeros(3)}), "has 4 stages"),
        (lambda state: state.update({"block1.0.mlp.fc1.weight": torch.zeros(3, 8, 1, 1)}), "has 4 stages"),
    ],
)
def test_other_files_are_rejected(change, said):
    state = random_state(TINY)
    change(state)
    with pytest.raises(UserError, match=said):
        convert_mscan(state)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_the_published_ones(size):
    with torch.device("meta"):
        model = MscanBackbone(MscanConfig.from_size(size))
    shapes = published_shapes(SIZES[size]["hidden_sizes"], SIZES[size]["depths"], (8, 8, 4, 4))
    assert len(model.state_dict()) == len(shapes)
    assert sum(t.numel() for t in model.state_dict().values()) == sum(map(math.prod, shapes.values()))


class TestMscanBackbone(PretrainedTester):
    model_class = MscanBackbone
    tiny = TINY
    main_output = "feature_maps"

    def predict(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().predict(model, pixel_values)[-1]


# ---- alone ----------------------------------------------------------------------------------------------------------


def make_backbone(**changes) -> MscanBackbone:
    torch.manual_seed(0)
    return MscanBackbone(MscanConfig(**{**TINY, **changes})).eval()


def test_returns_the_named_features():
    pixel_values = torch.randn(2, 3, 64, 64)
    assert make_backbone().out_features == ["stage4"]
    model = make_backbone(out_features=["stage2", "stage4"])
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
    assert model.channels == [12, 24]
    assert [tuple(f.shape) for f in output.feature_maps] == [(2, 12, 8, 8), (2, 24, 2, 2)]
    assert len(output.hidden_states) == 5
    assert output.feature_maps[1] is output.hidden_states[4]
    assert model(pixel_values).hidden_states is None
    as_tuple = model(pixel_values, return_dict=False)
    assert torch.equal(as_tuple[0][0], output.feature_maps[0])


def test_opens_by_automodel_with_its_named_features(tmp_path):
    model, pixel_values = make_backbone(out_indices=[0, 3]), torch.randn(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path)
    assert type(opened) is MscanBackbone
    features = (one(pixel_values).feature_maps for one in (aligned(opened), model))
    torch.testing.assert_close(*features, atol=0, rtol=0)


def test_drop_path_drops_whole_images_in_training():
    model = make_backbone(drop_path_rate=0.5, layer_scale_init_value=1.0)
    block = model.stages[3].blocks[0]  # the last one has the full rate
    assert block.drop_path_rate == 0.5
    assert model.stages[0].blocks[0].drop_path_rate == 0
    branch = torch.ones(400, 2, 1, 1)
    assert block.eval().drop_path(branch) is branch
    kept = block.train().drop_path(branch)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert 0.35 < (kept > 0).float().mean() < 0.65


def test_initial_convolutions_depend_on_fan_out():
    model = make_backbone(hidden_sizes=(64, 64, 64, 64), depths=(1, 1, 1, 1))
    block = model.stages[1].blocks[0]
    for conv, fan_out in (
        (block.attention.proj_in, 64),
        (block.attention.gate.local, 25),
        (block.feed_forward[0], 128),
    ):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        assert not conv.bias.any()
    assert (block.attention_scale == 1e-2).all()
    assert (block.feed_forward_scale == 1e-2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 1)}, r"depths.*\(1, 1\).*one entry for each stage"),
        ({"hidden_sizes": (7, 8, 8, 8)}, r"hidden_sizes.*\(7, 8, 8, 8\).* even"),
        ({"drop_path_rate": 1.0}, "drop_path_rate.*1.0.*below 1"),
    ],
)
def test_wrong_configurations_are_rejected(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        MscanConfig(**{**TINY, **changes})


def test_unknown_size_and_wrong_images_are_rejected():
    with says("MSCAN size 'huge'", "tiny, small, base, large"):
        MscanConfig.from_size("huge")
    with says("pixel_values", "3", "(1, 4, 64, 64)"):
        make_backbone()(torch.zeros(1, 4, 64, 64))
