"""What decides how long each part of a run takes: the kind of a run, as the cost model compares runs by it.

Kept with each result, so that the model reads one small file a result and none of its configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbi.config import LbiConfig
from lbi.graph_key import graph_key, held_key
from lbi.identity import canonical, canonical_cache, canonical_decoding, canonical_quantizer, digest
from lbi.share_key import share_key
from lbi.typed import plain


class Kinds:
    """Makes kinds. What depends on one section alone is worked out once: a plan's cells share their sections."""

    def __init__(self) -> None:
        # The section is kept beside its name, so that no other gets its id meanwhile.
        self._known: dict[tuple[str, int], tuple[Any, str]] = {}

    def of(self, config: LbiConfig) -> dict[str, Any]:
        """Short names of the parts of a setting, the same for parts that cost the same, and the amounts measured."""
        quantizer, measure = config.quantizer, config.measure
        return {
            "device": config.engine.device,
            "model": self._short("model", config.model, lambda section: canonical(plain(section))),
            "quantizer": self._short("quantizer", quantizer, canonical_quantizer),
            "method": f"{quantizer.family} {quantizer.method} {quantizer.bits}",
            "compiler": self._short("compiler", config.compiler, lambda section: canonical(plain(section))),
            "backend": config.compiler.backend,
            "graph": graph_key(config),
            "engine": config.engine.kind,
            "cache": self._short("cache", config.cache, canonical_cache),
            "decoding": self._short("decoding", config.decoding, canonical_decoding),
            "workload": self._short("workload", config.workload, lambda section: canonical(plain(section))),
            "quality": self._short("quality", config.quality, lambda section: canonical(plain(section)))
            if config.quality.enabled
            else None,
            "own_pass": own_pass(config),
            "fork": config.resources.fork,
            "shares": share_key(config),
            "holds": held_key(config) if share_key(config) else None,
            "repetitions": measure.repetitions,
            "warmup": measure.warmup,
            "tokens": config.workload.new_tokens,
        }

    def _short(self, name: str, section: Any, text: Callable[[Any], str]) -> str:
        key = (name, id(section))
        if key not in self._known:
            self._known[key] = (section, short(text(section)))
        return self._known[key][1]


def own_pass(config: LbiConfig) -> str | None:
    """What beside the weights decides a cell's teacher-forced pass; None where it is that of the weights alone."""
    parts: list[str] = [config.engine.kind] if config.engine.kind == "fused" or not config.cache.lossless else []
    parts += [canonical_cache(config.cache)] if not config.cache.lossless else []
    parts += [canonical(plain(config.compiler))] if config.compiler.prefill else []
    return short(" ".join(parts)) if parts else None


def short(text: str) -> str:
    """12 hex digits for a text."""
    return digest("kind", {"text": text})
