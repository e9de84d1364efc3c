"""Networks, training and commands on a GPU, compared with the CPU where it has the same number type.

A machine without the libraries that training needs still runs the rest.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import noise
from PIL import Image
from save_tiny_models import PROCESSOR, TESTERS, make_tiny_model

import unconceal
from unconceal.__main__ import main


pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROOT = Path(__file__).parents[1]
# The largest error of each number type, relative to the spread of the outputs, as on the CPU.
HALVES = {torch.bfloat16: 0.2, torch.float16: 0.03}


@pytest.fixture(autouse=True)
def exact_and_fresh(monkeypatch):
    """Convolve in float32 without TF32, and let each test choose the number type of Accelerate."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=TESTERS)
def network(request):
    return make_tiny_model(request.param)


@pytest.fixture
def inputs(network):
    return TESTERS[network.config_class.model_type.split("_")[0]]().make_inputs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a network that finds edges."""
    folder = tmp_path_factory.mktemp("network")
    make_tiny_model("run").save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Return a generated data set."""
    for name in ("datasets", "omegaconf", "py_sod_metrics", "skimage", "tensorboard"):
        pytest.importorskip(name)
    from unconceal.data.builders import build_synthetic

    folder = tmp_path_factory.mktemp("scenes") / "data"
    build_synthetic("camouflage", folder, {"train": 10, "val": 3}, size=48)
    return folder


@torch.no_grad()
def predict(network, pixel_values):
    return network(pixel_values=pixel_values.to(network.device, network.dtype)).logits.float().cpu()


def test_float32_equals_the_cpu(network, inputs):
    expected = predict(network, inputs["pixel_values"])
    network.to(DEVICE)
    for one in (network, network.for_inference()):
        torch.testing.assert_close(predict(one, inputs["pixel_values"]), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_inference_form_in_half_precision_is_near_float32(network, inputs, dtype):
    expected = predict(network, inputs["pixel_values"])
    got = predict(network.to(DEVICE).for_inference(dtype), inputs["pixel_values"])
    assert (got - expected).square().mean().sqrt() < HALVES[dtype] * expected.std()


def test_compiled_inference_form_equals_eager(network, inputs):
    form = network.to(DEVICE).for_inference()
    expected = predict(form, inputs["pixel_values"])
    torch._dynamo.reset()
    form.compile()
    torch.testing.assert_close(predict(form, inputs["pixel_values"]), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_steps_lower_the_loss(network, inputs, precision):
    accelerator = Accelerator(mixed_precision=precision)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2, fused=True)
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    inputs = {name: value.to(accelerator.device) for name, value in inputs.items()}
    losses = []
    for _ in range(20):  # in float16 the first ones only search for the scale of the loss
        loss = model(**inputs).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert accelerator.device.type == DEVICE
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.95 * losses[0], losses
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_recipe_trains_and_resumes(scenes, precision, tmp_path):
    from test_training import history, train_until

    from unconceal.training.loop import train
    from unconceal.training.recipe import load_recipe

    settings = [f"mixed_precision={precision}", f"output_dir={tmp_path}", f"data.path={scenes}"]
    settings += ["processor.size={height: 32, width: 32}", "phases.segmentation.ema_decay=0.9"]
    recipe = load_recipe(ROOT / "configs/srs/smoke.yaml", [*settings, "phases.segmentation.epochs=2"])
    train_until(2, recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    last = train(recipe, resume=True).with_name("last")
    assert [row["epoch"] for row in history(last)] == [1, 2]
    assert all(math.isfinite(row["train_loss"]) for row in history(last))
    assert unconceal.load(last, "cpu").model.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "mean"), [("float32", 0.1), ("bfloat16", 8), ("float16", 1)])
def test_segment_equals_the_cpu(folder, dtype, mean, tmp_path):
    masks = []
    noise(250, 180).save(tmp_path / "image.png")  # its edges are refined
    for device, kind in (("cpu", "float32"), (DEVICE, dtype)):
        command = ["segment", str(tmp_path / "image.png"), "--model", str(folder), "--out", str(tmp_path / device)]
        assert main([*command, "--device", device, "--dtype", kind]) == 0
        masks.append(np.asarray(Image.open(tmp_path / device / "image.png"), np.float32))
    assert masks[0].std() > 10, "too flat for this test"
    assert np.abs(masks[0] - masks[1]).mean() <= mean


def test_pipeline_and_unfolding_equal_the_cpu(folder):
    image = noise(70, 50)
    on_gpu, on_cpu = (unconceal.load(folder, device) for device in (DEVICE, "cpu"))
    pipe = unconceal.SoftMaskPipeline(model=on_gpu.model, image_processor=PROCESSOR, device=DEVICE)
    np.testing.assert_allclose(pipe(image)["probs"].cpu(), on_cpu.segment(image), atol=1e-3)
    np.testing.assert_allclose(on_gpu.unfold(image).mask, on_cpu.unfold(image).mask, atol=1e-3)


def test_evaluate_equals_the_cpu(scenes, folder, tmp_path):
    from unconceal.data.loading import load_splits
    from unconceal.evaluation.networks import evaluate_model
    from unconceal.evaluation.protocols import PROTOCOLS

    command = ["evaluate", "--model", folder, "--data", scenes, "--split", "val", "--protocol", "cod"]
    assert main([*map(str, command), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["device"] == DEVICE
    model, protocol = unconceal.load(folder, "cpu").model, PROTOCOLS["cod"]
    val = load_splits(str(scenes), ["val"])["val"]
    expected = protocol.summarize(evaluate_model(model, PROCESSOR, val, protocol=protocol))
    assert result["results"] == pytest.approx(expected, abs=1e-3)
