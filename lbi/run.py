"""One run: load, quantize, audit, compile, warm up, measure, score, look inside, trace.

    python -m lbi.run ATTEMPT_FOLDER

A process of its own, started by the worker. It reads `config.json` from its attempt
folder, writes everything it finds there, and last `verdict.json`: how it ended and
why. A process that dies without one is judged by the worker.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbi.config import LbiConfig
from lbi.errors import InputError, OutOfMemory, RunFailure
from lbi.files import read_json, write_json
from lbi.kept_graphs import NEW, KeptGraphs
from lbi.process import Phases, cpu_seconds, die_with_parent, prepare
from lbi.record import Record
from lbi.store import SCHEMA
from lbi.typed import build

if TYPE_CHECKING:
    from lbi.draft_models import Draft
    from lbi.engines import Engine
    from lbi.models import LoadedModel
    from lbi.quantizers.audit import Layer
    from lbi.shared_model import Shared


def main(folder: Path) -> int:
    """Run the attempt in `folder`; 0 if it ended with a number."""
    die_with_parent()
    return attempt(folder)


def attempt(folder: Path, share: Callable[[], Shared] | None = None) -> int:
    """Run the attempt in `folder`; 0 if it ended with a number, and `share`, if given, can be used by another.

    `share` gives the model that runs of this process have in common; torch must have been imported by then.
    """
    started, cpu_before = time.perf_counter(), cpu_seconds()
    request = read_json(folder / "config.json", SCHEMA) or {}
    phases = Phases(folder)
    record = Record(folder, phases)
    status, reason, graphs, spoilt = "ok", "", None, ""
    try:
        config = build(LbiConfig, request["config"])
        graphs = _open_graphs(config, request, phases)
        record.effective |= {**request["slot"], "isolation": request["isolation"]}
        with phases("import"):
            prepare(config)
            import lbi.steps  # noqa: F401
        shared = share() if share is not None else None
        _run(config, request, record, phases, shared)
        _close_graphs(graphs, record, phases)
        record.metrics["total_s"] = time.perf_counter() - started
        record.write()
        if shared is not None:
            shared.hold(config, request["run_id"], record)
            spoilt = _put_back(shared, phases)
    except Exception as error:
        status, reason = _classify(error)
        traceback.print_exc()
        # A graph that was compiled is good, whatever came after it.
        _close_graphs(graphs, record, phases)
    cost = {**record.cost, "cpu_s": cpu_seconds() - cpu_before, "isolation": request.get("isolation", {}).get("how")}
    verdict = {"schema": SCHEMA, "status": status, "reason": reason, **phases.report(), "cost": cost, "spoilt": spoilt}
    write_json(folder / "verdict.json", verdict)
    return 0 if status == "ok" and not spoilt else 1


def _put_back(shared: Shared, phases: Phases) -> str:
    """Make the shared model what it was, for the next run; why it must not be used again, or empty.

    It is not this run's failure: what this run found is written.
    """
    with phases("put back"):
        try:
            return shared.put_back()
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"


def _open_graphs(config: LbiConfig, request: dict[str, Any], phases: Phases) -> KeptGraphs | None:
    """Compiled graphs of earlier runs, before anything is compiled; None where nothing will be."""
    graphs = KeptGraphs.of(config, Path(request["compile_cache"]), Path(request["kept_graphs"]))
    if graphs is not None:
        graphs.beside = int(request.get("beside", 0))
        with phases("open graphs"):
            graphs.open()
    return graphs


def _close_graphs(graphs: KeptGraphs | None, record: Record, phases: Phases) -> None:
    """Keep what was compiled, and record what a cold compile of the graph takes where that is known."""
    if graphs is None:
        return
    with phases("keep graphs"):
        start, phase_s = record.cost.get("compile"), phases.seconds.get("compile", 0.0)
        known = {} if start is None or start in NEW else graphs.cold()
        compile_s = record.metrics.get("compile_s") or record.effective.get("isolation", {}).get("compile_s")
        graphs.close(start, phase_s, compile_s)
    record.cost |= {"compile_cold_s": known["phase_s"]} if "phase_s" in known else {}
    record.effective["graph"] = {
        "key": graphs.key,
        "start": start,
        "from_the_store": graphs.seeded,
        **({"cold_compile_s": known["compile_s"]} if "compile_s" in known else {}),
        **({"cold_compile_beside": int(known["beside"])} if known.get("beside") else {}),
        **({"problems": graphs.problems} if graphs.problems else {}),
    }


def _classify(error: Exception) -> tuple[str, str]:
    """Status and reason of an exception."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RunFailure):
        return error.status, str(error)
    if isinstance(error, InputError):
        return "unsupported", str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return OutOfMemory.status, text
    return "crash", f"{type(error).__name__}: {text}"


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that is loaded, quantized and audited, and the engine around it; `check` compares a run's tokens."""

    engine: Engine
    loaded: LoadedModel
    prompt: list[int]
    layers: list[Layer]
    drafting: tuple[Any, list[Layer]] | None
    tuning: Path
    check: Callable[[list[int]], dict[str, Any]] | None


def _run(
    config: LbiConfig, request: dict[str, Any], record: Record, phases: Phases, shared: Shared | None = None
) -> None:
    from lbi import measuring, race, scoring, steps
    from lbi.look_inside import look_inside

    ready = make_ready(config, request, record, phases, checked=not _only_compiles(request), shared=shared)
    engine, model, prompt, layers = ready.engine, ready.loaded.model, ready.prompt, ready.layers
    steps.warm_up(config, engine, prompt, record, phases)
    steps.keep_tuning(layers, ready.tuning)
    if _only_compiles(request):
        record.metrics["compile_s"] = max(0.0, record.first_call_s - record.last_warm_up_s)
        return
    racing = race.enter(config, request, engine, prompt, record, phases)
    tokens = measuring.measure(config, engine, prompt, record, phases, racing)
    if ready.check is not None:
        record.effective["lossless"] = ready.check(tokens)
    record.text = {"prompt_tokens": len(prompt), "tokens": tokens, "text": ready.loaded.decode(tokens)}
    steps.place_on_roofline(config, request, model, layers, ready.drafting, len(prompt), record, phases)
    scoring.compare_text(config, request, tokens, record)
    if "mean_kld" not in record.metrics | record.missing:
        scoring.score_quality(config, request, engine, record, phases)
    look_inside(config, engine, model, prompt, layers, record, phases)
    steps.trace(config, engine, prompt, record, phases)


def _only_compiles(request: dict[str, Any]) -> bool:
    """Whether this is a process of ahead.py, which is done when its graph is compiled."""
    return request.get("until") == "compiled"


def make_ready(
    config: LbiConfig,
    request: dict[str, Any],
    record: Record,
    phases: Phases,
    *,
    checked: bool,
    shared: Shared | None = None,
) -> Ready:
    """Everything before the warm-up; `checked` holds kernels and tokens against the plain path."""
    from lbi import steps
    from lbi.engines import make

    had = _quantized(config, request, record, phases, shared)
    loaded, prompt, draft = had.loaded, had.prompt, had.draft
    check = None
    if checked:
        steps.check_one_row(config, loaded.model, had.layers, len(prompt), record, phases)
        check = steps.plain_path(config, loaded.model, prompt, phases)
    # Made after it: engine=fused turns the model's layers into views of its own matrices.
    engine = make(config, loaded.model, had.slots, draft, loaded.tokenizer)
    layers = steps.read_again(config, loaded.model, had.layers)
    draft_layers = steps.read_again(config, draft.model, had.draft_layers) if draft else []
    if checked:
        check = check or steps.cache_path(config, loaded.model, engine, prompt, phases)
    drafting = (draft.model, draft_layers) if draft else None
    return Ready(engine, loaded, prompt, layers, drafting, had.tuning, check)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A model that is loaded, quantized and audited, and its draft if there is one; no engine has touched it.

    `slots` is the length of a static cache, in tokens; `tuning` the file of GemLite's earlier tuning.
    """

    loaded: LoadedModel
    layers: list[Layer]
    prompt: list[int]
    slots: int
    draft: Draft | None
    draft_layers: list[Layer]
    tuning: Path


def _quantized(
    config: LbiConfig, request: dict[str, Any], record: Record, phases: Phases, shared: Shared | None
) -> Quantized:
    """Load, quantize and audit; where runs share a model, the first of them does, and the others use it."""
    from lbi import steps
    from lbi.draft_models import load_draft
    from lbi.models import load
    from lbi.prompts import fit_tokens, read_text
    from lbi.shared_model import Findings

    known = shared.kept if shared is not None else None
    with phases("load"):
        steps.check_request(config, request)
        loaded = known.loaded if known is not None else load(config.model, config.engine)
    tuning, kept = Path(request["devices"]) / f"gemlite-{request['env_id']}.json", Path(request["quantized"])
    sample = loaded.encode(read_text("text:chat"))
    prompt = fit_tokens(loaded.encode(read_text(config.workload.prompt)), config.workload.prompt_tokens)
    steps.check_context(config, loaded.model, len(prompt))
    slots = _slots(config, len(prompt))
    draft = load_draft(config, loaded.model)
    if shared is not None and known is not None:
        layers = known.layers
        shared.tell(config, record)
    else:
        findings = Findings(record)
        layers = steps.quantize(config, loaded.model, sample, tuning, record, phases, kept)
        if shared is not None:
            shared.keep(loaded, layers, findings.close(), request["run_id"], phases)
    draft_layers = steps.quantize_draft(config, draft, record, phases, kept)
    return Quantized(loaded, layers, prompt, slots, draft, draft_layers, tuning)


def _slots(config: LbiConfig, prompt_tokens: int) -> int:
    """The length of a static cache, in tokens. Raises `InputError` for one that the text does not fit."""
    # A verification writes its drafts behind the text's end, whether they stand or not.
    needed = prompt_tokens + config.workload.new_tokens + (config.decoding.draft_tokens or 0)
    slots = config.cache.max_len or needed
    if slots < needed:
        raise InputError(
            "cache.max_len", slots, f"is too short for {needed} tokens", "Set it to null for what is needed"
        )
    return slots


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
