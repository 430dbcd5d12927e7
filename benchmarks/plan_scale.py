"""What planning costs: lbi's planner beside Hydra's own sweeper, in one run.

    python benchmarks/plan_scale.py [--cells 10000] [--hydra-cells 500]

Plans a grid of five groups to the last verdict (composed, typed, checked, identified,
looked up in an empty store), then has Hydra's BasicSweeper validate some of the same
cells, and prints seconds per cell of both and the planner's peak memory. Hydra's figure
is only `validate_batch_is_legal`: it composes every cell a second time when it launches.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from lbi.compose import Composer, parse
from lbi.hydra_compose import Hydra
from lbi.places import conf_folder
from lbi.plan import Plan, make_plan
from lbi.store import Store

GRID = {
    "quantizer": "none,int8_wo,int4_wo,intx_sim,hqq8,hqq4,hqq3,hqq2,hqq1",
    "compiler": "eager,inductor,inductor_reduce_overhead,inductor_max_autotune,inductor_tuned",
    "cache": "static,dynamic",
    "workload": "chat,survey,pp512_tg128,long_context,custom",
    "model": "tiny_random,llama32_1b_random",
}
"""Five groups, 900 combinations; `workload.new_tokens` is swept as far as the number of cells asks for."""


def arguments(cells: int) -> list[str]:
    """Overrides of a grid of at least `cells` cells."""
    combinations = 1
    for options in GRID.values():
        combinations *= len(options.split(","))
    lengths = -(-cells // combinations)
    return [f"{group}={options}" for group, options in GRID.items()] + [f"workload.new_tokens=range(16,{16 + lengths})"]


def plan(cells: int, folder: Path) -> tuple[Plan, Composer, float]:
    """The plan, its composer, and the seconds it took."""
    loader = GlobalHydra.instance().config_loader()
    store = Store.open(folder / "store", write=True)
    started = time.perf_counter()
    overrides = ["hydra/sweeper=basic", "hydra/launcher=basic", *arguments(cells)]
    composer = Composer(Hydra(loader, "config"), *parse(overrides, loader))
    made = make_plan(composer, store, started)
    return made, composer, time.perf_counter() - started


def validate_with_hydra(planned: Plan, count: int) -> tuple[int, float]:
    """Seconds that Hydra's BasicSweeper takes to validate `count` random cells of the plan."""
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    loader = GlobalHydra.instance().config_loader()
    basics = ["hydra/sweeper=basic", "hydra/launcher=basic"]
    master = loader.load_configuration("config", basics, run_mode=RunMode.MULTIRUN)
    sweeper = BasicSweeper(max_batch_size=None)
    Plugins.instance()
    sweeper.config = master
    sweeper.hydra_context = HydraContext(config_loader=loader, callbacks=Callbacks())
    chosen = random.Random(0).sample(planned.cells, min(count, len(planned.cells)))
    batch = [[item for item in cell.overrides if not item.startswith("hydra/")] for cell in chosen]
    started = time.perf_counter()
    sweeper.validate_batch_is_legal(batch)
    return len(batch), time.perf_counter() - started


def main() -> None:
    """Measure both and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--hydra-cells", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(conf_folder()), version_base="1.3"):
        planned, composer, seconds = plan(given.cells, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        count, hydra_seconds = validate_with_hydra(planned, given.hydra_cells)
    ours, theirs = seconds / len(planned.cells), hydra_seconds / count
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in planned.counts().items())
    print(
        f"lbi plan             {len(planned.cells):>7} cells {seconds:>8.2f} s {1e3 * ours:>8.3f} ms/cell ({verdicts})"
    )
    print(f"  of which Hydra composed {composer.hydra.composed} configurations; peak memory {peak:.0f} MB")
    print(f"BasicSweeper validate{count:>7} cells {hydra_seconds:>8.2f} s {1e3 * theirs:>8.3f} ms/cell")
    print(f"ratio                {theirs / ours:.0f}x")
    if "torch" in sys.modules:
        raise SystemExit("torch was imported while planning")


if __name__ == "__main__":
    main()
