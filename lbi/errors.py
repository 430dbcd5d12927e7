"""The failures that lbi gives a name to.

A user's mistake is an `InputError`: it names the field, the value and the way
out, and ends with exit code 2 and no traceback. Everything that can go wrong
inside a run is a `RunFailure` whose class decides the status of the result.
"""

from __future__ import annotations


class InputError(Exception):
    """The request cannot be carried out as written.

    `field` is the dotted name of the knob ("workload.new_tokens") or of what
    was given in its place; `value` is what it was set to; `way_out` says what
    to do instead.
    """

    def __init__(self, field: str, value: object, problem: str, way_out: str = "") -> None:
        self.field, self.value, self.problem, self.way_out = field, value, problem, way_out
        message = f"{field}={value}: {problem}" if value is not None else f"{field}: {problem}"
        super().__init__(f"{message}. {way_out}" if way_out else message)


class RunFailure(Exception):
    """A run that ended without a number. `status` is the result's status."""

    status = "crash"


class OutOfMemory(RunFailure):
    """The device or the host ran out of memory."""

    status = "oom"


class Unsupported(RunFailure):
    """This machine or these library versions cannot run the setting at all."""

    status = "unsupported"


class NotApplied(RunFailure):
    """What ran is not what was asked for, so its numbers mean something else."""

    status = "not_applied"


class BadNumerics(RunFailure):
    """NaN, infinity, or a lossless option that changed the tokens."""

    status = "numerics"


class ClusterError(Exception):
    """The cluster did not do as asked; the message says what happened and what was submitted."""


class Disturbed(RunFailure):
    """Others were on the device, or it was too hot: no word about the setting, and the next call runs it again."""

    status = "preempted"
