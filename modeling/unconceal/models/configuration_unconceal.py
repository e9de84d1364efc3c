"""Labels for the configurations of all networks."""

from transformers import PreTrainedConfig


def name_labels(config: PreTrainedConfig, num_labels: int | None):
    """Set missing label names; call before `PreTrainedConfig.__post_init__`.

    Args:
        config: Configuration whose `id2label` and `label2id` are set if None.
        num_labels: Value that the configuration was given.
    """
    # transformers does not save the names of two labels. So a plain `num_labels=2` must mean these.
    if config.id2label is None and num_labels in (None, 2):
        config.id2label = {0: "background", 1: "object"}
    if config.label2id is None and config.id2label is not None:
        config.label2id = {label: int(index) for index, label in config.id2label.items()}


__all__ = ["name_labels"]
