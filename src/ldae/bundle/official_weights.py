"""Names of the tensors in the released LDAE checkpoints, and their conversion to the names of this package's networks.

    autoencoderkl.pth   AutoencoderKL of the package monai-generative, which names the upsampling convolutions otherwise
    encoder.pth         the semantic encoder, with its ConvNeXt stored under two prefixes
    decoder.pth         the frozen U-Net and, as shift_* and label_emb, the gradient estimator
    a training checkpoint of the U-Net, under the prefix ema_unet.

Blocks are numbered as in ADM (arXiv 2105.05233): input_blocks, middle_block, output_blocks. Loading is strict: a tensor
that is missing, unexpected or of another shape is reported by its name in the file.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldae.models.semantic_encoder import sinusoidal_positions
from ldae.models.state import check_tensors
from ldae.utils.errors import UserError

Tensors = dict[str, Tensor]

BACKBONE, BACKBONE_COPY = "backbone.", "slice_distributed.module."
POSITIONS = "positional_encoding.pe"
EMA = "ema_unet."

_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time.linear": "emb_layers.1",
    "semantic.linear": "emb_z_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
    "projection": "proj_out",
}
_ENCODER = {
    "score": "soft_attention.linear",
    "query": "query_projection",
    "key": "key_projection",
    "value": "value_projection",
    "norm": "layer_norm_after_attention",
}


def _block_name(name: str) -> str:
    """Official name of a tensor inside a block, e.g. time.linear.weight -> emb_layers.1.weight."""
    stem, _, leaf = name.rpartition(".")
    return f"{_BLOCK.get(stem, stem)}.{leaf}"


def _up_path_name(name: str, prefix: str) -> str:
    """Official name of a tensor of an UpPath."""
    part, rest = name.removeprefix("path.").split(".", 1)
    if part in ("norm", "conv"):
        return f"{prefix}out.{0 if part == 'norm' else 2}.{rest}"
    if part == "middle":
        index, rest = rest.split(".", 1)
        return f"{prefix}middle_block.{index}.{_block_name(rest)}"
    stage, index, rest = rest.split(".", 2)
    return f"{prefix}output_blocks.{stage}.{index}.{_block_name(rest)}"


def official_unet_name(name: str) -> str:
    """Official name of a tensor of UNet."""
    part, rest = name.split(".", 1)
    if part == "time":
        return f"time_embed.{rest}"
    if part == "input":
        return f"input_blocks.0.0.{rest}"
    if part == "down":
        stage, index, rest = rest.split(".", 2)
        return f"input_blocks.{int(stage) + 1}.{index}.{_block_name(rest)}"
    return _up_path_name(name, "")


def official_estimator_name(name: str) -> str:
    """Official name of a tensor of GradientEstimator."""
    return name.replace("semantic.", "label_emb.", 1) if name.startswith("semantic.") else _up_path_name(name, "shift_")


def official_encoder_name(name: str) -> str:
    """Official name of a tensor of SemanticEncoder."""
    part, rest = name.split(".", 1)
    return f"{BACKBONE}{name}" if part == "backbone" else f"{_ENCODER.get(part, part)}.{rest}"


def official_autoencoder_name(name: str) -> str:
    """Official name of a tensor of AutoencoderKL."""
    return name.replace(".postconv.", ".conv.")


def _rename_tensors(
    module: nn.Module, tensors: Tensors, official_name: Callable[[str], str], source: Path | str
) -> Tensors:
    """The tensors of `module` by its own names, from exactly those tensors by their official names.

    Args:
        module: may be on the meta device.
        source: file that the tensors are from, for the message.

    Raises:
        UserError: names the first missing, unexpected or misshapen tensor.
    """
    own = module.state_dict()
    # The released attention has 1x1 convolutions; here they are linear layers.
    flat = {n: t.squeeze(-1) if re.search(r"\.(qkv|proj_out)\.weight$", n) else t for n, t in tensors.items()}
    check_tensors({official_name(name): tensor.shape for name, tensor in own.items()}, flat, source)
    return {name: flat[official_name(name)].float().contiguous() for name in own}


def convert_autoencoder(module: nn.Module, tensors: Tensors, source: Path | str) -> Tensors:
    """The tensors of autoencoderkl.pth by the names of `module`, an AutoencoderKL."""
    return _rename_tensors(module, tensors, official_autoencoder_name, source)


def convert_encoder(module: nn.Module, tensors: Tensors, source: Path | str) -> Tensors:
    """The tensors of encoder.pth by the names of `module`, a SemanticEncoder.

    Raises:
        UserError: a tensor does not fit, the two copies of the backbone differ, or the positions are not the sinusoid.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE_COPY)}
    for name, tensor in tensors.items():
        if name.startswith(BACKBONE_COPY):
            original = BACKBONE + name.removeprefix(BACKBONE_COPY)
            if original not in rest or not torch.equal(rest[original], tensor):
                raise UserError(f"{source}: tensors '{name}' and '{original}' should be the same and are not")
    positions = rest.pop(POSITIONS, None)
    if positions is not None and not _are_sinusoids(positions):
        raise UserError(f"{source}: tensor '{POSITIONS}' is not the plain sinusoid")
    return _rename_tensors(module, rest, official_encoder_name, source)


def _are_sinusoids(positions: Tensor) -> bool:
    return positions.ndim == 3 and torch.allclose(
        positions.float(), sinusoidal_positions(*positions.shape[1:]), atol=1e-3
    )


def convert_decoder(
    unet: nn.Module, estimator: nn.Module, tensors: Tensors, source: Path | str
) -> tuple[Tensors, Tensors]:
    """The tensors of decoder.pth by the names of `unet` and of `estimator`."""
    own = [name for name in tensors if name.startswith(("shift_", "label_emb."))]
    shift = {name: tensors[name] for name in own}
    trunk = {name: tensor for name, tensor in tensors.items() if name not in shift}
    return _rename_tensors(unet, trunk, official_unet_name, source), _rename_tensors(
        estimator, shift, official_estimator_name, source
    )


def convert_unet(module: nn.Module, tensors: Tensors, source: Path | str) -> Tensors:
    """The averaged U-Net of a training checkpoint (tensors `ema_unet.*`) by the names of `module`, a UNet."""
    averaged = {name.removeprefix(EMA): tensor for name, tensor in tensors.items() if name.startswith(EMA)}
    return _rename_tensors(module, averaged or tensors, official_unet_name, source)
