"""Which runs may use one loaded model in turn, in one process (resources.isolation=shared_load).

The key groups: runs with one key differ in decoding, cache or workload alone. A run has none where what it does
to the model, or what is done beside it, would reach into the runs after it; `why_alone` says what.
"""

from __future__ import annotations

from lbi import tracing
from lbi.config import LbiConfig
from lbi.graph_key import graph_key
from lbi.identity import canonical, canonical_engine, canonical_quantizer, digest
from lbi.quantizers.options import parts
from lbi.typed import plain

SHARED = "shared_load"
PROCESS = "process"

ALIKE = ("model", "compiler", "quality", "measure", "trace", "store", "resources")
"""Groups that runs of one process have in common, beside the engine and the quantizer."""


def why_alone(config: LbiConfig) -> str | None:
    """Why a run must have a process of its own although resources.isolation=shared_load; None if it need not."""
    if config.engine.kind == "fused":
        return "engine=fused puts the model's weights together anew, and leaves none for another engine"
    if config.decoding.speculative == "self":
        return "decoding.speculative=self makes its draft of the weights before they are quantized"
    if config.quantizer.family == "autoquant":
        return "what autoquant chooses rests on times of its own process"
    if any(part.family == "custom" for part in (config.quantizer, *parts(config.quantizer))):
        return "what a quantizer of the user's own does to later runs is not known"
    if tracing.wanted(config):
        return f"trace={config.trace.name} records what a process does from its start"
    if config.engine.device == "cuda" and config.resources.foreign == "wait":
        return "resources.foreign=wait looks at the GPU between two runs, when nothing of lbi's may be on it"
    return None


def share_key(config: LbiConfig) -> str | None:
    """12 hex digits that runs have in common which one process may do in turn; None for one that shares nothing."""
    if config.resources.isolation != SHARED or why_alone(config) is not None:
        return None
    alike = {name: canonical(plain(getattr(config, name))) for name in ALIKE}
    alike |= {"engine": canonical_engine(config.engine), "quantizer": canonical_quantizer(config.quantizer)}
    return digest("share", alike)


def together(config: LbiConfig) -> str | None:
    """What runs have in common that had better follow each other: a loaded model, else a compiled graph; or nothing.

    Runs of one loaded model have one compiler, so those of a graph are among them.
    """
    return share_key(config) or graph_key(config)
