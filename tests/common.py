"""Tests of what every network must do; test modules inherit them."""

import copy
import inspect
import json
import math
import os
import pickle
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from unconceal import UnconcealImageProcessor
from unconceal.utils.errors import UserError


SPECS = Path(os.environ.get("UNCONCEAL_SPECS", Path(__file__).parents[2] / "shared" / "specs"))
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO_PROCESSES += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
# The smallest SRS, for tests of something else.
SMALLEST_SRS = {
    "stem_size": 4,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "reconstruction_stem_size": 4,
    "reconstruction_hidden_sizes": [4, 4, 4, 4],
    "reconstruction_depths": [1, 1, 1, 1],
    "attention_reduction_ratio": 2,
}


def noise(width: int = 30, height: int = 20, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@lru_cache
def modules_beyond_transformers(*others: str) -> list[str]:
    """Return installed modules that transformers, Pillow and `others` do not need."""
    todo, needed = ["torch", "transformers", "huggingface_hub", "numpy", "pillow", "safetensors", *others], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            requirements = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        todo += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    installed = metadata.packages_distributions().items()
    # An editable installation does not list its modules.
    return ["unconceal", *(m for m, owners in installed if needed.isdisjoint(map(canonicalize_name, owners)))]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def says(*parts: str):
    """Expect a `ValueError` with all `parts` in its message."""
    with pytest.raises(ValueError) as caught:
        yield caught
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"


@contextmanager
def rejected(match: str):
    """Expect a `UserError` of one line."""
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def check_published(name: str, shapes: dict[str, tuple[int, ...]]):
    """Compare names and shapes of weights with a list of the published ones."""
    path = SPECS / f"{name}_published_keys.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert {name: str(shape) for name, shape in shapes.items()} == dict(line.split("\t")[:2] for line in lines)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int, bias: float) -> dict[str, torch.Tensor]:
    """Make a published state dict of random tensors, with activations near 1."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = 0.5 + values.sigmoid()
        else:
            state[name] = values / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else bias * values
    return state


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same_state(model: nn.Module, other: nn.Module) -> bool:
    state, of_other = model.state_dict(), other.state_dict()
    return state.keys() == of_other.keys() and all(torch.equal(state[name], of_other[name]) for name in state)


def aligned(model: nn.Module) -> nn.Module:
    """Copy a loaded model to aligned memory.

    Files give weights at any address, and some kernels then round differently.
    """
    return copy.deepcopy(model)


class PretrainedTester:
    """Tests for every network and encoder: configure, build, save, load, copy.

    Inherit as `class TestX(PretrainedTester)`, set `model_class` and `tiny`, and other attributes if they differ.
    """

    model_class: type
    tiny: dict  # arguments of the configuration class
    main_output = "logits"

    # ---- tools ------------------------------------------------------------------------------------------------------

    def make_config(self, **changes):
        return self.model_class.config_class(**{**self.tiny, **changes})

    def make_model(self, seed: int = 0, **changes):
        torch.manual_seed(seed)
        return self.model_class(self.make_config(**changes)).eval()

    def make_lively_model(self, **changes):
        """Make a model whose batch norms fit the inputs.

        With fresh statistics the signal fades, and all outputs are almost equal.
        """
        model = self.make_model(**changes)
        momenta = [(norm, norm.momentum) for norm in batch_norms(model)]
        for norm, _ in momenta:
            norm.train()
            norm.momentum = 1.0
        self.predict(model, self.make_inputs(batch_size=4)["pixel_values"])
        for norm, momentum in momenta:
            norm.momentum = momentum
        return model.eval()

    def make_inputs(self, batch_size: int = 2, size: tuple[int, int] = (33, 47)) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        channels = self.make_config().num_channels
        inputs = {"pixel_values": torch.randn(batch_size, channels, *size, generator=generator)}
        inputs["labels"] = (torch.rand(batch_size, *size, generator=generator) > 0.5).float()
        return inputs

    def predict(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return getattr(model(pixel_values=pixel_values), self.main_output)

    def check_gradients(self, **changes):
        """Check that the loss gives every parameter a gradient.

        A narrow layer behind a ReLU can have none by chance, but not for every seed.
        """
        silent = None
        for seed in range(8):
            model = self.make_model(seed=seed, **changes)
            model(**self.make_inputs()).loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
            now_silent = {name for name, grad in gradients.items() if not grad.any()}
            silent = now_silent if silent is None else silent & now_silent
            if not silent:
                return
        raise AssertionError(f"no gradient for any seed: {silent}")

    # ---- configuration and construction -----------------------------------------------------------------------------

    def test_configuration_survives_files_copies_and_pickles(self, tmp_path):
        config = self.make_config()
        config.save_pretrained(tmp_path)  # first, because it sets `auto_map`
        loaded = self.model_class.config_class.from_pretrained(tmp_path)
        for again in (loaded, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert again.to_dict() == config.to_dict()

    def test_can_be_built_without_memory(self):
        with torch.device("meta"):
            model = self.model_class(self.make_config())
        assert [name for name, tensor in tensors_of(model).items() if not tensor.is_meta] == []
        # Plain tensor attributes are not moved by `model.to(device)`.
        hidden = [
            (name, attribute)
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        ]
        assert hidden == []

    def test_every_parameter_and_buffer_is_initialized(self):
        """transformers allocates a model without values.

        `_init_weights` must set everything that files do not hold.
        """
        model = self.make_model()
        tensors = tensors_of(model)
        for tensor in tensors.values():
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
            tensor._is_hf_initialized = False
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        assert [name for name, tensor in tensors.items() if not (tensor.isfinite() & (tensor != -1)).all()] == []

    def test_buffers_have_values_without_initialization(self):
        expected = dict(self.make_model().named_buffers())
        with no_init_weights():
            model = self.model_class(self.make_config())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, expected[name]), name

    # ---- saving, loading and copying --------------------------------------------------------------------------------

    def test_weights_in_many_files_and_partly_on_disk(self, tmp_path):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        prediction = self.predict(model, pixel_values)
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        files = {path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")}
        assert len(files) > 1
        assert all(name.endswith(".safetensors") for name in files)
        loaded = self.model_class.from_pretrained(tmp_path)
        assert same_state(loaded, model)
        assert torch.equal(self.predict(aligned(loaded), pixel_values), prediction)
        half = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model).values()) // 2
        offloaded = self.model_class.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path / "offload"
        )
        assert any(tensor.is_meta for tensor in tensors_of(offloaded).values()), "everything is in memory"
        torch.testing.assert_close(self.predict(offloaded, pixel_values), prediction, atol=1e-4, rtol=1e-4)

    def test_loaded_in_half_precision(self, tmp_path):
        dtype = torch.float16  # `test_half_precision_is_near_float32` runs in bfloat16
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        model.save_pretrained(tmp_path / "single")
        half = self.model_class.from_pretrained(tmp_path / "single", dtype=dtype)
        half.save_pretrained(tmp_path / "half")
        kept = set(half._keep_in_fp32_modules_strict or ())
        for one in (half, self.model_class.from_pretrained(tmp_path / "half", dtype="auto")):
            assert one.dtype == dtype
            for name, tensor in tensors_of(one).items():
                expected = torch.float32 if kept & set(name.split(".")) else dtype
                assert tensor.dtype == (expected if tensor.is_floating_point() else torch.int64), name
        exact, prediction = self.predict(model, pixel_values), self.predict(half, pixel_values.to(dtype))
        assert prediction.dtype == dtype
        # float16 keeps 11 bits. Some thirty layers of random weights lose about half.
        assert (prediction.float() - exact).square().mean().sqrt() < 0.03 * exact.std()

    def test_saving_what_was_loaded_writes_the_same_files(self, tmp_path):
        model = self.make_model()
        model.save_pretrained(tmp_path / "one", True, safe_serialization=True)  # arguments of `PreTrainedModel`
        self.model_class.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
        one, two = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert {name for name in one if one[name].read_bytes() != two[name].read_bytes()} <= {"config.json"}
        configs = [json.loads(files["config.json"].read_text()) for files in (one, two)]
        for config in configs:
            # transformers adds the dtype of an encoder after loading.
            config.get("backbone_config", {}).pop("dtype", None)
        assert configs[0] == configs[1]

    def test_copies_are_equal_and_independent(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        prediction, state = self.predict(model, pixel_values), copy.deepcopy(model.state_dict())
        model.activation_checkpointing_enable()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(self.predict(twin, pixel_values), prediction)
            twin.train()
            self.predict(twin, pixel_values)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.add_(1)
            assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class ModelTester(PretrainedTester):
    """Further tests for every network: labels, loss, training, Hub.

    Inherit as `class TestX(ModelTester)`, set `model_class`, `tiny` and `hidden_shapes`, and others if they differ.
    """

    needs_labels = True  # otherwise labels are ignored: an image is its own label
    num_outputs = 1  # channels of the main output
    sizes = ((33, 47), (64, 64))
    learning_rate = 1e-2  # of the steps on one image
    hidden_shapes: list[tuple[int, int, int]]  # (C, h, w) of the hidden states of an image of 33x47

    # ---- outputs ----------------------------------------------------------------------------------------------------

    def test_output_has_the_size_of_the_input(self):
        model = self.make_model()
        smallest = (model.min_image_size, model.min_image_size)
        for size in (*self.sizes, smallest):
            inputs = self.make_inputs(size=size)
            output = model(**inputs)
            prediction = output[self.main_output]
            assert prediction.shape == (2, self.num_outputs, *size)
            assert prediction.isfinite().all()
            assert output.loss.shape == ()
            assert output.loss.isfinite()

    def test_return_dict_false_gives_a_tuple(self):
        model, inputs = self.make_model(), self.make_inputs()
        output = model(**inputs, output_hidden_states=True)
        as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple, output.to_tuple(), atol=0, rtol=0)
        assert torch.equal(as_tuple[1], output[self.main_output])
        model.config.return_dict = False
        assert isinstance(model(**inputs), tuple)

    def test_hidden_states_are_returned_on_request(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        output = model(pixel_values, output_hidden_states=True)
        assert isinstance(output.hidden_states, tuple)
        assert [tuple(states.shape[1:]) for states in output.hidden_states] == self.hidden_shapes
        gradients = torch.autograd.grad(output[self.main_output].sum(), output.hidden_states, allow_unused=True)
        assert all(gradient is not None and gradient.any() for gradient in gradients), "no influence on the output"
        assert "hidden_states" not in model(pixel_values)
        model.config.output_hidden_states = True
        assert len(model(pixel_values).hidden_states) == len(self.hidden_shapes)
        assert "hidden_states" not in model(pixel_values, output_hidden_states=False)

    def test_loss_without_labels(self):
        model, inputs = self.make_model(), self.make_inputs()
        loss = model(inputs["pixel_values"]).loss
        if self.needs_labels:
            assert loss is None
        else:
            assert torch.equal(loss, model(**inputs).loss)

    def test_terms_add_up_to_the_loss(self):
        output = self.make_model()(**self.make_inputs())
        if self.needs_labels:
            assert len(output.loss_dict) > 1 and not any(term.requires_grad for term in output.loss_dict.values())
            torch.testing.assert_close(sum(output.loss_dict.values()), output.loss.detach())

    def test_trainer_predicts_tensors_without_the_terms_of_the_loss(self, tmp_path):
        model, inputs = self.make_model(), self.make_inputs()
        arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[])
        trainer = transformers.Trainer(model, arguments)
        loss, predicted, _ = trainer.prediction_step(model, inputs, prediction_loss_only=False)
        assert loss is not None
        predicted = predicted if isinstance(predicted, tuple) else (predicted,)
        assert torch.equal(predicted[0], self.predict(model, inputs["pixel_values"]))
        assert [type(one) for one in predicted if isinstance(one, dict)] == []

    def test_images_of_a_batch_are_independent(self):
        model, inputs = self.make_lively_model(), self.make_inputs(batch_size=3)

        def run(images: slice):
            with torch.no_grad():
                output = model(**{name: value[images] for name, value in inputs.items()}, output_hidden_states=True)
            maps = [value for name, value in output.items() if name not in ("loss", "loss_dict")]
            return output.loss, output[self.main_output], tree_leaves(maps)

        loss, prediction, together = run(slice(3))
        assert (prediction[0] - prediction[1]).abs().max() > 1e-2, "too similar for this test"
        singles = [run(slice(i, i + 1)) for i in range(3)]
        for i, (_, alone, others) in enumerate(singles):
            # Kernels for other batch sizes sum in another order.
            torch.testing.assert_close(alone[0], prediction[i], atol=1e-5, rtol=1e-4)
            for one, of_all in zip(others, together, strict=True):
                torch.testing.assert_close(one[0], of_all[i], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(torch.stack([one for one, *_ in singles]).mean(), loss)

    def test_same_input_gives_same_output(self):
        model, inputs = self.make_lively_model(), self.make_inputs()
        assert torch.equal(*(self.predict(model, inputs["pixel_values"]) for _ in range(2)))
        model.train()
        losses = []
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(model(**inputs).loss)
        assert torch.equal(*losses)

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def test_labels_with_and_without_channel_axis_are_equal(self):
        model, inputs = self.make_model(), self.make_inputs()
        without_axis = model(**inputs).loss
        assert torch.equal(model(inputs["pixel_values"], labels=inputs["labels"][:, None]).loss, without_axis)

    def test_wrong_labels_and_images_are_rejected(self):
        model, pixel_values = self.make_model(), self.make_inputs()["pixel_values"]
        for shape in ((2, 33, 46), (2, 33), (1, 33, 47), (2, 3, 33, 47)) if self.needs_labels else ():
            with says("labels", "(2, 1, 33, 47)", "got", str(shape)):
                model(pixel_values, labels=torch.zeros(shape))
        for value, dtype in (
            ((255, torch.uint8), (1.5, None), (-0.1, None), (math.nan, None)) if self.needs_labels else ()
        ):
            labels = torch.zeros((2, 33, 47), dtype=dtype)
            labels[0, 3, 4] = value
            with says("labels", "values from", "expected 0 to 1"):
                model(pixel_values, labels=labels)
        channels, smallest = model.config.num_channels, model.min_image_size
        for shape in ((2, channels + 1, 64, 64), (channels, 64, 64)):
            with says("pixel_values", str(channels), "got", str(shape)):
                model(torch.zeros(shape))
        for size in ((smallest - 1, 64), (64, smallest - 1)):
            with says("pixel_values", f"{smallest}x{smallest}", "got", f"{size[1]}x{size[0]}"):
                model(torch.zeros(1, channels, *size))

    def test_unknown_arguments_are_rejected(self):
        """With `**kwargs`, Trainer would not divide the loss by the accumulation steps."""
        model, inputs = self.make_model(), self.make_inputs()
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds
        assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "pixel_values"
        for name in ("output_attentions", "mask_labels"):
            with pytest.raises(TypeError, match=name):
                model(**inputs, **{name: None})
        model.config.output_attentions = True
        assert "attentions" not in model(**inputs)

    def test_runs_on_the_output_of_the_image_processor(self):
        model = self.make_model()
        processor = UnconcealImageProcessor(size={"height": 33, "width": 47})
        images = [Image.new("RGB", (90, 60), "red"), Image.new("L", (20, 70), 9)]
        batch = processor(images, [Image.new("L", image.size, 255) for image in images])
        output = model(**batch)
        assert output[self.main_output].shape == (2, self.num_outputs, 33, 47)
        in_half = model.to(torch.bfloat16)(**batch.to(torch.bfloat16))
        torch.testing.assert_close(in_half.loss, output.loss, atol=0.05, rtol=0.05)

    # ---- training ---------------------------------------------------------------------------------------------------

    def test_declares_what_the_training_loop_uses(self):
        model = self.make_model()
        assert model.training_progress == 1
        assert model.has_backbone == hasattr(model, "backbone")
        if not model.has_backbone:
            with says("got backbone nowhere", "has no backbone"):
                model.load_backbone("nowhere")
        image = model.denormalize(self.make_inputs()["pixel_values"])
        assert image is None or (image.min() >= 0 and image.max() <= 1)
        assert (model.num_stages > 0) == (image is not None)

    def test_image_has_a_gradient(self):
        model, inputs = self.make_lively_model(), self.make_inputs()
        pixel_values = inputs["pixel_values"].requires_grad_()
        model(pixel_values, inputs["labels"]).loss.backward()
        assert pixel_values.grad.isfinite().all()
        assert (pixel_values.grad != 0).float().mean() > 0.9

    def test_everything_but_a_frozen_encoder_learns(self):
        model = self.make_model().train()
        if not model.has_backbone:
            pytest.skip("this network has no backbone")
        model.backbone.requires_grad_(False)
        rest = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any(name.startswith("backbone.") for name in rest)
        for prepare in (lambda: None, model.activation_checkpointing_enable):
            prepare()
            model.zero_grad()
            model(**self.make_inputs()).loss.backward()
            assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == rest

    def test_every_parameter_has_a_gradient(self):
        self.check_gradients()

    def test_steps_on_one_image_lower_the_loss(self):
        model, inputs = self.make_model().train(), self.make_inputs(batch_size=1)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=self.learning_rate)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0], losses

    @pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
    def test_gradient_checkpointing_gives_the_same_numbers(self, options):
        model = self.make_model().train()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
            # On the children, because some versions of transformers recompute without a call of the layer.
            for child in layer.children():
                child.register_forward_pre_hook(count)

        def run():
            nonlocal calls
            calls = 0
            model.load_state_dict(start)
            model.zero_grad()
            torch.manual_seed(0)
            loss = model(**self.make_inputs()).loss
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            # Without the number of batches, which has no effect if the momentum is a number.
            buffers = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
            return loss.detach(), gradients, buffers, calls

        *plain, calls_plain = run()
        model.activation_checkpointing_enable(options)
        *saving, calls_saving = run()
        model.activation_checkpointing_disable()
        *again, calls_again = run()
        assert calls_saving > calls_plain > 0, "nothing was recomputed"
        assert calls_again == calls_plain
        torch.testing.assert_close(saving, plain, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(again, plain, atol=0, rtol=0)

    def test_gradient_checkpointing_learns_the_same_statistics_without_gradients(self):
        statistics = []
        for is_saving in (False, True):
            model = self.make_model().train()
            if is_saving:
                model.activation_checkpointing_enable()
            with torch.no_grad():
                model(**self.make_inputs())
            statistics.append(dict(model.named_buffers()))
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not any(batch_norms(layer) for layer in layers):
            pytest.skip("no recomputed layer has statistics")
        torch.testing.assert_close(*statistics, atol=0, rtol=0)

    def test_half_precision_is_near_float32(self):
        model, inputs = self.make_lively_model(), self.make_inputs()
        exact = self.predict(model, inputs["pixel_values"])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(**inputs)
        model.to(torch.bfloat16)
        cast = model(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
        for output in (autocast, cast):
            prediction = output[self.main_output]
            assert prediction.dtype == torch.bfloat16, "did not run in half precision"
            # bfloat16 keeps 8 bits. Some thirty layers of random weights lose about half.
            assert (prediction.float() - exact).square().mean().sqrt() < 0.2 * exact.std()
            assert output.loss.dtype == torch.float32
            assert output.loss.isfinite()

    # ---- inference form ---------------------------------------------------------------------------------------------

    def test_inference_form_is_equal_and_leaves_the_network_as_it_is(self):
        model = self.make_lively_model().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        form, evaluated = model.for_inference(), copy.deepcopy(model).eval()
        assert not form.training
        assert not any(parameter.requires_grad for parameter in form.parameters())
        assert not [norm for norm in batch_norms(form) if norm.track_running_stats], "not folded"
        for size in ((33, 47), (64, 64)):
            for batch_size in (1, 2):
                pixel_values = self.make_inputs(batch_size, size)["pixel_values"]
                expected = self.predict(evaluated, pixel_values)
                torch.testing.assert_close(self.predict(form, pixel_values), expected, rtol=0, atol=1e-4)
        assert model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        with pytest.raises(ValueError, match="copy for inference"):
            form.save_pretrained("nowhere")

    def test_inference_form_in_bfloat16_is_near_float32(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        exact = self.predict(model, pixel_values)
        prediction = self.predict(model.for_inference(torch.bfloat16), pixel_values.bfloat16())
        assert prediction.dtype == torch.bfloat16, "did not run in half precision"
        assert (prediction.float() - exact).square().mean().sqrt() < 0.2 * exact.std()

    def test_inference_form_runs_under_autocast(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        exact = self.predict(model, pixel_values)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = self.predict(model.for_inference(), pixel_values)
        assert (prediction.float() - exact).square().mean().sqrt() < 0.2 * exact.std()

    def test_network_in_several_places_is_its_own_inference_form(self):
        model = self.make_model()
        model.hf_device_map = {"encoder": "cpu", "decoder": "disk"}
        assert model.for_inference() is model

    def test_inference_form_needs_no_fused_convolution(self, monkeypatch):
        form, pixel_values = self.make_lively_model().for_inference(), self.make_inputs()["pixel_values"]
        fused = self.predict(form, pixel_values)
        monkeypatch.setattr("unconceal.models.inference.fused_convolution", None)
        torch.testing.assert_close(self.predict(form, pixel_values), fused, rtol=0, atol=1e-4)

    # ---- on the Hub -------------------------------------------------------------------------------------------------

    def test_saved_model_opens_by_every_auto_class(self, tmp_path):
        """test_loading.py does so without the package."""
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        model.save_pretrained(tmp_path)
        prediction = self.predict(model, pixel_values)
        assert prediction.std() > 1e-2, "too flat for this test"
        assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is self.model_class.config_class
        for auto_class in self.model_class.auto_classes:
            opened = getattr(transformers, auto_class).from_pretrained(tmp_path)
            assert type(opened) is self.model_class
            assert torch.equal(self.predict(aligned(opened), pixel_values), prediction)
