"""Encoders from transformers or timm with features at strides 4 to 32."""

import copy
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig
from transformers import initialization as init

from .configuration_efficientnet_lite import EfficientNetLiteConfig
from .configuration_mscan import MscanConfig
from .modeling_efficientnet_lite import EfficientNetLiteBackbone
from .modeling_mscan import MscanBackbone
from .modeling_unconceal import UnconcealPreTrainedModel


NUM_LEVELS = 4
# Strides double from level to level. Image sides are padded to a multiple of the coarsest.
FINEST_STRIDE = 4
COARSEST_STRIDE = FINEST_STRIDE * 2 ** (NUM_LEVELS - 1)
# Our own encoders. The class that transformers knows by a `model_type` may come from another folder.
OWN_CONFIGS = {config.model_type: config for config in (EfficientNetLiteConfig, MscanConfig)}
OWN_BACKBONES = {EfficientNetLiteConfig: EfficientNetLiteBackbone, MscanConfig: MscanBackbone}
LEVELS_IN_WORDS = f"{NUM_LEVELS} levels, at strides 4, 8, 16 and 32"


def make_backbone_config(
    given: dict | PreTrainedConfig | None, num_channels: int, default: str = MscanConfig.model_type
) -> PreTrainedConfig:
    """Return the configuration of an encoder, by default with four levels.

    Args:
        given: Fields with a `model_type`, or a configuration, which is copied.
        num_channels: Image channels if nothing is given.
        default: `model_type` if nothing is given.

    Raises:
        ValueError: If the type is unknown or there are fewer levels.
    """
    if given is None:
        given = {"model_type": default, "num_channels": num_channels}
    if isinstance(given, dict):
        given = dict(given)
        model_type = given.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`backbone_config`: got `model_type` {model_type!r}, expected one of transformers, such as {default}."
            )
        given = (OWN_CONFIGS.get(model_type) or CONFIG_MAPPING[model_type])(**given)
    if not hasattr(given, "out_indices"):
        raise ValueError(f"`backbone_config`: got {given.model_type}, which is not a backbone; choose a backbone.")
    given = copy.deepcopy(given)
    own = OWN_CONFIGS.get(given.model_type)
    if own and not isinstance(given, own):
        given = own.from_dict(given.to_dict())  # it came with the code of another folder
    names = getattr(given, "stage_names", None)  # timm names its stages when it is built
    indices = list(given.out_indices or [-1])
    if indices in ([-1], [len(names or ()) - 1]):  # the default of transformers: only the last level
        # The first name can be that of the stem.
        stages = [name for name in names or () if name.startswith(("stage", "layer"))]
        if names and len(stages) < NUM_LEVELS:
            raise ValueError(
                f"`backbone_config`: {given.model_type} has {len(stages)} ({', '.join(stages)}), expected "
                f"{LEVELS_IN_WORDS}; choose another backbone."
            )
        given.out_indices = [names.index(name) for name in stages[-NUM_LEVELS:]] or list(range(-NUM_LEVELS, 0))
    return given


def check_backbone_config(config: PreTrainedConfig):
    """Raise `ValueError` unless `backbone_config` has four levels and matching channels."""
    backbone_config = config.backbone_config
    # The levels of timm have no names before they are built.
    levels = getattr(backbone_config, "out_features", None) or backbone_config.out_indices
    if len(levels) != NUM_LEVELS:
        raise ValueError(
            f"`backbone_config`: {backbone_config.model_type} returns {len(levels)} ({', '.join(map(str, levels))}), "
            f"expected {LEVELS_IN_WORDS}; set `out_features`."
        )
    channels = getattr(backbone_config, "num_channels", config.num_channels)
    if channels != config.num_channels:
        raise ValueError(
            f"`num_channels`: got {config.num_channels}, but {channels} in `backbone_config`; set both to one number."
        )


class UnconcealBackboneModel(UnconcealPreTrainedModel):
    """Base class of networks with a pretrained encoder."""

    has_backbone = True

    def make_backbone(self) -> torch.nn.Module:
        """Return the encoder of `config.backbone_config` with random weights."""
        config = self.config.backbone_config
        own = OWN_BACKBONES.get(type(config))
        return (own._from_config if own else AutoBackbone.from_config)(config)

    @classmethod
    def from_backbone(cls, backbone: str, **config_kwargs) -> "UnconcealBackboneModel":
        """Build the network on a pretrained encoder, the rest with random weights.

        Args:
            backbone: Folder or Hub id of a transformers backbone, a classifier with one, or a timm checkpoint.
            config_kwargs: Further arguments of the configuration.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If it is not an encoder with four levels, or weights are missing.
        """
        backbone_config = AutoConfig.from_pretrained(backbone)
        if backbone_config.model_type == "timm_wrapper":  # how transformers reads checkpoints of timm
            backbone_config = {"model_type": "timm_backbone", "backbone": backbone_config.architecture}
        model = cls(cls.config_class(backbone_config=backbone_config, **config_kwargs))
        model.load_backbone(backbone)
        return model

    def load_backbone(self, source: str):
        """Load every weight of the encoder; `source` is as in `from_backbone`.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If the weights do not fit this encoder. Nothing is changed then.
        """
        kind, config = type(self.backbone), self.config.backbone_config
        if config.model_type == "timm_backbone":
            prefix = "local-dir:" if Path(source).is_dir() else "hf-hub:" if "/" in source else ""
            with init.no_init_weights():  # it would reset the running statistics
                loaded = kind.from_pretrained(prefix + source, config=config)
            lacking = set(self.backbone.state_dict()) ^ set(loaded.state_dict())
        else:
            # The error below names weights of other shapes.
            loaded, report = kind.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
            own, prefix = tuple(f"{name}." for name, _ in self.backbone.named_children()), f"{kind.base_model_prefix}."
            lacking = {key for key in report["unexpected_keys"] if key.removeprefix(prefix).startswith(own)}
            lacking |= report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
        if lacking:
            raise ValueError(
                f"got {source}, whose weights do not fit {kind.__name__}: {len(lacking)} are missing, unknown or of "
                f"another shape, such as {min(lacking)}; use weights of the architecture of `backbone_config`."
            )
        self.backbone.load_state_dict(loaded.state_dict())

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the features of the encoder, finest first.

        Takes (B, 3, H, W), sides multiples of `COARSEST_STRIDE`.

        Raises:
            ValueError: If the features are not at strides 4, 8, 16 and 32.
        """
        feature_maps = self.backbone(pixel_values).feature_maps
        if torch.compiler.is_compiling():
            return feature_maps  # sizes are symbolic
        height, width = pixel_values.shape[-2:]
        got = [f"{feature_map.shape[-1]}x{feature_map.shape[-2]}" for feature_map in feature_maps]
        expected = [f"{width // s}x{height // s}" for s in (FINEST_STRIDE * 2**level for level in range(NUM_LEVELS))]
        if got != expected:
            raise ValueError(
                f"`backbone_config`: got {', '.join(got)} from {self.config.backbone_config.model_type}, "
                f"expected {', '.join(expected)}, strides 4, 8, 16 and 32; choose another backbone."
            )
        return feature_maps
