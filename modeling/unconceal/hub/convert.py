"""Convert checkpoints published by the papers' authors.

Every tensor of a published file is used, or dropped by a name listed here; anything else is an error. Names and shapes
are facts about the files. Their meaning was found from the papers and the published topology.

Each conversion takes the names and tensors of one file. It returns the network, and the published modules that were
dropped because the network does not use them. It raises a `UserError` if a tensor is missing, has another shape or is
unknown.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ..data.names import first_names
from ..models.configuration_efficientnet_lite import IMAGE_MEAN, IMAGE_STD, EfficientNetLiteConfig
from ..models.configuration_efficientnet_lite import SIZES as LITE_SIZES
from ..models.configuration_mscan import SIZES, MscanConfig
from ..models.configuration_srs import SrsConfig
from ..models.image_processing_unconceal import UnconcealImageProcessor
from ..models.modeling_efficientnet_lite import EfficientNetLiteBackbone
from ..models.modeling_mscan import STRIP_SIZES, MscanBackbone
from ..models.modeling_srs import NUM_LEVELS, SrsForImageSegmentation, SrsForReconstruction
from ..training.checkpoints import CONVERSION_FILE, Conversion
from ..utils.commits import git_commit
from ..utils.digests import weights_digest
from ..utils.errors import UserError
from ..utils.files import file_sha256


_SRS_BLOCK = {
    "conv1": "conv1",
    "norm1": "bn1",
    "conv2": "CONV",
    "norm2": "bn2",
    "channel_attention.squeeze": "ca.fc1",
    "channel_attention.excite": "ca.fc2",
    "spatial_attention.conv": "sa.conv1",
    "shortcut.0": "shortcut.0",
    "shortcut.1": "shortcut.1",
}
_SRS_FUSION = {
    "refine.0.0": "conv1",
    "refine.0.1": "bn3",
    "refine.1.0": "conv2",
    "refine.1.1": "bn4",
    "attention.conv": "ECALayer.conv",
    "merge.0": "finalconv.0",
    "merge.1": "finalconv.1",
}
_SRS_DYNAMIC_CONV = {
    "dynamic_conv.channel_attention.squeeze": "PKernel_D2.ca.fc1",
    "dynamic_conv.channel_attention.excite": "PKernel_D2.ca.fc2",
    "dynamic_conv.spatial_attention.conv": "PKernel_D2.sa.conv1",
    "dynamic_conv.project": "PKernel_D2.Conv.0",
}
# Modules that both published networks hold but never run, and those that the segmentation network does not run either.
_SRS_UNUSED = r"conv0_3_1x1|bottomuplocal_fpn_[123]\.bn[12]|IPATR[012]\.tr(_1)?"
_SRS_CONTRASTS = r"IPATR[012]\.conv[123]"

# Heads of the classifier and of SegNeXt.
_MSCAN_HEADS = r"(head|decode_head|auxiliary_head)(\..+)?"
_MSCAN_BLOCK = {
    "attention_norm": "norm1",
    "attention.proj_in": "attn.proj_1",
    "attention.gate.local": "attn.spatial_gating_unit.conv0",
    **{
        f"attention.gate.strips.{i}.{j}": f"attn.spatial_gating_unit.conv{i}_{j + 1}"
        for i in range(len(STRIP_SIZES))
        for j in range(2)
    },
    "attention.gate.mix": "attn.spatial_gating_unit.conv3",
    "attention.proj_out": "attn.proj_2",
    "feed_forward_norm": "norm2",
    "feed_forward.0": "mlp.fc1",
    "feed_forward.1": "mlp.dwconv.dwconv",
    "feed_forward.3": "mlp.fc2",
}

# The classifier of EfficientNet-Lite.
_LITE_HEAD = "_conv_head|_bn1|_fc"
_LITE_BLOCK = {
    "expand.0": "_expand_conv",
    "expand.1": "_bn0",
    "depthwise.0": "_depthwise_conv",
    "depthwise.1": "_bn1",
    "project.0": "_project_conv",
    "project.1": "_bn2",
}


def load_published(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a published file of weights without running code in it.

    Removes a wrapper `{"state_dict": ...}` and the prefix `module.` that data-parallel training leaves.

    Raises:
        UserError: If there is no such file, or if it does not hold named tensors.
    """
    path, advice = Path(path), "name the .pth file that the authors published"
    if not path.is_file():
        raise UserError(f"no file {path}; {advice}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # On foreign files torch's readers raise nearly any class.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise UserError(f"cannot read {path} as tensors of PyTorch ({reason}); {advice}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{path} holds no state dict (names and tensors); {advice}")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def save_converted(folder: Path, files: Sequence[str | Path], command: str | None, model: PreTrainedModel, *others):
    """Save a converted network with the record of its conversion.

    `files` are the published ones, `others` what belongs beside the network, such as its processor.
    """
    for part in (model, *others):
        part.save_pretrained(folder)
    record = Conversion(
        network=type(model).__name__,
        files=[{"name": Path(file).name, "sha256": file_sha256(Path(file))} for file in files],
        weights=weights_digest(model),
        command=command,
        git_commit=git_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (folder / CONVERSION_FILE).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def convert_srs_reconstruction(
    published: Mapping[str, torch.Tensor], config: SrsConfig
) -> tuple[SrsForReconstruction, list[str]]:
    """Convert the authors' R to the network of phase 1."""
    names = dict(_srs_grid("reconstruction_", config.reconstruction_depths))
    for level in range(NUM_LEVELS - 1):
        for i in range(3):
            names[f"reconstruction_decoder.contrasts.{level}.convs.{i}"] = f"IPATR{level}.conv{i + 1}"
    model = SrsForReconstruction(config)
    state, dropped = _take("SRS reconstruction network", published, names, _shapes(model), _SRS_UNUSED)
    model.load_state_dict(state)
    return model.eval(), dropped


def convert_srs_segmentation(
    published: Mapping[str, torch.Tensor], reconstruction: SrsForReconstruction
) -> tuple[SrsForImageSegmentation, list[str]]:
    """Convert the authors' S to the network of phase 2.

    The encoder and config of `reconstruction` are used.
    """
    model = SrsForImageSegmentation(reconstruction.config)
    encoder = reconstruction.reconstruction_encoder.state_dict(prefix="reconstruction_encoder.")
    shapes = {name: shape for name, shape in _shapes(model).items() if name not in encoder}
    # Each kernel entry has a weight and a bias; `SrsDynamicConv` says why these make two kernels.
    scaled, static = "dynamic_conv.scaled_conv.weight", "dynamic_conv.static_conv.weight"
    num_entries = shapes[static].numel()
    flat_shapes = {**shapes, scaled: (num_entries, 1, 1, 1), static: (num_entries,)}
    names = dict(_srs_grid("", reconstruction.config.depths)) | _SRS_DYNAMIC_CONV
    names |= {scaled: "PKernel_D2.Conv.2.weight", static: "PKernel_D2.Conv.2.bias"}
    unused = f"{_SRS_UNUSED}|{_SRS_CONTRASTS}"
    state, dropped = _take("SRS segmentation network", published, names, flat_shapes, unused)
    for name in (scaled, static):
        state[name] = state[name].reshape(shapes[name])
    model.load_state_dict({**state, **encoder})
    return model.eval(), dropped


def convert_mscan(published: Mapping[str, torch.Tensor]) -> tuple[MscanBackbone, list[str]]:
    """Convert an MSCAN of any size, which then returns all its levels.

    The file is that of the ImageNet classifier or of a whole SegNeXt.
    """
    encoder = {name.removeprefix("backbone."): tensor for name, tensor in published.items()}  # SegNeXt's prefix
    config = _mscan_config(encoder)
    model = MscanBackbone(config)
    state, dropped = _take("MSCAN", encoder, dict(_mscan_modules(config)), _shapes(model), _MSCAN_HEADS)
    model.load_state_dict(state)
    return model.eval(), dropped


def _mscan_config(published: Mapping[str, torch.Tensor]) -> MscanConfig:
    """Read the size from the shapes."""
    what = f"a published MSCAN, which has {NUM_LEVELS} stages of blocks and norms"
    fault = UserError(f"these are not the weights of {what}; name the ImageNet checkpoint or one of SegNeXt")
    widths, depths, ratios = [], [], []
    for i in range(1, NUM_LEVELS + 1):
        norm, linear = published.get(f"norm{i}.weight"), published.get(f"block{i}.0.mlp.fc1.weight")
        if norm is None or linear is None or norm.dim() != 1 or linear.dim() != 4 or not linear.numel():
            raise fault
        widths.append(len(norm))
        ratios.append(linear.shape[0] // linear.shape[1])
        depths.append(sum(bool(re.fullmatch(rf"block{i}\.\d+\.mlp\.fc1\.weight", name)) for name in published))
    sizes = {"hidden_sizes": tuple(widths), "depths": tuple(depths)}
    known = next((size for size in SIZES.values() if sizes.items() <= size.items()), sizes)
    try:
        return MscanConfig(**known, mlp_ratios=tuple(ratios), out_indices=list(range(NUM_LEVELS)))
    except (ValueError, StrictDataclassError) as error:
        raise fault from error


def _mscan_modules(config: MscanConfig) -> Iterator[tuple[str, str]]:
    """Yield (our name, published name) for modules and lone parameters of MSCAN."""
    for i, depth in enumerate(config.depths):
        stage, embedding = f"stages.{i}", f"patch_embed{i + 1}"
        if i == 0:
            yield from ((f"{stage}.embedding.{j}", f"{embedding}.proj.{j}") for j in (0, 1, 3, 4))
        else:
            yield f"{stage}.embedding.0", f"{embedding}.proj"
            yield f"{stage}.embedding.1", f"{embedding}.norm"
        for j in range(depth):
            ours, theirs = f"{stage}.blocks.{j}", f"block{i + 1}.{j}"
            yield from ((f"{ours}.{our}", f"{theirs}.{their}") for our, their in _MSCAN_BLOCK.items())
            yield f"{ours}.attention_scale", f"{theirs}.layer_scale_1"
            yield f"{ours}.feed_forward_scale", f"{theirs}.layer_scale_2"
        yield f"{stage}.norm", f"norm{i + 1}"


def convert_efficientnet_lite(published: Mapping[str, torch.Tensor]) -> tuple[EfficientNetLiteBackbone, list[str]]:
    """Convert an EfficientNet-Lite of any published size."""
    num_blocks = sum(name.endswith("_depthwise_conv.weight") for name in published)
    last = published.get(f"_blocks.{num_blocks - 1}._project_conv.weight")
    for size in LITE_SIZES:
        model = EfficientNetLiteBackbone(EfficientNetLiteConfig.from_size(size))
        if last is None or (model.num_blocks, model.num_features[-1]) == (num_blocks, len(last)):
            break
    names = {"stem.0": "_conv_stem", "stem.1": "_bn0"}
    places = [f"stages.{i}.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage))]
    for i, place in enumerate(places):
        names |= {f"{place}.{ours}": f"_blocks.{i}.{theirs}" for ours, theirs in _LITE_BLOCK.items()}
    state, dropped = _take("EfficientNet-Lite", published, names, _shapes(model), _LITE_HEAD)
    model.load_state_dict(state)
    return model.eval(), dropped


def efficientnet_lite_processor() -> UnconcealImageProcessor:
    """Return the processor for the published weights of EfficientNet-Lite."""
    return UnconcealImageProcessor(size={"height": 224, "width": 224}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)


def srs_processor(release_quirks: bool = False, bgr: bool = False) -> UnconcealImageProcessor:
    """Return the processor for converted SRS weights.

    Args:
        release_quirks: Divide by 255 again after the normalization, as the authors' loader does.
        bgr: Feed blue first, as the authors' loader of the breast ultrasound set does.
    """
    processor = UnconcealImageProcessor(channel_order="bgr" if bgr else "rgb")
    if release_quirks:
        processor.image_std = [255 * std for std in processor.image_std]
    return processor


def _srs_grid(prefix: str, depths: list[int]) -> Iterator[tuple[str, str]]:
    """Yield (our module, published module) for modules of both networks."""
    encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
    yield f"{encoder}.stem.0", "conv1.0"
    yield f"{encoder}.stem.1", "conv1.1"
    for j in range(NUM_LEVELS):
        for i in range(NUM_LEVELS - j):
            node = f"{decoder}.columns.{j - 1}.{i}" if j else f"{encoder}.levels.{i}"
            yield from _srs_node(node, f"conv{i}_{j}", depths[i])
    for level in range(NUM_LEVELS - 1):
        for ours, theirs in _SRS_FUSION.items():
            yield f"{decoder}.fusions.{level}.{ours}", f"bottomuplocal_fpn_{level + 1}.{theirs}"
        yield f"{decoder}.upsamples.{level}.conv.0", f"fup{level + 1}.conv.0"
        yield f"{decoder}.upsamples.{level}.conv.1", f"fup{level + 1}.conv.1"
    # Named after the column that ends a level, not the level itself.
    yield f"{decoder}.projections.1", "conv0_1_1x1"
    yield f"{decoder}.projections.2", "conv0_2_1x1"
    yield from _srs_node(f"{decoder}.merge", "finalconv", depth=1)
    yield f"{prefix}head", "mask_head_1x1"


def _srs_node(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    for k in range(depth):
        for our_part, their_part in _SRS_BLOCK.items():
            yield f"{ours}.{k}.{our_part}", f"{theirs}.{k}.{their_part}"


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _take(
    network: str,
    published: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    unused: str,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename the published tensors, each used once.

    `names` maps our modules and lone tensors to the published ones, `shapes` our tensors to the published shapes. The
    pattern `unused` fits the published modules that may be dropped. Returns our tensors, and what was dropped.
    """
    left = dict(published)
    state, missing, misshapen = {}, [], []
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        source = names.get(name) or f"{names[module]}.{part}"
        tensor = left.pop(source, None)
        if tensor is None:
            missing.append(source)
        elif tensor.shape != shape:
            misshapen.append(f"{source} {tuple(tensor.shape)} instead of {tuple(shape)}")
        else:
            state[name] = tensor
    dropped = {name: name.rpartition(".")[0] for name in left if re.fullmatch(unused, name.rpartition(".")[0])}
    left_over = [name for name in left if name not in dropped]
    faults = [
        f"{len(found)} {kind} ({first_names(found)})"
        for kind, found in (("missing", missing), ("of another shape", misshapen), ("left over", left_over))
        if found
    ]
    if faults:
        advice = "check that it is the right file and that two files are not exchanged"
        what = f"these are not the weights of the published {network}: tensors {'; '.join(faults)}"
        raise UserError(f"{what}; {advice}")
    return state, list(dict.fromkeys(dropped.values()))
