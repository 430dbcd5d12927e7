"""How fast the memory allows decoding to be: bytes a token must read, and peaks of the device.

The measured peaks are what a plain streaming read and a large matmul reach on this
machine, kept in the store per environment; the data sheet's are a table by name.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from lbi.files import BadFile, read_json, write_json
from lbi.quantizers.audit import Layer, storage_bytes, weight_bytes

SCHEMA = 1

NOMINAL_BYTES_PER_S = {
    "H200": 4.8e12,
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100-SXM4-40GB": 1.555e12,
    "L40S": 0.864e12,
    "L4": 0.3e12,
    "RTX 5090": 1.792e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
}
"""Memory bandwidth from the makers' data sheets, by a part of the device's name."""


def nominal_bandwidth(device_name: str) -> float | None:
    """Data sheet bandwidth in bytes a second; None for a device that is not in the table."""
    return next((rate for name, rate in NOMINAL_BYTES_PER_S.items() if name in device_name), None)


def bytes_per_step(model: torch.nn.Module, layers: list[Layer], kv_bytes_read: float, sequences: int = 1) -> float:
    """Bytes that one decode step must read, which gives a token to each of `sequences`.

    All weights but the embedding table, of which a row a sequence is read, unless the lm_head
    is the same storage; plus the keys and values of all sequences.
    """
    module = model.get_input_embeddings()
    embedding = module.weight  # of an int8 table too
    head = next((layer for layer in layers if layer.name.endswith("lm_head")), None)
    tied = head is not None and any(
        tensor.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr() for tensor in head.seen.tensors
    )
    scale = getattr(module, "scale", None)
    whole = [embedding, scale] if isinstance(scale, torch.Tensor) else [embedding]
    table = 0 if tied else storage_bytes(whole)
    rows = sequences * embedding.shape[-1] * embedding.element_size()
    return weight_bytes(model) - table + (0 if tied else rows) + kv_bytes_read


def flop_shape(model: Any, layers: list[Layer]) -> dict[str, float]:
    """What `metrics.prefill_flop` needs to know of a model."""
    config = model.config
    head = sum(layer.params for layer in layers if layer.name.endswith("lm_head"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "body_params": float(sum(layer.params for layer in layers) - head),
        "head_params": float(head),
        "layers": float(config.num_hidden_layers),
        "attention_width": float(config.num_attention_heads * head_dim),
    }


PROBE = 2
"""Of how a device is measured: what an older lbi measured is measured again."""


def measured_peaks(folder: Path, name: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth (bytes/s) and matmul peak (FLOP/s) of this device, measured once per `name`."""
    file = folder / f"{name}.json"
    try:
        known = read_json(file, SCHEMA)
    except BadFile:
        known = None
    if known is None or known.get("probe") != PROBE:
        known = {
            "schema": SCHEMA,
            "probe": PROBE,
            "read_bytes_per_s": read_bandwidth(device),
            "matmul_flop_per_s": _matmul_peak(device, dtype),
            "threads": torch.get_num_threads(),
        }
        write_json(file, known)
    return {key: float(known[key]) for key in ("read_bytes_per_s", "matmul_flop_per_s")}


def _best_seconds(work: Any, device: str, tries: int = 7) -> float:
    """The shortest of `tries`; on a GPU of five calls each, by its own clock: a launch is a share of one call."""
    best = float("inf")
    for _ in range(tries):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                work()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 5e3)
        else:
            begun = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - begun)
    return best


def read_bandwidth(device: str) -> float:
    """Bytes a second that reading takes at best, of a buffer far larger than any cache: 1 GiB on a GPU, half on a CPU.

    The faster of a sum and, on a GPU, of a matrix times a vector: neither is the faster one on every GPU, and what a
    decode step is held to should be no slower than what it does.
    """
    elements = (1 << 28) if device == "cuda" else (1 << 27)
    buffer = torch.ones(elements, dtype=torch.float32, device=device)
    size = float(buffer.numel() * buffer.element_size())
    best = _best_seconds(buffer.sum, device)
    if device == "cuda":
        matrix = buffer.view(torch.bfloat16).view(-1, 4096)
        vector = torch.ones(1, 4096, dtype=torch.bfloat16, device=device)
        best = min(best, _best_seconds(lambda: torch.nn.functional.linear(vector, matrix), device))
    return size / best


def _matmul_peak(device: str, dtype: torch.dtype) -> float:
    side = 8192 if device == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    # F.linear, not `@`: a CPU has a far slower path for an untransposed bfloat16 operand.
    seconds = _best_seconds(lambda: torch.nn.functional.linear(left, right), device, tries=4)
    return 2.0 * side**3 / seconds
