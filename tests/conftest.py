"""Settings for all tests."""

import os

import pytest


# Tiny tensors are slower on several threads. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# No test uses the internet.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

pytest.register_assert_rewrite("common")
