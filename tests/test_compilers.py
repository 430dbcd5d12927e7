"""torch.compile as the compiler group sets it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from lbi.compilers import compile_function
from lbi.config import CompilerConfig


class Attention(torch.nn.Module):
    """As transformers has it: the scale is a number of the module's."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling = 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=self.scaling)


def times_handed_on(dynamic: bool) -> int:
    """How often dynamo handed an attention's graph to the compiler."""
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(2, 4, 8, 16)
    compiler = CompilerConfig(name="inductor", backend="inductor", dynamic=dynamic)
    with torch.no_grad():
        found = compile_function(Attention().forward, compiler)(x)
    torch.testing.assert_close(found, Attention()(x))
    return int(counters["aot_autograd"]["total"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_is_compiled_in_one_go(dynamic: bool) -> None:
    """torch's own setting would have dynamo begin again in the middle for the sake of the scale."""
    with torch._dynamo.config.patch(specialize_float=False):
        assert times_handed_on(dynamic) == 1
