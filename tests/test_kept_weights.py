"""Quantized weights that the store keeps: the very tensors come back, and no fault makes them other ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantizers import SHAPES, Block, option

from lbi import environment, kept_weights, steps
from lbi.config import LbiConfig, QuantizerConfig
from lbi.engines import make
from lbi.errors import NotApplied
from lbi.files import UMASK
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.quantizers import assign, audit, layer_forms, storages
from lbi.quantizers.layer_forms import NotKept, put_together, take_apart
from lbi.record import Record
from lbi.store import own_claim
from lbi.typed import plain

FAMILIES = [
    ("int8_pack", {"embeddings": "int8", "lm_head": "int8"}),
    ("int8_wo", {"lm_head": "same"}),
    ("int8_da", {"granularity": "tensor"}),
    ("fp8_wo", {}),
    ("int4_wo", {"group_size": 32}),
    ("int4_wo", {"group_size": 64, "qparams": "hqq", "lm_head": "int8"}),
    ("intx_sim", {"bits": 3, "group_size": 32}),
    ("intx_sim", {"bits": 5, "group_size": 32, "symmetric": True}),
    ("mx_sim", {"bits": 8}),
    ("mx_sim", {"bits": 4}),
    ("nvfp4_wo", {}),
    ("hqq8", {}),
    ("hqq4", {"lm_head": "same"}),
    ("hqq3", {}),
    ("hqq2", {}),
    ("hqq1", {}),
    ("bitnet", {}),
    ("rsr", {}),
    ("native_w8", {}),
    ("native_fp8", {}),
    ("native_w4", {"group_size": 64}),
    ("native_w4", {"group_size": 32, "symmetric": True, "qparams": "rtn", "embeddings": "int8"}),
    ("native_w2", {}),
    ("native_w158", {}),
    ("mix", {"mix": {"down_proj": "hqq4", "q_proj": "native_w8", "default": "int8_wo"}}),
]
"""Every family that runs on a CPU, heads and tables among them."""


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def cell(plan: Callable[..., Plan]) -> LbiConfig:
    """A cell of the tiny model whose quantized weights are kept whatever that saves."""
    config = plan("store.quantized_s=0", "quality=off").cells[0].config
    assert config is not None
    return config


def had(cell: LbiConfig, folder: Path, store: Path) -> tuple[Any, list[audit.Layer], Record]:
    """The cell's model, quantized in a process that would be the run's; its layers and record."""
    folder.mkdir(parents=True, exist_ok=True)
    phases = Phases(folder)
    record = Record(folder, phases)
    model = load(cell.model, cell.engine).model
    layers = steps.quantize(cell, model, [1, 2, 3], folder / "tuning.json", record, phases, store)
    return model, layers, record


def entries(store: Path) -> list[Path]:
    return [entry for entry in store.iterdir() if not entry.name.startswith(".")] if store.is_dir() else []


def forms(model: Any, names: list[str]) -> dict[str, layer_forms.Form]:
    return {name: take_apart(model.get_submodule(name)) for name in names}


@pytest.mark.parametrize(("name", "knobs"), FAMILIES, ids=lambda value: str(value))
@pytest.mark.slow
def test_kept_weights_are_the_very_tensors_and_make_the_same_tokens(
    name: str, knobs: dict[str, Any], cell: LbiConfig, tmp_path: Path
) -> None:
    config = replace(cell, quantizer=option(name, **knobs))
    fresh, layers, first = had(config, tmp_path / "1", tmp_path / "quantized")
    assert first.effective["quantized"] == "fresh"
    assert [note[:5] for note in first.effective["quantized_notes"]] == ["kept:"]
    again, same_layers, second = had(config, tmp_path / "2", tmp_path / "quantized")
    (entry,) = entries(tmp_path / "quantized")
    assert second.effective["quantized"] == f"cached ({entry.name})"
    names = kept_weights.names_of(fresh, assign.by_name(fresh, config.quantizer), config.quantizer.embeddings)
    assert len(names) >= 14
    # Others may read what this user may: the store may be theirs too.
    modes = {file.stat().st_mode & 0o777 for file in (entry / "tensors.safetensors", entry / "meta.json")}
    assert modes == {0o666 & ~UMASK}
    for layer, form in forms(fresh, names).items():
        assert kept_weights.same(form, take_apart(again.get_submodule(layer))), layer
        assert type(fresh.get_submodule(layer)) is type(again.get_submodule(layer))
    assert [vars_of(layer) for layer in layers] == [vars_of(layer) for layer in same_layers]
    assert audit.weight_bytes(fresh) == audit.weight_bytes(again)
    assert first.effective["weights"] == second.effective["weights"]
    prompt = list(range(3, 20))
    tokens = [make(config, model, slots=64).generate(prompt, 12, seed=0).tokens for model in (fresh, again)]
    assert tokens[0] == tokens[1]
    # What is read at every token lies in memory of the process, aligned as torch aligns its own.
    for form in forms(again, names).values():
        assert all(tensor.untyped_storage().data_ptr() % 64 == 0 for tensor in form.tensors.values())


def vars_of(layer: audit.Layer) -> tuple[Any, ...]:
    seen = layer.seen
    return layer.name, layer.params, layer.stored_bytes, seen.kind, seen.bits, seen.group_size, seen.quantized


def test_the_result_tells_reading_from_quantizing(cell: LbiConfig, tmp_path: Path) -> None:
    config = replace(cell, quantizer=option("hqq4"))
    _, _, first = had(config, tmp_path / "1", tmp_path / "quantized")
    _, _, second = had(config, tmp_path / "2", tmp_path / "quantized")
    assert {"quantize", "keep quantized"} <= set(first.phases.seconds)
    assert "load quantized" in second.phases.seconds
    assert "quantize" not in second.phases.seconds
    # What quantizing costs is a figure of the setting: that of the run that did it.
    assert second.metrics["quantize_s"] == first.metrics["quantize_s"] > 0
    assert second.metrics["quantized_load_s"] > 0
    assert "quantized_load_s" in first.missing


def test_a_head_and_a_table_share_their_tensor_again(cell: LbiConfig, tmp_path: Path) -> None:
    tied = replace(cell.model, arch={**(cell.model.arch or {}), "tie_word_embeddings": True})
    config = replace(cell, model=tied, quantizer=option("int8_pack", embeddings="int8", lm_head="int8"))
    had(config, tmp_path / "1", tmp_path / "quantized")
    model, _, record = had(config, tmp_path / "2", tmp_path / "quantized")
    assert record.effective["quantized"].startswith("cached")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() == table.weight.data_ptr()


def test_another_setting_version_device_or_source_is_another_address(
    cell: LbiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(cell.model, cell.engine).model

    def at(config: LbiConfig) -> str:
        quantizer = config.quantizer
        assignment = assign.by_name(model, quantizer)
        return kept_weights.address(config, config.model, model, assignment, quantizer.embeddings).id

    def of(**knobs: Any) -> LbiConfig:
        return replace(cell, quantizer=option("native_w4", **knobs))

    base = at(of())
    assert base == at(replace(of(), cache=replace(cell.cache, kind="static"), workload=replace(cell.workload, batch=2)))
    others = [at(of(group_size=32)), at(of(skip=("down_proj",))), at(of(lm_head="same")), at(of(embeddings="int8"))]
    others += [
        at(replace(of(), model=replace(cell.model, **{knob: value})))
        for knob, value in (("seed", 1), ("dtype", "float32"))
    ]
    versions = environment.packages()
    for package in ("torch", "torchao", "hqq"):
        with monkeypatch.context() as patch:
            patch.setattr(environment, "packages", lambda package=package: {**versions, package: "0.0"})
            others.append(at(of()))
    for target, name in ((kept_weights, "sources"), (environment, "cpu_model"), (torch, "get_num_threads")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda: "another")
            others.append(at(of()))
    assert len({base, *others}) == 1 + len(others)
    assert base == at(of())


def test_a_custom_quantizer_and_a_checkpoint_are_not_kept(cell: LbiConfig) -> None:
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})
    for family, reason in (("custom", "of the user's own"), ("checkpoint", "come quantized")):
        assignment = {"layer": QuantizerConfig(name="x", family=family, method="x")}
        with pytest.raises(NotKept, match=reason):
            kept_weights.address(cell, cell.model, model, assignment, "keep")


def test_a_hub_model_whose_revision_is_not_known_is_not_kept(cell: LbiConfig) -> None:
    hub = replace(cell.model, source="hf", path="no-such-org/no-such-model")
    model = load(cell.model, cell.engine).model
    assignment = assign.by_name(model, option("native_w8"))
    with pytest.raises(NotKept, match="revision"):
        kept_weights.address(cell, hub, model, assignment, "keep")
    model.config._commit_hash = "abc"
    first = kept_weights.address(cell, hub, model, assignment, "keep").id
    model.config._commit_hash = "def"
    assert kept_weights.address(cell, hub, model, assignment, "keep").id != first


def test_classes_that_are_not_listed_are_not_kept() -> None:
    class Mine(torch.nn.Linear):
        pass

    with pytest.raises(NotKept, match="a Mine"):
        take_apart(Mine(2, 2))
    with pytest.raises(NotKept, match="weight of the class Parameter"):
        take_apart(torch.nn.Linear(2, 2))
    with pytest.raises(NotKept, match="the class PosixPath"):
        layer_forms.encoded({"a": Path()})
    for forged in ({"object": ["Popen", {"args": "true"}]}, {"enum": ["Path", "x"]}):
        with pytest.raises(KeyError):
            layer_forms.decoded(forged)


def test_the_plain_layer_is_left_alone_until_all_layers_are_there() -> None:
    block = Block(SHAPES).to(torch.bfloat16)
    config = option("int8_wo")
    twin = Block(SHAPES).to(torch.bfloat16)
    twin.load_state_dict(block.state_dict())
    assign.apply(twin, assign.by_name(twin, config))
    made = put_together(take_apart(twin.layers[0]), block.layers[0])
    assert type(block.layers[0].weight) is torch.nn.Parameter
    assert torch.equal(made(torch.ones(1, 64).bfloat16()), twin.layers[0](torch.ones(1, 64).bfloat16()))


def test_what_costs_less_than_reading_it_is_not_kept(cell: LbiConfig, tmp_path: Path) -> None:
    config = replace(cell, quantizer=option("int8_wo"), store=replace(cell.store, quantized_s=1000.0))
    _, _, record = had(config, tmp_path / "1", tmp_path / "quantized")
    assert "store.quantized_s is 1000" in record.effective["quantized_notes"][0]
    # Measured: what is written is read back, and given up where that took as long.
    slow = replace(config, store=replace(cell.store, quantized_s=1e-9))
    compare = kept_weights._compare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_weights, "_compare", lambda *given: (compare(*given)[0], 1e6))
        _, _, record = had(slow, tmp_path / "2", tmp_path / "quantized")
    assert record.effective["quantized"] == "fresh"
    assert "as long as quantizing" in record.effective["quantized_notes"][0]
    # Foreseen: so many bytes take longer than they would spare, and nothing is written.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_weights, "READ_BYTES_PER_S", 1.0)
        patch.setattr(kept_weights, "_compare", lambda *given: pytest.fail("it was written"))
        _, _, record = had(slow, tmp_path / "3", tmp_path / "quantized")
    assert record.effective["quantized"] == "fresh"
    assert "spares too little" in record.effective["quantized_notes"][0]
    assert not entries(tmp_path / "quantized")


def test_nothing_is_kept_or_used_without_room_for_it(cell: LbiConfig, tmp_path: Path) -> None:
    config = replace(cell, quantizer=option("native_w8"))
    had(config, tmp_path / "1", tmp_path / "quantized")
    off = replace(config, store=replace(config.store, quantized_gb=0.0))
    _, _, record = had(off, tmp_path / "2", tmp_path / "quantized")
    assert record.effective["quantized"] == "fresh"
    assert record.effective["quantized_notes"] == ["not kept: store.quantized_gb=0"]
    small = replace(config, quantizer=option("native_w4"), store=replace(config.store, quantized_gb=1e-5))
    _, _, record = had(small, tmp_path / "3", tmp_path / "quantized")
    assert "more than store.quantized_gb=1e-05" in record.effective["quantized_notes"][0]
    _, _, plain = had(cell, tmp_path / "4", tmp_path / "quantized")
    assert plain.effective["quantized"] == "nothing to quantize"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda entry: os.truncate(entry / "tensors.safetensors", 5000),
    "cut off in the header": lambda entry: os.truncate(entry / "tensors.safetensors", 40),
    "empty": lambda entry: os.truncate(entry / "tensors.safetensors", 0),
    "a flipped bit": lambda entry: flip(entry / "tensors.safetensors", -9),
    "a flipped bit in the header": lambda entry: flip(entry / "tensors.safetensors", 100),
    "longer": lambda entry: (entry / "tensors.safetensors").open("ab").write(b"x"),
    "no file": lambda entry: (entry / "tensors.safetensors").unlink(),
    "no description": lambda entry: (entry / "meta.json").unlink(),
    "no seconds": lambda entry: changed(entry / "meta.json", quantize_s="?"),
    "half a description": lambda entry: os.truncate(entry / "meta.json", 100),
    "another's description": lambda entry: changed(entry / "meta.json", key={"weights": "others"}),
}


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.slow
def test_a_damaged_entry_counts_as_absent_is_told_and_is_replaced(kind: str, cell: LbiConfig, tmp_path: Path) -> None:
    config, store = replace(cell, quantizer=option("native_w4")), tmp_path / "quantized"
    fresh, _, _ = had(config, tmp_path / "1", store)
    (entry,) = entries(store)
    DAMAGE[kind](entry)
    model, _, record = had(config, tmp_path / "2", store)
    assert record.effective["quantized"] == "fresh"
    damaged, kept = record.effective["quantized_notes"]
    assert damaged.startswith("damaged, quantized anew: ")
    assert kept.startswith("kept")
    third, _, record = had(config, tmp_path / "3", store)
    assert record.effective["quantized"] == f"cached ({entry.name})"
    names = kept_weights.names_of(fresh, assign.by_name(load(cell.model, cell.engine).model, config.quantizer), "keep")
    for name, form in forms(fresh, names).items():
        assert kept_weights.same(form, take_apart(model.get_submodule(name)))
        assert kept_weights.same(form, take_apart(third.get_submodule(name)))


def test_forms_of_another_lbi_count_as_damaged(cell: LbiConfig, tmp_path: Path) -> None:
    """A file that is whole, whose layers this lbi does not know."""
    config, store = replace(cell, quantizer=option("native_w4")), tmp_path / "quantized"
    had(config, tmp_path / "1", store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_forms, "KINDS", {})
        model = load(cell.model, cell.engine).model
        where = kept_weights.address(
            config, config.model, model, assign.by_name(model, config.quantizer), config.quantizer.embeddings
        )
        kept = kept_weights.Kept(store, where, config.store)
        assert kept.load(model) is None
    assert "cannot be put together (KeyError" in kept.notes[0]
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), torch.nn.Linear)


def test_a_full_disk_is_a_note_in_the_result(cell: LbiConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = replace(cell, quantizer=option("native_w8")), tmp_path / "quantized"

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"x" * 1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storages, "write", full)
    _, layers, record = had(config, tmp_path / "1", store)
    assert len(layers) == 15
    assert record.effective["quantized_notes"] == ["not kept: No space left on device"]
    assert list(store.iterdir()) == []


@pytest.mark.slow
def test_a_file_system_that_takes_no_more_is_a_note_too(cell: LbiConfig, tmp_path: Path) -> None:
    """A limit on the size of files, which safetensors runs into while it writes."""
    store = tmp_path / "quantized"
    ended = in_a_process(
        """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
""",
        replace(cell, quantizer=option("native_w8")),
        tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert "not kept: " in ended.stdout
    assert "File too large" in ended.stdout
    assert list(store.iterdir()) == []


def test_layers_that_would_not_come_back_as_they_were_are_not_kept(
    cell: LbiConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = replace(cell, quantizer=option("native_w8")), tmp_path / "quantized"
    tensor_of = storages.tensor_of
    monkeypatch.setattr(storages, "tensor_of", lambda view, found: tensor_of(view, found).clone().zero_())
    _, _, record = had(config, tmp_path / "1", store)
    assert "would not come back as it was" in record.effective["quantized_notes"][0]
    monkeypatch.undo()
    known = layer_forms.KINDS["NativeLinear"]

    def other(*given: Any) -> torch.nn.Module:
        made = known.make(*given)
        made.forward = lambda inputs: torch.zeros(1)  # type: ignore[method-assign]
        return made

    monkeypatch.setitem(layer_forms.KINDS, "NativeLinear", replace(known, make=other))
    _, _, record = had(config, tmp_path / "2", store)
    assert "would not compute what it did" in record.effective["quantized_notes"][0]
    assert entries(store) == []


def test_what_is_not_as_asked_is_not_kept(cell: LbiConfig, tmp_path: Path) -> None:
    config = replace(cell, quantizer=replace(option("int8_wo"), bits=4))
    with pytest.raises(NotApplied):
        had(config, tmp_path / "1", tmp_path / "quantized")
    assert entries(tmp_path / "quantized") == []


def in_a_process(before: str, config: LbiConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """`had` in a process of its own, after the lines `before`."""
    (folder / "cell.json").write_text(json.dumps(plain(config)))
    script = f"""
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_grad_enabled(False)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from lbi.config import LbiConfig
from lbi.quantizers import storages
from lbi.typed import build
from test_kept_weights import had
{before}
folder = Path({str(folder)!r})
had(build(LbiConfig, json.loads((folder / "cell.json").read_text())), folder / "0", folder / "quantized")
"""
    return subprocess.run(
        [sys.executable, "-c", script],
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )


KILLED = """
write = storages.write
def killed(path, *rest):
    write(path, *rest)
    os.truncate(path, 3000)
    os.kill(os.getpid(), signal.SIGKILL)
storages.write = killed
"""


@pytest.mark.slow
def test_a_writer_that_was_killed_leaves_nothing_that_is_used(cell: LbiConfig, tmp_path: Path) -> None:
    config, store = replace(cell, quantizer=option("native_w8")), tmp_path / "quantized"
    ended = in_a_process(KILLED, config, tmp_path)
    assert ended.returncode == -9, ended.stderr
    assert entries(store) == []
    assert [entry.name[:9] for entry in store.iterdir()] == [".writing-"]
    _, _, record = had(config, tmp_path / "1", store)
    assert record.effective["quantized"] == "fresh"
    # The next writer clears away what the dead one left.
    assert [entry.name for entry in store.iterdir()] == [entries(store)[0].name]


def test_of_two_writers_one_entry_remains(cell: LbiConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, store = replace(cell, quantizer=option("native_w8")), tmp_path / "quantized"
    write, inside = storages.write, []

    def meanwhile(*given: Any) -> None:
        write(*given)
        if not inside:
            inside.append(1)
            _, _, record = had(config, tmp_path / "2", store)
            assert record.effective["quantized_notes"][0].startswith("kept")

    monkeypatch.setattr(storages, "write", meanwhile)
    _, _, record = had(config, tmp_path / "1", store)
    assert record.effective["quantized_notes"][0].startswith("kept")
    assert [entry.name for entry in store.iterdir()] == [entries(store)[0].name]
    _, _, record = had(config, tmp_path / "3", store)
    assert record.effective["quantized"].startswith("cached")


def test_the_least_recently_used_goes_and_never_one_that_is_being_read(cell: LbiConfig, tmp_path: Path) -> None:
    store = tmp_path / "quantized"

    def kept(quantizer: str) -> Path:
        before = set(entries(store))
        had(replace(cell, quantizer=option(quantizer)), tmp_path / quantizer, store)
        (made,) = set(entries(store)) - before
        return made

    oldest, middle, newest = kept("native_w8"), kept("native_w4"), kept("native_w2")
    for age, entry in ((10, middle), (20, newest), (30, oldest)):
        os.utime(entry / "used", (time.time() - age,) * 2)
    reader = oldest / "readers" / "here-1"
    reader.mkdir(parents=True)
    (reader / "claim.json").write_text(json.dumps(own_claim()))
    dead = newest / "readers" / "here-2"
    dead.mkdir(parents=True)
    (dead / "claim.json").write_text(json.dumps({**own_claim(), "start_ticks": 1}))
    total = sum((entry / "tensors.safetensors").stat().st_size for entry in entries(store))
    kept_weights.make_room(store, total - 1)
    assert set(entries(store)) == {oldest, middle}
    # A use makes an entry young again.
    had(replace(cell, quantizer=option("native_w8")), tmp_path / "again", store)
    kept_weights.make_room(store, 0)
    assert set(entries(store)) == {oldest}


def test_storages_of_any_layout_and_type_come_back(tmp_path: Path) -> None:
    wide = torch.arange(48, dtype=torch.float32)
    tensors = {
        "transposed": torch.arange(12, dtype=torch.int8).view(3, 4).t(),
        "a part": wide[4:20].view(4, 4),
        "another part": wide[20:],
        "once for all": torch.ones(1).expand(5),
        "e8m0": torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "nan": torch.tensor([float("nan"), -0.0]),
        "none": torch.empty(0),
        "a number": torch.tensor(3.0),
    }
    kept = storages.Storages()
    views = {name: kept.view_of(tensor) for name, tensor in tensors.items()}
    storages.write(tmp_path / "file", kept.by_name, views)
    found, about, _ = storages.read(tmp_path / "file", "cpu")
    back = {name: storages.tensor_of(view, found) for name, view in about.items()}
    for name, tensor in tensors.items():
        assert kept_weights._same_bits(tensor, back[name]), name
    assert back["a part"].untyped_storage().data_ptr() == back["another part"].untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="beyond"):
        storages.tensor_of({**views["transposed"], "size": [4, 4]}, found)


def test_the_draft_of_speculative_decoding_is_kept_too(plan: Callable[..., Plan], tmp_path: Path) -> None:
    from lbi.draft_models import load_draft

    config = (
        plan(
            "engine=loop",
            "cache=static",
            "decoding=speculative_self",
            "decoding.draft_quantizer=native_w4",
            "store.quantized_s=0",
            "quality=off",
        )
        .cells[0]
        .config
    )
    assert config is not None
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        phases = Phases(folder)
        record = Record(folder, phases)
        model = load(config.model, config.engine).model
        draft = load_draft(config, model)
        steps.quantize_draft(config, draft, record, phases, tmp_path / "quantized")
        assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
        found.append(record.effective["draft"]["quantized"][:6])
    assert found == ["fresh", "cached"]


@pytest.mark.slow
def test_a_sweep_quantizes_once_for_the_cells_that_share_it(run_lbi: Callable[..., Any], tmp_path: Path) -> None:
    """The second sweep adds a quantizer, and pays for that alone."""
    grid = ["-m", "model=tiny_random", "tracker=none", "measure=brief", "quality=off", "measure.repetitions=1,2"]
    for quantizers, name in (("hqq4", "first"), ("hqq4,native_w4", "second")):
        ended = run_lbi(*grid, "store.quantized_s=0", f"quantizer={quantizers}", f"sweep.name={name}", timeout=600)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    cells: dict[str, list[tuple[dict[str, Any], ...]]] = {}
    for attempt in (tmp_path / "store").glob("runs/*/*/attempt-*"):
        config, effective, metrics, text = (
            json.loads((attempt / f"{name}.json").read_text()) for name in ("config", "effective", "metrics", "text")
        )
        cells.setdefault(config["config"]["quantizer"]["name"], []).append((effective, metrics["metrics"], text))
    assert cells.keys() == {"hqq4", "native_w4"}
    for (one, first, said), (other, second, same) in cells.values():
        assert {one["quantized"][:6], other["quantized"][:6]} == {"cached", "fresh"}
        assert said["tokens"] == same["tokens"]
        assert [first[name] for name in ("weight_bytes", "quantize_s")] == [
            second[name] for name in ("weight_bytes", "quantize_s")
        ]
