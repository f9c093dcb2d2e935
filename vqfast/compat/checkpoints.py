"""Checkpoints of other libraries' quantizers into our own layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqfast.nn import ResidualVectorQuantizer, VectorQuantizer, VectorQuantizerEMA
from vqfast.ops import _shapes


class _Level(NamedTuple):
    """One codebook as found: codes [G, K, D], sizes [G, K] or None where the codebook learns by gradient."""

    codes: Tensor
    sizes: Tensor | None


def load_quantizer(source: str | Path | Mapping[str, Tensor], *, prefix: str = "", transposed: bool | None = None, **options):
    """Build a layer of ours from the quantizer inside another library's checkpoint.

    Recognised by their keys under `prefix`: vector_quantize_pytorch (`_codebook.embed`), encodec, audiocraft and moshi
    (`_codebook.*`), transformers' Encodec, Xcodec, HiggsAudioV2Tokenizer and Mimi (`codebook.*`), rosinality (`embed` [D, K]), Sonnet
    (`embeddings` [D, K]), and everything that keeps `embedding.weight` (taming, diffusers, VAR, LlamaGen, 1d-tokenizer,
    Chameleon, Emu3, Janus); a stack `layers.{i}.*` of one of the first three becomes a residual quantizer.

    Args:
        source: a .safetensors file, a .pt, .pth, .bin or .ckpt file (read with weights_only=True: no pickled code runs), or a state
            dict.
        prefix: the path of the quantizer in the checkpoint, "quantize." or "quantizer.vq." say; a missing last dot is added.
        transposed: whether a code is a column. By default as the key tells; needed for `embed` with as many codes as dimensions.
        options: of the layer, beside sizes: metric, commitment_weight, channel_dim, decay, eps, revive_below, ...

    Returns:
        ResidualVectorQuantizer for a stack, VectorQuantizerEMA where the checkpoint has moving sizes (vector_quantize_pytorch's always
        has), VectorQuantizer for a codebook alone, which learns by gradient; projections before and after the search are kept. The
        codes are exactly the checkpoint's, float32 (float64). cluster_size is its moving size; cluster_sum is code times size, so that the codes do not jump when training goes on.

    Raises:
        ValueError: nothing known stands under `prefix` (the message lists what does), the layer cannot hold it, or the file cannot be
            read.
        FileNotFoundError: there is no such file.

    Heads of vector_quantize_pytorch that share one codebook are refused where a projection shows them; without projections no key tells
    of them, and the layer that comes back has a head's width.
    """
    state = _read(source)
    prefix = prefix + "." if prefix and not prefix.endswith(".") else prefix
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    stack = _stack(inner)
    if stack:
        return _residual([_level(part, prefix, transposed) for part in stack], _projections(inner), options)
    if not inner:
        raise ValueError(f"no key starts with {prefix!r}; the checkpoint holds {_some(state)}.")
    return _single(_level(inner, prefix, transposed), _projections(inner), options)


# ---- reading ---------------------------------------------------------------------------------------------------------------


def _read(source) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        state = source
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint at {path}.")
        state = _read_file(path)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _read_file(path: Path) -> Mapping:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # each format has its own, and what a damaged file raises is not documented
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}; a state dict is needed.")
    return state


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no tensors"


# ---- recognising -----------------------------------------------------------------------------------------------------------


def _stack(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The levels of `layers.{i}.*`, in order."""
    levels: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = re.match(r"layers\.(\d+)\.(.*)", name)
        if match:
            levels.setdefault(int(match[1]), {})[match[2]] = tensor
    return [levels[index] for index in sorted(levels)]


def _mean_codes(sums: Tensor, sizes: Tensor) -> Tensor:
    # moshi's and Mimi's own clamp
    return sums / sizes.clamp(min=1e-5)[:, None]


# Keys of codes and sizes (None: the codebook learns by gradient), and where a code stands: in a row, in a column, or as the number of
# sizes tells, for the one key that projects use both ways (encodec's codebook itself, and rosinality's). First match wins.
_FORMATS = [
    ("_codebook.embed", "_codebook.cluster_size", "row"),
    ("codebook.embed", "codebook.cluster_size", "row"),
    ("embed", "cluster_size", "by size"),
    ("embeddings", "ema_cluster_size.average", "column"),
    ("embeddings", None, "column"),
    ("embedding.weight", "embedding.cluster_size", "row"),
    ("embedding.weight", None, "row"),
]
# moshi and Mimi keep sums; a code is sum / size, with their clamp.
_SUMS = [(f"{name}.{sums}", f"{name}.cluster_usage") for name in ("_codebook", "codebook") for sums in ("embedding_sum", "embed_sum")]


def _level(state: dict[str, Tensor], prefix: str, transposed: bool | None) -> _Level:
    if "codebook.weight" in state and any(name.startswith("in_proj") for name in state):
        raise ValueError(
            f"{prefix or 'the checkpoint'} is a DAC quantizer: it searches normalised vectors and returns codes that are not, which no"
            " layer of vqfast.nn does. Load it into vqfast.compat.dac.VectorQuantize or ResidualVectorQuantize."
        )
    for sums, usage in _SUMS:
        if sums in state and usage in state:
            sizes = state[usage]
            return _Level((state[sums] / sizes.clamp(min=1e-5)[:, None])[None], sizes[None])
    for key, size_key, place in _FORMATS:
        if key in state and (size_key is None or size_key in state):
            codes, sizes = state[key], None if size_key is None else state[size_key]
            if transposed is None:
                transposed = _columns(codes, sizes) if place == "by size" else place == "column"
            codes = codes.T if transposed else codes
            codes = codes if codes.dim() == 3 else codes[None]
            return _Level(codes, None if sizes is None else sizes.reshape(codes.shape[:2]))
    raise ValueError(f"no quantizer that vqfast knows stands under {prefix!r}; there are {_some(state)}.")


def _columns(codes: Tensor, sizes: Tensor) -> bool:
    """Whether codes [K, D] or [D, K] are columns, by the number of sizes."""
    rows, columns = codes.shape
    if rows == columns:
        raise ValueError(
            f"the codebook is {_shapes.describe(codes)}: as many codes as dimensions, so its shape does not tell which is which."
            " Pass transposed=True (a code per column, as in rosinality's and Sonnet's checkpoints) or transposed=False."
        )
    return sizes.numel() == columns


def _projections(state: dict[str, Tensor]) -> dict[str, nn.Linear]:
    """project_in and project_out where both are there, else {}; the layer norm that lucidrains may put after the first is refused."""
    found = {}
    for name in ("project_in", "project_out"):
        keys = [key for key in state if re.fullmatch(rf"{name}\.(0\.)?weight", key)]
        if f"{name}.1.weight" in state:
            raise ValueError(f"{name} holds a layer norm, which vqfast's layers do not have.")
        if keys:
            weight, bias = state[keys[0]], state.get(keys[0].removesuffix("weight") + "bias")
            found[name] = nn.Linear(weight.shape[1], weight.shape[0])
            found[name].weight.data.copy_(weight)
            found[name].bias.data.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return found


# ---- building --------------------------------------------------------------------------------------------------------------


def _single(level: _Level, projections: dict[str, nn.Linear], options: dict):
    groups, size, width = level.codes.shape
    layer = VectorQuantizer if level.sizes is None else VectorQuantizerEMA
    return _fill(layer(**_dims(width * groups, size, projections), groups=groups, **options), level, projections)


def _residual(levels: list[_Level], projections: dict[str, nn.Linear], options: dict) -> ResidualVectorQuantizer:
    shapes = {tuple(level.codes.shape) for level in levels}
    if len(shapes) > 1 or next(iter(shapes))[0] != 1 or levels[0].sizes is None:
        raise ValueError(
            f"the levels hold codebooks {sorted(shapes)}; ResidualVectorQuantizer needs the same [K, D] and moving averages in each."
            " Load the levels one by one, with prefix='...layers.0' and so on."
        )
    _, size, width = levels[0].codes.shape
    stacked = _Level(torch.cat([level.codes for level in levels]), torch.cat([level.sizes for level in levels]))
    layer = ResidualVectorQuantizer(**_dims(width, size, projections), num_quantizers=len(levels), **options)
    return _fill(layer, stacked, projections)


def _dims(width: int, size: int, projections: dict[str, nn.Linear]) -> dict[str, int | None]:
    if not projections:
        return {"dim": width, "codebook_size": size}
    inner = projections["project_in"].out_features
    if inner != width:
        raise ValueError(
            f"project_in has {inner} outputs, codes have {width} dimensions: heads that share a codebook, which vqfast.nn's layers do not"
            " have. Load the checkpoint into vqfast.compat.vector_quantize_pytorch.VectorQuantize."
        )
    return {"dim": projections["project_in"].in_features, "codebook_size": size, "codebook_dim": width}


@torch.no_grad()
def _fill(layer, level: _Level, projections: dict[str, nn.Linear]):
    codes = level.codes.to(torch.float64 if level.codes.dtype == torch.float64 else torch.float32)
    layer = layer.to(codes.dtype) if codes.dtype == torch.float64 else layer
    layer.codebook.copy_(codes.reshape(layer.codebook.shape))
    if level.sizes is not None:
        sizes = level.sizes.to(layer.cluster_size).reshape(layer.cluster_size.shape)
        layer.cluster_size.copy_(sizes)
        layer.cluster_sum.copy_(layer.codebook * sizes[..., None])
    for name, linear in projections.items():
        getattr(layer, name).load_state_dict(linear.state_dict())
    return layer
