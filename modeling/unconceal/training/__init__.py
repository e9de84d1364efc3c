"""Training: recipes, the loop, checkpoints."""

from .loop import train
from .recipe import Recipe, load_recipe


__all__ = ["Recipe", "load_recipe", "train"]
