"""Test RUN: common tests, closed forms, unfolding, encoders."""

import json

import pytest
import torch
import torch.nn.functional as F
from common import ModelTester, aligned, says
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PvtV2Config, PvtV2Model, ResNetConfig, ResNetForImageClassification, ViTConfig

from unconceal import RunConfig, RunForImageSegmentation
from unconceal.models.losses import ambiguity_loss, contour_weights, edge_dice_loss, mask_edges, structure_loss
from unconceal.models.modeling_run import STEPS, RunContext, mean_logit, uncertainty_filter
from unconceal.models.run_layers import join_windows, split_windows


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
    learning_rate = 3e-3
    tiny = TINY
    # Of the encoder, padded to 64x64, then of the coarse mask and the stages.
    hidden_shapes = [(8, 16, 16), (16, 8, 8), (16, 4, 4), (32, 2, 2), *((16, n, n) for n in (2, 2, 4, 8, 16))]

    def test_every_stage_is_in_the_output(self):
        output = self.make_model()(**self.make_inputs(size=(33, 70)), output_stages=True)  # padded to 96x64
        sizes = [(2, 3), (4, 6), (8, 12), (16, 24)]
        assert [tuple(logits.shape) for logits in output.mask_logits] == [(2, 1, *size) for size in sizes[:1] + sizes]
        assert [tuple(logits.shape) for logits in output.edge_logits] == [(2, 1, *size) for size in sizes]
        assert [tuple(image.shape) for image in output.backgrounds] == [(2, 3, *size) for size in sizes[:1] + sizes]
        assert [tuple(image.shape) for image in output.reconstructions] == [
            (2, 3, *size) for size in sizes[:1] + sizes
        ]
        assert [tuple(logits.shape) for logits in output.share_logits] == [(2, 1, *size) for size in sizes[:1] + sizes]

    def test_logits_are_the_last_stage_at_the_input_size(self):
        output = self.make_lively_model()(self.make_inputs(size=(33, 70))["pixel_values"], output_stages=True)
        enlarged = F.interpolate(output.mask_logits[-1], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.logits, enlarged[:, :, :33, :70])

    @pytest.mark.parametrize("step", STEPS)
    def test_last_background_is_computed_only_for_those_who_ask(self, step):
        model, inputs = self.make_lively_model(background_step=step), self.make_inputs()
        calls = []
        model.background_step.register_forward_hook(lambda *_: calls.append(1))
        last = model(**inputs, output_stages=True)
        count = len(calls)
        output = model(inputs["pixel_values"])
        assert torch.equal(output.logits, last.logits)
        assert len(calls) == 2 * count - 1
        assert len(last.backgrounds) == len(model(inputs["pixel_values"], output_stages=True).backgrounds) == 5

    def test_backgrounds_are_shares_of_the_image(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs(size=(64, 96))["pixel_values"]
        output = model(pixel_values, output_stages=True)
        image = model.denormalize(pixel_values)
        for share, background in zip(output.share_logits, output.backgrounds, strict=True):
            torch.testing.assert_close(background, share.sigmoid() * F.avg_pool2d(image, 64 // share.shape[-2]))

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
        parts |= {f"M_{k}": output.mask_logits[k] for k in range(num_stages + 1)}
        parts |= {f"s_{k}": output.share_logits[k] for k in range(num_stages)}
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
        assert model.background_step.network.head.weight.grad[:1].any()
        for numbers in (model.mask_step.raw_proximity, model.mask_step.raw_sparsity):
            assert (numbers.grad.abs() > 1e-5).all()
        assert (model.background_step.raw_proximity.grad[:-1].abs() > 1e-5).all()  # the last one is for B_K

    @pytest.mark.parametrize("step", STEPS)
    def test_every_background_trains_every_parameter(self, step):
        self.check_gradients(background_step=step)

    @pytest.mark.parametrize(
        "changes", [{"stage_levels": (0,)}, {"stage_levels": (3, 3, 2, 2, 1, 0, 0)}, {"share_stages": True}], ids=str
    )
    def test_other_stages_train_every_parameter(self, changes):
        self.check_gradients(**changes)
        model = self.make_model(**changes)
        output = model(self.make_inputs()["pixel_values"], output_stages=True)
        assert output.logits.shape == (2, 1, 33, 47)
        assert len(output.mask_logits) == model.num_stages + 1

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
            torch.testing.assert_close(logits, estimate)

    def test_scans_are_initialized_as_in_mamba(self):
        scan = self.make_model().stages[0].large_field.scan
        bound = scan.inner_size**-0.5  # as in a linear layer with inner_size inputs
        assert 0.9 * bound < scan.token_proj.abs().max() <= bound
        steps = F.softplus(scan.step_bias)
        assert 0.9e-3 < steps.min() < 3e-3 < 3e-2 < steps.max() < 1.1e-1
        torch.testing.assert_close(-scan.log_decay[0].exp(), -torch.arange(1.0, 5.0))
        assert scan.skip.eq(1).all()

    def test_mask_estimate_minimizes_its_surrogate(self):
        """The surrogate is at full size; M^ and s have one value for 4x4 pixels."""
        step = self.make_model().mask_step.double()
        with torch.no_grad():
            step.raw_sparsity.fill_(-0.1)
        torch.manual_seed(0)
        image = torch.rand(2, 3, 32, 40, dtype=torch.float64)
        share_logits, previous, before = 3 * torch.randn(3, 2, 1, 8, 10, dtype=torch.float64)
        energy = F.avg_pool2d(image.square().sum(1, keepdim=True), 4)
        estimate = step(2, energy, share_logits, previous, before).sigmoid().double().requires_grad_()

        certain, hardened = uncertainty_filter(previous)
        certain_before, hardened_before = uncertainty_filter(before)
        step_before = certain_before * (previous.sigmoid() - hardened_before.sigmoid())
        target = (hardened + step.sparsity_gradient(step_before)).sigmoid()  # t
        assert (target - hardened.sigmoid()).abs().max() > 1e-4
        mask, share = (F.interpolate(maps, scale_factor=4) for maps in (estimate, share_logits.sigmoid()))
        surrogate = 0.5 * (image - image * mask - image * share).square().sum() / 16
        surrogate = surrogate + step.proximity[1] / 2 * (estimate - previous.sigmoid()).square().sum()
        surrogate = surrogate + step.sparsity[1] / 2 * (certain * (estimate - target)).square().sum()
        (slope,) = torch.autograd.grad(surrogate, estimate)
        assert slope.abs().max() < 1e-6  # the closed form is computed in float32
        assert step.sparsity[1] > 0.3

    def test_background_estimate_minimizes_its_surrogate(self):
        step = self.make_model().background_step
        with torch.no_grad():
            step.network.head.weight.zero_()
            step.network.head.bias.zero_()
        torch.manual_seed(0)
        image, features = torch.rand(2, 3, 9, 11), torch.randn(2, 16, 9, 11)
        mask_logits, share_logits = torch.randn(2, 2, 1, 9, 11)
        new_share, _ = step(1, image, mask_logits, share_logits, features, None)
        background = (image * new_share.sigmoid()).requires_grad_()
        surrogate = 0.5 * (image - image * mask_logits.sigmoid() - background).square().sum()
        previous = image * share_logits.sigmoid()
        surrogate = surrogate + step.proximity[0] / 2 * (background - previous).square().sum()
        (slope,) = torch.autograd.grad(surrogate, background)
        assert slope.abs().max() < 1e-6
        assert step.proximity[0] > 0.09

    def test_mean_logit_keeps_its_gradient_near_zero_and_one(self):
        logits = torch.tensor([-60.0, -20, 0, 5, 20, 60], requires_grad=True)
        weights = torch.tensor(2.0), torch.tensor(6.0)
        mean = mean_logit([logits, logits], weights)
        torch.testing.assert_close(mean, logits)
        mean.sum().backward()
        torch.testing.assert_close(logits.grad, torch.ones(6))
        expected = torch.tensor([0.25 * 0.9 + 0.75 * 0.2]).logit()
        torch.testing.assert_close(mean_logit(torch.tensor([[0.9], [0.2]]).logit(), weights), expected)

    def test_start_of_the_learned_numbers(self):
        model = self.make_model()
        torch.testing.assert_close(model.mask_step.proximity, torch.ones(4))
        torch.testing.assert_close(model.mask_step.sparsity, torch.full((4,), 0.1))
        torch.testing.assert_close(model.background_step.proximity, torch.full((4,), 0.1))
        head = model.background_step.network.head
        assert 0 < head.weight.std() < 2e-3
        assert not head.bias.any()

    def test_filter_hardens_likely_pixels_and_drops_undecided_ones(self):
        probs = torch.tensor([0.01, 0.05, 0.2, 0.39, 0.45, 0.5, 0.55, 0.61, 0.8, 0.95, 0.99])
        certain, hardened = uncertainty_filter(probs.logit())
        assert certain.tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
        expected = torch.tensor([0.01, 0.05, 0.1, 0.1, 0.45, 0.5, 0.55, 0.9, 0.9, 0.95, 0.99])
        torch.testing.assert_close(hardened.sigmoid(), expected)

    def test_non_local_reconstruction_is_its_two_parts(self):
        model = self.make_lively_model(background_step="non_local")
        output = model(self.make_inputs(size=(64, 64))["pixel_values"], output_stages=True)
        assert all(maps.isfinite().all() for maps in output.share_logits)
        image = model.denormalize(self.make_inputs(size=(64, 64))["pixel_values"])
        for maps in output.reconstructions:  # means of colors
            assert maps.min() >= image.min() - 1e-4
            assert maps.max() <= image.max() + 1e-4

    def test_non_local_share_tells_like_from_unlike(self):
        step = self.make_model(background_step="non_local").background_step
        features = torch.zeros(1, 16, 4, 4)
        features[:, 0, :, :2], features[:, 1, :, 2:] = 1, 1  # two textures
        with torch.no_grad():
            for layer in (step.query, step.key):
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[0, 0], layer.weight[1, 1] = 1, 1
        mask = torch.full((1, 1, 4, 4), -9.0)
        mask[..., :3, :2] = 9  # a pixel of the first texture is missed
        context = RunContext(torch.rand(1, 3, 4, 4), features)
        share, _ = step(2, context.image, mask, None, features, context)  # of stride 16, like the context
        assert (share.sigmoid()[..., :2] < 0.3).all()
        assert (share.sigmoid()[..., 2:] > 0.9).all()

    def test_networks_of_older_checkpoints(self, tmp_path):
        """Their configuration lacks `background_step`; they predict as they did."""
        model = self.make_lively_model(background_step="correction", coarse_dilations=(6, 12, 18))
        pixel_values = self.make_inputs()["pixel_values"]
        model.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        for name in ("background_step", "coarse_dilations", "background_weight"):
            del config[name]
        path.write_text(json.dumps(config))
        loaded = aligned(RunForImageSegmentation.from_pretrained(tmp_path))
        assert loaded.config.background_step == "correction"
        output, expected = (one(pixel_values, output_stages=True) for one in (loaded, model))
        assert torch.equal(output.logits, expected.logits)
        assert output.share_logits == ()
        last = F.interpolate(output.mask_logits[-1], scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(output.logits, last[:, :, :33, :47])
        assert model(**self.make_inputs()).loss.isfinite()

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
        weights |= {"background_weight": 0.8}
        model = self.make_lively_model(**weights, ambiguity_weight=1.7)
        inputs = self.make_inputs(size=(64, 96))
        inputs["labels"][:] = 0
        inputs["labels"][0, 8:24, 16:40] = 1
        inputs["labels"][1, 30:50, 8:20] = 1
        output = model(**inputs, output_stages=True)
        labels, image = inputs["labels"][:, None], model.denormalize(inputs["pixel_values"])
        small = F.avg_pool2d(labels, 4)
        strides, stage_weights = (32, 32, 16, 8, 4), (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)

        def loss_of(logits, labels):
            logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
            return structure_loss(logits, labels, contour_weights(labels), 0.6, 1.4)

        total = 1.7 * ambiguity_loss(output.logits)
        for k, (stride, weight) in enumerate(zip(strides, stage_weights, strict=True)):
            stage = loss_of(output.logits, labels) if k == 4 else loss_of(output.mask_logits[k], small)
            stage += 0.8 * loss_of(-output.share_logits[k], small)
            if k > 0:
                stage += 0.7 * edge_dice_loss(output.edge_logits[k - 1], F.max_pool2d(mask_edges(labels), stride))
            error = output.reconstructions[k] - F.avg_pool2d(image, stride)
            stage += 3 * error.square().mean()
            total = total + weight * stage
        torch.testing.assert_close(output.loss, total)

    def test_cells_outside_the_image_do_not_count(self):
        model, inputs = self.make_model(ambiguity_weight=0.0), self.make_inputs()
        labels = inputs["labels"][:, None]  # 47x33 in 64x64: 12x9 of 16x16 cells show the image
        output = model(inputs["pixel_values"], output_stages=True)
        image = F.pad(model.denormalize(inputs["pixel_values"]), (0, 17, 0, 31), mode="replicate")
        names = ("mask_logits", "edge_logits", "share_logits", "reconstructions")
        maps = {name: list(getattr(output, name)) for name in names}

        def loss():
            return sum(model.loss_terms(labels, image, output.logits, **maps).values())

        expected = loss()
        for name in names:
            maps[name][-1] = maps[name][-1].clone()
            maps[name][-1][..., 9:, :] = 7
            maps[name][-1][..., 12:] = 7
        assert torch.equal(loss(), expected)
        for name in names[1:]:  # the last mask counts by its logits
            maps[name][-1][..., 8, 11] += 7
            assert not torch.equal(loss(), expected)
            maps[name][-1][..., 8, 11] -= 7

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
            ({"background_step": "none"}, "background_step"),
            ({"coarse_dilations": (1, 0)}, "coarse_dilations"),
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
