"""Test OPDS: common tests, factorization, decoder, losses, size."""

import pytest
import torch
import torch.nn.functional as F
from common import ModelTester, says
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig

from unconceal import MscanBackbone, MscanConfig, OpdsConfig, OpdsForImageSegmentation
from unconceal.models.modeling_opds import OpdsMatrixFactorization


TINY_MSCAN = {
    "model_type": "mscan_backbone",
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "mlp_ratios": [2, 2, 2, 2],
}
TINY = {
    "backbone_config": {**TINY_MSCAN, "drop_path_rate": 0.0},
    "decoder_hidden_sizes": (8, 8, 16, 16),
    "num_bases": 4,
}


class TestOpdsForImageSegmentation(ModelTester):
    model_class = OpdsForImageSegmentation
    tiny = TINY
    # Of the encoder, padded to 64x64, then of the decoder.
    hidden_shapes = [
        *((8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)),
        *((16, 2, 2), (16, 4, 4), (8, 8, 8), (8, 16, 16)),
    ]

    def test_every_level_is_in_the_output_coarse_to_fine(self):
        output = self.make_model()(**self.make_inputs(size=(33, 70)), output_levels=True)  # padded to 96x64
        sizes = [(2, 3), (4, 6), (8, 12), (16, 24)]
        assert [tuple(logits.shape) for logits in output.level_logits] == [(2, 1, *size) for size in sizes]

    def test_logits_are_the_finest_level_at_the_input_size(self):
        output = self.make_lively_model()(self.make_inputs(size=(33, 70))["pixel_values"], output_levels=True)
        enlarged = F.interpolate(output.level_logits[-1], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.logits, enlarged[:, :, :33, :70])

    def test_compiled_equals_eager(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        prediction = self.predict(model, pixel_values)
        torch.testing.assert_close(self.predict(compiled, pixel_values), prediction, atol=1e-6, rtol=1e-5)
        torch.compiler.reset()

    def test_bases_do_not_depend_on_the_seed(self):
        one = self.make_model(seed=1).state_dict()
        other = self.make_model(seed=2).state_dict()
        bases = [name for name in one if name.endswith("factorisation.bases")]
        assert len(bases) == 4
        for name in bases:
            assert torch.equal(one[name], other[name])
            torch.testing.assert_close(one[name].norm(dim=0), torch.ones(4))
            assert one[name].min() >= 0

    def test_bases_are_loaded(self, tmp_path):
        model = self.make_model()
        for level in model.levels:
            level.hamburger.factorisation.bases.fill_(0.123)
        model.save_pretrained(tmp_path)
        for level in OpdsForImageSegmentation.from_pretrained(tmp_path).levels:
            assert (level.hamburger.factorisation.bases == 0.123).all()

    def test_each_level_depends_on_features_and_mask_of_the_level_before(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs(size=(64, 64))["pixel_values"]
        before = model(pixel_values, output_levels=True).level_logits
        for i in (3, 2, 1):  # levels are finest first
            place = 3 - i  # in the output, which is coarse to fine
            level = model.levels[i]
            with torch.no_grad():
                kept = {name: tensor.clone() for name, tensor in level.state_dict().items()}
                level.mask_head.bias.add_(1)
                after_map = model(pixel_values, output_levels=True).level_logits
                # Change the features, but not the mask.
                level.load_state_dict(kept)
                level.mask_head.weight.zero_()
                closed = model(pixel_values, output_levels=True).level_logits
                level.align[1].bias.add_(1)
                after_features = model(pixel_values, output_levels=True).level_logits
                level.load_state_dict(kept)
            assert not torch.equal(after_map[place + 1], before[place + 1])
            assert torch.equal(after_features[place], closed[place])
            assert not torch.equal(after_features[place + 1], closed[place + 1])
            for after in (after_map, after_features):
                assert all(torch.equal(after[j], before[j]) for j in range(place))

    def test_single_head_uses_all_features_at_stride_4(self):
        model = self.make_model(decoder_hidden_sizes=[16])
        inputs = self.make_inputs(size=(33, 70))
        output = model(**inputs, output_levels=True)
        assert [tuple(logits.shape) for logits in output.level_logits] == [(2, 1, 16, 24)]
        assert model.levels[0].squeeze[0].in_channels == 8 + 8 + 16 + 16
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        hidden_states = model(inputs["pixel_values"], output_hidden_states=True).hidden_states
        assert [states.shape[1] for states in hidden_states] == [8, 8, 16, 16, 16]

    def make_factorization(self, channels: int = 6, **changes) -> OpdsMatrixFactorization:
        layer = OpdsMatrixFactorization(OpdsConfig(**{**TINY, **changes}), channels)
        values = torch.rand(layer.bases.shape, generator=torch.Generator().manual_seed(3))
        layer.bases.copy_(F.normalize(values, dim=0))
        return layer.eval()

    def test_factorization_follows_the_multiplicative_updates(self):
        """Compare with the rules of Lee and Seung."""
        layer, features = self.make_factorization(eval_steps=2), torch.rand(1, 6, 3, 4)
        x = features[0].flatten(1).double()  # (C, L)
        bases = layer.bases.double()  # (C, R)
        coefficients = (x.T @ bases).softmax(dim=1).T  # (R, L)
        for step in range(3):
            coefficients = coefficients * (bases.T @ x) / (bases.T @ (bases @ coefficients))
            if step < 2:
                bases = bases * (x @ coefficients.T) / ((bases @ coefficients) @ coefficients.T)
        expected = (bases @ coefficients).view(1, 6, 3, 4)
        torch.testing.assert_close(layer(features).double(), expected, atol=1e-4, rtol=1e-4)

    def test_training_and_evaluation_have_separate_steps(self):
        layer, features = self.make_factorization(train_steps=1, eval_steps=5), torch.rand(1, 6, 4, 4)
        in_training = layer.train()(features)
        assert not torch.allclose(in_training, layer.eval()(features))
        assert torch.equal(in_training, self.make_factorization(eval_steps=1)(features))

    def test_zeros_give_zeros_and_finite_gradients(self):
        features = torch.zeros(1, 6, 4, 4, requires_grad=True)
        out = self.make_factorization()(features)
        assert not out.any()
        out.sum().backward()
        assert features.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        layer = self.make_factorization()
        features = (100 * torch.rand(1, 6, 40, 40)).to(dtype)  # sums over 1,600 positions exceed float16
        got = layer(features)
        assert got.dtype == dtype
        torch.testing.assert_close(got, layer(features.float()).to(dtype), atol=0, rtol=0)
        expected = layer(features.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(layer(features.float()), expected, atol=0, rtol=0)

    def test_loss_is_the_weighted_sum_over_levels_at_the_input_size(self):
        weights = [1.0, 0.5, 0.25, 0.0]
        model = self.make_model(level_weights=weights, bce_weight=2.0, iou_weight=3.0)
        inputs = self.make_inputs(size=(40, 70))
        output = model(**inputs, output_levels=True)
        labels = inputs["labels"][:, None]
        expected = 0.0
        for weight, logits in zip(weights, reversed(output.level_logits), strict=True):
            stride = 96 // logits.shape[-1]
            enlarged = F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=False)[:, :, :40, :70]
            bce = F.binary_cross_entropy_with_logits(enlarged, labels)
            both = (enlarged.sigmoid() * labels).sum(dim=(1, 2, 3))
            either = (enlarged.sigmoid() + labels).sum(dim=(1, 2, 3)) - both
            expected = expected + weight * (2 * bce + 3 * (1 - (both + 1) / (either + 1)).mean())
        torch.testing.assert_close(output.loss, expected)

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"decoder_hidden_sizes": []}, ["decoder_hidden_sizes`: got []", "4 multiples"]),
            ({"decoder_hidden_sizes": [8, 8]}, ["decoder_hidden_sizes", "4 multiples of 8, or one", "[8, 8]"]),
            ({"decoder_hidden_sizes": [8, 8, 8, 12]}, ["decoder_hidden_sizes", "multiples of 8"]),
            ({"level_weights": [1.0]}, ["level_weights", "4 numbers", "[1.0]"]),
            ({"level_weights": [0.0, 1.0, 1.0, 1.0]}, ["level_weights", "first above 0"]),
            ({"level_weights": [1.0, -1.0, 0.0, 0.0]}, ["level_weights", "0 or more"]),
            ({"iou_weight": -1.0}, ["iou_weight", "0 or more", "-1.0"]),
            ({"eval_steps": 0}, ["eval_steps", "1 or more", "got 0"]),
            ({"num_channels": 1}, ["num_channels", "got 1, but 3 in"]),
            ({"num_channels": 1, "backbone_config": None}, ["num_channels", "got 1, expected 3"]),
            ({"backbone_config": {**TINY_MSCAN, "out_features": ["stage2"]}}, ["4 levels", "stage2"]),
            ({"backbone_config": {"model_type": "vit"}}, ["backbone_config", "vit"]),
        ],
    )
    def test_wrong_configurations_are_rejected(self, changes, parts):
        with pytest.raises((StrictDataclassError, ValueError)) as caught:
            OpdsConfig(**{**TINY, **changes})
        assert [part for part in parts if part not in str(caught.value)] == []

    def test_encoder_code_of_another_folder_is_not_used(self):
        """For each name, transformers knows only the last registered class."""

        class OtherConfig(MscanConfig):
            pass

        class OtherBackbone(MscanBackbone):
            config_class = OtherConfig

        try:
            AutoConfig.register(MscanConfig.model_type, OtherConfig, exist_ok=True)
            AutoBackbone.register(OtherConfig, OtherBackbone, exist_ok=True)
            model = self.make_model()
            assert type(model.backbone) is MscanBackbone
            assert type(model.config.backbone_config) is MscanConfig
        finally:
            AutoConfig.register(MscanConfig.model_type, MscanConfig, exist_ok=True)

    def test_from_backbone_loads_every_weight(self, tmp_path):
        source = self.make_lively_model()
        source.backbone.save_pretrained(tmp_path)
        model = OpdsForImageSegmentation.from_backbone(str(tmp_path), decoder_hidden_sizes=[8, 8, 16, 16], num_bases=4)
        weights = model.backbone.state_dict()
        assert weights.keys() == source.backbone.state_dict().keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in source.backbone.state_dict().items())
        other = self.make_model(backbone_config={**TINY["backbone_config"], "depths": [1, 1, 2, 1]})
        with says("do not fit MscanBackbone", "architecture of"):
            other.load_backbone(str(tmp_path))
