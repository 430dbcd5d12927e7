"""The plan's verdicts on a cell, in a file of their own so that a report need not load the planner."""

RUN = "RUN"
"""To be measured."""

DONE = "DONE"
"""There is a result in the store that may stand for it."""

DUPLICATE = "DUPLICATE"
"""The same resolved configuration as an earlier cell."""

PRUNED = "PRUNED"
"""Cannot be measured, for the reason given."""
