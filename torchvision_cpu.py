"""Let torchvision import beside a CPU-only torch.

PyPI's Linux wheel of torchvision links libtorch_cuda.so. Beside a CPU build of torch its operators cannot load and
`import torchvision` dies with "operator torchvision::nms does not exist", which also breaks open_clip, transformers
and diffusers. Declaring the two schemas that torchvision registers fake kernels for makes its pure-Python parts
(transforms, models) usable; no operator is implemented, `torchvision.ops.nms` still raises. With a matching torch
this does nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_LIBRARY: torch.library.Library | None = None  # keeps the registration alive


def ensure_torchvision() -> bool:
    """Call before the first import of torchvision, open_clip, transformers or diffusers in a process.

    Returns True where torchvision's native operators load. Raises ImportError where torchvision is not installed.
    """
    global _LIBRARY
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed; run `make setup`")
    if _LIBRARY is not None:
        return False
    for shared_object in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(shared_object))
            return True
        except OSError:
            break
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        _LIBRARY.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return False
