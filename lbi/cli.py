"""The command line: a Hydra application, and verbs for what was run.

    python -m lbi quantizer=int8_wo                      one run
    python -m lbi -m quantizer=none,int8_wo              a sweep
    python -m lbi status|report|collect|doctor [SWEEP]   afterwards, from any shell
    python -m lbi recipe RUN                             a result as a script of its own
    python -m lbi trace RUN_A RUN_B                      which kernels cost the difference
    python -m lbi logs SWEEP CELL, cancel SWEEP [PART]   on a cluster
    python -m lbi render k8s|cloud OVERRIDES             the files for Kubernetes or SkyPilot, nothing submitted

Overrides always hold a `=`, so verbs and overrides cannot be confused. Exit codes:
0 all ok, 1 some cells failed, 2 the request was wrong.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbi.errors import ClusterError, InputError

VERBS = ("status", "logs", "cancel", "report", "collect", "sync", "dashboard", "recipe", "trace", "doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments and arguments[0] in VERBS:
            from lbi import verbs

            return verbs.run(arguments[0], arguments[1:])
        if arguments and arguments[0] == "render":
            return _hydra(_rendering(arguments[1:]))
        if arguments and arguments[0] in ("-h", "--help"):
            from lbi.overview import text

            print(text())
            return 0
        word = next((item for item in arguments if "=" not in item and not item.startswith(("-", "~"))), None)
        if word is not None and not _is_value(arguments, word):
            raise InputError(
                "command", word, "is neither a verb nor an override", f"Verbs: {', '.join((*VERBS, 'render'))}"
            )
        return _hydra(arguments)
    except InputError as error:
        print(f"lbi: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"lbi: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        # Looking on (status --watch, logs -f) ends so; a sweep handles the signal itself.
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"lbi: {error.strerror}: {error.filename or 'the store'}. What is finished is kept; "
            "free some space, and the same command goes on",
            file=sys.stderr,
        )
        return 1


RENDERED = {
    "k8s": ["hydra/launcher=lbi_k8s"],
    "cloud": ["hydra/launcher=lbi_cloud", "hydra.launcher.dry_run=true"],
}
"""What `lbi render` can write, and the overrides that make a sweep of it."""


def _rendering(arguments: Sequence[str]) -> list[str]:
    """The request that writes a sweep's files for what the first word names."""
    kind = arguments[0] if arguments else None
    if kind not in RENDERED:
        raise InputError("render", kind, "is nothing that lbi renders", f"There are: {', '.join(RENDERED)}")
    return [*RENDERED[kind], *(item for item in arguments[1:] if item not in ("-m", "--multirun"))]


def _is_value(arguments: Sequence[str], word: str) -> bool:
    """Whether a word belongs to the option before it ("--config-dir FOLDER")."""
    before = arguments[arguments.index(word) - 1] if arguments.index(word) else ""
    return before in (
        "--config-dir",
        "-cd",
        "--config-name",
        "-cn",
        "--config-path",
        "-cp",
        "--cfg",
        "-c",
        "--package",
        "-p",
    )


def _hydra(arguments: Sequence[str]) -> int:
    """Hand over to Hydra, which comes back through the sweeper plugin."""
    import hydra
    from hydra.errors import HydraException

    from lbi.hydra_compose import explain
    from lbi.places import conf_folder

    # Hydra finds plugins in the namespace package hydra_plugins, wherever parts of it lie.
    plugins = str(Path(__file__).parent / "plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
    def application(config: Any) -> None:
        raise InputError("hydra.mode", "RUN", "lbi plans every request as a sweep", "Leave hydra.mode alone")

    before = sys.argv
    sys.argv = ["lbi", *in_each_cell(arguments)]
    # Hydra then raises what it finds wrong instead of printing it in its own words and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        application()
    except Exception as error:
        if not isinstance(error, HydraException) and _reached_the_sweep(error):
            raise
        raise InputError("request", None, explain(error), "See python -m lbi --help") from error
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def in_each_cell(arguments: Sequence[str]) -> list[str]:
    """The arguments, knobs of a swept group as sweeps of one value: `quantizer=a,b quantizer.lm_head=choice(same)`.

    Hydra applies what is no sweep to the default option of each group first, which need not have the knob.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), {}
    for argument in arguments:
        if "=" in argument and not argument.startswith(("-", "~")):
            try:
                parsed[argument] = parser.parse_override(argument)
            except HydraException:
                # Hydra says what is wrong with it.
                continue
    swept = {override.key_or_group for override in parsed.values() if override.is_sweep_override()}
    made = []
    for argument in arguments:
        override = parsed.get(argument)
        of_swept = override is not None and override.key_or_group.split(".")[0] in swept
        if override is not None and of_swept and "." in override.key_or_group and not override.is_sweep_override():
            name, _, value = argument.partition("=")
            argument = f"{name}=choice({value})"
        made.append(argument)
    return made


def _reached_the_sweep(error: BaseException) -> bool:
    """Whether an exception came out of lbi's own work rather than out of Hydra's reading of the request."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "lbi.drive":
            return True
        trace = trace.tb_next
    return False
