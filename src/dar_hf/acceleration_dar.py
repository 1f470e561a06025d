"""What only buys speed: private copies of the models, in the same or another dtype. Nothing here changes a model.

`accelerated` gives a copy of a module that shares its parameters. On CPUs the copy's linear layers go through oneDNN.
torch multiplies float32 matrices with MKL, which on AMD processors is half as fast, and a third with the few rows of a
decoding step. In half precision torch uses oneDNN, but lays the weights out anew in every call: three times the memory
traffic of the weights themselves, which is what a decoding step costs. A packed layer has laid them out once.

Models whose own classes and parameters are not all that computes (hooks, adapters, quantised or sharded weights,
compiled or offloaded parts) are not copied: they run as they are.
"""

import copy
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer

HALF_FROM = 512  # width from which a denoiser gains from bf16; smaller ones are bound by overheads
SHORT_SEQUENCE = 128  # up to here the fused attention of CPUs is several times slower backwards than plain matmuls
HALF_SEQUENCE = 128  # from here on, bf16 on CPUs, products of two heads at a time are faster than fused attention
PACK_FROM = 2**25  # bytes: smaller models stay in the processor's cache, where packing gains nothing
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# packed weights of the copies that are alive, by the parameter they are of; and the copies that outlive their call
_PACKED: WeakValueDictionary[tuple[int, torch.dtype], nn.Parameter] = WeakValueDictionary()
_KEPT: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
_LOCK = threading.Lock()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bf16 natively, and so faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def fastest_dtype(dtype: torch.dtype, device: torch.device, width: int) -> torch.dtype:
    """In which dtype a denoiser of this width decodes fastest, of a model in ``dtype``; no less exact than bf16."""
    if width < HALF_FROM:
        return dtype
    if has_fast_bf16(device):
        return torch.bfloat16 if dtype == torch.float32 else dtype
    is_half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and device.type == "cpu" else dtype


def is_plain(module: nn.Module) -> bool:
    """Whether a copy of this module computes what it does: nothing intervenes but its own classes and parameters."""
    return all(
        (part is module or _is_known(type(part)))
        and not any(map(_intervenes, (*part._forward_hooks.values(), *part._forward_pre_hooks.values())))
        and "forward" not in vars(part)  # how accelerate, diffusers and kernels wrap it
        and part._compiled_call_impl is None
        and all(_is_ordinary(parameter) for parameter in part._parameters.values())
        for part in module.modules()
    )


def _intervenes(hook: Any) -> bool:
    """Whether a hook is more than transformers' recorder of hidden states, which stays where it was once asked for."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _is_known(kind: type) -> bool:
    """Whether a class is torch's, transformers' or this package's own."""
    own = __name__.partition(".")[0]
    return kind.__module__.startswith(("torch.nn.modules.", "transformers.activations", "transformers.models.", own))


def _is_ordinary(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter is a plain tensor in memory; quantised and sharded ones have types of their own."""
    return parameter is None or (type(parameter) is nn.Parameter and not parameter.is_meta)


def accelerated(
    module: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    pack: bool = False,
    keep: bool = False,
    float32_outputs: Collection[str] = (),
    without: Collection[str] = (),
) -> Any:
    """A private copy of a module that computes the same faster without gradients, or the module itself.

    The copy shares the module's parameters and buffers, so it costs no memory and sees every change of them; but for
    packed or cast weights, which are those of this moment. It has its own training mode. The module itself comes back
    with gradients enabled, where `is_plain` says so, and under ``torch.compile``.

    Args:
        dtype: cast the copy's weights.
        pack: lay the weights of linear layers out for the processor: as much memory again, which copies of one module
            share while its weights stay. Does nothing for small models and on other devices.
        keep: keep the packed weights for the next call, until `release`.
        float32_outputs: names of linear layers whose outputs are to be float32 on CPUs.
        without: names of parts to leave out.
    """
    kept = _KEPT.pop(module, None)  # alive until this call is over, so that its packed weights are found
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_plain(module):
        return module
    linears = [part for part in module.modules() if type(part) is nn.Linear]
    size = sum(layer.weight.numel() * (dtype or layer.weight.dtype).itemsize for layer in linears)
    faster = _copy(module, dtype, pack and size >= PACK_FROM, float32_outputs, without)
    if keep:
        _KEPT[module] = faster
    del kept
    return faster


def release(module: nn.Module) -> None:
    """Forget the copy that `accelerated` kept."""
    _KEPT.pop(module, None)


def _copy(
    module: nn.Module,
    dtype: torch.dtype | None,
    pack: bool,
    float32_outputs: Collection[str],
    without: Collection[str],
) -> nn.Module:
    clone = copy.copy(module)  # parameters, buffers and hooks stay in the dictionaries of the module
    if type(module) is nn.Linear and module.weight.device.type == "cpu":
        _accelerate(clone, dtype, pack)
    elif dtype is not None:
        clone._parameters = _cast(clone._parameters, dtype)
        clone._buffers = _cast(clone._buffers, dtype)
    if hasattr(clone, "processor") and hasattr(clone.processor, "attention"):
        clone.processor = copy.copy(clone.processor)
        clone.processor.attention = functools.partial(fast_attention, clone.processor.attention)
    clone._modules = {
        name: None if child is None or name in without else _copy(child, dtype, pack, float32_outputs, without)
        for name, child in module._modules.items()
    }
    for name in float32_outputs:
        if isinstance(layer := clone._modules.get(name), FastLinear):
            layer.float32_output = True
    return clone


def _cast(tensors: Mapping[str, torch.Tensor | None], dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point parameters or buffers in another dtype; without a copy where they have it."""
    return {
        name: tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


class FastLinear(nn.Linear):
    """``nn.Linear`` through oneDNN, where no gradient is wanted; its weight may be packed. Made by `accelerated`."""

    float32_output = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16):
            x = x.to(weight.dtype)  # attention over float32 queries, keys and values gives float32
        if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            output = F.linear(x, weight.to_dense() if weight.is_mkldnn else weight, self.bias)
        elif weight.is_mkldnn or (x.dtype == torch.float32 and _LINEAR is not None):
            output = _LINEAR(x, weight, self.bias, "none", [], "")
        else:
            output = F.linear(x, weight, self.bias)
        return output.float() if self.float32_output else output


def _accelerate(layer: nn.Linear, dtype: torch.dtype | None, pack: bool) -> None:
    """Make a layer that nobody else uses fast, of weights that others use."""
    dtype = layer.weight.dtype if dtype is None else dtype
    weight = _packed(layer.weight, dtype) if pack and _packs(dtype) else layer.weight.to(dtype)
    if weight is not layer.weight:
        layer._parameters = {"weight": weight, **_cast({"bias": layer.bias}, dtype)}
    layer.__class__ = FastLinear


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out weights of this dtype on this processor: bf16 needs AVX-512."""
    if _LINEAR is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _packed(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A weight in another dtype, laid out for oneDNN: another copy's, or a new one where the weight has changed."""
    # for few rows of input, which is best for many, too; outside inference mode, as others may use it there
    with _LOCK, torch.inference_mode(False):
        state = _state(weight)
        packed = _PACKED.get((id(weight), dtype))
        if packed is None or packed.state[:2] != state[:2] or not torch.equal(packed.state[2], state[2]):
            dense = weight.detach().to(dtype)
            packed = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(dense, 2), requires_grad=False)
            packed.state = state
            _PACKED[id(weight), dtype] = packed
    return packed


def _state(weight: nn.Parameter) -> tuple[int, int, torch.Tensor]:
    """What changes with a weight: its address, torch's count of changes, and the sums of its rows' bits.

    Writing through ``.data``, as averages of weights are put in place, is not counted. A sum takes a tenth of the time
    of packing.
    """
    version = 0 if weight.is_inference() else weight._version
    bits = weight.detach()
    size = bits.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    # where rows divide into 64-bit integers these are summed: fewer of them, and as fast as memory is read
    if bits.is_contiguous() and bits.shape[-1] * size % 8 == 0 and bits.storage_offset() * size % 8 == 0:
        integers = torch.int64
    return weight.data_ptr(), version, bits.view(integers).sum(dim=-1)


def fast_attention(
    attention: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    backend: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Calls ``attention (B, L, heads, head_dim)``, except for long unmasked sequences in bf16 on CPUs.

    There torch's fused kernel is no faster than in float32; softmax(QK^T)V is computed instead, two heads at a time,
    so that their scores stay in the cache and each core has a head.
    """
    is_half = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if backend is not None or attention_mask is not None or not is_half or key.shape[1] <= HALF_SEQUENCE:
        return attention(query, key, value, attention_mask, backend=backend, **kwargs)
    output = torch.empty_like(query)
    batch_size, length, num_heads, head_dim = query.shape
    scores = query.new_empty(2, length, key.shape[1])
    weights = torch.empty_like(scores)
    for row in range(batch_size):
        q, k, v = (x[row].transpose(0, 1).contiguous() for x in (query * head_dim**-0.5, key, value))
        for head in range(0, num_heads, 2):
            pair = slice(head, head + 2)
            size = len(q[pair])
            torch.bmm(q[pair], k[pair].transpose(1, 2), out=scores[:size])
            torch.softmax(scores[:size], dim=-1, out=weights[:size])
            output[row, :, pair] = torch.bmm(weights[:size], v[pair]).transpose(0, 1)
    return output


class FilledCacheLayer(DynamicLayer):
    """Keys and values in one buffer of full length, of which attention sees the filled part.

    A growing cache is copied whole at every token, and a static one is read whole.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.buffers: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype = key_states.dtype
        self.device = key_states.device
        batch_size, num_heads, _, head_dim = key_states.shape
        shape = (batch_size, num_heads, self.max_length, head_dim)
        with torch.inference_mode(False):  # a stream begun in inference mode may go on outside it
            self.buffers = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2)]
        self.keys, self.values = (buffer[:, :, :0] for buffer in self.buffers)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop].copy_(new)
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: torch's allocator keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)


class SideStream:
    """A CUDA stream on which denoising runs while the language model goes on on the stream that was current.

    What one stream makes and the other reads is recorded there: else its memory could be given away too early.
    """

    def __init__(self, device: torch.device):
        self.main = torch.cuda.current_stream(device)
        self.side = _side_stream(device)
        self.side.wait_stream(self.main)

    def hand_over(self, codes: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Codes for the side stream, on which this is run, made on the main one."""
        try:
            while True:
                with torch.cuda.stream(self.main):
                    group = next(codes, None)
                if group is None:
                    return
                self.side.wait_stream(self.main)
                group.record_stream(self.side)
                yield group
        finally:
            getattr(codes, "close", lambda: None)()

    def run(self, steps: Iterator[Any]) -> Iterator[Any]:
        """The steps, all of which run on the side stream. At their end the main one waits, and may use the last."""
        last = None
        try:
            while True:
                with torch.cuda.stream(self.side):
                    step = next(steps, None)
                if step is None:
                    break
                last = step
                yield step
        finally:
            getattr(steps, "close", lambda: None)()
            self.main.wait_stream(self.side)
            if last is not None:
                last.sample.record_stream(self.main)
                last.latents.record_stream(self.main)


def can_overlap(transformer: nn.Module, tokenizer: nn.Module) -> bool:
    """Whether denoising may run alongside the language model: both stay on one CUDA device.

    Compiled tokenizers are left out: CUDA graphs share memory, and must not be replayed on two streams at once.
    """
    devices = {tokenizer.device, transformer.device}
    if len(devices) > 1 or devices.pop().type != "cuda":
        return False
    parts = [*tokenizer.modules(), *transformer.modules()]
    moved = any(hasattr(part, name) for part in parts for name in ("_hf_hook", "_diffusers_hook"))
    compiled = any(part._compiled_call_impl or hasattr(part, "_orig_mod") for part in tokenizer.modules())
    return not moved and not compiled
