"""Wan's text embeddings: UMT5's last hidden states, computed once and kept on disk.

The encoder has four times the weights of the 1.3B transformer, so it is loaded for the texts that are new and dropped
again. A machine that has the cache needs no encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from policy.files import WeightsError
from torchvision_cpu import ensure_torchvision

ensure_torchvision()

BATCH = 8


class WanText:
    """A `TextEncoder` over a cache folder that belongs to one encoder; its encoder.json says to which.

    cache: folder, made when it is missing. length: tokens L. dim: what the transformer reads, None: any. folder: holds
    text_encoder/ and tokenizer/ in diffusers layout; None, or a folder without them: only cached texts. dtype, device:
    where and how the encoder runs. Raises WeightsError where the cache is another encoder's.
    """

    def __init__(
        self,
        cache: str | Path,
        length: int,
        dim: int | None,
        folder: str | Path | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ) -> None:
        self.cache, self.length, self.dim = Path(cache), length, dim
        self.dtype, self.device = dtype, torch.device(device)
        self.folder = Path(folder) if folder is not None and (Path(folder) / "text_encoder").is_dir() else None
        recorded = self._recorded()
        own = f"{identity_of(self.folder)}-{str(dtype).removeprefix('torch.')}" if self.folder else recorded
        if recorded not in (None, own):
            raise WeightsError(f"{self.cache} holds embeddings of another encoder than {folder}; choose another cache")
        self.identity = own
        self._read = lru_cache(maxsize=256)(self._read_file)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[B, L, dim] in the encoder's dtype, padded with zeros as diffusers' WanPipeline does.

        Raises WeightsError naming the text that is not cached where there is no encoder.
        """
        if missing := self.missing(texts):
            self._encode(missing)
        rows = [self._read(text) for text in texts]
        return torch.stack([F.pad(r, (0, 0, 0, self.length - len(r))) for r in rows])

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those that are not cached yet, each once."""
        return [text for text in dict.fromkeys(texts) if not self._file(text).is_file()]

    def put(self, text: str, embedding: Tensor) -> None:
        """Caches an embedding [n, dim] or [L, dim] that was made elsewhere; rows of zeros at its end are padding."""
        dim = self.dim or embedding.shape[-1]
        if embedding.ndim != 2 or embedding.shape[1] != dim or len(embedding) > self.length:
            need = f"at most {self.length} rows of {dim}"
            raise WeightsError(f"the embedding of {text!r} is {list(embedding.shape)}, not {need}; give another")
        if self.identity is None:
            self.identity = "given"
        self.cache.mkdir(parents=True, exist_ok=True)
        if self._recorded() is None:
            record = {"encoder": self.identity, "length": self.length, "dim": dim}
            _write(self.cache / "encoder.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        used = embedding.ne(0).any(1).nonzero()
        rows = embedding[: int(used.max()) + 1 if len(used) else 0].contiguous().cpu()
        _write(self._file(text), lambda path: save_file({"embedding": rows}, path, {"text": text}))

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> None:
        if self.folder is None:
            raise WeightsError(
                f"no embedding of the text {texts[0]!r} in {self.cache}, and no text_encoder/ to make it with; "
                "run jobs.embed where there is one"
            )
        pipeline = _pipeline(self.folder, self.dtype, self.device)
        for i in range(0, len(texts), BATCH):
            some = list(texts[i : i + BATCH])
            embeddings, _ = pipeline.encode_prompt(
                some, do_classifier_free_guidance=False, max_sequence_length=self.length, device=torch.device("cpu")
            )
            for text, embedding in zip(some, embeddings):
                self.put(text, embedding)

    def _file(self, text: str) -> Path:
        key = json.dumps([text, self.identity, self.length])
        return self.cache / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"

    def _read_file(self, text: str) -> Tensor:
        file = self._file(text)
        try:
            rows = load_file(file)["embedding"]
        except (SafetensorError, OSError, KeyError) as error:
            raise WeightsError(f"cannot read the embedding {file}: {error}; remove it to have it made again") from error
        if self.dim not in (None, rows.shape[-1]):
            raise WeightsError(f"{file} holds {list(rows.shape)}, but the transformer reads {self.dim} numbers a token")
        return rows

    def _recorded(self) -> str | None:
        file = self.cache / "encoder.json"
        try:
            return json.loads(file.read_text())["encoder"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"cannot read {file}: {error}; remove the folder or choose another cache") from error


def identity_of(folder: Path) -> str:
    """A hash of the tokenizer, of the encoder's config.json, and of the name, size and last MiB of its weights."""
    h = hashlib.blake2b(digest_size=12)
    for file in sorted((*folder.glob("tokenizer/*"), *folder.glob("text_encoder/*"))):
        size = file.stat().st_size
        with file.open("rb") as opened:
            if file.suffix == ".safetensors":
                opened.seek(max(0, size - 2**20))
            h.update(f"{file.name} {size}".encode() + opened.read())
    return h.hexdigest()


def _pipeline(folder: Path, dtype: torch.dtype, device: torch.device):
    """diffusers' WanPipeline with its text half alone."""
    from diffusers import WanPipeline  # here, as it takes seconds that a run with cached texts does not need
    from transformers import AutoTokenizer, UMT5EncoderModel

    if not (folder / "tokenizer/tokenizer.json").is_file():  # transformers goes on with a vocabulary of its own
        raise WeightsError(f"{folder / 'tokenizer'} holds no tokenizer.json; restore it or choose another")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder, info = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(
            f"cannot read the text encoder of {folder}: {reason}; restore it or choose another"
        ) from error
    if strange := sorted((*info["missing_keys"], *info["unexpected_keys"])):
        raise WeightsError(f"{folder / 'text_encoder'} is not whole: {strange[0]} is missing or unknown; restore it")
    return WanPipeline(tokenizer=tokenizer, text_encoder=encoder.eval().to(device), vae=None, scheduler=None)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """All or nothing, whoever else writes the same."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
