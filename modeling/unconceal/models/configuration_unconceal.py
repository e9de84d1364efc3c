"""What the configurations of all networks share."""

from transformers import PreTrainedConfig


def name_labels(config: PreTrainedConfig, num_labels: int | None):
    """Name the two labels of a configuration that has no names; call it before `PreTrainedConfig.__post_init__`.

    Args:
        config: Its `id2label` and `label2id` are set where they are None.
        num_labels: As given to the configuration.
    """
    # transformers does not save the names of two labels, so a plain `num_labels=2` must mean these as well.
    if config.id2label is None and num_labels in (None, 2):
        config.id2label = {0: "background", 1: "object"}
    if config.label2id is None and config.id2label is not None:
        config.label2id = {label: int(index) for index, label in config.id2label.items()}


__all__ = ["name_labels"]
