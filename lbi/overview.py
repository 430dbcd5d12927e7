"""`python -m lbi --help`: what can be chosen, one line each, read from conf/ itself."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import yaml

import lbi
from lbi.config import LbiConfig
from lbi.places import conf_folder

HEAD = """{about}

  python -m lbi quantizer=int8_wo                                     one run
  python -m lbi -m quantizer=none,int8_wo compiler=eager,inductor     a sweep: every combination
  python -m lbi -m +sweep=quickstart                                  a preset
  python -m lbi -m ... sweep.dry_run=true                             the plan only
  python -m lbi -m ... workload.new_tokens=64,128                     any single knob, swept too
  python -m lbi --cfg job                                             every knob with its value

Afterwards (SWEEP is a name, the beginning of one, or left out for the newest):
  python -m lbi status [SWEEP]      what is done, running, missing
  python -m lbi report [SWEEP]      the table and the answer again, and the HTML report
  python -m lbi collect [SWEEP]     results.csv and results.parquet again
  python -m lbi sync [SWEEP]        hand the results to the tracker again
  python -m lbi trace RUN [OTHER]   where a decode step's time goes, and which kernels cost the difference
  python -m lbi recipe RUN          a result as a short script of its own, without lbi where it can be
  python -m lbi doctor              what this machine can run, and what is missing for the rest

Groups (choose with group=option; * is the default)
"""

TAIL = """
Exit codes: 0 all ok, 1 some cells failed or are missing, 2 the request was wrong.
The store is {store}; LBI_STORE or store.path=FOLDER names another."""


def text() -> str:
    """The whole help text."""
    folder = conf_folder()
    defaults = _defaults(folder)
    lines = [HEAD.format(about=(lbi.__doc__ or "").strip())]
    for group, hint in get_type_hints(LbiConfig).items():
        options = sorted((folder / group).glob("*.yaml")) if group != "sweep" else []
        if not options:
            continue
        lines.append(f"  {group}: {_first_sentence(hint.__doc__)}")
        for option in options:
            mark = "*" if defaults.get(group) == option.stem else " "
            lines.append(f"    {mark} {option.stem:<26}{_headline(option)}")
    lines.append("\nPresets (+sweep=NAME)")
    for preset in sorted((folder / "sweep").glob("*.yaml")):
        lines.append(f"      {preset.stem:<26}{_headline(preset)}")
    lines.append(TAIL.format(store="lbi_store in the current folder"))
    return "\n".join(lines)


def _defaults(folder: Path) -> dict[str, str]:
    loaded = yaml.safe_load((folder / "config.yaml").read_text())
    return {
        str(key): str(value) for entry in loaded["defaults"] if isinstance(entry, dict) for key, value in entry.items()
    }


def _headline(option: Path) -> str:
    """The first comment of a YAML that is not a Hydra directive."""
    for line in option.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _first_sentence(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0].rstrip(".")
