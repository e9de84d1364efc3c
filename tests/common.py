"""What every network must do. A test module names a model class and a tiny configuration, and inherits the tests."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


# The smallest SRS, where any will do.
SMALLEST_SRS = {
    "stem_size": 4,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "reconstruction_stem_size": 4,
    "reconstruction_hidden_sizes": [4, 4, 4, 4],
    "reconstruction_depths": [1, 1, 1, 1],
    "attention_reduction_ratio": 2,
}

# Opens a saved folder where neither this package nor anything beyond transformers' own needs is installed.
FRESH_PROCESS = """
import importlib.util, json, sys

task = json.loads(sys.argv[1])


class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in task["hidden"] else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("unconceal") is None

import torch
import transformers
from safetensors.torch import load_file

torch.set_num_threads(task["num_threads"])
tensors = load_file(task["tensors"])


def check(auto_class, folder):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == task["model_class"], (auto_class, type(model))
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        prediction = getattr(model(pixel_values=tensors["pixel_values"]), task["main_output"])
    assert torch.equal(prediction, tensors["prediction"]), (auto_class, folder)
    return model


config = transformers.AutoConfig.from_pretrained(task["folder"], trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config)
for auto_class in task["auto_classes"]:
    model = check(auto_class, task["folder"])
model.save_pretrained(task["again"])
check(task["auto_classes"][-1], task["again"])
"""


@lru_cache
def modules_beyond_transformers() -> list[str]:
    """Names of the installed modules that an installation of torch, transformers and Pillow alone would lack."""
    todo, needed = ["torch", "transformers", "huggingface_hub", "numpy", "pillow", "safetensors"], set()
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
    """Expect a `ValueError` whose message holds every one of `parts`."""
    with pytest.raises(ValueError) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"


class ModelTester:
    """Inherit as `class TestX(ModelTester)`, set `model_class` and `tiny`, and what differs of the switches."""

    model_class: type
    tiny: dict  # arguments of the configuration class
    needs_labels = True  # else an image is its own label, and given ones are ignored
    main_output = "logits"
    num_outputs = 1  # channels of the main output
    is_exported = True  # users run it elsewhere
    sizes = ((33, 47), (64, 64))

    # ---- what the tests work with -----------------------------------------------------------------------------------

    def make_config(self, **changes):
        return self.model_class.config_class(**{**self.tiny, **changes})

    def make_model(self, seed: int = 0, **changes):
        torch.manual_seed(seed)
        return self.model_class(self.make_config(**changes)).eval()

    def make_lively_model(self, **changes):
        """A model whose batch norms know their inputs.

        With fresh statistics the signal fades from layer to layer, and any two outputs are almost equal.
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
        output = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(output)
        assert torch.equal(as_tuple[0], output.loss)
        assert any(torch.equal(value, output[self.main_output]) for value in as_tuple[1:])

    def test_without_labels_there_is_a_loss_only_if_it_needs_none(self):
        model, inputs = self.make_model(), self.make_inputs()
        loss = model(inputs["pixel_values"]).loss
        if self.needs_labels:
            assert loss is None
        else:
            assert torch.equal(loss, model(**inputs).loss)

    def test_every_image_is_alone_in_its_batch(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs(batch_size=3)["pixel_values"]
        together = self.predict(model, pixel_values)
        assert (together[0] - together[1]).abs().max() > 1e-2, "too alike to tell"
        for i in range(3):
            # Other batch sizes take other kernels, which sum in another order.
            torch.testing.assert_close(
                self.predict(model, pixel_values[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-4
            )

    def test_same_input_gives_same_output(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        assert torch.equal(self.predict(model, pixel_values), self.predict(model, pixel_values))

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def test_labels_with_and_without_channel_axis_are_equal(self):
        model, inputs = self.make_model(), self.make_inputs()
        without_axis = model(**inputs).loss
        assert torch.equal(model(inputs["pixel_values"], labels=inputs["labels"][:, None]).loss, without_axis)

    @pytest.mark.parametrize("shape", [(2, 33, 46), (2, 33), (1, 33, 47), (2, 3, 33, 47)])
    def test_wrong_labels_are_refused(self, shape):
        if not self.needs_labels:
            pytest.skip("this network ignores labels: its images are its labels")
        with says("labels", "(2, 1, 33, 47)", "got", str(shape)):
            self.make_model()(self.make_inputs()["pixel_values"], labels=torch.zeros(shape))

    def test_wrong_images_are_refused(self):
        model = self.make_model()
        channels, smallest = model.config.num_channels, model.min_image_size
        for shape in ((2, channels + 1, 64, 64), (channels, 64, 64)):
            with says("pixel_values", str(channels), "got", str(shape)):
                model(torch.zeros(shape))
        for size in ((smallest - 1, 64), (64, smallest - 1)):
            with says("pixel_values", f"{smallest}x{smallest}", "got", f"{size[0]}x{size[1]}"):
                model(torch.zeros(1, channels, *size))

    # ---- training ---------------------------------------------------------------------------------------------------

    def test_every_parameter_has_a_gradient(self):
        # A narrow layer behind a ReLU can be silent by chance, but not under every seed.
        silent = None
        for seed in range(8):
            model = self.make_model(seed=seed)
            model(**self.make_inputs()).loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
            now_silent = {name for name, grad in gradients.items() if not grad.any()}
            silent = now_silent if silent is None else silent & now_silent
            if not silent:
                break
        assert not silent

    def test_steps_on_one_image_lower_the_loss(self):
        model, inputs = self.make_model().train(), self.make_inputs(batch_size=1)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0], losses

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*deprecated:FutureWarning")
    def test_gradient_checkpointing_changes_no_number(self):
        model = self.make_model().train()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        for layer in (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)):
            # On its children: some versions of transformers recompute without a call of the layer itself.
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
            # The count of batches is left out: nothing reads it where the momentum is a number.
            buffers = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
            return loss.detach(), gradients, buffers, calls

        *plain, calls_plain = run()
        model.gradient_checkpointing_enable()
        *saving, calls_saving = run()
        model.gradient_checkpointing_disable()
        *again, calls_again = run()
        assert calls_saving > calls_plain > 0, "nothing was recomputed"
        assert calls_again == calls_plain
        torch.testing.assert_close(saving, plain, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(again, plain, atol=0, rtol=0)

    def test_half_precision_is_near_single(self):
        model, inputs = self.make_lively_model(), self.make_inputs()
        exact = self.predict(model, inputs["pixel_values"])
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(**inputs)
        model.to(torch.bfloat16)
        cast = model(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
        for output in (autocast, cast):
            prediction = output[self.main_output]
            assert prediction.dtype == torch.bfloat16, "did not run in half precision"
            # bfloat16 keeps 8 bits, of which some thirty layers of random weights lose about half.
            assert (prediction.float() - exact).square().mean().sqrt() < 0.2 * exact.std()
            assert output.loss.dtype == torch.float32
            assert output.loss.isfinite()

    # ---- construction, saving, loading ------------------------------------------------------------------------------

    def test_can_be_built_without_memory(self):
        with torch.device("meta"):
            model = self.model_class(self.make_config())
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert [name for name, tensor in tensors.items() if not tensor.is_meta] == []

    def test_initialisation_covers_every_parameter_and_buffer(self):
        """transformers allocates a model without values, then relies on `_init_weights` for all that no file gives."""
        model = self.make_model()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for tensor in tensors.values():
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
            tensor._is_hf_initialized = False
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        assert [name for name, tensor in tensors.items() if not (tensor.isfinite() & (tensor != -1)).all()] == []

    def test_saved_model_opens_with_and_without_the_package(self, tmp_path):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        saved, again = tmp_path / "saved", tmp_path / "again"
        model.save_pretrained(saved)
        prediction = self.predict(model, pixel_values)
        assert prediction.std() > 1e-2, "too flat to tell one set of weights from another"
        save_file({"pixel_values": pixel_values, "prediction": prediction}, tmp_path / "tensors.safetensors")
        task = {
            "hidden": modules_beyond_transformers(),
            "num_threads": torch.get_num_threads(),
            "tensors": str(tmp_path / "tensors.safetensors"),
            "folder": str(saved),
            "again": str(again),
            "model_class": self.model_class.__name__,
            "main_output": self.main_output,
            "auto_classes": self.model_class.auto_classes,
        }
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, json.dumps(task)],
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert load_file(saved / "model.safetensors").keys() == load_file(again / "model.safetensors").keys()
        for folder in (saved, again):
            assert type(transformers.AutoConfig.from_pretrained(folder)) is self.model_class.config_class
            for auto_class in self.model_class.auto_classes:
                opened = getattr(transformers, auto_class).from_pretrained(folder)
                assert type(opened) is self.model_class
                assert torch.equal(self.predict(opened, pixel_values), prediction)

    # ---- compilers --------------------------------------------------------------------------------------------------

    def test_compiled_equals_eager(self):
        model, pixel_values = self.make_lively_model(), self.make_inputs()["pixel_values"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(
            self.predict(compiled, pixel_values), self.predict(model, pixel_values), atol=1e-6, rtol=1e-5
        )
        torch.compiler.reset()

    def test_exported_takes_any_batch_and_size(self):
        if not self.is_exported:
            pytest.skip("only training uses this network")
        model = self.make_lively_model()
        dynamic = torch.export.Dim.DYNAMIC
        exported = torch.export.export(
            model,
            (self.make_inputs(size=self.sizes[0])["pixel_values"],),
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        ).module()
        for batch_size, size in ((1, self.sizes[0]), (3, self.sizes[1]), (1, self.sizes[1][::-1])):
            pixel_values = self.make_inputs(batch_size, size)["pixel_values"]
            torch.testing.assert_close(
                exported(pixel_values)[self.main_output], self.predict(model, pixel_values), atol=1e-6, rtol=1e-5
            )
