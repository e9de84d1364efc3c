"""Exported files against their networks, their folder, refusals; and compiling."""

import errno
import json
import subprocess
import sys
import zipfile
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SMALLEST_SRS, ModelTester
from PIL import Image
from safetensors.torch import load_file, save_file
from test_modeling_opds import TINY as TINY_OPDS
from test_modeling_run import TINY as TINY_RUN
from test_modeling_srs import TINY as TINY_SRS

import unconceal.hub.export as export_module
import unconceal.hub.exported as exported_module
from unconceal import OpdsForImageSegmentation, RunForImageSegmentation, SrsConfig, SrsForImageSegmentation
from unconceal.__main__ import main as run_command
from unconceal.api import Segmenter, load, weights_digest
from unconceal.hub.export import check_sizes, describe, export_model
from unconceal.hub.exported import ExportedNetwork
from unconceal.hub.formats import FORMATS
from unconceal.hub.stage import stage_model
from unconceal.models.image_processing_unconceal import UnconcealImageProcessor
from unconceal.models.selective_scan import selective_scan
from unconceal.training.recipe import load_recipe
from unconceal.training.start import build_model
from unconceal.utils.compiling import compile_forward
from unconceal.utils.errors import UserError, run_main


NETWORKS = {
    "opds": (OpdsForImageSegmentation, TINY_OPDS),
    # Fewer stages than usual, because each takes long to trace.
    "run": (RunForImageSegmentation, {**TINY_RUN, "stage_levels": (3, 0)}),
    "run-one-stage": (RunForImageSegmentation, {**TINY_RUN, "stage_levels": (0,)}),
    "srs": (SrsForImageSegmentation, TINY_SRS),
}
SIZES = ((1, 32, 32), (2, 32, 33), (3, 40, 70), (1, 129, 33))  # batch, height, width

# Runs a program of torch.export without this package and transformers. Saves its logits, prints its metadata.
ELSEWHERE = """
import sys

sys.modules["unconceal"] = sys.modules["transformers"] = None
import torch
from safetensors.torch import load_file, save_file

files = {"metadata.json": ""}
run = torch.export.load(sys.argv[1], extra_files=files).module()
with torch.no_grad():
    save_file({name: run(pixel_values) for name, pixel_values in load_file(sys.argv[2]).items()}, sys.argv[3])
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
QUICK = (("run-one-stage", "onnx"), ("srs", "torch-export"))
WAYS = [
    pytest.param(way, id="-".join(way), marks=() if way in QUICK else pytest.mark.thorough)
    for way in product(NETWORKS, FORMATS)
]


@pytest.fixture(scope="module", params=WAYS)
def exported(request, tmp_path_factory):
    """Return the report, the model, what the file gives for `make_images`, and its metadata."""
    name, format = request.param
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
    model, folder = make_tester(name).make_lively_model(), tmp_path_factory.mktemp(name)
    processor = UnconcealImageProcessor(size={"height": 48, "width": 40})
    report = export_model(Segmenter(model, processor), format, folder / "exported")
    if format == "onnx":
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        assert session.get_outputs()[0].shape == ["batch", 1, "height", "width"]
        given = {name: images.numpy() for name, images in make_images().items()}
        logits = {name: session.run(["logits"], {"pixel_values": images})[0] for name, images in given.items()}
        logits = {name: torch.from_numpy(one) for name, one in logits.items()}
        return report, model, logits, session.get_modelmeta().custom_metadata_map
    save_file(make_images(), folder / "images.safetensors")
    files = [report.path, folder / "images.safetensors", folder / "logits.safetensors"]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return report, model, load_file(files[-1]), json.loads(done.stdout)


def make_images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {str(size): torch.randn(size[0], 3, *size[1:], generator=generator) for size in SIZES}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_gives_the_logits_of_the_network_at_any_size(exported):
    report, model, logits, _ = exported
    assert report.difference < 1e-5
    assert (report.tolerance, report.stray_share) == (1e-4, 0)
    for name, pixel_values in make_images().items():
        with torch.no_grad():
            expected = model(pixel_values).logits
        assert expected.std() > 1e-2, "too flat to tell"
        torch.testing.assert_close(logits[name], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_folder_holds_only_the_file_and_its_settings(exported):
    report, model, *_ = exported
    folder = report.path.parent
    assert {path.name for path in folder.iterdir()} == {report.path.name, "config.json", "preprocessor_config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == model.config.model_type
    assert not {"auto_map", "custom_pipelines"} & config.keys(), "names code that is not here"
    # No local path: neither in traces nor of the package.
    parts = [report.path.read_bytes()]
    if report.path.suffix == ".pt2":
        with zipfile.ZipFile(report.path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    paths = [str(Path(module.__file__).parent).encode() for module in (export_module, torch)]
    assert not any(path in part for path in paths for part in parts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_metadata_say_how_to_prepare_an_image(exported):
    report, model, _, about = exported
    if report.opset:
        file = pytest.importorskip("onnx").load(report.path)
        assert about["opset"] == str(file.opset_import[0].version) == str(report.opset)
    assert f"{about['network'].title()}Config" == type(model.config).__name__
    assert int(about["min_image_size"]) == model.min_image_size
    # An image prepared by the metadata equals the processor's.
    height, width = json.loads(about["image_size"])
    assert (height, width, about["channel_order"]) == (48, 40, "rgb")
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    prepared = pixels * np.float32(json.loads(about["rescale_factor"]))
    prepared = (prepared - json.loads(about["image_mean"])) / json.loads(about["image_std"])
    processor = UnconcealImageProcessor.from_pretrained(report.path.parent)
    torch.testing.assert_close(
        torch.from_numpy(prepared.transpose(2, 0, 1)[None]).float(), processor(images=pixels).pixel_values
    )


def test_metadata_tell_tiles_from_images_to_resize(segmenter):
    sized = {"size": {"height": 64, "width": 48}}
    about = [
        describe(segmenter.model, UnconcealImageProcessor(**sized, do_resize=resize), 20) for resize in (True, False)
    ]
    assert [each["do_resize"] for each in about] == ["true", "false"]
    assert [each.get("image_size") for each in about] == ["[64, 48]", None]
    assert [each.get("tile_size") for each in about] == [None, "[64, 48]"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_exported_folder_segments_like_its_network(exported):
    report, model, *_ = exported
    folder, image = report.path.parent, Image.effect_noise((90, 70), 60)
    network, file = Segmenter(model, UnconcealImageProcessor.from_pretrained(folder)), load(folder)
    np.testing.assert_allclose(file.segment(image, 2, "always"), network.segment(image, 2, "always"), atol=1e-3)
    assert weights_digest(file.model) != weights_digest(model), "results of a file are not those of the weights"
    with pytest.raises(UserError, match="no stages"):
        file.explain(image)


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
    assert UnconcealImageProcessor.from_pretrained(tmp_path / "one").size == {"height": 48, "width": 32}
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_inference_form_is_traced_as_plain_operations():
    """Fused convolutions of oneDNN exist only in eager mode."""
    form = make_tester("opds").make_lively_model().for_inference()
    graph = torch.export.export(form, (), {"pixel_values": torch.randn(1, 3, 64, 64)}, strict=False).graph
    targets = {str(node.target) for node in graph.nodes}
    assert "aten.conv2d.default" in targets
    assert not {target for target in targets if "mkldnn" in target}


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
    (tmp_path / "file").write_text("")
    new, foreign = tmp_path / "new", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.onnx").write_text("mine")
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    for model, format, out, options, *says in (
        (checkpoint, "tflite", new, (), "'tflite'", "onnx or torch-export"),
        (checkpoint, "onnx", new, ("--opset", 17), "17", "18 to 23"),
        (checkpoint, "torch-export", new, ("--opset", 18), "opset", "torch-export"),
        (tmp_path / "none", "torch-export", new, (), "not a folder"),
        (checkpoint, "torch-export", new, ("--size", 32, 31), "31x32", "at least 32x32"),
        (checkpoint, "torch-export", tmp_path / "file", (), "is not a folder"),
        (checkpoint, "torch-export", tmp_path / "file" / "deeper", (), "cannot write"),
        (checkpoint, "torch-export", checkpoint, (), "not an empty folder", "--overwrite"),
        (checkpoint, "torch-export", checkpoint, ("--overwrite",), "which no export wrote"),
        (checkpoint, "torch-export", foreign, ("--overwrite",), "no config.json of opds, run, srs"),
    ):
        assert main(model, "--format", format, "--out", out, *options) == 2, says
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert [part for part in says if part not in error] == [], error
    assert not new.exists() and (foreign / "model.onnx").read_text() == "mine"
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    assert main(checkpoint, "--format", "onnx", "--out", new) == 2
    error = capsys.readouterr().err
    assert "onnx, onnxscript, onnxruntime" in error
    assert "pip install 'unconceal[onnx]'" in error


def test_mistakes_with_exported_folders_give_one_line(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    (folder / "model.onnx").write_bytes(b"no program")
    recipe = load_recipe(Path(__file__).parents[1] / "configs" / "srs" / "smoke.yaml")
    for act, *says in (
        (lambda: load(folder), "cannot run", "export the checkpoint again"),
        (lambda: load(folder, device="meta"), "the device 'meta'", "cannot use here"),
        (lambda: load(folder, dtype="float16"), "float16", "float32"),
        (lambda: load(folder, compile=True), "--compile"),
        (lambda: stage_model(folder, "me/name", tmp_path / "upload"), "push needs the network"),
        (lambda: build_model(recipe, "segmentation", folder), "cannot start from"),
    ):
        with pytest.raises(UserError) as caught:
            act()
        assert [part for part in says if part not in str(caught.value)] == [], caught.value
        assert "\n" not in str(caught.value)
    assert main(folder, "--format", "onnx", "--out", tmp_path / "new") == 2
    monkeypatch.setattr(exported_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxruntime.*unconceal\[onnx\]"):
        load(folder)


def test_memory_of_an_exported_file_is_explained():
    def run(images):
        raise Exception("Failed to allocate memory for requested buffer of size 1073741824")

    network = ExportedNetwork(Path("model.onnx"), SrsConfig(), run)
    with pytest.raises(UserError, match="out of memory with 1 image"):
        Segmenter(network, UnconcealImageProcessor(size=32)).segment(Image.new("RGB", (40, 40)))


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
    monkeypatch.setattr(export_module, "open_program", lambda path: run(segmenter.model))
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

    monkeypatch.setattr(export_module, "open_program", lambda path: turn_spot(3))
    report = export_model(segmenter, "torch-export", tmp_path / "out")
    assert 0.9 < report.difference <= 1
    assert report.tolerance < 1e-2
    assert report.stray_share == pytest.approx(9 / (32 * 32), abs=1e-6)  # of the smallest size, one image
    monkeypatch.setattr(export_module, "open_program", lambda path: turn_spot(4))
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
    export_model(segmenter, "torch-export", tmp_path / "out", size=(64, 64), check=False)
    assert all(parameter.requires_grad for parameter in segmenter.model.decoder.parameters()), "changed the network"
    assert segmenter.processor.size == {"height": 32, "width": 40}, "changed the processor"
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns

    def fail(*_):
        raise RuntimeError("first line\nsecond line")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "_save_program", fail)
        with pytest.raises(UserError, match="SrsFor.* as torch-export: RuntimeError: first line second"):
            export_model(segmenter, "torch-export", tmp_path / "out", overwrite=True, check=False)
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    report = export_model(segmenter, "torch-export", tmp_path / "out", overwrite=True, check=False)
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns > before
    assert (report.difference, report.eager_seconds, report.num_bytes) == (None, None, len(b"program"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_not_blamed_on_the_network(segmenter, traced_once, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "_save_program", fail)
    with pytest.raises(OSError, match="No space left"):
        export_model(segmenter, "torch-export", tmp_path / "out", check=False)
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_the_check_differ_and_are_allowed():
    for own in ((32, 32), (64, 48), (256, 256), (384, 384), (1024, 1024)):
        first, odd, smaller = check_sizes(own, 32)
        assert first == own
        assert min(*odd, *smaller) >= 32
        assert odd[0] % 2 and odd[1] % 2 and odd[0] != odd[1]
        assert smaller[0] <= own[0] and smaller[1] <= own[1]


# ---- compiling ------------------------------------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, pixel_values):
        return pixel_values * 2


def compile_with(monkeypatch, backend) -> torch.nn.Module:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    network = Doubled()
    compile_forward(network)
    return network


@pytest.mark.parametrize("batch_sizes, compiled", [((4, 3, 1, 2), (4,)), ((1, 1, 2, 3), (1, 2))])
def test_compiling_is_rare_and_reported(batch_sizes, compiled, monkeypatch, caplog):
    graphs = []
    network = compile_with(monkeypatch, lambda graph, _: graphs.append(graph) or graph)
    for batch_size in batch_sizes:
        images = torch.rand(batch_size, 3, 8, 6)
        torch.testing.assert_close(network(pixel_values=images), images * 2)
    lines = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert len(graphs) == len(lines) == len(compiled)
    for batch_size, line in zip(compiled, lines, strict=True):
        assert f"{batch_size} image(s) of 6x8" in line


def test_missing_compiler_gives_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nfound")

    with pytest.raises(UserError, match=r"cannot compile Doubled on cpu: .*no compiler found.*leave out --compile"):
        compile_with(monkeypatch, fail)(pixel_values=torch.rand(1, 3, 8, 6))


@pytest.mark.thorough  # takes minutes; test_modeling_opds.py compiles one network
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["opds", "run", "srs"])
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
