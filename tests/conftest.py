"""Settings for all tests."""

import os

import pytest


# Tiny tensors are slower on several threads. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# No test uses the internet.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

pytest.register_assert_rewrite("common", "space_server")


def pytest_runtest_setup(item):
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.fixture(autouse=True)
def own_backbones():
    """Undo what a checkpoint's code registers: its copies of the backbones."""
    yield
    from transformers import AutoConfig

    from unconceal.models.configuration_efficientnet_lite import EfficientNetLiteConfig
    from unconceal.models.configuration_mscan import MscanConfig

    for config in (EfficientNetLiteConfig, MscanConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with the smallest SRS, untrained, and its processor for 32x32."""
    import torch
    from common import SMALLEST_SRS

    import unconceal

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    unconceal.SrsForImageSegmentation(unconceal.SrsConfig(**SMALLEST_SRS)).save_pretrained(folder)
    unconceal.UnconcealImageProcessor(size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def without_pictures(request, monkeypatch):
    """Spare tiny trainings their plots and sample sheets, unless the test has the marker `pictures`."""
    if request.node.get_closest_marker("pictures"):
        return
    from unconceal.training import logs, loop

    monkeypatch.setattr(loop, "write_report", lambda recipe: None)
    monkeypatch.setattr(logs.RunLog, "draw_samples", lambda *args: None)


@pytest.fixture
def segment(checkpoint, capsys):
    """Run `unconceal segment` and return (exit code, stdout, stderr)."""
    from unconceal.__main__ import main

    def run(*args):
        code = main(["segment", *map(str, args), "--model", str(checkpoint), "--device", "cpu"])
        return code, *capsys.readouterr()

    return run
