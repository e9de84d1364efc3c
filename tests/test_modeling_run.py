"""Test RUN: common tests, closed forms, unfolding, encoders."""

import json

import pytest
import torch
import torch.nn.functional as F
from common import ModelTester, aligned, says
from huggingface_hub.errors import StrictDataclassError
from run_ablations import PARTS, run_without
from torch import nn
from transformers import PvtV2Config, PvtV2Model, ResNetConfig, ResNetForImageClassification, ViTConfig

from unconceal import RunConfig, RunForImageSegmentation
from unconceal.models.losses import ambiguity_loss, contour_weights, edge_dice_loss, mask_edges, structure_loss
from unconceal.models.modeling_run import (
    background_minimizer,
    background_share,
    join_windows,
    mask_minimizer,
    split_windows,
    uncertainty_filter,
)


TINY_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
TINY_PVT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
TINY = {
    "backbone_config": TINY_BACKBONE,
    "hidden_size": 16,
    "state_size": 4,
    "window_size": 4,
    "sparsity_hidden_size": 8,
    "reconstruction_hidden_sizes": (8, 8, 16),
}


class TestRunForImageSegmentation(ModelTester):
    model_class = RunForImageSegmentation
    tiny = TINY
    # Of the encoder, padded to 64x64, then of the coarse mask and the stages.
    hidden_shapes = [(8, 16, 16), (16, 8, 8), (16, 4, 4), (32, 2, 2), *((16, n, n) for n in (2, 2, 4, 8, 16))]

    def test_every_stage_is_in_the_output(self):
        output = self.make_model()(**self.make_inputs(size=(33, 70)), output_stages=True)  # padded to 96x64
        sizes = [(2, 3), (4, 6), (8, 12), (16, 24)]
        assert [tuple(logits.shape) for logits in output.mask_logits] == [(2, 1, *size) for size in sizes[:1] + sizes]
        assert [tuple(logits.shape) for logits in output.edge_logits] == [(2, 1, *size) for size in sizes]
        assert [tuple(image.shape) for image in output.backgrounds] == [(2, 3, *size) for size in sizes[:1] + sizes]
        assert [tuple(image.shape) for image in output.reconstructions] == [(2, 3, *size) for size in sizes]

    def test_logits_are_the_last_stage_at_the_input_size(self):
        output = self.make_lively_model()(self.make_inputs(size=(33, 70))["pixel_values"], output_stages=True)
        enlarged = F.interpolate(output.mask_logits[-1], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.logits, enlarged[:, :, :33, :70])

    def test_first_background_is_the_image_without_the_coarse_mask(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs(size=(64, 96))["pixel_values"]
        output = model(pixel_values, output_stages=True)
        image = F.avg_pool2d(model.denormalize(pixel_values), 32)
        torch.testing.assert_close(output.backgrounds[0], (1 - output.mask_logits[0].sigmoid()) * image)

    def test_last_background_is_computed_only_for_those_who_ask(self):
        model, inputs = self.make_lively_model(), self.make_inputs()
        calls = []
        model.background_step.register_forward_hook(lambda *_: calls.append(1))
        last = model(**inputs, output_stages=True)
        output = model(inputs["pixel_values"])
        assert torch.equal(output.logits, last.logits)
        assert len(calls) == 2 * model.num_stages - 1
        assert len(last.backgrounds) == len(model(inputs["pixel_values"], output_stages=True).backgrounds)

    def test_denormalize_restores_the_image(self):
        model = self.make_model()
        image = torch.rand(2, 3, 32, 32)
        mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.image_mean, model.config.image_std))
        torch.testing.assert_close(model.denormalize((image - mean) / std), image)
        assert model.denormalize(torch.full((1, 3, 32, 32), 9.0)).max() == 1

    def test_final_mask_depends_on_every_part_of_every_stage(self):
        model = self.make_lively_model()
        estimates = []
        model.mask_step.register_forward_hook(lambda _, __, estimate: estimates.append(estimate))
        output = model(self.make_inputs(size=(64, 64))["pixel_values"], output_stages=True)
        num_stages = model.config.num_stages
        parts = {f"M^_{k + 1}": estimate for k, estimate in enumerate(estimates)}
        parts |= {f"M_{k}": output.mask_logits[k] for k in range(num_stages)}
        parts |= {f"B_{k}": output.backgrounds[k] for k in range(num_stages)}
        assert len(estimates) == num_stages
        options = {"retain_graph": True, "allow_unused": True}
        gradients = torch.autograd.grad(output.logits.sum(), list(parts.values()), **options)
        silent = [name for name, grad in zip(parts, gradients, strict=True) if grad is None or not grad.any()]
        assert silent == []

        output.logits.sum().backward()
        silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        # Edges do not influence masks.
        expected = {f"stages.{k}.edge_head.{name}" for k in range(num_stages) for name in ("weight", "bias")}
        assert silent == expected
        assert model.background_step.network.head.weight.grad[3:].any()

    @pytest.mark.parametrize(
        "changes", [{"stage_levels": (0,)}, {"stage_levels": (3, 3, 2, 2, 1, 0, 0)}, {"share_stages": True}], ids=str
    )
    def test_other_stages_train_every_parameter(self, changes):
        self.check_gradients(**changes)
        model = self.make_model(**changes)
        output = model(self.make_inputs()["pixel_values"], output_stages=True)
        assert output.logits.shape == (2, 1, 33, 47)
        assert len(output.mask_logits) == model.num_stages + 1

    @pytest.mark.parametrize("part", PARTS)
    def test_every_ablation_trains_a_step(self, part):
        torch.manual_seed(0)
        model, inputs = run_without(part, self.make_config()), self.make_inputs(batch_size=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            output = model(**inputs, output_stages=True)
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
        assert losses[1] < losses[0]
        assert len(output.mask_logits) == model.num_stages + 1
        assert [name for name, p in model.named_parameters() if p.grad is None] == []

    def test_ablation_switches_of_older_checkpoints(self, tmp_path):
        """Older checkpoints hold the switches, all of them on."""
        switches = ("use_unfolding", "use_state_space", "use_background", "use_residual_sparsity")
        self.make_config().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        assert config.keys().isdisjoint(switches)
        path.write_text(json.dumps({**config, **dict.fromkeys(switches, True)}))
        assert RunConfig.from_pretrained(tmp_path).to_dict() == RunConfig.from_dict(config).to_dict()
        path.write_text(json.dumps({**config, "use_background": False}))
        with says("`use_background`: got false, expected true"):
            RunConfig.from_pretrained(tmp_path)

    def test_mask_heads_correct_the_closed_form(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs(size=(64, 64))["pixel_values"]
        with torch.no_grad():
            for stage in model.stages:
                stage.mask_head.weight.zero_()
                stage.mask_head.bias.zero_()
            estimates = []
            model.mask_step.register_forward_hook(lambda _, __, estimate: estimates.append(estimate))
            output = model(pixel_values, output_stages=True)
        for estimate, logits in zip(estimates, output.mask_logits[1:], strict=True):
            torch.testing.assert_close(logits.sigmoid(), estimate.clamp(0.01, 0.99))

    def test_scans_are_initialized_as_in_mamba(self):
        scan = self.make_model().stages[0].large_field.scan
        bound = scan.inner_size**-0.5  # as in a linear layer with inner_size inputs
        assert 0.9 * bound < scan.token_proj.abs().max() <= bound
        steps = F.softplus(scan.step_bias)
        assert 0.9e-3 < steps.min() < 3e-3 < 3e-2 < steps.max() < 1.1e-1
        torch.testing.assert_close(-scan.log_decay[0].exp(), -torch.arange(1.0, 5.0))
        assert scan.skip.eq(1).all()

    @pytest.mark.parametrize("sparsity", [0.0, 0.3])
    def test_mask_estimate_minimizes_its_surrogate(self, sparsity):
        generator = torch.Generator().manual_seed(0)
        image, background = torch.rand(2, 3, 3, 9, 11, dtype=torch.float64, generator=generator)
        previous, before_previous, gradient = torch.rand(3, 3, 1, 9, 11, dtype=torch.float64, generator=generator)
        certain, hardened = uncertainty_filter(previous)
        certain_before, hardened_before = uncertainty_filter(before_previous)
        proximity, gradient = 0.07, gradient - 0.5
        step_before = certain_before * (previous - hardened_before)
        estimate = mask_minimizer(
            image, background, previous, proximity, certain, hardened, step_before, gradient, sparsity
        ).requires_grad_()
        step = certain * (estimate - hardened)
        surrogate = 0.5 * (image - image * estimate - background).square().sum()
        surrogate = surrogate + proximity / 2 * (estimate - previous).square().sum()
        surrogate = surrogate + sparsity / 2 * (step - step_before + gradient).square().sum()
        (slope,) = torch.autograd.grad(surrogate, estimate)
        assert slope.abs().max() < 1e-10

    def test_background_estimate_minimizes_its_surrogate(self):
        generator = torch.Generator().manual_seed(0)
        image, previous = torch.rand(2, 3, 3, 9, 11, dtype=torch.float64, generator=generator)
        mask = torch.rand(3, 1, 9, 11, dtype=torch.float64, generator=generator)
        proximity = 0.07
        estimate = background_minimizer(image, mask, previous, proximity).requires_grad_()
        surrogate = 0.5 * (image - image * mask - estimate).square().sum()
        surrogate = surrogate + proximity / 2 * (estimate - previous).square().sum()
        (slope,) = torch.autograd.grad(surrogate, estimate)
        assert slope.abs().max() < 1e-10

    def test_mask_step_is_the_minimizer_of_its_parameters(self):
        step = self.make_model().mask_step
        image, background = torch.rand(2, 2, 3, 8, 8)
        previous, before_previous = torch.rand(2, 2, 1, 8, 8)
        certain, hardened = uncertainty_filter(previous)
        certain_before, hardened_before = uncertainty_filter(before_previous)
        step_before = certain_before * (previous - hardened_before)
        gradient = step.sparsity_gradient(step_before)
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            step(image, background, previous, before_previous),
            mask_minimizer(
                image, background, previous, step.proximity, certain, hardened, step_before, gradient, step.sparsity
            ),
        )
        torch.testing.assert_close((step.proximity, step.sparsity), (torch.tensor(0.1), torch.tensor(0.1)))

    def test_filter_hardens_likely_pixels_and_drops_undecided_ones(self):
        probs = torch.tensor([0.0, 0.05, 0.2, 0.39, 0.45, 0.5, 0.55, 0.61, 0.8, 0.95, 1.0])
        certain, hardened = uncertainty_filter(probs)
        assert certain.tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
        expected = torch.tensor([0.0, 0.05, 0.1, 0.1, 0.45, 0.5, 0.55, 0.9, 0.9, 0.95, 1.0])
        torch.testing.assert_close(hardened, expected)

    def test_background_share_of_black_pixels_is_one_minus_mask(self):
        mask = torch.rand(2, 1, 8, 8)
        for brightness in (0.0, 0.002, 0.5, 1.0):
            image = torch.full((2, 3, 8, 8), brightness, requires_grad=True)
            share = background_share((1 - mask) * image, image, mask)
            torch.testing.assert_close(share, (1 - mask).expand_as(image))
            share.sum().backward()
            assert image.grad.isfinite().all()

    def test_windows_are_split_and_joined(self):
        tokens = torch.randn(2, 3, 8, 12)
        windows = split_windows(tokens, 4)
        assert torch.equal(windows[1 * 6 + 1 * 3 + 2], tokens[1, :, 4:8, 8:12])
        assert torch.equal(join_windows(windows, tokens.shape, 4), tokens)

    def test_small_field_is_a_window_and_large_field_the_whole_map(self):
        model = self.make_model()
        for block, is_local in ((model.stages[3].small_field, True), (model.stages[3].large_field, False)):
            tokens = torch.randn(1, block.scan.inner_size, 8, 8, requires_grad=True)
            if is_local:
                mixed = join_windows(block.scan.scan(split_windows(tokens, 4)), tokens.shape, 4)
            else:
                mixed = block.scan.scan(tokens)
            mixed[..., 0, 0].sum().backward()
            seen = tokens.grad[0].abs().sum(0) > 0
            assert seen[:4, :4].all()
            assert seen[4:, 4:].any() != is_local
            assert seen[0, 4:].any() != is_local

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bad_image_does_not_affect_the_others(self, value):
        model, pixel_values = self.make_lively_model(), self.make_inputs(batch_size=3)["pixel_values"]
        good = self.predict(model, pixel_values)
        pixel_values[1] = value
        bad = self.predict(model, pixel_values)
        assert torch.equal(bad[0], good[0])
        assert torch.equal(bad[2], good[2])

    def test_black_half_of_an_image_gives_finite_gradients(self):
        model, inputs = self.make_model(), self.make_inputs()
        inputs["pixel_values"][..., :20] = -10
        loss = model(**inputs).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_total_loss_computed_from_the_outputs(self):
        weights = {"bce_weight": 0.6, "iou_weight": 1.4, "reconstruction_weight": 3.0, "edge_weight": 0.7}
        model = self.make_lively_model(**weights, ambiguity_weight=1.7)
        inputs = self.make_inputs(size=(64, 96))
        output = model(**inputs, output_stages=True)
        labels, image = inputs["labels"][:, None], model.denormalize(inputs["pixel_values"])
        strides, stage_weights = (32, 32, 16, 8, 4), (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
        total = 1.7 * ambiguity_loss(output.logits)
        for k, (stride, weight) in enumerate(zip(strides, stage_weights, strict=True)):
            logits = F.interpolate(output.mask_logits[k], (64, 96), mode="bilinear", align_corners=False)
            stage = structure_loss(logits, labels, contour_weights(labels), 0.6, 1.4)
            if k > 0:
                stage += 0.7 * edge_dice_loss(output.edge_logits[k - 1], F.max_pool2d(mask_edges(labels), stride))
                error = output.reconstructions[k - 1] - F.avg_pool2d(image, stride)
                stage += 3 * error.square().mean()
            total = total + weight * stage
        torch.testing.assert_close(output.loss, total)

    def test_cells_outside_the_image_do_not_count(self):
        model, inputs = self.make_model(ambiguity_weight=0.0, bce_weight=0.0, iou_weight=0.0), self.make_inputs()
        labels = inputs["labels"][:, None]  # 47x33 in 64x64: 12x9 of 16x16 cells show the image
        output = model(inputs["pixel_values"], output_stages=True)
        image = F.pad(model.denormalize(inputs["pixel_values"]), (0, 17, 0, 31), mode="replicate")

        def loss(edges, reconstructions):
            rest = (output.logits, list(output.mask_logits))
            return model.compute_loss(labels, image, *rest, edges, reconstructions)

        edges, reconstructions = list(output.edge_logits), list(output.reconstructions)
        expected = loss(edges, reconstructions)
        for maps in (edges, reconstructions):
            maps[-1] = maps[-1].clone()
            maps[-1][..., 9:, :] = 7
            maps[-1][..., 12:] = 7
        assert torch.equal(loss(edges, reconstructions), expected)
        edges[-1][..., 8, 11] += 7
        assert not torch.equal(loss(edges, reconstructions), expected)

    def test_ambiguity_weight_rises_with_training_progress(self):
        model, inputs = self.make_model(), self.make_inputs()
        losses = []
        for progress in (0.0, 0.5, 1.0):
            model.training_progress = progress
            losses.append(model(**inputs).loss)
        torch.testing.assert_close(losses[2] - losses[0], 2 * (losses[1] - losses[0]))
        assert losses[2] > losses[0]


class TestBackbones:
    """Test other encoders and their pretrained weights."""

    @pytest.mark.parametrize(
        "backbone_config",
        [
            {"model_type": "pvt_v2", **TINY_PVT},
            {"model_type": "mscan_backbone", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
            {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4},
        ],
        ids=lambda config: config["model_type"],
    )
    def test_any_encoder_of_four_levels_works(self, backbone_config, tmp_path):
        torch.manual_seed(0)
        model = RunForImageSegmentation(RunConfig(**{**TINY, "backbone_config": backbone_config})).eval()
        pixel_values = torch.randn(1, 3, 45, 70)
        with torch.no_grad():
            logits = model(pixel_values).logits
            assert logits.shape == (1, 1, 45, 70)
            model.save_pretrained(tmp_path)
            loaded = aligned(RunForImageSegmentation.from_pretrained(tmp_path))
            assert torch.equal(loaded(pixel_values).logits, logits)

    def test_last_four_levels_are_the_default(self):
        for given in (None, {"model_type": "pvt_v2"}, ResNetConfig(), {"model_type": "swin"}):
            names = RunConfig(backbone_config=given).backbone_config.out_features
            assert names == ["stage1", "stage2", "stage3", "stage4"]

    def test_encoders_without_four_levels_are_rejected(self):
        with says("4 levels", "resnet has 2 (stage1, stage2)"):
            RunConfig(backbone_config={"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1]})
        with pytest.raises(StrictDataclassError, match=r"resnet returns 2 \(stage3, stage4\)"):
            RunConfig(backbone_config={"model_type": "resnet", "out_features": ["stage3", "stage4"]})
        with says("model_type", "resnet", "'no_such_type'"):
            RunConfig(backbone_config={"model_type": "no_such_type"})
        with says("backbone", "vit", "not a backbone"):
            RunConfig(backbone_config=ViTConfig())

    def test_encoders_of_other_strides_are_rejected(self):
        config = {"model_type": "dinov2", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
        config |= {"image_size": 28, "patch_size": 14}
        model = RunForImageSegmentation(RunConfig(**{**TINY, "backbone_config": config}))
        with says("strides 4, 8, 16 and 32", "dinov2", "got 4x4"):
            model(torch.zeros(1, 3, 64, 64))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"stage_levels": ()}, "stage_levels"),
            ({"stage_levels": (0, 1)}, "stage_levels"),
            ({"stage_levels": (4, 0)}, "stage_levels"),
            ({"stage_levels": (3, 1)}, "stage_levels"),
            ({"hidden_size": 20}, "hidden_size"),
            ({"reconstruction_hidden_sizes": (8, 16)}, "reconstruction_hidden_sizes"),
            ({"image_std": (0.1, 0.0, 0.1)}, "image_std"),
            ({"image_mean": (0.5,)}, "image_mean"),
            ({"num_channels": 4, "image_mean": (0.5,) * 4, "image_std": (0.5,) * 4}, "num_channels"),
            ({"window_size": 0}, "window_size"),
            ({"edge_weight": -1.0}, "edge_weight"),
        ],
    )
    def test_impossible_configurations_are_rejected(self, changes, message):
        with pytest.raises(StrictDataclassError, match=message):
            RunConfig(**{**TINY, **changes})

    def save_classifier(self, folder, **changes):
        config = ResNetConfig(**{**TINY_BACKBONE, "num_labels": 5, **changes})
        torch.manual_seed(7)
        classifier = ResNetForImageClassification(config).eval()
        classifier.save_pretrained(folder)
        return classifier

    def test_from_backbone_loads_every_weight_of_a_classifier(self, tmp_path):
        classifier = self.save_classifier(tmp_path)
        changes = {name: value for name, value in TINY.items() if name != "backbone_config"}
        model = RunForImageSegmentation.from_backbone(str(tmp_path), **changes)
        assert model.config.hidden_size == TINY["hidden_size"]
        state = classifier.resnet.state_dict()
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, state[name]), name

    def test_from_backbone_loads_a_timm_checkpoint(self, tmp_path):
        timm = pytest.importorskip("timm")
        encoder = timm.create_model("res2net50_26w_4s", pretrained=False)
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
        timm.models.save_for_hf(encoder, tmp_path, safe_serialization="both")
        model = RunForImageSegmentation.from_backbone(str(tmp_path), hidden_size=16)
        state = encoder.state_dict()
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, state[name.removeprefix("_backbone.")]), name
        model.save_pretrained(tmp_path / "saved")
        again = RunForImageSegmentation.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())

    def test_given_configuration_is_not_changed(self):
        config = ResNetConfig()
        RunConfig(backbone_config=config)
        assert config.out_indices == [4]

    def test_weights_of_another_encoder_are_rejected_and_change_nothing(self, tmp_path):
        self.save_classifier(tmp_path / "wider", hidden_sizes=[8, 16, 16, 40])
        self.save_classifier(tmp_path / "shallower")
        PvtV2Model(PvtV2Config(**TINY_PVT)).save_pretrained(tmp_path / "pvt")
        deeper = {**TINY_BACKBONE, "depths": [1, 1, 2, 1]}
        self.save_classifier(tmp_path / "deeper", depths=[1, 1, 2, 1])
        cases = {"wider": TINY_BACKBONE, "shallower": deeper, "deeper": TINY_BACKBONE, "pvt": TINY_BACKBONE}
        for folder, backbone_config in cases.items():
            model = RunForImageSegmentation(RunConfig(**{**TINY, "backbone_config": backbone_config}))
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with says(str(tmp_path / folder), "do not fit", "such as"):
                model.load_backbone(str(tmp_path / folder))
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with pytest.raises(OSError, match="no_such_folder"):
            model.load_backbone(str(tmp_path / "no_such_folder"))
