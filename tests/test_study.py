"""The studies of the networks' parts: their variants are recipes, and their tables hold what was measured."""

import importlib.util
from pathlib import Path

import pytest
import torch

from unconceal.data.synthetic import KINDS
from unconceal.metrics import PROTOCOLS
from unconceal.networks import NETWORKS
from unconceal.training import load_recipe


ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("study", ROOT / "scripts/study.py")
study_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study_script)
STUDIES = study_script.STUDIES


def recipe_with(network, *settings):
    overrides = [f"{key}={value}" for part in settings for key, value in part.items()]
    return load_recipe(study_script.recipe_of(network), overrides)


@pytest.mark.parametrize("network", STUDIES)
def test_every_variant_is_another_network(network):
    study, built = STUDIES[network], {}
    for name, changes in study.variants.items():
        recipe = recipe_with(network, study.common, changes)
        with torch.device("meta"):
            model = NETWORKS[network].tasks["segmentation"](NETWORKS[network].config_class(**recipe.model))
        built[name] = model.config.to_json_string()
        assert model.num_parameters() > 1e5
    assert len(set(built.values())) == len(study.variants) > 2


@pytest.mark.parametrize("network", STUDIES)
def test_its_metrics_are_of_its_protocol(network):
    study = STUDIES[network]
    assert study.kind in KINDS
    protocol = PROTOCOLS[recipe_with(network, study.common, study.pretraining).protocol]
    assert {metric.removeprefix("eval_") for metric in study.metrics} <= {*protocol.best_metrics, "mean_iou_at_0.5"}


def test_baseline_of_run_is_no_straw_man():
    parameters = {}
    for name in ("plain decoder", "RUN, K = 4"):
        recipe = recipe_with("run", STUDIES["run"].variants[name])
        with torch.device("meta"):
            model = NETWORKS["run"].tasks["segmentation"](NETWORKS["run"].config_class(**recipe.model))
        parameters[name] = model.num_parameters()
    assert parameters["plain decoder"] > 0.85 * parameters["RUN, K = 4"]


def test_table_has_mean_and_deviation():
    study = STUDIES["run"]
    rows = [
        {"variant": name, "seed": seed, "parameters": 1_500_000, **dict.fromkeys(study.metrics, 0.5 + 0.1 * seed)}
        for name in study.variants
        for seed in (0, 1, 2)
    ]
    line = next(line for line in study_script.table(study, rows).splitlines() if line.startswith("| K = 2 |"))
    assert line == "| K = 2 | 1.50 M | 0.600 ± 0.100 | 0.600 ± 0.100 | 0.600 ± 0.100 |"
