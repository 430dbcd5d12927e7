"""A config is refused with the field, the value and the way out, and never silently bent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml

from lbi import knob_rules, tracing
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.quantizers import FAMILIES, method
from lbi.speculation_rules import GRAMMAR_KNOBS, READ_BY
from lbi.typed import build, knob, plain

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}

CONF = Path(__file__).parent.parent / "conf"


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int = knob("how many", low=1, high=9)
    share: float | None = knob("how much", default=None, above=0.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b"] = knob("which", default="a")
    names: tuple[str, ...] = knob("whose", default=())
    flag: bool = knob("whether", default=False)


def test_values_are_converted_to_the_fields_types() -> None:
    made = build(Outer, {"inner": {"count": 3.0, "share": "0.5"}, "names": ["x", 1]})
    assert made == Outer(inner=Inner(count=3, share=0.5), names=("x", "1"))
    assert isinstance(made.inner.count, int)


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({"inner": {"count": 0}}, "inner.count", "at least 1"),
        ({"inner": {"count": 10}}, "inner.count", "at most 9"),
        ({"inner": {"count": 1, "share": 0}}, "inner.share", "more than 0"),
        ({"inner": {"count": "many"}}, "inner.count", "whole number"),
        ({"inner": {"count": 2.5}}, "inner.count", "whole number"),
        ({"inner": {"count": True}}, "inner.count", "whole number"),
        ({"inner": {"count": float("nan")}}, "inner.count", "whole number"),
        ({"inner": {"count": None}}, "inner.count", "must have a value"),
        ({"inner": {}}, "inner.count", "is not given"),
        ({"inner": 3}, "inner", "group of knobs"),
        ({"inner": {"count": 1}, "kind": "c"}, "kind", "a, b"),
        ({"inner": {"count": 1}, "kind": 0}, "kind", "a, b"),
        ({"inner": {"count": 1}, "flag": "yes"}, "flag", "true or false"),
        ({"inner": {"count": 1}, "names": "xy"}, "names", "list"),
        ({"inner": {"count": 1}, "nope": 1}, "nope", "no such knob"),
    ],
)
def test_a_bad_value_names_the_field_and_the_way_out(values: dict[str, Any], field: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        build(Outer, values)
    assert caught.value.field == field
    assert part in str(caught.value)


def test_plain_and_build_are_inverse() -> None:
    made = build(Outer, {"inner": {"count": 3}, "names": ["x"], "kind": "b"})
    assert build(Outer, plain(made)) == made


def options() -> list[Path]:
    return sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "sweep")


@pytest.mark.parametrize("option", options(), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_fits_its_dataclass_and_says_what_it_is(option: Path) -> None:
    cls = get_type_hints(LbiConfig)[option.parent.name]
    content = yaml.safe_load(option.read_text())
    if option.parent.name == "store":
        content["path"] = "somewhere"
    made = build(cls, content, option.parent.name)
    assert made.name == option.stem
    assert option.read_text().startswith("# ")


@pytest.mark.parametrize("option", options(), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_lists_every_knob_that_it_reads(option: Path) -> None:
    """What is not listed cannot be overridden on the command line, so nothing may be left to a default."""
    group = option.parent.name
    content = yaml.safe_load(option.read_text())
    listed = set(content)
    if group == "quantizer":
        made = build(get_type_hints(LbiConfig)[group], content, group)
        assert listed == {"name", "family", "method"} | method(made).knobs
    elif group == "decoding":
        drafts = READ_BY[content.get("speculative")] | (GRAMMAR_KNOBS if "grammar" in content else set())
        knobs = SAMPLING if content["kind"] == "sampling" or drafts else set()
        knobs = knobs | drafts | ({"speculative"} if "speculative" in content else set())
        assert listed == {"name", "kind"} | knobs
    elif group == "engine":
        knobs = set() if content["kind"] == "hf" else {"tokens_per_graph"}
        assert listed == {"name", "kind", "device", "threads", "attention"} | knobs
    elif group == "cache":
        of_backend = knob_rules.CACHE_BACKENDS.get(content.get("backend"), set())
        knobs = set(knob_rules.CACHE_KNOBS[content["kind"]]) | of_backend
        if content["kind"] == "static":
            knobs = {"max_len"} | ({"format", "group_size"} if "format" in content else set())
        assert listed == {"name", "kind"} | knobs
    elif group == "trace":
        knobs = {"tokens", "blocking"} if "kernels" in tracing.KINDS[content["kind"]] else set()
        assert listed == {"name", "kind"} | knobs
    else:
        assert listed == {spec.name for spec in fields(get_type_hints(LbiConfig)[group])}


def test_every_knob_is_documented() -> None:
    for cls in get_type_hints(LbiConfig).values():
        for spec in fields(cls):
            assert spec.metadata.get("doc"), f"{cls.__name__}.{spec.name}"


def test_every_family_can_be_asked_without_torch() -> None:
    import subprocess
    import sys

    question = "import sys, importlib\n" + "\n".join(
        f"assert importlib.import_module('lbi.quantizers.{family}').METHODS" for family in FAMILIES
    )
    done = subprocess.run(
        [sys.executable, "-c", question + "\nassert 'torch' not in sys.modules"],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
