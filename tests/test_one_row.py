"""A decode kernel that multiplies by other weights than the prefill's: found, and the run ends."""

from __future__ import annotations

import pytest
import torch

from lbi.errors import BadNumerics
from lbi.quantizers import assign, audit, one_row
from lbi.quantizers.options import option


class WrongAlone(torch.nn.Linear):
    """Like GemLite's untuned 1-bit kernel: right for many rows, off by `share` for one."""

    share = 0.0

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        product = super().forward(given)
        return product * (1 + self.share) if given.shape[0] == 1 else product


def block(share: float) -> tuple[torch.nn.Module, list[audit.Layer]]:
    made = torch.nn.ModuleDict({"right": torch.nn.Linear(64, 32), "other": WrongAlone(64, 48)})
    made["other"].share = share  # type: ignore[assignment]
    made = made.to(torch.bfloat16)
    return made, audit.read_layers(made, frozenset(made))


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_the_worst_layer_is_named_with_its_error(share: float) -> None:
    model, layers = block(share)
    worst = one_row.worst_layer(model, layers, 6, torch.bfloat16)
    assert worst["error"] == pytest.approx(share, abs=0.01)
    if share:
        assert (worst["layer"], worst["shape"], worst["rows"]) == ("other", "64 x 48", 6)


@pytest.mark.parametrize("share", [0.2, float("nan")])
def test_a_wrong_kernel_ends_the_run(share: float) -> None:
    model, layers = block(share)
    with pytest.raises(BadNumerics, match=r"^other .*64 x 48.: its product with one row is"):
        one_row.worst_layer(model, layers, 6, torch.bfloat16)


def test_the_random_numbers_of_a_run_are_left_alone() -> None:
    model, layers = block(0.0)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    one_row.worst_layer(model, layers, 6, torch.bfloat16)
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize(
    "name", ["none", "int8_wo", "int8_da", "int4_wo", "hqq4", "int8_pack", "bitnet", "rsr", "native_w4"]
)
def test_the_kernels_of_a_cpu_agree(name: str) -> None:
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(256, 192, bias=False)}).to(torch.bfloat16)
    assignment = assign.by_name(model, option(name))
    assign.apply(model, assignment)
    layers = audit.read_layers(model, frozenset(assignment))
    assert one_row.worst_layer(model, layers, 6, torch.bfloat16)["error"] < 0.01
