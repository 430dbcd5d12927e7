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
    embedding = model.get_input_embeddings().weight  # of an int8 table too
    head = next((layer for layer in layers if layer.name.endswith("lm_head")), None)
    tied = head is not None and any(
        tensor.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr() for tensor in head.seen.tensors
    )
    table = 0 if tied else storage_bytes([embedding])
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


def measured_peaks(folder: Path, name: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth (bytes/s) and matmul peak (FLOP/s) of this device, measured once per `name`."""
    file = folder / f"{name}.json"
    try:
        known = read_json(file, SCHEMA)
    except BadFile:
        known = None
    if known is None:
        known = {
            "schema": SCHEMA,
            "read_bytes_per_s": read_bandwidth(device),
            "matmul_flop_per_s": _matmul_peak(device, dtype),
            "threads": torch.get_num_threads(),
        }
        write_json(file, known)
    return {key: float(known[key]) for key in ("read_bytes_per_s", "matmul_flop_per_s")}


def _best_seconds(work: Any, device: str, tries: int = 7) -> float:
    best = float("inf")
    for _ in range(tries):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(device: str) -> float:
    """Bytes a second of a sum over a buffer far larger than any cache: 1 GiB on a GPU, 512 MiB on a CPU."""
    elements = (1 << 28) if device == "cuda" else (1 << 27)
    buffer = torch.ones(elements, dtype=torch.float32, device=device)
    return float(buffer.numel() * buffer.element_size()) / _best_seconds(buffer.sum, device)


def _matmul_peak(device: str, dtype: torch.dtype) -> float:
    side = 8192 if device == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    # F.linear, not `@`: a CPU has a far slower path for an untransposed bfloat16 operand.
    seconds = _best_seconds(lambda: torch.nn.functional.linear(left, right), device, tries=4)
    return 2.0 * side**3 / seconds
