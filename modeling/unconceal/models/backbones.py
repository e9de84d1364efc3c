"""The encoders of networks that stand on a backbone: any of transformers or timm with features at strides 4 to 32."""

import copy
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, PreTrainedConfig
from transformers import initialization as init

from .configuration_mscan import MscanConfig
from .modeling_mscan import MscanBackbone
from .modeling_unconceal import UnconcealPreTrainedModel


NUM_LEVELS = 4
# Stride of the finest level; each level after it has twice that of the one before.
FINEST_STRIDE = 4
# Sides are padded to a multiple of this, the stride of the coarsest level.
STRIDE = FINEST_STRIDE * 2 ** (NUM_LEVELS - 1)
LEVELS_IN_WORDS = f"{NUM_LEVELS} levels, at strides 4, 8, 16 and 32"


def make_backbone_config(
    given: dict | PreTrainedConfig | None, num_channels: int, default: str = MscanConfig.model_type
) -> PreTrainedConfig:
    """Return an encoder's configuration, set to return its last four levels unless it says which.

    Args:
        given: Fields with their `model_type`, or a configuration, which stays as it is.
        num_channels: Image channels, where nothing is given.
        default: `model_type` where nothing is given.

    Raises:
        ValueError: If its type is unknown or it has fewer levels.
    """
    if given is None:
        given = {"model_type": default, "num_channels": num_channels}
    if isinstance(given, dict):
        given = dict(given)
        model_type = given.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`backbone_config` must name a `model_type` that transformers knows, such as {default}, got "
                f"{model_type!r}."
            )
        given = (MscanConfig if model_type == MscanConfig.model_type else CONFIG_MAPPING[model_type])(**given)
    if not hasattr(given, "out_indices"):
        raise ValueError(f"`backbone_config` must be of a backbone, got one of {given.model_type}, which is none.")
    given = copy.deepcopy(given)
    if given.model_type == MscanConfig.model_type and not isinstance(given, MscanConfig):
        given = MscanConfig.from_dict(given.to_dict())  # of another folder's code
    names = getattr(given, "stage_names", None)  # timm's are known once it is built
    indices = list(given.out_indices or [-1])
    if indices in ([-1], [len(names or ()) - 1]):  # the last level alone, as when nothing was said
        # The first name is the stem's where there is one.
        stages = [name for name in names or () if name.startswith(("stage", "layer"))]
        if names and len(stages) < NUM_LEVELS:
            raise ValueError(
                f"`backbone_config` must have {LEVELS_IN_WORDS}; {given.model_type} has {len(stages)}: "
                f"{', '.join(stages)}."
            )
        given.out_indices = (
            list(range(-NUM_LEVELS, 0)) if not names else [names.index(n) for n in stages[-NUM_LEVELS:]]
        )
    return given


def check_backbone_config(config: PreTrainedConfig):
    """Raise a `ValueError` unless a network's `backbone_config` returns four levels of its `num_channels`."""
    backbone_config = config.backbone_config
    # timm's levels have names once they are built.
    levels = getattr(backbone_config, "out_features", None) or backbone_config.out_indices
    if len(levels) != NUM_LEVELS:
        raise ValueError(
            f"`backbone_config` must return {LEVELS_IN_WORDS}; {backbone_config.model_type} returns {len(levels)}: "
            f"{', '.join(map(str, levels))}."
        )
    channels = getattr(backbone_config, "num_channels", config.num_channels)
    if channels != config.num_channels:
        raise ValueError(
            f"`num_channels` must be the same in `backbone_config`, got {config.num_channels} and {channels}."
        )


class UnconcealBackboneModel(UnconcealPreTrainedModel):
    """A network on a `backbone`, built from `config.backbone_config` and filled from a pretrained encoder."""

    has_backbone = True

    def make_backbone(self) -> torch.nn.Module:
        """Return the encoder with random weights."""
        config = self.config.backbone_config
        # transformers knows one class of a name, which may have come with another folder: this network's own is meant.
        kind = MscanBackbone._from_config if isinstance(config, MscanConfig) else AutoBackbone.from_config
        return kind(config)

    @classmethod
    def from_backbone(cls, backbone: str, **config_kwargs) -> "UnconcealBackboneModel":
        """Build the network on a pretrained encoder; everything else starts at random.

        Args:
            backbone: Folder or Hub id of a transformers backbone, of a classifier on one, or of a timm checkpoint.
            config_kwargs: Further arguments of the network's configuration.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If it is no encoder with four levels, or lacks weights.
        """
        backbone_config = AutoConfig.from_pretrained(backbone)
        if backbone_config.model_type == "timm_wrapper":  # as transformers reads timm's own checkpoints
            backbone_config = {"model_type": "timm_backbone", "backbone": backbone_config.architecture}
        model = cls(cls.config_class(backbone_config=backbone_config, **config_kwargs))
        model.load_backbone(backbone)
        return model

    def load_backbone(self, source: str):
        """Load pretrained weights into the encoder, every one of them.

        Args:
            source: As in `from_backbone`.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If its weights are not those of this encoder; nothing is changed then.
        """
        kind, config = type(self.backbone), self.config.backbone_config
        if config.model_type == "timm_backbone":
            prefix = "local-dir:" if Path(source).is_dir() else "hf-hub:" if "/" in source else ""
            with init.no_init_weights():  # which would reset the running statistics that timm has loaded
                loaded = kind.from_pretrained(prefix + source, config=config)
            lacking = set(self.backbone.state_dict()) ^ set(loaded.state_dict())
        else:
            # Other shapes are told below, by name.
            loaded, report = kind.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
            own = tuple(f"{name}." for name, _ in self.backbone.named_children())
            unused = {
                key
                for key in report["unexpected_keys"]
                if key.removeprefix(f"{kind.base_model_prefix}.").startswith(own)
            }
            lacking = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]} | unused
        if lacking:
            raise ValueError(
                f"{source} holds other weights than {kind.__name__}: {len(lacking)} are missing, too many or of another "
                f"shape, such as {min(lacking)}; give weights of the same architecture as `backbone_config`."
            )
        self.backbone.load_state_dict(loaded.state_dict())

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the encoder's features of images (B, 3, H, W), H and W multiples of `STRIDE`, finest first.

        Raises:
            ValueError: If they are not at strides 4, 8, 16 and 32.
        """
        feature_maps = self.backbone(pixel_values).feature_maps
        if torch.compiler.is_compiling():
            return feature_maps  # sizes are symbols there
        height, width = pixel_values.shape[-2:]
        got = [tuple(feature_map.shape[-2:]) for feature_map in feature_maps]
        expected = [(height // s, width // s) for s in (FINEST_STRIDE * 2**level for level in range(NUM_LEVELS))]
        if got != expected:
            raise ValueError(
                f"`backbone_config` must give features at strides 4, 8, 16 and 32, which are {expected} for an image of "
                f"{height}x{width}, got {got} from {self.config.backbone_config.model_type}."
            )
        return feature_maps


__all__ = ["UnconcealBackboneModel", "check_backbone_config", "make_backbone_config"]
