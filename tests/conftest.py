"""Settings for all tests."""

import os

import pytest


# Tiny tensors are slower on several threads, and tests start processes that would compete. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# No test may depend on the Hub, nor wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

pytest.register_assert_rewrite("common")
