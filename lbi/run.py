"""One run: load, quantize, audit, compile, warm up, measure, score, trace, record.

    python -m lbi.run ATTEMPT_FOLDER

A process of its own, started by the worker. It reads `config.json` from its attempt
folder, writes everything it finds there, and last `verdict.json`: how it ended and
why. A process that dies without one is judged by the worker.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbi.config import CacheConfig, CompilerConfig, LbiConfig
from lbi.errors import InputError, NotApplied, OutOfMemory, RunFailure
from lbi.files import read_json, write_json
from lbi.process import CpuWatch, PeakMemory, Phases, die_with_parent, prepare
from lbi.store import SCHEMA
from lbi.typed import build


def main(folder: Path) -> int:
    """Run the attempt in `folder`; 0 if it ended with a number."""
    die_with_parent()
    started = time.perf_counter()
    request = read_json(folder / "config.json", SCHEMA) or {}
    phases = Phases(folder)
    status, reason = "ok", ""
    try:
        config = build(LbiConfig, request["config"])
        record = _Record(folder, phases)
        with phases("import"):
            prepare(config)
            import lbi.engines.hf
            import lbi.models  # noqa: F401
        _run(config, request, record, phases)
        record.metrics["total_s"] = time.perf_counter() - started
        record.write()
    except Exception as error:
        status, reason = _classify(error)
        traceback.print_exc()
    write_json(folder / "verdict.json", {"schema": SCHEMA, "status": status, "reason": reason, **phases.report()})
    return 0 if status == "ok" else 1


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


class _Record:
    """What the run found, written at its end into its attempt folder."""

    def __init__(self, folder: Path, phases: Phases) -> None:
        self.folder, self.phases = folder, phases
        self.metrics: dict[str, float | None] = {}
        self.missing: dict[str, str] = {}
        self.effective: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self.text: dict[str, Any] = {}

    def write(self) -> None:
        """metrics.json is last: a folder that has it has everything."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name, phase in (("load_s", "load"), ("quantize_s", "quantize")):
            self.metrics[name] = self.phases.seconds.get(phase, 0.0)
        pq.write_table(pa.Table.from_pylist(self.samples), self.folder / "samples.parquet")
        write_json(self.folder / "effective.json", {"schema": SCHEMA, **self.effective})
        write_json(self.folder / "text.json", {"schema": SCHEMA, **self.text})
        write_json(
            self.folder / "metrics.json",
            {
                "schema": SCHEMA,
                "metrics": self.metrics,
                "missing": self.missing,
                "phases_s": self.phases.seconds,
            },
        )


def _run(config: LbiConfig, request: dict[str, Any], record: _Record, phases: Phases) -> None:
    from lbi.engines.hf import HfEngine
    from lbi.models import fit_tokens, load, read_text

    with phases("load"):
        loaded = load(config.model, config.engine)
    layers = _quantize(config, loaded.model, record, phases)
    workload = config.workload
    prompt = fit_tokens(loaded.encode(read_text(workload.prompt)), workload.prompt_tokens)
    slots = config.cache.max_len or len(prompt) + workload.new_tokens
    if slots < len(prompt) + workload.new_tokens:
        raise InputError("cache.max_len", slots, f"is too short for {len(prompt)} + {workload.new_tokens} tokens")
    engine = HfEngine(loaded.model, config, slots)
    check = _plain_path(config, loaded.model, prompt, phases)
    _warm_up(config, engine, prompt, record, phases)
    tokens = _measure(config, engine, prompt, record, phases)
    if check is not None:
        record.effective["lossless"] = check(tokens)
    record.text = {"prompt_tokens": len(prompt), "tokens": tokens, "text": loaded.decode(tokens)}
    _roofline(config, request, loaded.model, layers, len(prompt), record, phases)
    _score(config, request, engine, loaded.encode, tokens, record, phases)
    _trace(config, engine, prompt, record, phases)


def _quantize(config: LbiConfig, model: Any, record: _Record, phases: Phases) -> list[Any]:
    """Quantize and audit; the layers as found."""
    import torch

    from lbi.compilers import CompilerState
    from lbi.quantizers import audit, method

    names = audit.linear_names(model)
    targets = audit.targets(model, config.quantizer)
    before = CompilerState.take()
    with phases("quantize"), torch.no_grad():
        method(config.quantizer).apply(model, config.quantizer, targets)
    undone = before.restore()
    with phases("audit"):
        layers = audit.read_layers(model, names)
        audit.check(layers, config.quantizer)
        gc.collect()
        summary = audit.summarize(layers)
        weight_bytes = audit.weight_bytes(model)
    record.metrics |= {
        "weight_bytes": float(weight_bytes),
        "bits_per_weight": summary["bits_per_weight"],
        "quantized_fraction": summary["quantized_fraction"],
    }
    record.effective["weights"] = summary
    record.effective["settings_undone"] = undone
    record.effective["attention"] = getattr(model.config, "_attn_implementation", None)
    record.effective["threads"] = torch.get_num_threads()
    record.effective["torch"] = torch.__version__
    return layers


def _plain_path(config: LbiConfig, model: Any, prompt: list[int], phases: Phases) -> Any:
    """A check that the cell's greedy tokens are those of the eager, dynamic-cache path; None where it is that path."""
    import torch

    from lbi.engines.hf import HfEngine
    from lbi.lossless import compare

    is_plain = config.compiler.backend == "eager" and config.cache.kind == "dynamic"
    if is_plain or config.decoding.kind != "greedy":
        return None
    plain = replace(
        config,
        compiler=CompilerConfig(name="eager", backend="eager"),
        cache=CacheConfig(name="dynamic", kind="dynamic"),
    )
    with phases("plain path"):
        engine = HfEngine(model, plain, slots=0)
        expected = engine.generate(prompt, config.workload.new_tokens, seed=0, inspect=True)
        at_once = engine.forward(prompt + expected.tokens[:-1])[len(prompt) - 1 :].float().cpu()
    assert_finite(torch, at_once)
    return lambda tokens: compare(tokens, expected.tokens, expected.logits, at_once)


def assert_finite(torch: Any, logits: Any) -> None:
    """Raise `BadNumerics` for logits with NaN or infinity."""
    from lbi.errors import BadNumerics

    if not bool(torch.isfinite(logits).all()):
        raise BadNumerics("the logits hold NaN or infinity")


def _warm_up(config: LbiConfig, engine: Any, prompt: list[int], record: _Record, phases: Phases) -> None:
    """Compile, generate until warm, and read back what was compiled and which cache is used."""
    from lbi.compilers import counters

    compiled = config.compiler.backend == "inductor"
    durations = []
    with phases("compile" if compiled else "warm up"):
        if compiled:
            engine.compile()
        for _ in range(config.measure.warmup):
            start = time.perf_counter()
            engine.generate(prompt, config.workload.new_tokens, seed=0)
            durations.append(time.perf_counter() - start)
        inspected = engine.generate(prompt, config.workload.new_tokens, seed=0, inspect=True)
    seen = counters()
    record.effective["compiler"] = seen
    record.effective["cache"] = inspected.cache
    record.metrics["kv_bytes"] = float(inspected.cache["bytes"])
    record.metrics["compile_s"] = max(0.0, durations[0] - min(durations)) if compiled and len(durations) > 1 else None
    if not compiled:
        record.missing["compile_s"] = "nothing is compiled"
        return
    if record.metrics["compile_s"] is None:
        record.missing["compile_s"] = "needs two warm-ups, a cold and a warm one"
    if seen["graphs"] == 0:
        raise NotApplied(f"{config.compiler.name} was asked for and nothing was compiled")
    if config.compiler.fullgraph and seen["graph_breaks"]:
        raise NotApplied(f"fullgraph was asked for and there are {seen['graph_breaks']} graph breaks")


def _measure(config: LbiConfig, engine: Any, prompt: list[int], record: _Record, phases: Phases) -> list[int]:
    """Take the samples; the tokens of the first valid one."""
    from lbi.compilers import counters
    from lbi.energy import EnergyMeter
    from lbi.metrics import summarize

    measure = config.measure
    valid, tokens, voids, joules = [], [], [], []
    seed = config.decoding.seed or 0
    with phases("measure"), PeakMemory(config.engine.device) as peak:
        for number in range(measure.repetitions + measure.void_budget):
            time.sleep(measure.cooldown_s)
            before = counters()
            with CpuWatch() as watch, EnergyMeter(config.engine.device) as meter:
                generation = engine.generate(prompt, config.workload.new_tokens, seed=seed)
            void = "recompiled" if counters()["frames"] != before["frames"] else ""
            record.samples += _sample_rows(number, generation.timing, void, watch.foreign_share)
            if void:
                voids.append(void)
                continue
            tokens = tokens or generation.tokens
            valid.append(generation.timing)
            joules.append(meter.joules)
            if len(valid) == measure.repetitions:
                break
    if len(valid) < measure.repetitions:
        raise NotApplied(f"{len(voids)} samples were void ({voids[0]} in the timed region)")
    record.metrics |= summarize(valid)
    record.metrics["void_samples"] = float(len(voids))
    record.metrics["peak_memory_bytes"] = None if peak.bytes is None else float(peak.bytes)
    foreign = [row["foreign_cpu"] for row in record.samples if row["foreign_cpu"] is not None]
    record.metrics["foreign_cpu"] = max(foreign, default=None)
    known = [value for value in joules if value is not None]
    if known:
        record.metrics["energy_j_per_token"] = sum(known) / len(known) / config.workload.new_tokens
    else:
        record.missing["energy_j_per_token"] = EnergyMeter.why_not(config.engine.device)
    return tokens


def _sample_rows(number: int, timing: Any, void: str, foreign: float | None) -> list[dict[str, Any]]:
    common = {"repetition": number, "void": void, "foreign_cpu": foreign}
    rows = [{**common, "token": index, "seconds": at - timing.start} for index, at in enumerate(timing.tokens)]
    return [*rows, {**common, "token": -1, "seconds": timing.end - timing.start}]


def _roofline(
    config: LbiConfig,
    request: dict[str, Any],
    model: Any,
    layers: list[Any],
    prompt_tokens: int,
    record: _Record,
    phases: Phases,
) -> None:
    """Bytes a token, and how near decode and prefill are to what the device can do."""
    from lbi import roofline
    from lbi.metrics import model_bandwidth_utilization, prefill_flop

    cache, metrics = record.effective["cache"], record.metrics
    # A static cache is read to its end at every step; a dynamic one as far as it has grown.
    depth = cache["slots"] if config.cache.kind == "static" else prompt_tokens + config.workload.new_tokens / 2
    bytes_per_token = roofline.bytes_per_token(model, layers, cache["bytes_per_slot"] * depth)
    metrics["bytes_per_token"] = bytes_per_token
    with phases("roofline"):
        name = f"{request['env_id']}-{config.engine.threads or 'all'}-{config.model.dtype}"
        peaks = roofline.measured_peaks(Path(request["devices"]), name, config.engine.device, model.dtype)
    speed, prefill = metrics["decode_tok_s"], metrics["ttft_s"]
    if speed is None or prefill is None:
        raise RunFailure("no speed was measured")
    metrics["mbu_measured"] = model_bandwidth_utilization(bytes_per_token, speed, peaks["read_bytes_per_s"])
    flop = prefill_flop(roofline.flop_shape(model, layers), prompt_tokens)
    metrics["mfu_measured"] = flop / prefill / peaks["matmul_flop_per_s"]
    nominal = roofline.nominal_bandwidth(request["device_name"])
    if nominal is None:
        record.missing["mbu_nominal"] = f"no data sheet bandwidth is known for {request['device_name']}"
    else:
        metrics["mbu_nominal"] = model_bandwidth_utilization(bytes_per_token, speed, nominal)
    record.effective["peaks"] = peaks


def _score(
    config: LbiConfig,
    request: dict[str, Any],
    engine: Any,
    encode: Any,
    tokens: list[int],
    record: _Record,
    phases: Phases,
) -> None:
    """Quality against the stored reference of the unquantized model."""
    import json

    import numpy as np

    from lbi.quality import first_divergence, score

    references = request["references"]
    greedy = read_json(Path(references["greedy"]) / "greedy.json", SCHEMA)
    if config.decoding.kind != "greedy":
        record.missing["first_divergence"] = "sampled tokens are not compared"
    elif greedy is None:
        record.missing["first_divergence"] = request["reference_problem"] or "there is no reference"
    else:
        record.metrics["first_divergence"] = float(first_divergence(tokens, greedy["tokens"]))
    if not config.quality.enabled:
        record.missing["mean_kld"] = "quality=off"
        return
    folder = Path(references["logits"])
    if not folder.exists():
        record.missing["mean_kld"] = request["reference_problem"] or "there is no reference"
        return
    with phases("quality"):
        pieces = json.loads((folder / "pieces.json").read_text())
        stored = np.load(folder / "logits.npy", mmap_mode="r")
        record.metrics |= score(engine.forward, pieces, stored)


def _trace(config: LbiConfig, engine: Any, prompt: list[int], record: _Record, phases: Phases) -> None:
    if config.trace.kind == "off":
        return
    from lbi.tracing import profile

    with phases("trace"):
        record.effective["trace"] = profile(engine, prompt, config.trace.tokens, record.folder / "trace")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
