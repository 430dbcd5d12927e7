"""Engines and bits side by side in one run: tokens/s, bytes a token, and how near that is to the memory's speed.

    python benchmarks/engines.py [--rows 'fused native_w4,hf none inductor_reduce_overhead'] [--gpt-fast FOLDER]

Every row is a process of its own (a fresh allocator and nothing compiled) on the same device, one
after the other: the median of five generations after three that do not count. The next row's process
imports its packages meanwhile, on another core, and does nothing else before its turn. `--gpt-fast`
takes a checkout of that project, gives its model random weights, and runs it by its own generate().
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

ROWS = (
    "hf none eager",
    "hf none inductor_reduce_overhead",
    "loop none cudagraph",
    "fused none cudagraph",
    *(
        f"{engine} native_{kind} cudagraph"
        for kind in ("w8", "fp8", "w4", "w2", "w158")
        for engine in ("loop", "fused")
    ),
)
GPT_FAST = ("bf16", "int8", "int4")
WARM_UPS, REPETITIONS = 3, 5


def main() -> None:
    """Run the rows and print each as it comes, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="engine, quantizer, compiler, and further overrides")
    parser.add_argument("--model", default="llama31_8b_random")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--gpt-fast", metavar="FOLDER", help="a checkout of gpt-fast")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure = gpt_fast if given.one.startswith("gpt-fast ") else one_row
        _import_all(given)
        sys.stdin.readline()
        print(json.dumps(measure(given)))
        return
    rows = [row.strip() for row in given.rows.split(",")]
    if given.gpt_fast and not any(row.startswith("gpt-fast ") for row in rows):
        rows += [f"gpt-fast {mode}" for mode in GPT_FAST]
    found = []
    titles = f"{'row':52} {'tok/s':>8} {'whole':>8} {'prefill':>8} {'MFU':>4} {'GB/tok':>7} {'MBU':>5}"
    print(f"{titles} {'peak GB':>8} {'first s':>8}", flush=True)
    ahead = len(os.sched_getaffinity(0)) > 2
    begun = _begun(rows[0], given)
    for number, row in enumerate(rows):
        now = begun
        if ahead and number + 1 < len(rows):
            begun = _begun(rows[number + 1], given)
        found.append(_result(now) | {"row": row})
        if not ahead and number + 1 < len(rows):
            begun = _begun(rows[number + 1], given)
        print(_line(found[-1]), flush=True)
        if given.json:
            Path(given.json).write_text(json.dumps(found, indent=1))
    _print_ratios(found)


def one_row(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one engine with one quantizer and compiler, made as a run of lbi makes them."""
    import torch

    from lbi import roofline, steps
    from lbi.engines import make
    from lbi.metrics import prefill_flop
    from lbi.models import load
    from lbi.process import Phases
    from lbi.prompts import fit_tokens, read_text
    from lbi.record import Record

    engine, quantizer, compiler, *more = given.one.split()
    cache = "dynamic" if (engine, compiler) == ("hf", "eager") else "static"
    same = [] if quantizer == "none" else ["quantizer.lm_head=same"]
    overrides = [f"engine={engine}", f"quantizer={quantizer}", f"compiler={compiler}", f"cache={cache}", *same, *more]
    overrides += [f"model={given.model}", f"workload.new_tokens={given.new_tokens}"]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        config = _planned(overrides, Path(folder))
        record, phases = Record(Path(folder), Phases(Path(folder))), Phases(Path(folder))
        loaded = load(config.model, config.engine)
        layers = steps.quantize(config, loaded.model, [1, 2, 3], Path(folder) / "tuning.json", record, phases)
        prompt = fit_tokens(loaded.encode(read_text(config.workload.prompt)), config.workload.prompt_tokens)
        made = make(config, loaded.model, len(prompt) + given.new_tokens)
        layers = steps.read_again(config, loaded.model, layers)
        if config.compiler.backend != "eager":
            made.compile()
        start = time.perf_counter()
        cached = made.generate(prompt, given.new_tokens, seed=0, inspect=True).cache
        first_s = time.perf_counter() - start
        for _ in range(WARM_UPS - 1):
            made.generate(prompt, given.new_tokens, seed=0)
        timings = [made.generate(prompt, given.new_tokens, seed=0).timing for _ in range(REPETITIONS)]
        peaks = roofline.measured_peaks(Path(folder), "peaks", config.engine.device, loaded.model.dtype)
    depth = len(prompt) + given.new_tokens / 2 if cached.get("reads") == "live" else cached["slots"]
    size = roofline.bytes_per_step(loaded.model, layers, cached["bytes_per_slot"] * depth)
    speed = median(1 / timing.tpot_s() for timing in timings)
    prefill_s = median(timing.ttft_s() for timing in timings)
    flop = prefill_flop(roofline.flop_shape(loaded.model, layers), len(prompt))
    return {
        "tok_s": speed,
        "prefill_tok_s": len(prompt) / prefill_s,
        "mfu": flop / prefill_s / peaks["matmul_flop_per_s"],
        "whole_tok_s": median(given.new_tokens / (timing.end - timing.start) for timing in timings),
        "bytes": size,
        "mbu": speed * size / peaks["read_bytes_per_s"],
        "peak_bytes": torch.cuda.max_memory_allocated() if config.engine.device == "cuda" else None,
        "first_s": first_s,
        "clocks": _clocks(),
    }


def gpt_fast(given: argparse.Namespace) -> dict[str, Any]:
    """Measure gpt-fast at one width by its own generate(), compiled as its own command line compiles it."""
    sys.path.insert(0, given.gpt_fast)
    import generate
    import torch
    from model import Transformer

    mode = given.one.split()[1]
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer.from_name("llama-3.1-8b").eval()
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
        if mode != "bf16":
            _quantize_gpt_fast(model, mode)
    generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
    prompt = torch.tensor([128000, 9906, 11, 856, 836, 374], device="cuda", dtype=torch.int)

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        settings = {"batch_size": 1, "interactive": False, "draft_model": None, "temperature": 0.8, "top_k": 200}
        generate.generate(model, prompt, given.new_tokens, **settings)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    warm_ups = [seconds() for _ in range(WARM_UPS)]
    speed = median(given.new_tokens / seconds() for _ in range(REPETITIONS))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    size = sum(value.numel() * value.element_size() for name, value in tensors if "tok_emb" not in name)
    # Its call is timed as a whole: it notes no token by itself.
    return {"tok_s": speed, "whole_tok_s": speed, "bytes": size, "first_s": warm_ups[0], "clocks": _clocks()}


def _quantize_gpt_fast(model: Any, mode: str) -> None:
    import quantize as their
    import torch

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, torch.nn.Linear):
                continue
            if mode == "int8":
                weight, scale, _ = their.dynamically_quantize_per_channel(child.weight.float(), -128, 127, torch.int8)
                made = their.WeightOnlyInt8Linear(child.in_features, child.out_features).cuda()
                made.weight, made.scales = weight, scale.to(torch.bfloat16)
            else:
                codes, made_scales = their.group_quantize_tensor(child.weight.data, n_bit=4, groupsize=128)
                if codes.dtype == torch.int32:
                    codes = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
                sizes = {"bias": False, "groupsize": 128, "inner_k_tiles": 8, "padding": False}
                made = their.WeightOnlyInt4Linear(child.in_features, child.out_features, **sizes).cuda()
                made.weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
                made.scales_and_zeros = made_scales
            setattr(parent, name, made)


def _planned(overrides: list[str], folder: Path) -> Any:
    """The configuration of one cell as the plan makes it. Raises `Unsupported` with the plan's reason."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from lbi.compose import Composer, parse
    from lbi.errors import Unsupported
    from lbi.hydra_compose import Hydra
    from lbi.places import conf_folder
    from lbi.plan import make_plan
    from lbi.store import Store

    common = ["hydra/sweeper=basic", "hydra/launcher=basic", "workload=survey"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cells = list(Composer(Hydra(loader, "config"), *parse([*common, *overrides], loader)))
        planned = make_plan(cells, Store.open(folder / "store", write=True), 0.0).cells[0]
    if planned.config is None or planned.reason:
        raise Unsupported(str(planned.reason))
    return planned.config


def _import_all(given: argparse.Namespace) -> None:
    """What the row needs, without touching the GPU."""
    if given.one.startswith("gpt-fast "):
        sys.path.insert(0, given.gpt_fast)
    else:
        import hydra
        import torchao
        import transformers

        from lbi import steps

        del hydra, torchao, transformers, steps


@dataclass(frozen=True)
class Row:
    """A row's process, which waits for a line before it measures, and the file that its errors go to."""

    process: subprocess.Popen[str]
    errors: IO[str]


def _begun(row: str, given: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, "--one", row, "--model", given.model, "--new-tokens", str(given.new_tokens)]
    command += ["--gpt-fast", given.gpt_fast] if given.gpt_fast else []
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it is gone with the row)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    return Row(subprocess.Popen(command, text=True, **pipes), errors)  # type: ignore[call-overload]


def _result(row: Row) -> dict[str, Any]:
    """Let it measure, and wait for what it found."""
    out, _ = row.process.communicate("\n")
    lines = (out.strip() or "-").splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except ValueError:
        row.errors.seek(0)
        said = row.errors.read().strip().splitlines()
        return {"problem": (said or [f"exit code {row.process.returncode}"])[-1][:300]}


def _clocks() -> str:
    """SM and memory clock in MHz of the GPU in use, as they are right after the last generation."""
    from lbi import gpu_clocks

    now = gpu_clocks.read()
    return f"{now['sm_mhz']}/{now['memory_mhz']}" if now else ""


def _line(found: dict[str, Any]) -> str:
    if "problem" in found:
        return f"{found['row']:52} {found['problem']}"
    share = f"{found['mbu']:.0%}" if "mbu" in found else ""
    peak = f"{found['peak_bytes'] / 1e9:.1f}" if found.get("peak_bytes") else ""
    prefill = f"{found['prefill_tok_s']:8.0f} {found['mfu']:4.0%}" if "mfu" in found else f"{'':13}"
    return (
        f"{found['row']:52} {found['tok_s']:8.1f} {found['whole_tok_s']:8.1f} {prefill} "
        f"{found['bytes'] / 1e9:7.2f} {share:>5} {peak:>8} {found['first_s']:8.1f}  {found['clocks']} MHz"
    )


def _print_ratios(found: list[dict[str, Any]]) -> None:
    """Each row's speed over transformers compiled, and over gpt-fast at as many bits."""
    speeds = {row["row"]: row["whole_tok_s"] for row in found if "whole_tok_s" in row}
    compiled = speeds.get("hf none inductor_reduce_overhead")
    peers = {"none": "bf16", "native_w8": "int8", "native_fp8": "int8", "native_w4": "int4"}
    for row, speed in speeds.items():
        over = [f"{speed / compiled:.2f}x transformers compiled"] if compiled else []
        peer = speeds.get(f"gpt-fast {peers.get(row.split()[1], '')}")
        over += [f"{speed / peer:.2f}x gpt-fast at as many bits"] if peer and not row.startswith("gpt") else []
        if over:
            print(f"{row:52} {', '.join(over)}")


if __name__ == "__main__":
    main()
