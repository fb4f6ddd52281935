"""Tensors of the released LDAE checkpoints, renamed for our networks.

    autoencoderkl.pth   MONAI Generative's AutoencoderKL, whose upsampling convolutions were named otherwise
    encoder.pth         the semantic encoder, its ConvNeXt stored twice under two prefixes
    decoder.pth         the frozen U-Net and, as shift_* and label_emb, the gradient estimator
    a training checkpoint of the U-Net, under the prefix ema_unet.

Blocks are numbered as ADM's (arXiv 2105.05233) are: input_blocks, middle_block, output_blocks. Nothing is loaded
loosely: a tensor that is missing, left over or of another shape is named, by its name in the file.
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

BACKBONE, BACKBONE_TWIN = "backbone.", "slice_distributed.module."
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


def _block(name: str) -> str:
    """Official name of a tensor inside a block, e.g. time.linear.weight -> emb_layers.1.weight."""
    stem, _, leaf = name.rpartition(".")
    return f"{_BLOCK.get(stem, stem)}.{leaf}"


def _path(name: str, prefix: str) -> str:
    """Official name of a tensor of an UpPath."""
    part, rest = name.removeprefix("path.").split(".", 1)
    if part in ("norm", "conv"):
        return f"{prefix}out.{0 if part == 'norm' else 2}.{rest}"
    if part == "middle":
        index, rest = rest.split(".", 1)
        return f"{prefix}middle_block.{index}.{_block(rest)}"
    stage, index, rest = rest.split(".", 2)
    return f"{prefix}output_blocks.{stage}.{index}.{_block(rest)}"


def official_unet_name(name: str) -> str:
    """Official name of a tensor of our UNet."""
    part, rest = name.split(".", 1)
    if part == "time":
        return f"time_embed.{rest}"
    if part == "input":
        return f"input_blocks.0.0.{rest}"
    if part == "down":
        stage, index, rest = rest.split(".", 2)
        return f"input_blocks.{int(stage) + 1}.{index}.{_block(rest)}"
    return _path(name, "")


def official_estimator_name(name: str) -> str:
    """Official name of a tensor of our GradientEstimator."""
    return name.replace("semantic.", "label_emb.", 1) if name.startswith("semantic.") else _path(name, "shift_")


def official_encoder_name(name: str) -> str:
    """Official name of a tensor of our SemanticEncoder."""
    part, rest = name.split(".", 1)
    return f"{BACKBONE}{name}" if part == "backbone" else f"{_ENCODER.get(part, part)}.{rest}"


def official_autoencoder_name(name: str) -> str:
    """Official name of a tensor of our AutoencoderKL."""
    return name.replace(".postconv.", ".conv.")


def _renamed(module: nn.Module, tensors: Tensors, official: Callable[[str], str], source: Path | str) -> Tensors:
    """The tensors of `module` under our names; `tensors` must hold exactly those, by their official names."""
    own = module.state_dict()
    # Attention's 1x1 convolutions are Linears here.
    flat = {n: t.squeeze(-1) if re.search(r"\.(qkv|proj_out)\.weight$", n) else t for n, t in tensors.items()}
    check_tensors({official(name): tensor.shape for name, tensor in own.items()}, flat, source)
    return {name: flat[official(name)].float().contiguous() for name in own}


def convert_autoencoder(module: nn.Module, tensors: Tensors, source: Path | str) -> Tensors:
    """autoencoderkl.pth under the names of `module`, an AutoencoderKL (may be on the meta device)."""
    return _renamed(module, tensors, official_autoencoder_name, source)


def convert_encoder(module: nn.Module, tensors: Tensors, source: Path | str) -> Tensors:
    """encoder.pth under the names of `module`, a SemanticEncoder.

    Raises:
        UserError: besides what does not fit, if the two copies of the backbone differ, or its positions are not ours.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE_TWIN)}
    for name, tensor in tensors.items():
        if name.startswith(BACKBONE_TWIN):
            twin = BACKBONE + name.removeprefix(BACKBONE_TWIN)
            if twin not in rest or not torch.equal(rest[twin], tensor):
                raise UserError(f"{source}: tensors '{name}' and '{twin}' should be the same and are not")
    positions = rest.pop(POSITIONS, None)
    if positions is not None and not _are_sinusoids(positions):
        raise UserError(f"{source}: tensor '{POSITIONS}' is not the plain sinusoid")
    return _renamed(module, rest, official_encoder_name, source)


def _are_sinusoids(positions: Tensor) -> bool:
    return positions.ndim == 3 and torch.allclose(
        positions.float(), sinusoidal_positions(*positions.shape[1:]), atol=1e-3
    )


def convert_decoder(
    unet: nn.Module, estimator: nn.Module, tensors: Tensors, source: Path | str
) -> tuple[Tensors, Tensors]:
    """decoder.pth split into the tensors of `unet` and of `estimator`, under their names."""
    own = [name for name in tensors if name.startswith(("shift_", "label_emb."))]
    shift = {name: tensors[name] for name in own}
    trunk = {name: tensor for name, tensor in tensors.items() if name not in shift}
    return _renamed(unet, trunk, official_unet_name, source), _renamed(
        estimator, shift, official_estimator_name, source
    )


def convert_unet(module: nn.Module, tensors: Tensors, source: Path | str) -> Tensors:
    """The U-Net of a training checkpoint (its `ema_unet.` tensors; the rest is not read), under our names."""
    averaged = {name.removeprefix(EMA): tensor for name, tensor in tensors.items() if name.startswith(EMA)}
    return _renamed(module, averaged or tensors, official_unet_name, source)
