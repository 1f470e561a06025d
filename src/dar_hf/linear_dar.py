"""Linear layers that are fast on CPUs where no gradient is wanted; what the two models share.

torch multiplies float32 matrices with MKL, which on AMD processors is half as fast as oneDNN, and a third with the
few rows of a decoding step. In half precision it uses oneDNN, but lays the weights out anew in every call: three times
the memory traffic of the weights themselves, which is what a decoding step costs. `pack` lays them out once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACK_FROM = 2**25  # bytes: smaller models stay in the processor's cache, where packing gains nothing
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bf16 natively, and so faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out weights of this dtype on this processor: bf16 needs AVX-512."""
    if _LINEAR is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """``nn.Linear``, through oneDNN where no gradient is wanted. Its weight may be packed, see `pack`."""

    _unpacked: tuple[nn.Parameter] | None = None  # the parameter, without data while packed; a tuple hides it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            self.unpack()
            return F.linear(x, self.weight, self.bias)
        packed, compiling = self._unpacked is not None, torch.compiler.is_compiling()
        if packed and (compiling or x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu")):
            return F.linear(x, self.weight.to_dense(), self.bias)
        if packed or (not compiling and self._gains_from_onednn(x)):
            return _LINEAR(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def _gains_from_onednn(self, x: torch.Tensor) -> bool:
        return (
            _LINEAR is not None
            and x.dtype == torch.float32 == self.weight.dtype
            and x.device.type == "cpu" == self.weight.device.type
            and type(self.weight) is nn.Parameter  # quantised weights have types of their own
            and not torch.is_autocast_enabled("cpu")
        )

    @property
    def can_pack(self) -> bool:
        """Whether the weight is one that oneDNN lays out here, and not packed yet."""
        weight = self.weight
        known = weight.device.type == "cpu" and _packs(weight.dtype)
        return known and self._unpacked is None and type(weight) is nn.Parameter

    def pack(self, rows: int) -> None:
        """Lay the weight out for ``rows`` rows of input (any other number works too)."""
        weight = self.weight
        with torch.inference_mode(False):  # or the parameter could not be trained after a call in inference mode
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self._unpacked = (weight,)
            self._parameters["weight"] = nn.Parameter(packed, requires_grad=weight.requires_grad)
            weight.data = weight.data.new_empty(0)

    def unpack(self) -> None:
        """Undo `pack`: the same parameter object, with the same values, is back."""
        if self._unpacked is not None:
            (weight,) = self._unpacked
            with torch.inference_mode(False):
                weight.data = self.weight.detach().to_dense()
            self._parameters["weight"] = weight
            self._unpacked = None

    # whatever is not inference wants the weight as it was

    def train(self, mode: bool = True) -> "Linear":
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "Linear":
        self.unpack()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        self.unpack()
        return super().__getstate__()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unpacked is not None:
            destination[prefix + "weight"] = self.weight.detach().to_dense()


def pack(module: nn.Module, rows: int) -> list[Linear]:
    """Lay the weights of a module's `Linear` layers out for fast inference on a CPU, in place and one by one.

    They take no more memory than before. Training mode, gradients, moving, loading and saving give the plain weights
    back. Does nothing for small models and on other devices.

    Args:
        rows: rows of input to expect, such as the batch size of a decoding step.

    Returns:
        The layers that were packed.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Linear) and layer.can_pack]
    if module.training or sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) < PACK_FROM:
        return []
    for layer in layers:
        layer.pack(rows)
    return layers


@contextmanager
def packed(module: nn.Module, rows: int) -> Iterator[None]:
    """`pack` for the length of a block."""
    layers = pack(module, rows)
    try:
        yield
    finally:
        for layer in layers:
            layer.unpack()
