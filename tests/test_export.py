"""Exported files against their networks, their folder, refusals; and compiling."""

import json
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SMALLEST_SRS, ModelTester
from safetensors.torch import save_file
from test_modeling_opds import TINY as TINY_OPDS
from test_modeling_run import TINY as TINY_RUN
from test_modeling_srs import TINY as TINY_SRS

import unconceal.hub.export as export_module
from unconceal import (
    OpdsForImageSegmentation,
    RunForImageSegmentation,
    SrsConfig,
    SrsForImageSegmentation,
    SrsForReconstruction,
)
from unconceal.__main__ import main as run_command
from unconceal.api import Segmenter, load
from unconceal.hub.export import check_sizes, export_model
from unconceal.hub.formats import FORMATS
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.selective_scan import selective_scan
from unconceal.utils.errors import UserError, run_main


NETWORKS = {
    "opds": (OpdsForImageSegmentation, TINY_OPDS),
    # Two stages, the first at an eighth of the size. Four take twice as long to trace.
    "run": (RunForImageSegmentation, {**TINY_RUN, "stage_levels": (3, 0)}),
    "srs": (SrsForImageSegmentation, TINY_SRS),
}

# Runs a program of torch.export without this package and transformers.
ELSEWHERE = """
import sys

sys.modules["unconceal"] = sys.modules["transformers"] = None
import torch
from safetensors.torch import load_file

tensors = load_file(sys.argv[2])
files = {"metadata.json": ""}
logits = torch.export.load(sys.argv[1], extra_files=files).module()(tensors["pixel_values"])
assert (logits - tensors["logits"]).abs().max() < 1e-4
print(files["metadata.json"])
"""


def make_tester(name: str) -> ModelTester:
    tester = ModelTester()
    tester.model_class, tester.tiny = NETWORKS[name]
    return tester


def main(*args):
    """Run `unconceal export` as a shell would, and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: run_command(["export", *map(str, args)]))
    return caught.value.code


@pytest.fixture(scope="module")
def segmenter():
    """Return the smallest network, with random weights."""
    torch.manual_seed(0)
    model = SrsForImageSegmentation(SrsConfig(**SMALLEST_SRS)).eval()
    return Segmenter(model, UnconcealImageProcessor(size={"height": 32, "width": 40}, image_mean=0.3, image_std=0.2))


@pytest.fixture(scope="module")
def checkpoint(segmenter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "smallest"
    segmenter.model.save_pretrained(folder)
    segmenter.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def traced_once(monkeypatch):
    """Replace the tracing, for tests of what happens around it."""
    monkeypatch.setattr(export_module, "_trace", lambda *_: None)

    def save(program, path, *_):
        path.write_bytes(b"program")

    monkeypatch.setattr(export_module, "_save_program", save)


# ---- files ----------------------------------------------------------------------------------------------------------


# The others take minutes.
QUICK = (("run", "onnx"), ("srs", "onnx"), ("srs", "torch-export"))
WAYS = [
    pytest.param(way, id="-".join(way), marks=() if way in QUICK else pytest.mark.thorough)
    for way in product(NETWORKS, ("onnx", "torch-export"))
]


@pytest.fixture(scope="module", params=WAYS)
def exported(request, tmp_path_factory):
    """Return (format, report, model, the file as a function)."""
    name, format = request.param
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
    model = make_tester(name).make_lively_model()
    processor = UnconcealImageProcessor(size={"height": 64, "width": 48})
    report = export_model(Segmenter(model, processor), format, tmp_path_factory.mktemp(name) / "exported")
    if format == "onnx":
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        assert [(put.name, put.shape) for put in session.get_inputs()] == [
            ("pixel_values", ["batch", 3, "height", "width"])
        ]
        assert [(put.name, put.shape) for put in session.get_outputs()] == [
            ("logits", ["batch", 1, "height", "width"])
        ]

        def run(pixel_values):
            return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

        return format, report, model, run
    return format, report, model, torch.export.load(report.path).module()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_gives_the_logits_of_the_network_at_any_size(exported):
    _, report, model, run = exported
    assert report.difference < 1e-5
    assert (report.tolerance, report.stray_share) == (1e-4, 0)
    for batch_size, height, width in ((1, 32, 32), (2, 32, 33), (3, 70, 130), (1, 257, 33), (5, 64, 64)):
        pixel_values = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected = model(pixel_values).logits
        assert expected.std() > 1e-2, "too flat to tell"
        torch.testing.assert_close(run(pixel_values), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_folder_holds_only_the_file_and_its_settings(exported):
    _, report, model, _ = exported
    folder = report.path.parent
    assert {path.name for path in folder.iterdir()} == {report.path.name, "config.json", "preprocessor_config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model.config.model_type
    assert not {"auto_map", "custom_pipelines"} & config.keys(), "names code that is not here"
    assert UnconcealImageProcessor.from_pretrained(folder).size == {"height": 64, "width": 48}
    # No local path: neither in traces nor of the package.
    if report.path.suffix == ".pt2":
        with zipfile.ZipFile(report.path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    else:
        parts = [report.path.read_bytes()]
    paths = [str(Path(module.__file__).parent).encode() for module in (export_module, torch)]
    assert not any(path in part for path in paths for part in parts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_metadata_say_how_to_prepare_an_image(exported, tmp_path):
    format, report, model, run = exported
    if format == "onnx":
        onnx = pytest.importorskip("onnx")
        model_proto = onnx.load(report.path)
        about = {entry.key: entry.value for entry in model_proto.metadata_props}
        assert about["opset"] == str(model_proto.opset_import[0].version) == str(report.opset)
    else:
        pixel_values = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(3))
        tensors = {"pixel_values": pixel_values, "logits": run(pixel_values).detach()}
        save_file(tensors, tmp_path / "tensors.safetensors")
        command = [sys.executable, "-c", ELSEWHERE, report.path, tmp_path / "tensors.safetensors"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        about = json.loads(done.stdout)
    assert about["network"] in NETWORKS and isinstance(model, NETWORKS[about["network"]][0])
    # An image prepared by the metadata equals the processor's.
    height, width = json.loads(about["image_size"])
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert about["channel_order"] == "rgb"
    prepared = pixels * np.float32(json.loads(about["rescale_factor"]))
    prepared = (prepared - json.loads(about["image_mean"])) / json.loads(about["image_std"])
    processor = UnconcealImageProcessor.from_pretrained(report.path.parent)
    torch.testing.assert_close(
        torch.from_numpy(prepared.transpose(2, 0, 1)[None]).float(), processor(images=pixels).pixel_values
    )
    assert int(about["min_image_size"]) == model.min_image_size


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("format", FORMATS)
def test_command_exports_half_precision_as_float32_and_is_reproducible(format, checkpoint, tmp_path, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    half = tmp_path / "half"
    load(checkpoint, "cpu", "bfloat16").model.save_pretrained(half)
    UnconcealImageProcessor().save_pretrained(half)
    opset = ["--opset", "18"] if format == "onnx" else []
    for out in ("one", "two"):
        assert main(half, "--format", format, "--out", tmp_path / out, "--size", 48, 32, *opset) == 0
        output = capsys.readouterr().out
        for part in (str(tmp_path / out / FORMATS[format]), "from a checkpoint in bfloat16", "32x48", "difference"):
            assert part in output
        assert ("opset 18" in output) == (format == "onnx")
    for name in (FORMATS[format], "config.json", "preprocessor_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert json.loads((tmp_path / "one" / "preprocessor_config.json").read_text())["size"] == {
        "height": 48,
        "width": 32,
    }
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "float32"
    assert load(half, "cpu").model.dtype == torch.bfloat16


def test_a_scan_is_exported_as_one_loop():
    """Unrolled, its steps would be thousands of nodes. tests/test_selective_scan.py compares the values."""

    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan(x, delta, A, B, C)

    inputs = (*torch.rand(2, 2, 6, 17), -torch.rand(6, 3), *torch.randn(2, 2, 2, 3, 17))
    nodes = torch.export.export(Scan(), inputs).graph.nodes
    assert sum(node.target is torch.ops.higher_order.scan for node in nodes) == 1
    assert len(nodes) < 60


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_mistakes_of_users_give_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    reconstruction = tmp_path / "reconstruction"
    SrsForReconstruction(SrsConfig(**SMALLEST_SRS)).save_pretrained(reconstruction)
    UnconcealImageProcessor().save_pretrained(reconstruction)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    new = tmp_path / "new"
    for args, *says in (
        ((checkpoint, "--format", "tflite", "--out", new), "'tflite'", "onnx or torch-export"),
        ((checkpoint, "--format", "onnx", "--out", new, "--opset", 17), "17", "18 to 23"),
        ((checkpoint, "--format", "torch-export", "--out", new, "--opset", 18), "opset", "torch-export"),
        ((tmp_path / "empty", "--format", "torch-export", "--out", new), "without config.json"),
        ((tmp_path / "none", "--format", "torch-export", "--out", new), "not a folder"),
        ((reconstruction, "--format", "torch-export", "--out", new), "SrsForReconstruction", "trained to segment"),
        ((checkpoint, "--format", "torch-export", "--out", new, "--size", 32, 31), "31x32", "at least 32x32"),
        ((checkpoint, "--format", "torch-export", "--out", tmp_path / "file"), "is not a folder"),
        ((checkpoint, "--format", "torch-export", "--out", tmp_path / "file" / "deeper"), "cannot write"),
        ((checkpoint, "--format", "torch-export", "--out", checkpoint), "not an empty folder", "--overwrite"),
        ((checkpoint, "--format", "torch-export", "--out", checkpoint, "--overwrite"), "which no export wrote"),
    ):
        assert main(*args) == 2, args
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert [part for part in says if part not in error] == [], error
    assert not new.exists()
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    assert main(checkpoint, "--format", "onnx", "--out", new) == 2
    error = capsys.readouterr().err
    assert "onnx, onnxscript, onnxruntime" in error
    assert "pip install 'unconceal[onnx]'" in error


@pytest.mark.parametrize(
    "run, says",
    [
        (lambda model: lambda images: model(images).logits * (1 + 2e-4) + 2e-4, "differ by up to"),
        (lambda model: lambda images: model(images).logits * float("nan"), "differ by up to nan"),
        (lambda model: lambda images: model(images).logits[:1], "logits of (1, 1, 32, 40) for 3 image(s) of 40x32"),
        (lambda model: lambda images: model(images[:, :2]).logits, "fails for 1 image(s) of 40x32"),
    ],
)
def test_differing_export_is_not_written(run, says, segmenter, traced_once, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_open_program", lambda path: run(segmenter.model))
    with pytest.raises(UserError, match="(?s)nothing is written") as caught:
        export_model(segmenter, "torch-export", tmp_path / "out")
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_small_spot_that_differs_is_accepted_and_reported(segmenter, traced_once, tmp_path, monkeypatch):
    def turn_spot(side):
        def run(images):
            logits = segmenter.model(images).logits
            logits[0, 0, :side, :side] += 1
            return logits

        return run

    monkeypatch.setattr(export_module, "_open_program", lambda path: turn_spot(3))
    report = export_model(segmenter, "torch-export", tmp_path / "out")
    assert 0.9 < report.difference <= 1
    assert report.tolerance < 1e-2
    assert report.stray_share == pytest.approx(9 / (32 * 32), abs=1e-6)  # of the smallest size, one image
    monkeypatch.setattr(export_module, "_open_program", lambda path: turn_spot(4))
    with pytest.raises(UserError, match="in 1.2% of the pixels"):
        export_model(segmenter, "torch-export", tmp_path / "other")


def test_network_that_amplifies_rounding_gets_a_larger_tolerance():
    images = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for factor, least, most in ((1, 1e-4, 1e-4), (2e2, 1.1e-4, 1e-3), (1e7, 1e-2, 1e-2)):
        # Multiplies differences; the logits stay below 2.
        def network(images, factor=factor):
            return (images * factor).sin()

        assert least <= export_module._tolerance(network, images, network(images)) <= most


def test_overwrite_keeps_the_old_export_if_the_new_one_fails(segmenter, traced_once, tmp_path, monkeypatch):
    export_model(segmenter, "torch-export", tmp_path / "out", check=False)
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="--overwrite"):
        export_model(segmenter, "torch-export", tmp_path / "out", check=False)

    def fail(*_):
        raise RuntimeError("first line\nsecond line")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "_save_program", fail)
        with pytest.raises(
            UserError, match="SrsForImageSegmentation as torch-export: RuntimeError: first line second"
        ):
            export_model(segmenter, "torch-export", tmp_path / "out", overwrite=True, check=False)
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    report = export_model(segmenter, "torch-export", tmp_path / "out", overwrite=True, check=False)
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns > before
    assert (report.difference, report.eager_seconds, report.num_bytes) == (None, None, len(b"program"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_does_not_change_the_network(segmenter, traced_once, tmp_path):
    requires_grad = [parameter.requires_grad for parameter in segmenter.model.parameters()]
    export_model(segmenter, "torch-export", tmp_path / "out", size=(64, 64), check=False)
    assert [parameter.requires_grad for parameter in segmenter.model.parameters()] == requires_grad
    assert segmenter.processor.size == {"height": 32, "width": 40}


def test_sizes_of_the_check_differ_and_are_allowed():
    for own in ((32, 32), (64, 48), (256, 256), (384, 384), (1024, 1024)):
        first, odd, smaller = check_sizes(own, 32)
        assert first == own
        assert min(*odd, *smaller) >= 32
        assert odd[0] % 2 and odd[1] % 2 and odd[0] != odd[1]
        assert smaller[0] <= own[0] and smaller[1] <= own[1]


# ---- compiling ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough  # the base tester compiles each forward pass
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_equals_eager_forward_and_backward(name, dynamic):
    """The traced passes run as they are, without a C++ compiler."""
    tester = make_tester(name)
    model = tester.make_lively_model()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def learn(network, inputs):
        model.load_state_dict(start)
        model.zero_grad()
        loss = network(**inputs).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    # At these sizes no maximum and no ReLU is so close to undecided that the last bit changes the gradients.
    for size in ((33, 47), (45, 70)) if dynamic else ((33, 47),):
        inputs = tester.make_inputs(size=size)
        model.eval()
        expected = tester.predict(model, inputs["pixel_values"])
        torch.testing.assert_close(tester.predict(compiled, inputs["pixel_values"]), expected, atol=1e-5, rtol=1e-4)
        model.train()
        loss, gradients = learn(model, inputs)
        compiled_loss, compiled_gradients = learn(compiled, inputs)
        torch.testing.assert_close(compiled_loss, loss)
        assert compiled_gradients.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            # Sums over all pixels, in another order.
            scale = gradient.abs().max().clamp(min=1e-3)
            assert (compiled_gradients[parameter] - gradient).abs().max() < 1e-3 * scale, parameter
    torch.compiler.reset()
