"""The study of RUN's parts: its variants are recipes, and its table holds what was measured."""

import importlib.util
from pathlib import Path

import pytest
import torch

from unconceal.networks import NETWORKS
from unconceal.training import load_recipe


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study_run", ROOT / "scripts/study_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_is_another_network(study):
    built = {}
    for name, changes in study.VARIANTS.items():
        recipe = load_recipe(study.RECIPE, [f"{key}={value}" for key, value in changes.items()])
        with torch.device("meta"):
            model = NETWORKS["run"].tasks["segmentation"](NETWORKS["run"].config_class(**recipe.model))
        built[name] = model.num_parameters()
    assert len(set(built.values())) == len(built)
    # The baseline is no straw man.
    assert built["plain decoder"] > 0.85 * built["RUN, K = 4"]


def test_table_has_mean_and_deviation(study):
    rows = [
        {"variant": name, "seed": seed, "parameters": 1_500_000, **dict.fromkeys(study.METRICS, 0.5 + 0.1 * seed)}
        for name in study.VARIANTS
        for seed in (0, 1, 2)
    ]
    line = next(line for line in study.table(rows).splitlines() if line.startswith("| K = 2 |"))
    assert line == "| K = 2 | 1.50 M | 0.600 ± 0.100 | 0.600 ± 0.100 | 0.600 ± 0.100 |"
