"""Wan2.1 transformers in every format that they are published in, read and written bit for bit.

    diffusers     a folder with config.json and diffusion_pytorch_model*.safetensors, one file or shards with an index;
                  a pipeline's folder with that in transformer/; or a lone file in diffusers' names
    original      the same files in the names of Wan's own repository (blocks.0.self_attn.q.weight, head.head.weight)
    self_forcing  a .pt of Self-Forcing: {"generator_ema" | "generator" | "model": {"model." + original name: tensor}}

What a file is follows from its content, not from its name. No pickled code is run: safetensors, or torch.load with
weights_only.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from policy.causal import widen_input
from policy.files import WeightsError

from diffusers import WanTransformer3DModel  # isort: skip  (after policy.causal has readied torchvision)

LAYOUTS = ("diffusers", "original", "self_forcing")
_WEIGHTS = "diffusion_pytorch_model"
_HEAD_DIM = 128  # of every published Wan; the one width that the weights do not show

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{a}": f"attn1.{b}" for a, b in _ATTENTION.items()},
    **{f"cross_attn.{a}": f"attn2.{b}" for a, b in (_ATTENTION | _IMAGE_ATTENTION).items()},
}
# The two sets of names have nothing but the patch embedding in common, so every name tells its own layout.
_TO_DIFFUSERS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    **{f"blocks.*.{a}": f"blocks.*.{b}" for a, b in _BLOCK.items()},
}
_TO_ORIGINAL = {b: a for a, b in _TO_DIFFUSERS.items()}
_CONFIG = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "eps": "eps",
}


def to_diffusers(name: str) -> str:
    """The name in diffusers of a tensor of the original layout; a name of diffusers' own comes back as it is."""
    return _rename(name, _TO_DIFFUSERS)


def to_original(name: str) -> str:
    """The inverse of `to_diffusers`."""
    return _rename(name, _TO_ORIGINAL)


def locate(source: str | Path, download: bool = False) -> Path:
    """A local file or folder as it is; else, if `download`, the repository of that id on the Hugging Face hub.

    For the driver alone: workers are given the path. Raises WeightsError where there is nothing to be had.
    """
    if Path(source).exists():
        return Path(source)
    if not download:
        raise WeightsError(f"{source} is no file or folder; if it is a hub id, download=true fetches it")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["config.json", f"{_WEIGHTS}*", "transformer/*"]))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot download {source}: {_first_line(error)}; give a local folder") from error


def read_wan(
    path: str | Path, dtype: torch.dtype | None = None, in_channels: int | None = None
) -> WanTransformer3DModel:
    """A transformer in eval mode on the CPU, from a folder or a file in any of the formats above.

    dtype: None keeps each tensor as stored; otherwise as `from_pretrained` has it, norms and modulation staying fp32.
    in_channels: a T2V checkpoint with fewer is given zero-initialised control channels; None takes what is there.
    The architecture is that of config.json, beside the weights; what it does not say, the shapes do.
    Nothing is initialised only to be overwritten: at the peak there is the model in memory and one tensor more.
    Raises WeightsError naming the file where one is missing, damaged, no Wan, or not what config.json describes.
    """
    files, path = _weight_files(Path(path)), Path(path)
    state = {name: tensor if dtype is None else tensor.to(_dtype_of(name, dtype)) for name, tensor in _entries(files)}
    architecture = _described(state, files, path)
    try:
        with init_empty_weights(include_buffers=False):
            model = WanTransformer3DModel.from_config(architecture)
        model.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = textwrap.shorten(" ".join(str(error).splitlines()[1:]) or str(error), 300, placeholder=" ...")
        config = files[0].parent / "config.json"
        beside = f"is not what {config} describes" if config.exists() else "is not whole"
        raise WeightsError(f"{path} {beside}: {reason.rstrip('.')}; restore it or choose another") from error
    if extra := _extra_channels(model.config, in_channels, path):
        widen_input(model, extra)
    return model.eval()


def read_architecture(path: str | Path, in_channels: int | None = None) -> dict[str, Any]:
    """The arguments of WanTransformer3DModel that `read_wan` would use, as it leaves them; no weights are read.

    Raises WeightsError as `read_wan` does, but for weights that are not what config.json describes.
    """
    files, path = _weight_files(Path(path)), Path(path)
    architecture = _described(dict(_entries(files, meta=True)), files, path)
    extra = _extra_channels(architecture, in_channels, path)
    return architecture | {"in_channels": architecture["in_channels"] + extra}


def write_wan(model: WanTransformer3DModel, out: str | Path, layout: str = "diffusers") -> None:
    """Writes the folder `out`, whole or not at all: config.json and the weights in one of LAYOUTS.

    `diffusers` is what stock `WanTransformer3DModel.from_pretrained(out)` reads, `original` what Wan's own
    `WanModel.from_pretrained(out)` does, `self_forcing` holds generator.pt. Raises WeightsError where `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise WeightsError(f"{out} exists; remove it or choose another out")
    partial = out.with_name(f".partial_{out.name}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if layout == "diffusers":
            model.save_pretrained(partial)
        else:
            (partial / "config.json").write_text(json.dumps(_original_config(model), indent=2) + "\n")
            state = {to_original(name): tensor for name, tensor in model.state_dict().items()}
            if layout == "original":
                save_torch_state_dict(state, partial, filename_pattern=_WEIGHTS + "{suffix}.safetensors")
            else:
                state = {f"model.{name}": tensor for name, tensor in state.items()}
                torch.save({"generator": state}, partial / "generator.pt")
        partial.rename(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by RuntimeError
        raise WeightsError(f"cannot write {out}: {_first_line(error)}; make room or choose another out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def merge_lora(model: WanTransformer3DModel, adapter: str | Path) -> WanTransformer3DModel:
    """Adds a PEFT adapter folder (adapter_config.json, adapter_model.safetensors) to the model's weights, in place.

    Raises WeightsError where a file is missing or the adapter does not fit the model.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # where PEFT finds none it asks the hub
        if not (Path(adapter) / name).is_file():
            raise WeightsError(f"{adapter} is no PEFT adapter: no {name}; give the folder that PEFT saved")
    from peft import PeftModel, get_peft_model_state_dict  # here, as it takes seconds that no other format needs

    given = {name for name, _ in _tensors(Path(adapter) / "adapter_model.safetensors")}
    misfit = f"{adapter} is no adapter of this transformer"
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise WeightsError(f"{misfit}: {reason}; choose the base it was made for") from error
    # PEFT warns of names that it cannot place and goes on.
    if strange := sorted(given ^ get_peft_model_state_dict(adapted).keys()):
        raise WeightsError(f"{misfit}: {strange[0]} is missing or unknown; choose the base it was made for")
    return adapted.merge_and_unload()


def _rename(name: str, table: Mapping[str, str]) -> str:
    block, module, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name).groups("")
    module = f"blocks.*.{module}" if block else module
    return table.get(module, module).replace("blocks.*.", block) + leaf


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if index := sorted(folder.glob(f"{_WEIGHTS}*.index.json")):
        if shards := _read_json(index[0]).get("weight_map"):
            return [folder / name for name in sorted(set(shards.values()))]
        raise WeightsError(f"{index[0]} names no file of weights; restore it")
    patterns = (f"{_WEIGHTS}*.safetensors", "*.safetensors", "*.pt")
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    if len(files) != 1:
        found = f"{folder} holds {len(files)} files of weights and no index"
        raise WeightsError(f"{found}; name the one to read or choose another")
    return files


def _entries(files: Sequence[Path], meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """`_tensors` of the files, in diffusers' names."""
    for file in files:
        for name, tensor in _tensors(file, meta):
            name = to_diffusers(re.sub(r"^model\.(diffusion_model\.)?|_fsdp_wrapped_module\.|_orig_mod\.", "", name))
            if not any(ignored in name for ignored in WanTransformer3DModel._keys_to_ignore_on_load_unexpected):
                yield name, tensor


def _tensors(file: Path, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, read one by one: a safetensors file into memory, a torch.save archive mapped; with
    `meta` their shapes alone.
    """
    try:
        with file.open("rb") as opened:
            is_archive = opened.read(4) == b"PK\x03\x04"
        if is_archive:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for entry in ("generator_ema", "generator", "model"):
                if isinstance(state, dict) and isinstance(state.get(entry), dict):
                    state = state[entry]
                    break
            entries = state.items() if isinstance(state, dict) else []
            if not entries or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in entries):
                raise WeightsError(f"{file} holds no weights under generator_ema, generator or model; choose another")
            yield from entries
        else:
            with safe_open(file, framework="pt", backend="pread") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    shape = opened.get_slice(name).get_shape()
                    yield name, torch.empty(shape, device="meta") if meta else opened.get_tensor(name)
    except UnpicklingError as error:
        raise WeightsError(f"{file} holds more than tensors, and pickled code is not run; choose another") from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise WeightsError(f"cannot read weights {file}: {_first_line(error)}; restore it or choose another") from error


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if {*WanTransformer3DModel._keep_in_fp32_modules} & {*name.split(".")} else dtype


def _described(state: Mapping[str, Tensor], files: Sequence[Path], path: Path) -> dict[str, Any]:
    """What config.json says, and the shapes where it says nothing."""
    config = files[0].parent / "config.json"
    architecture = _architecture(state, path) | _read_config(config)
    if not config.exists() and state["patch_embedding.weight"].shape[0] % _HEAD_DIM:
        raise WeightsError(f"{path} does not show the number of its heads; put its config.json beside it")
    return architecture


def _extra_channels(config: Mapping[str, Any], asked: int | None, path: Path) -> int:
    """How many control channels a T2V checkpoint is to be given."""
    own = config["in_channels"]
    if asked in (None, own):
        return 0
    if own != config["out_channels"] or own > asked:
        raise WeightsError(f"{path} takes {own} input channels, not {asked}; choose another checkpoint")
    return asked - own


def _architecture(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Arguments of WanTransformer3DModel, as far as the shapes show them."""
    try:
        shape = {name: tensor.shape for name, tensor in state.items()}
        dim, channels, *patch = shape["patch_embedding.weight"]
        embedder, image = "condition_embedder", "condition_embedder.image_embedder"
        return {
            "patch_size": tuple(patch),
            "num_attention_heads": dim // _HEAD_DIM,
            "attention_head_dim": _HEAD_DIM,
            "in_channels": channels,
            "out_channels": shape["proj_out.weight"][0] // math.prod(patch),
            "text_dim": shape[f"{embedder}.text_embedder.linear_1.weight"][1],
            "freq_dim": shape[f"{embedder}.time_embedder.linear_1.weight"][1],
            "ffn_dim": shape["blocks.0.ffn.net.0.proj.weight"][0],
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shape if name.startswith("blocks.")),
            "cross_attn_norm": "blocks.0.norm2.weight" in shape,
            "image_dim": shape.get(f"{image}.norm1.weight", [None])[0],
            "added_kv_proj_dim": shape.get("blocks.0.attn2.add_k_proj.weight", [None, None])[1],
            "pos_embed_seq_len": shape.get(f"{image}.pos_embed", [None, None])[1],
        }
    except (KeyError, IndexError, ValueError) as error:
        raise WeightsError(f"{path} is no Wan transformer: {error} is missing or misshapen; choose another") from error


def _read_config(file: Path) -> dict[str, Any]:
    """Arguments of WanTransformer3DModel from a config.json of either layout; none where there is no such file."""
    if not file.exists():
        return {}
    raw = _read_json(file)
    if "dim" not in raw:
        return {name: value for name, value in raw.items() if not name.startswith("_")}
    try:
        told = {new: raw[old] for old, new in _CONFIG.items()}
        return told | {"attention_head_dim": raw["dim"] // raw["num_heads"]}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{file} does not describe a Wan: {error}; restore it") from error


def _original_config(model: WanTransformer3DModel) -> dict[str, Any]:
    c = model.config
    kind = "flf2v" if c.pos_embed_seq_len else "i2v" if c.image_dim else "t2v"
    sizes = {old: c[new] for old, new in _CONFIG.items()}
    dim = c.num_attention_heads * c.attention_head_dim
    return {"_class_name": "WanModel", "model_type": kind, "text_len": 512, "dim": dim, **sizes}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"cannot read {file}: {_first_line(error)}; restore it") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
