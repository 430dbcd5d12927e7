"""Weights are not copied on their way to the device: files are mapped, random weights are made where they stay."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from lbi.config import LbiConfig
from lbi.models import load
from lbi.plan import Plan


@pytest.fixture
def cell(plan: Callable[..., Plan]) -> LbiConfig:
    config = plan("engine.device=cpu").cells[0].config
    assert config is not None
    return config


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_weights_of_a_folder_are_the_files_own_pages(cell: LbiConfig, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    load(cell.model, cell.engine).model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    model = load(replace(cell.model, source="hf", path=str(tmp_path), arch=None), cell.engine).model
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    assert mapped
    for name, weight in model.named_parameters():
        assert any(weight.data_ptr() in pages for pages in mapped), name


class LargestOnCpu(TorchDispatchMode):
    """Notes the largest tensor that any operation leaves on the CPU."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.numel = max(self.numel, value.numel())
        return found


def test_random_weights_are_made_on_the_device(cell: LbiConfig) -> None:
    """torch's device without memory stands in for a GPU: what is made on a CPU and moved would be seen."""
    with LargestOnCpu() as seen:
        model = load(cell.model, replace(cell.engine, device="meta")).model  # type: ignore[arg-type]
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert seen.numel <= 128
    with LargestOnCpu() as seen:
        load(cell.model, cell.engine)
    assert seen.numel >= 512 * 128
