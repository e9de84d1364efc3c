"""Test SRS: common tests of both networks, dynamic convolution, size."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ModelTester, batch_norms
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel

from unconceal import SrsConfig, SrsForImageSegmentation, SrsForReconstruction
from unconceal.models.modeling_srs import SrsDynamicConv, srs_dynamic_conv_ref
from unconceal.models.modeling_unconceal import pad_edges


TINY = {
    "stem_size": 4,
    "hidden_sizes": (8, 8, 16, 16),
    "depths": (1, 1, 1, 1),
    "reconstruction_stem_size": 4,
    "reconstruction_hidden_sizes": (8, 8, 8, 8),
    "reconstruction_depths": (1, 1, 1, 1),
    "attention_reduction_ratio": 2,
}


class TestSrsForImageSegmentation(ModelTester):
    model_class = SrsForImageSegmentation
    tiny = TINY
    # Of the encoder, padded to 48x40, then of the decoder.
    hidden_shapes = [
        *((8, 40, 48), (8, 20, 24), (16, 10, 12), (16, 5, 6)),
        *((16, 10, 12), (8, 20, 24), (8, 40, 48), (8, 40, 48)),
    ]

    def test_odd_sizes_are_padded_with_the_edge_and_cropped(self):
        check_padding(self)

    def test_frozen_encoder_never_changes(self, tmp_path):
        self.make_model().save_pretrained(tmp_path)
        for model in (self.make_model(), SrsForImageSegmentation.from_pretrained(tmp_path)):
            model.train()
            encoder = model.reconstruction_encoder
            assert model.decoder.training
            assert not any(module.training for module in encoder.modules())
            assert not any(parameter.requires_grad for parameter in encoder.parameters())
            before = {name: value.clone() for name, value in model.state_dict().items()}
            # Weight decay would change even parameters with zero gradients.
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
            for _ in range(2):
                model(**self.make_inputs()).loss.backward()
                optimizer.step()
            assert all(parameter.grad is None for parameter in encoder.parameters())
            changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
            assert changed == {name for name in before if not name.startswith("reconstruction_encoder.")}

    def test_batch_statistics_make_masks_depend_on_the_batch(self):
        first, second, third = self.make_inputs(batch_size=3)["pixel_values"].split(1)
        # The second mate is much brighter than the first image.
        pairs = [torch.cat([first, mate]) for mate in (second, 3 * third + 5)]
        for switch in (False, True):
            model = self.make_lively_model(reconstruction_batch_statistics=switch).train().eval()
            masks = [self.predict(model, pair)[0] for pair in pairs]
            difference = (masks[0] - masks[1]).abs().max()
            assert difference > 1e-3 if switch else difference < 1e-5, (switch, difference)
            statistics = {norm.training for norm in batch_norms(model.reconstruction_encoder)}
            assert statistics == {switch}
            assert not any(norm.training for norm in batch_norms(model.encoder))

    def test_starts_from_a_reconstruction_checkpoint(self, tmp_path):
        torch.manual_seed(3)
        first = SrsForReconstruction(self.make_config())
        first(torch.randn(2, 3, 32, 32))  # changes the running statistics
        first.save_pretrained(tmp_path / "phase_1")
        second, report = SrsForImageSegmentation.from_pretrained(tmp_path / "phase_1", output_loading_info=True)
        state = second.state_dict()
        new = {name for name in state if not name.startswith("reconstruction_encoder.")}
        # Some versions of transformers do not report the counters of batch norms.
        expected, reported = (
            {name for name in names if not name.endswith("num_batches_tracked")}
            for names in (new, report["missing_keys"])
        )
        assert reported == expected
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        for name, value in first.reconstruction_encoder.state_dict().items():
            assert torch.equal(state[f"reconstruction_encoder.{name}"], value), name
        check_initial_weights((second.encoder, second.dynamic_conv, second.decoder, second.head))

        # The saved folder is that of a segmentation network.
        second.save_pretrained(tmp_path / "phase_2")
        config = json.loads((tmp_path / "phase_2" / "config.json").read_text())
        assert config["architectures"] == ["SrsForImageSegmentation"]
        assert config["auto_map"]["AutoModel"] == "modeling_srs.SrsForImageSegmentation"
        assert type(AutoModel.from_pretrained(tmp_path / "phase_2")) is SrsForImageSegmentation

    def test_loss_weights_come_from_the_configuration(self):
        inputs = self.make_inputs()
        bce, dice, both = (
            self.make_model(bce_weight=bce, dice_weight=dice)(**inputs).loss
            for bce, dice in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0))
        )
        torch.testing.assert_close(both, 2 * bce + 3 * dice)


class TestSrsForReconstruction(ModelTester):
    model_class = SrsForReconstruction
    tiny = TINY
    needs_labels = False
    main_output = "reconstruction"
    hidden_shapes = [(8, 40 // n, 48 // n) for n in (1, 2, 4, 8, 4, 2, 1, 1)]
    num_outputs = 3

    def test_odd_sizes_are_padded_with_the_edge_and_cropped(self):
        check_padding(self)

    def test_loss_ignores_the_padding(self):
        model, inputs = self.make_lively_model(), self.make_inputs()
        output = model(**inputs)
        torch.testing.assert_close(output.loss, (output.reconstruction - inputs["pixel_values"]).square().mean())


def check_padding(tester: ModelTester):
    model = tester.make_lively_model()
    pixel_values = tester.make_inputs(size=(33, 47))["pixel_values"]
    padded = torch.from_numpy(np.pad(pixel_values.numpy(), ((0, 0), (0, 0), (0, 7), (0, 1)), mode="edge"))
    assert torch.equal(tester.predict(model, pixel_values), tester.predict(model, padded)[..., :33, :47])
    assert torch.equal(pad_edges(padded, 8)[0], padded), "a multiple needs no padding"


def check_initial_weights(parts):
    """Check the rule of PyTorch, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            largest = module.weight.abs().max() * math.sqrt(module.weight[0].numel())
            assert (0.9 if module.weight.numel() > 100 else 0) < largest <= 1, module
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.running_var.eq(1).all(), module


# ---- the dynamic convolution ----------------------------------------------------------------------------------------


def dynamic_conv_inputs(channels=12, guidance_channels=4):
    torch.manual_seed(0)
    conv = SrsDynamicConv(channels, guidance_channels, reduction_ratio=2).double()
    hidden_states = torch.randn(3, channels, 5, 7, dtype=torch.float64, requires_grad=True)
    guidance = torch.randn(3, guidance_channels, 5, 7, dtype=torch.float64, requires_grad=True)
    return conv, hidden_states, guidance


def paper_dynamic_conv(conv: SrsDynamicConv, hidden_states: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Compute the dynamic convolution as in the paper, by a grouped convolution."""
    batch_size, channels, height, width = hidden_states.shape
    num_scalars = guidance.shape[1]

    def bottleneck(pooled):
        squeezed = F.conv2d(pooled, conv.channel_attention.squeeze.weight).relu()
        return F.conv2d(squeezed, conv.channel_attention.excite.weight)

    channel_weights = bottleneck(F.adaptive_avg_pool2d(guidance, 1)) + bottleneck(F.adaptive_max_pool2d(guidance, 1))
    weighted = channel_weights.sigmoid() * guidance
    maps = torch.cat([weighted.mean(1, keepdim=True), weighted.max(1, keepdim=True).values], dim=1)
    attended = F.conv2d(maps, conv.spatial_attention.conv.weight, padding=3).sigmoid() * guidance
    scalars = F.conv2d(attended, conv.project.weight, conv.project.bias).mean(dim=(2, 3), keepdim=True)
    # One weight and one bias for every kernel entry. Each scalar serves consecutive entries.
    kernels = F.conv2d(
        scalars, conv.scaled_conv.weight.reshape(-1, 1, 1, 1), conv.static_conv.weight.reshape(-1), groups=num_scalars
    )
    output = F.conv2d(
        hidden_states.reshape(1, batch_size * channels, height, width),
        kernels.reshape(batch_size * channels, channels, 3, 3),
        padding=1,
        groups=batch_size,
    )
    return output.reshape(batch_size, channels, height, width)


@pytest.mark.parametrize("reference", [srs_dynamic_conv_ref, paper_dynamic_conv])
def test_dynamic_conv_equals_its_slow_forms(reference):
    conv, hidden_states, guidance = dynamic_conv_inputs()
    sources = {"hidden_states": hidden_states, "guidance": guidance, **dict(conv.named_parameters())}
    fast, slow = conv(hidden_states, guidance), reference(conv, hidden_states, guidance)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(conv(hidden_states, guidance), slow, atol=1e-12, rtol=1e-12)
    weighting = torch.randn_like(fast)
    gradients = [
        dict(zip(sources, torch.autograd.grad((output * weighting).sum(), sources.values()), strict=True))
        for output in (fast, slow)
    ]
    assert [name for name, gradient in gradients[0].items() if not gradient.any()] == []
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


# ---- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_sizes": (8, 8, 16)}, r"`hidden_sizes`: got \(8, 8, 16\), expected 4 entries"),
        ({"depths": (1, 1, 1, 1, 1)}, r"`depths`: got \(1, 1, 1, 1, 1\), expected 4 entries"),
        ({"attention_reduction_ratio": 0}, r"`attention_reduction_ratio`: got 0, expected a number of 1 or more"),
        ({"reconstruction_depths": (1, 1, 1, 0)}, r"`reconstruction_depths`: got .* of at least 1"),
        ({"hidden_sizes": (8, 8, 10, 16)}, r"`hidden_sizes`: got \(8, 8, 10, 16\), .* multiples of 4 from the second"),
        ({"reconstruction_hidden_sizes": (8, 9, 8, 8)}, r"`reconstruction_hidden_sizes`: got"),
        ({"attention_reduction_ratio": 9}, r"at least `attention_reduction_ratio` \(9\)"),
        ({"hidden_sizes": (8, 8, 16, 12)}, r"`hidden_sizes\[-1\]`: got 12, expected a multiple of .* \(8\)"),
        ({"stem_size": "8"}, "stem_size.*\n.*expected int, got str"),
        ({"depths": 3}, "depths"),
        ({"dice_weight": "1"}, "dice_weight.*\n.*expected float, got str"),
        ({"reconstruction_batch_statistics": "yes"}, "reconstruction_batch_statistics.*\n.*expected bool, got str"),
    ],
)
def test_wrong_configurations_are_rejected(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        SrsConfig(**{**TINY, **changes})


def test_width_of_the_finest_level_need_not_be_a_multiple_of_4():
    SrsForReconstruction(SrsConfig(**{**TINY, "reconstruction_hidden_sizes": (6, 8, 8, 8)}))(torch.zeros(2, 3, 32, 32))


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="`num_labels`: got 5, expected 2"):
        SrsConfig(**TINY, num_labels=5)


def test_a_network_needs_names_of_background_and_object(tmp_path):
    SrsForImageSegmentation(SrsConfig(**TINY)).save_pretrained(tmp_path)
    for id2label in ({0: "background", 1: "object", 2: "edge"}, {1: "background", 2: "object"}):
        with pytest.raises(ValueError, match="`id2label`: got .* expected names of 0"):
            SrsForImageSegmentation(SrsConfig(**TINY, id2label=id2label))
        with pytest.raises(ValueError, match="`id2label`: got .* expected names of 0"):
            AutoModel.from_pretrained(tmp_path, id2label=id2label)
    with pytest.raises(ValueError, match="LABEL_4.*leave `num_labels`"):
        AutoModel.from_pretrained(tmp_path, num_labels=5)
    lesion = {0: "background", 1: "lesion"}
    assert AutoModel.from_pretrained(tmp_path, num_labels=2, id2label=lesion).config.id2label == lesion


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {0: "background", 1: "object"}),
        ({"num_labels": 2}, {0: "background", 1: "object"}),
        ({"id2label": {0: "background", 1: "lesion"}}, {0: "background", 1: "lesion"}),
        ({"id2label": {"0": "background", "1": "lesion"}}, {0: "background", 1: "lesion"}),
    ],
)
def test_labels_are_saved_and_reloaded(given, expected, tmp_path):
    SrsConfig(**TINY, **given).save_pretrained(tmp_path)
    for config in (SrsConfig(**TINY, **given), AutoConfig.from_pretrained(tmp_path)):
        assert config.id2label == expected
        assert config.label2id == {name: index for index, name in expected.items()}
        assert config.num_labels == 2
