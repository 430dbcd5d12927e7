"""What cannot be combined, and why.

A rule is a function from a cell to a reason, or None where it has nothing against
the cell. Each carries its evidence: what was run or read, and in which version,
so that it can be tried again when a library moves on (`sweep.prune=false` runs
what a rule refuses). Rules see the machine through `Machine`, without torch.
"""

from __future__ import annotations

from dataclasses import replace

from lbi import engine_rules, knob_rules, quantizer_rules
from lbi.config import LbiConfig
from lbi.model_files import ModelFacts
from lbi.quantizers.options import parts, parts_of_draft
from lbi.rule_table import ENTERED, Machine, Rule

__all__ = ["AT_LOADING", "RULES", "Machine", "Rule", "refuse"]

RULES = [
    rule
    for module in (knob_rules, quantizer_rules, engine_rules)
    for rule in ENTERED
    if rule.check.__module__ == module.__name__
]
"""All rules, in the order in which they are asked."""


def refuse(
    config: LbiConfig, facts: ModelFacts, machine: Machine, without: frozenset[str] = frozenset()
) -> tuple[Rule, str] | None:
    """The first rule against a cell with its reason, or None; the rules named in `without` are not asked."""
    named = [*parts(config.quantizer), *parts_of_draft(config.decoding)]
    for part in (config, *(replace(config, quantizer=part) for part in named)):
        for candidate in RULES:
            reason = None if candidate.name in without else candidate.check(part, facts, machine)
            if reason is not None:
                return candidate, reason
    return None


AT_LOADING = (
    quantizer_rules.hardware_fits,
    quantizer_rules.custom_function_is_there,
    quantizer_rules.stored_weights_fit,
    quantizer_rules.wrapped_layers_have_graph_breaks,
    engine_rules.loop_needs_fixed_rope,
)
"""Rules that a run asks again before it loads: the plan may not have known the GPU, or a hub id's config.json."""
