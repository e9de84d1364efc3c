"""Labels and checks for the configurations of all networks."""

from transformers import PreTrainedConfig


def name_labels(config: PreTrainedConfig, num_labels: int | None):
    """Set `id2label` and `label2id` if None, before `PreTrainedConfig.__post_init__`.

    Raises:
        ValueError: If `num_labels` is not 2 and there are no names.
    """
    if config.id2label is None and num_labels not in (None, 2):
        raise ValueError(f"`num_labels`: got {num_labels}, expected 2, background and object; leave it out.")
    # transformers does not save the names of two labels. So a plain `num_labels=2` must mean these.
    if config.id2label is None:
        config.id2label = {0: "background", 1: "object"}
    if config.label2id is None and config.id2label is not None:
        config.label2id = {label: int(index) for index, label in config.id2label.items()}


def check_labels(config: PreTrainedConfig):
    """Raise `ValueError` unless the names are those of background and object.

    `from_pretrained(..., num_labels=5)` changes a configuration after it was checked.
    """
    if set(config.id2label) != {0, 1}:
        raise ValueError(
            f"`id2label`: got {config.id2label}, expected names of 0, background, and 1, object; leave `num_labels` "
            "and `id2label` out."
        )


def check_at_least(config: PreTrainedConfig, minimum: int, *names: str):
    """Raise `ValueError` unless these fields are finite and at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not minimum <= value < float("inf"):
            raise ValueError(f"`{name}`: got {value}, expected a number of {minimum} or more.")


def check_channels(config: PreTrainedConfig):
    """Raise `ValueError` unless the images have three channels."""
    if config.num_channels != 3:
        raise ValueError(
            f"`num_channels`: got {config.num_channels}, expected 3; the image processor makes gray images RGB, too."
        )
