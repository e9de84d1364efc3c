"""The converter against the published names, shapes and topology."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import check_published, random_weights, rejected
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from unconceal import SrsConfig, SrsForImageSegmentation, SrsForReconstruction
from unconceal.__main__ import main
from unconceal.hub.convert import convert_srs_reconstruction, convert_srs_segmentation, load_published
from unconceal.training.checkpoints import Conversion, read_record
from unconceal.utils.digests import weights_digest
from unconceal.utils.errors import UserError


# Inputs of each node of the grid, in order: "u" upsamples, "d" pools.
NODES = {
    "0_0": [],
    "1_0": ["d0_0"],
    "2_0": ["d1_0"],
    "3_0": ["d2_0"],
    "0_1": ["0_0", "u1_0"],
    "1_1": ["1_0", "u2_0", "d0_1"],
    "2_1": ["2_0", "u3_0", "d1_1"],
    "0_2": ["0_1", "u1_1", "0_0"],
    "1_2": ["1_1", "u2_1", "1_0", "d0_2"],
    "0_3": ["0_2", "u1_2", "0_1"],
}
NETWORKS = {
    "r": {"stem": 16, "widths": (8, 16, 32, 64), "depths": (5, 5, 5, 5), "out": 3, "dynamic": False},
    "s": {"stem": 8, "widths": (16, 64, 128, 256), "depths": (3, 4, 6, 3), "out": 1, "dynamic": True},
}


def published_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published state dict."""
    facts = NETWORKS[network]
    widths, shapes = facts["widths"], {}

    def conv(name, out, into, kernel, bias=True):
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name, width):
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def attentions(name, width):
        conv(f"{name}.ca.fc1", width // 8, width, 1, bias=False)
        conv(f"{name}.ca.fc2", width, width // 8, 1, bias=False)
        conv(f"{name}.sa.conv1", 1, 2, 7, bias=False)

    def node(name, into, width, depth):
        for k in range(depth):
            conv(f"{name}.{k}.conv1", width, width if k else into, 3)
            conv(f"{name}.{k}.CONV", width, width, 3)
            norm(f"{name}.{k}.bn1", width)
            norm(f"{name}.{k}.bn2", width)
            attentions(f"{name}.{k}", width)
        conv(f"{name}.0.shortcut.0", width, into, 1)
        norm(f"{name}.0.shortcut.1", width)

    conv("conv1.0", facts["stem"], 3, 3)
    norm("conv1.1", facts["stem"])
    for name, inputs in NODES.items():
        into = sum(widths[int(source[-3])] for source in inputs) or facts["stem"]
        node(f"conv{name}", into, widths[int(name[0])], facts["depths"][int(name[0])])
    for level, (width, below) in enumerate(zip(widths, widths[1:], strict=False)):
        blam = f"bottomuplocal_fpn_{level + 1}"
        conv(f"{blam}.conv1", width, width, 1)
        conv(f"{blam}.conv2", width, width, 1)
        conv(f"{blam}.finalconv.0", width, 2 * width, 1)
        shapes[f"{blam}.ECALayer.conv.weight"] = (1, 1, 3)
        for part in ("bn1", "bn2", "bn3", "bn4", "finalconv.1"):
            norm(f"{blam}.{part}", width)
        for part, into, kernel in (("conv1", 1, 1), ("conv2", 1, 3), ("conv3", 1, 3), ("tr", 3, 3), ("tr_1", 2, 3)):
            conv(f"IPATR{level}.{part}", width, into * width, kernel)
        conv(f"fup{level + 1}.conv.0", width, below // 4, 3)
        norm(f"fup{level + 1}.conv.1", width)
        conv(f"conv0_{level + 1}_1x1", widths[0], below, 1)
    node("finalconv", 3 * widths[0], widths[0], 1)
    conv("mask_head_1x1", facts["out"], widths[0], 1)
    if facts["dynamic"]:
        attentions("PKernel_D2", 64)
        conv("PKernel_D2.Conv.0", 64, 64, 1)
        conv("PKernel_D2.Conv.2", 256 * 256 * 9, 1, 1)
    return shapes


def random_state(network: str) -> dict[str, torch.Tensor]:
    state = random_weights(published_shapes(network), ord(network), bias=0.1)
    for name in state:
        if name.startswith("PKernel_D2.Conv.2"):  # kernels of a 3x3 convolution with 256 inputs
            state[name] = state[name] * (1 / 48 if name.endswith("weight") else 10 / 48)
    return state


class Published:
    """Forward pass of the published networks over a published state dict."""

    def __init__(self, state: dict, depths: tuple, batch_statistics: bool = False):
        self.state, self.depths, self.batch_statistics = state, depths, batch_statistics

    def conv(self, name, x, **kwargs):
        weight = self.state[f"{name}.weight"]
        padding = kwargs.get("dilation", 1) * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), padding=padding, **kwargs)

    def norm(self, name, x):
        mean, var = (None, None) if self.batch_statistics else self.stats(name)
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.batch_norm(x, mean, var, weight, bias, training=self.batch_statistics)

    def stats(self, name):
        return self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]

    def channel_attention(self, name, x):
        pooled = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return sum(self.conv(f"{name}.fc2", F.relu(self.conv(f"{name}.fc1", p))) for p in pooled).sigmoid()

    def spatial_attention(self, name, x):
        return self.conv(f"{name}.conv1", torch.cat([x.mean(1, True), x.max(1, True).values], 1)).sigmoid()

    def node(self, name, x, depth):
        for k in range(depth):
            block = f"{name}.{k}"
            y = F.relu(self.norm(f"{block}.bn1", self.conv(f"{block}.conv1", x)))
            y = self.norm(f"{block}.bn2", self.conv(f"{block}.CONV", y))
            y = self.channel_attention(f"{block}.ca", y) * y
            y = self.spatial_attention(f"{block}.sa", y) * y
            if f"{block}.shortcut.0.weight" in self.state:
                x = self.norm(f"{block}.shortcut.1", self.conv(f"{block}.shortcut.0", x))
            x = F.relu(y + x)
        return x

    def encode(self, image):
        features = {}
        x = F.relu(self.norm("conv1.1", self.conv("conv1.0", image)))
        for i in range(4):
            x = self.node(f"conv{i}_0", F.max_pool2d(x, 2) if i else x, self.depths[i])
            features[f"{i}_0"] = x
        return features

    def dynamic_conv(self, x, y):
        """Run the paper's DPConv: one kernel for each image."""
        batch, channels = x.shape[:2]
        a = self.spatial_attention("PKernel_D2.sa", self.channel_attention("PKernel_D2.ca", y) * y) * y
        v = F.adaptive_avg_pool2d(self.conv("PKernel_D2.Conv.0", a), 1)
        kernels = self.conv("PKernel_D2.Conv.2", v, groups=v.shape[1]).reshape(batch * channels, channels, 3, 3)
        mixed = F.conv2d(x.reshape(1, batch * channels, *x.shape[2:]), kernels, padding=1, groups=batch)
        return mixed.reshape(x.shape)

    def blam(self, level, low, deep):
        name, spu = f"bottomuplocal_fpn_{level}", f"fup{level}.conv"
        deep = F.relu(self.norm(f"{spu}.1", self.conv(f"{spu}.0", F.pixel_shuffle(deep, 2))))
        low = F.relu(self.norm(f"{name}.bn3", self.conv(f"{name}.conv1", low)))
        low = F.relu(self.norm(f"{name}.bn4", self.conv(f"{name}.conv2", low)))
        peak = F.adaptive_max_pool2d(deep.sigmoid(), 1)[..., 0].transpose(1, 2)  # (B, 1, C)
        weights = F.conv1d(peak, self.state[f"{name}.ECALayer.conv.weight"], padding=1).sigmoid()
        deep = deep * weights.transpose(1, 2)[..., None]
        return F.relu(self.norm(f"{name}.finalconv.1", self.conv(f"{name}.finalconv.0", torch.cat([deep, low], 1))))

    def ipatr(self, level, x):
        contrasts = []
        for conv, dilation in (("conv1", 1), ("conv2", 1), ("conv3", 2)):
            mu = self.conv(f"IPATR{level}.{conv}", x, dilation=dilation)
            sigma = self.conv(f"IPATR{level}.{conv}", x - mu, dilation=dilation).sigmoid()
            contrasts.append((x - mu + 1e-3) / (sigma + 1e-3))
        return x + x * torch.stack(contrasts).mean(0).sigmoid()

    def decode(self, features, contrast):
        x = dict(features)
        for name, inputs in NODES.items():
            if name.endswith("_0"):
                continue
            change = {"u": lambda t: up(t, 2), "d": lambda t: F.max_pool2d(t, 2)}
            parts = [change.get(source[0], lambda t: t)(x[source[-3:]]) for source in inputs]
            x[name] = self.node(f"conv{name}", torch.cat(parts, 1), self.depths[int(name[0])])
        skips = [x["0_3"], x["1_2"], x["2_1"]]
        if contrast:
            skips = [self.ipatr(level, skip) for level, skip in enumerate(skips)]
        f3 = self.blam(3, skips[2], x["3_0"])
        f2 = self.blam(2, skips[1], f3)
        f1 = self.blam(1, skips[0], f2)
        parts = [f1, up(self.conv("conv0_1_1x1", f2), 2), up(self.conv("conv0_2_1x1", f3), 4)]
        return self.conv("mask_head_1x1", self.node("finalconv", torch.cat(parts, 1), 1))


def convert(*words):
    main(["convert", "srs", *map(str, words)])


def up(x, factor):
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def states():
    return {network: random_state(network) for network in NETWORKS}


@pytest.fixture(scope="module")
def files(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    # One as data-parallel training leaves it, the other in a wrapper: both exist.
    torch.save({f"module.{name}": tensor for name, tensor in states["r"].items()}, folder / "R.pth")
    torch.save({"state_dict": states["s"], "epoch": 3}, folder / "S.pth")
    return folder / "R.pth", folder / "S.pth"


@pytest.mark.parametrize("network", NETWORKS)
def test_names_and_shapes_are_the_published_ones(network):
    check_published(f"srs_{network}", published_shapes(network))


def test_reconstruction_equals_the_published_network(states):
    model, dropped = convert_srs_reconstruction(states["r"], SrsConfig())
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    published = Published(states["r"], NETWORKS["r"]["depths"])
    with torch.no_grad():
        expected = published.decode(published.encode(image), contrast=True)
        output = model(image).reconstruction
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    assert len(dropped) == 13
    assert "conv0_3_1x1" in dropped
    assert "IPATR2.tr_1" in dropped
    assert "bottomuplocal_fpn_1.bn1" in dropped


def test_segmentation_equals_the_published_networks(states):
    reconstruction, _ = convert_srs_reconstruction(states["r"], SrsConfig())
    model, dropped = convert_srs_segmentation(states["s"], reconstruction)
    assert len(dropped) == 13 + 9
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    published = Published(states["s"], NETWORKS["s"]["depths"])
    with torch.no_grad():
        features = published.encode(image)
        deepest = features["3_0"]
        without_guidance = published.decode(features, contrast=False)
        for batch_statistics in (False, True):
            guide = Published(states["r"], NETWORKS["r"]["depths"], batch_statistics)
            features["3_0"] = deepest + published.dynamic_conv(deepest, guide.encode(image)["3_0"])
            expected = published.decode(features, contrast=False)
            # The output is not constant, and depends on the guidance.
            assert expected.std() > 0.03
            assert (expected - without_guidance).abs().max() > 0.03
            model.config.reconstruction_batch_statistics = batch_statistics
            torch.testing.assert_close(model.eval()(image).logits, expected, atol=1e-4, rtol=1e-4)


def test_command_writes_folders_that_open(states, files, tmp_path, capsys):
    r, s = files
    out, r_out = tmp_path / "srs", tmp_path / "srs-r"
    quirks = ["--release-quirks", "--bgr"]
    convert("--reconstruction", r, "--segmentation", s, "--out", out, "--reconstruction-out", r_out, *quirks)
    printed = capsys.readouterr().out
    assert "IPATR0.conv1" in printed
    assert "bottomuplocal_fpn_3.bn2" in printed
    model = AutoModel.from_pretrained(out)
    assert isinstance(model, SrsForImageSegmentation)
    assert model.config.reconstruction_batch_statistics
    kernel = states["s"]["PKernel_D2.Conv.2.bias"].reshape(256, 256, 3, 3)
    assert torch.equal(model.dynamic_conv.static_conv.weight, kernel)
    assert isinstance(AutoModel.from_pretrained(r_out), SrsForReconstruction)
    for folder, published in ((out, (r, s)), (r_out, (r,))):
        record = Conversion(**read_record(folder))
        digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in published]
        assert record.files == [
            {"name": Path(file).name, "sha256": one} for file, one in zip(published, digests, strict=True)
        ]
        assert record.weights == weights_digest(AutoModel.from_pretrained(folder))
        assert record.command.startswith("unconceal convert srs --reconstruction")
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor.channel_order == "bgr"
    assert processor.image_std == pytest.approx([255 * 0.229, 255 * 0.224, 255 * 0.225])
    with pytest.raises(UserError, match="not an empty folder"):
        convert("--reconstruction", r, "--out", out)


def test_reconstruction_alone(files, tmp_path):
    convert("--reconstruction", files[0], "--out", tmp_path / "r")
    model = AutoModel.from_pretrained(tmp_path / "r")
    assert isinstance(model, SrsForReconstruction)
    assert not model.config.reconstruction_batch_statistics
    with pytest.raises(UserError, match="--segmentation"):
        convert("--reconstruction", files[0], "--out", tmp_path / "x", "--reconstruction-out", "y")
    given = ["--reconstruction", files[0], "--segmentation", files[1]]
    for out, other in (("x", "x"), ("x", "x/../x"), ("x", "x/r"), ("x/s", "x")):
        with rejected("expected two folders, none in the other"):
            convert(*given, "--out", tmp_path / out, "--reconstruction-out", tmp_path / other)
    assert not (tmp_path / "x").exists()


def test_error_names_every_fault(states):
    published = states["r"]
    reshaped = {**published, "mask_head_1x1.bias": torch.zeros(4)}
    missing = {name: tensor for name, tensor in published.items() if name != "conv2_1.3.bn2.running_var"}
    for tensors, says in (
        (missing, r"1 missing \(conv2_1\.3\.bn2\.running_var\)"),
        ({**published, "IPATR0.tr_2.weight": torch.zeros(1)}, r"1 left over \(IPATR0\.tr_2\.weight\)"),
        (reshaped, r"1 of another shape \(mask_head_1x1\.bias \(4,\) instead of \(3,\)\)"),
        (states["s"], "exchanged"),
    ):
        with rejected(says) as error:
            convert_srs_reconstruction(tensors, SrsConfig())
        assert len(str(error.value)) < 700


def test_other_files_are_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")  # a pickled object, which may hold code
    for name, content in {"empty": b"", "text": b"not weights", "zip": b"PK\x03\x04 broken"}.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    says = {"absent": "no file", "list": "no state dict"}
    for name in ("absent", "list", "module", "empty", "text", "zip"):
        with rejected(rf"(?=.*{says.get(name, 'cannot read')}).*{name}\.pth"):
            load_published(tmp_path / f"{name}.pth")
