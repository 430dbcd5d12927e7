"""Speculative decoding: the tokens of plain decoding, whatever is drafted, with one wait a verification."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import torch
from test_loop_engine import SHAPES, Operators, shape

from lbi import identity, knob_rules, measuring, rules, steps
from lbi.compilers import counters
from lbi.config import DecodingConfig, LbiConfig
from lbi.draft_models import Draft, load_draft, shared_copy
from lbi.engines import Graphs, make
from lbi.engines.lookup import Lookup
from lbi.engines.sampling import chooser, probabilities
from lbi.engines.speculation import Pace, read_clock
from lbi.engines.verification import acceptance, seen_by_row
from lbi.errors import InputError, Unsupported
from lbi.metrics import Speculation, summarize_speculation
from lbi.model_files import ModelFacts
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.record import Record
from lbi.verdicts import PRUNED, RUN

MakePlan = Callable[..., Plan]
MakeConfig = Callable[..., LbiConfig]

LOOKUP = "decoding=speculative_lookup"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def config(plan: MakePlan) -> MakeConfig:
    """A cell of engine=loop in float32 with these overrides, whatever the rules say of it."""

    def made(*overrides: str, arch: dict[str, Any] | None = None) -> LbiConfig:
        common = ["model.dtype=float32", "engine=loop", "cache=static", "sweep.prune=false"]
        found = plan(*common, *overrides).cells[0].config
        assert found is not None
        return replace(found, model=replace(found.model, arch=arch)) if arch else found

    return made


class Oracle:
    """Drafts what is known to come, with each `wrong`-th token of the text spoilt."""

    finished, surplus, forced, mask_s = False, 0, 0, 0.0

    def __init__(self, engine: Any, coming: Sequence[int], wrong: int) -> None:
        self.engine, self.coming, self.wrong, self.at = engine, coming, wrong, 0

    def prepare(self, counts: Sequence[int]) -> None:
        self.at = 0

    def begin(self, prompt: list[int]) -> None:
        pass

    def extend(self, tokens: list[int]) -> None:
        self.at += len(tokens)

    def propose(self, count: int) -> int:
        known = list(self.coming[self.at : self.at + count])
        known += [0] * (count - len(known))
        drafts = [token if (self.at + index) % self.wrong else (token + 1) % 301 for index, token in enumerate(known)]
        self.engine.drafts.tokens[:count] = torch.tensor(drafts)
        return count


def test_a_lookup_goes_on_as_the_longest_known_ending_did_last() -> None:
    lookup = Lookup(3)
    lookup.extend([1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3])
    # "2 3" came twice before; the later time 5 followed.
    assert lookup.propose(2) == [5, 8]
    lookup.extend([4])
    # "2 3 4" is known from the beginning, and is longer than what "3 4" or "4" would be alone.
    assert lookup.propose(1) == [9]
    lookup.extend([77])
    assert lookup.propose(4) == []
    # A text that repeats itself goes on doing so beyond its end.
    lookup.extend([5, 6, 5, 6])
    assert lookup.propose(5) == [5, 6, 5, 6, 5]
    assert Lookup(2).propose(3) == []


def test_a_lookup_finds_what_a_plain_search_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 4, (200,), generator=generator).tolist()
    lookup = Lookup(4)
    for end, token in enumerate(text):
        wanted: list[int] = []
        for length in range(min(4, end), 0, -1):
            starts = [at for at in range(end - length) if text[at : at + length] == text[end - length : end]]
            if starts:
                follows = starts[-1] + length
                wanted = [text[follows + index % (end - follows)] for index in range(3)]
                break
        assert lookup.propose(3) == wanted
        lookup.extend([token])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("loop", name) for name in ("gqa3-80", "gqa8-128-tied-llama3", "no-rope")),
        *(("fused", name) for name in ("gqa1-64-tied", "gqa3-80", "gqa8-128-tied-llama3")),
    ],
)
@pytest.mark.slow
def test_greedy_tokens_do_not_depend_on_what_was_drafted(config: MakeConfig, kind: str, name: str) -> None:
    engine_is = f"engine={kind}"
    greedy = config(engine_is, arch=SHAPES[name])
    cell = config(engine_is, LOOKUP, "decoding.draft_tokens=4", arch=SHAPES[name])
    model = load(greedy.model, greedy.engine).model
    plain = make(greedy, model, slots=80)
    for length, new in ((11, 30), (1, 9), (20, 2)):
        prompt = [(7 * index + length) % 300 for index in range(length)]
        wanted = plain.generate(prompt, new, seed=0, inspect=True)
        # The last drafts are written to the last slots there are.
        engine: Any = make(cell, model, slots=length + new - 1 + 4)
        looked_up = engine.generate(prompt, new, seed=0, inspect=True)
        assert looked_up.tokens == wanted.tokens
        for wrong in (1, 2, 3, 1000):
            engine._drafter = Oracle(engine, wanted.tokens, wrong)
            found = engine.generate(prompt, new, seed=0, inspect=True)
            assert found.tokens == wanted.tokens
            assert found.logits.shape == wanted.logits.shape
            assert float((found.logits - wanted.logits).abs().max() / wanted.logits.abs().max()) < 1e-5
            assert found.cache["class"] == {"loop": "StaticCache", "fused": "FusedCache"}[kind]
            tally = found.speculation
            assert tally.drafted == 4 * tally.verifications
            if wrong == 1:
                assert (tally.accepted, tally.verifications) == (0, new - 1)
            if wrong == 1000:
                assert tally.verifications == -(-(new - 1) // 5)


@pytest.mark.parametrize("kind", ["loop", "fused"])
@pytest.mark.parametrize("cache", ["static_int8", "static_fp8", "static_int4"])
@pytest.mark.slow
def test_drafts_over_a_low_bit_cache_leave_its_own_greedy_tokens(config: MakeConfig, kind: str, cache: str) -> None:
    """What fell is stored too, and must be written over: codes of older drafts are as good as any."""
    arch = SHAPES["gqa1-64-tied"]
    greedy = config(f"engine={kind}", f"cache={cache}", arch=arch)
    cell = config(f"engine={kind}", f"cache={cache}", LOOKUP, "decoding.draft_tokens=4", arch=arch)
    model = load(greedy.model, greedy.engine).model
    plain, prompt = make(greedy, model, slots=80), [(7 * index) % 300 for index in range(11)]
    wanted = plain.generate(prompt, 30, seed=0, inspect=True)
    unquantized = make(config(f"engine={kind}", arch=arch), load(greedy.model, greedy.engine).model, slots=80)
    assert not torch.equal(unquantized.generate(prompt, 30, seed=0, inspect=True).logits, wanted.logits)
    engine: Any = make(cell, model, slots=11 + 30 - 1 + 4)
    for wrong in (1, 2, 1000):
        engine._drafter = Oracle(engine, wanted.tokens, wrong)
        found = engine.generate(prompt, 30, seed=0, inspect=True)
        assert found.tokens == wanted.tokens
        assert float((found.logits - wanted.logits).abs().max() / wanted.logits.abs().max()) < 1e-4
        assert found.cache["dtype"] == cache.removeprefix("static_")
        assert found.cache["reads"] == "live"


def test_a_text_that_repeats_itself_is_looked_up(config: MakeConfig) -> None:
    """A model of one layer without attention to speak of goes round in circles."""
    arch = shape(4, 2, 32, num_hidden_layers=1, initializer_range=0.02)
    greedy, cell = config(arch=arch), config(LOOKUP, arch=arch)
    model = load(greedy.model, greedy.engine).model
    wanted = make(greedy, model, slots=120).generate([1, 2, 3], 100, seed=0).tokens
    found = make(cell, model, slots=120).generate([1, 2, 3], 100, seed=0)
    assert found.tokens == wanted
    assert found.speculation is not None
    assert found.speculation.verifications < 50
    again = make(config(LOOKUP, "decoding.adaptive=true", arch=arch), model, slots=120).generate([1, 2, 3], 100, seed=0)
    assert again.tokens == wanted


def test_times_are_the_verifications_and_the_last_is_cut(config: MakeConfig) -> None:
    timing, speculation = read_clock([0.0, 1.0, 1.1, 2.0, 2.5, 4.0, 4.25], [(3, 2), (4, 5)], 7, 6)
    assert timing.tokens == (1.0, 2.0, 2.0, 4.0, 4.0, 4.0)
    assert timing.end == 4.25
    assert speculation == Speculation(6, 2, 7, 5, pytest.approx(0.6), pytest.approx(2.4))
    found = summarize_speculation([speculation, speculation])
    assert found == pytest.approx(
        {"acceptance_length": 3.5, "acceptance_rate": 5 / 7, "draft_length": 3.5, "draft_s": 0.3, "verify_s": 1.2}
    )
    assert summarize_speculation([Speculation(4, 3, 0, 0, 0.1, 0.2)])["acceptance_rate"] is None
    assert summarize_speculation([]) == {}


def test_the_pace_follows_what_stood() -> None:
    decoding = DecodingConfig(name="x", kind="greedy", speculative="lookup", draft_tokens=12, adaptive=True, ngram=2)
    pace = Pace(decoding)
    assert pace.counts() == [1, 3, 6, 12]
    seen = []
    for stood in (0, 2, 3, 2, 6, 0, 0, 0, 0):
        seen.append(pace.count)
        pace.note(pace.count, min(stood, pace.count))
    assert seen == [12, 6, 3, 6, 3, 6, 3, 1, 1]
    fixed = Pace(replace(decoding, adaptive=False))
    fixed.note(12, 0)
    assert (fixed.count, fixed.counts()) == (12, [12])


def chi_square_p(counts: torch.Tensor, wanted: torch.Tensor) -> float:
    """Probability of counts as far from the wanted shares as these, or farther."""
    expected = wanted.double() * counts.sum()
    known = expected > 5
    other = expected[~known].sum()
    terms = ((counts - expected) ** 2 / expected)[known].sum()
    if other > 0:
        terms = terms + (counts[~known].sum() - other) ** 2 / other
    freedom = int(known.sum()) - 1 + int(other > 0)
    if freedom == 0:
        return float(counts[~known].sum() == 0)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), terms / 2))


@pytest.mark.parametrize("source", ["certain", "near", "far"])
@pytest.mark.parametrize("knobs", [{}, {"top_k": 4, "temperature": 1.7}, {"min_p": 0.1, "repetition_penalty": 2.0}])
@pytest.mark.slow
def test_accepted_and_redrawn_tokens_have_the_models_distribution(
    config: MakeConfig, source: str, knobs: dict[str, Any]
) -> None:
    """20,000 draws of two tokens at the logits of a tiny model, against their exact probabilities."""
    arch = shape(2, 1, 16, hidden=24, vocab_size=7, initializer_range=0.4)
    cell = config(arch=arch)
    model = load(cell.model, cell.engine).model
    decoding = DecodingConfig(name="s", kind="sampling", seed=0, **({"temperature": 0.7} | knobs))
    prompt, vocabulary, draws = [1, 5, 2], 7, 20_000
    seen = torch.zeros(1, vocabulary, dtype=torch.bool)
    seen[0, prompt] = True
    # What comes second depends on what came first: the exact joint distribution.
    first = probabilities(model(torch.tensor([prompt])).logits[:, -1], decoding, seen)[0]
    texts = torch.tensor([[*prompt, token] for token in range(vocabulary)])
    rows = model(texts).logits[:, -2:]
    marked = seen.repeat(vocabulary, 1)
    marked[range(vocabulary), range(vocabulary)] = True
    joint = first[:, None] * probabilities(rows[:, 1], decoding, marked)
    torch.manual_seed(3)
    near = (0.6 * first + 0.4 * torch.rand(vocabulary).softmax(-1))[None]
    shares = {"certain": None, "near": near, "far": torch.rand(1, vocabulary).pow(4)}[source]
    shares = None if shares is None else shares / shares.sum()
    likeliest = int(first.argmax())
    drafts = torch.full((draws, 1), likeliest) if shares is None else shares[0].multinomial(draws, True)[:, None]
    noise, uniform = torch.empty(draws, 1, vocabulary).exponential_(), torch.rand(draws, 1)
    every = torch.func.vmap(acceptance(decoding), in_dims=(0, 0, 0, 0, None, None))
    chosen, made = every(rows[drafts[:, 0]], drafts, noise, uniform, shares, seen)
    plain = chooser(decoding)(rows[0, :1], torch.empty(draws, vocabulary).exponential_(), seen)
    assert set(made[:, 0].tolist()) <= {1, 2}
    counts = chosen[:, 0].bincount(minlength=vocabulary)
    assert chi_square_p(counts, first) > 1e-3
    assert chi_square_p(plain.bincount(minlength=vocabulary), first) > 1e-3
    # Behind a draft that stood the second token is the model's own as well.
    stood = chosen[made[:, 0] == 2]
    assert (stood[:, 0] == drafts[made[:, 0] == 2, 0]).all()
    for token in range(vocabulary):
        second = stood[stood[:, 0] == token, 1].bincount(minlength=vocabulary)
        assert int(second.sum()) < 100 or chi_square_p(second, joint[token] / first[token]) > 1e-3
    overlap = first[likeliest] if shares is None else torch.minimum(first, shares[0]).sum()
    assert len(stood) / draws == pytest.approx(float(overlap), abs=0.015)


def test_a_wrong_acceptance_would_be_noticed(config: MakeConfig) -> None:
    """The test above can fail: taking every draft gives the draft's distribution, not the model's."""
    first = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    counts = torch.tensor([0.45, 0.35, 0.1, 0.06, 0.04]) * 20_000
    assert chi_square_p(counts, first) < 1e-6
    assert chi_square_p(first * 20_000, first) > 0.99


def test_each_row_has_seen_the_drafts_before_it() -> None:
    seen = torch.zeros(1, 6, dtype=torch.bool)
    seen[0, 5] = True
    rows = seen_by_row(seen, torch.tensor([2, 0, 2]))
    wanted = [[5], [2, 5], [0, 2, 5], [0, 2, 5]]
    assert [row.nonzero()[:, 0].tolist() for row in rows] == wanted
    assert torch.equal(seen_by_row(seen, torch.tensor([], dtype=torch.long)), seen)


@pytest.mark.parametrize("kind", ["loop", "fused"])
def test_a_seed_draws_the_same_text_again_and_penalties_count_what_stood(config: MakeConfig, kind: str) -> None:
    knobs = ["decoding.kind=sampling", "decoding.temperature=0.9", "decoding.seed=0", "decoding.repetition_penalty=50"]
    arch = shape(4, 2, 32, initializer_range=0.02)
    cell = config(f"engine={kind}", LOOKUP, *knobs, "decoding.draft_tokens=3", arch=arch)
    model = load(cell.model, cell.engine).model
    engine: Any = make(cell, model, slots=80)
    one, two = (engine.generate([1, 2, 3], 30, seed=seed).tokens for seed in (1, 2))
    assert one != two
    assert engine.generate([1, 2, 3], 30, seed=1).tokens == one
    # The last verification may have gone on beyond the thirtieth token.
    own, seen = (engine._own, engine._own.seen) if kind == "loop" else (engine.llama.steps, engine._seen)
    text = own.tokens.flatten()[3 : int(own.position) + 1].tolist()
    assert text[:30] == one
    assert seen[0].nonzero()[:, 0].tolist() == sorted({1, 2, 3, *text})


@pytest.mark.parametrize(
    "knobs",
    [
        [],
        pytest.param(
            ["decoding.kind=sampling", "decoding.temperature=0.8", "decoding.seed=0"], marks=pytest.mark.by_hand
        ),
    ],
)
@pytest.mark.slow
def test_each_verification_is_one_compiled_graph(config: MakeConfig, knobs: list[str]) -> None:
    cell = config("compiler=inductor", LOOKUP, "decoding.draft_tokens=3", *knobs)
    model = load(cell.model, cell.engine).model
    eager, compiled = make(cell, model, slots=60), make(cell, model, slots=60)
    before = counters()
    compiled.compile()
    for prompt in ([1, 2, 3, 1, 2], [9, 8, 7, 6, 5, 4]):
        wanted = eager.generate(prompt, 15, seed=2).tokens
        assert compiled.generate(prompt, 15, seed=2).tokens == wanted
    after = counters()
    # One for no drafts, one for three.
    assert (after["graphs"] - before["graphs"], after["graph_breaks"] - before["graph_breaks"]) == (2, 0)


class Graph:
    """A stand-in for a CUDA graph, which warms up, captures and restores as one does."""

    captured: ClassVar[list[int]] = []

    def __init__(self, call: Callable[[], Any], restore: Callable[[], None]) -> None:
        self.call, self.replays = call, 0
        for _ in range(4):
            found = call()
            if found is not None:
                self.captured.append(len(found))
            restore()

    def __call__(self) -> Any:
        self.replays += 1
        return self.call()


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """Graphs are stand-ins, and `captured` has the rows of each call that captured a verification."""
    for module in ("speculative", "model_drafter", "fused_drafter"):
        monkeypatch.setattr(f"lbi.engines.{module}.GraphedCall", Graph)
    monkeypatch.setattr(Graph, "captured", [])
    return Graph


@pytest.mark.parametrize("kind", ["loop", "fused"])
def test_verifications_are_captured_once_by_their_number_of_drafts(
    config: MakeConfig, graph: type[Graph], kind: str
) -> None:
    knobs = [LOOKUP, f"engine={kind}", "decoding.draft_tokens=4", "decoding.adaptive=true"]
    cells = [config(f"compiler={name}", *knobs) for name in ("eager", "cudagraph")]
    model = load(cells[0].model, cells[0].engine).model
    plain, graphed = (make(cell, model, slots=40) for cell in cells)
    graphed.compile()
    for prompt, new in (([1, 2, 3, 1, 2, 3], 12), ([4, 5], 8)):
        wanted = plain.generate(prompt, new, seed=0)
        found = graphed.generate(prompt, new, seed=0)
        assert found.tokens == wanted.tokens
    assert graph.captured == [1] * 4 + [2] * 4 + [3] * 4 + [5] * 4
    graphs = graphed.graphs()
    assert isinstance(graphs, Graphs)
    assert graphs.captured == 4
    assert graphs.replays > 2


@pytest.mark.parametrize("kind", ["loop", "fused"])
@pytest.mark.parametrize("shares_cache", [True, False])
def test_drafts_of_a_model_are_captured_beside(
    config: MakeConfig, graph: type[Graph], kind: str, shares_cache: bool
) -> None:
    own = [f"engine={kind}", "decoding=speculative_draft", "decoding.draft=tiny_random", "compiler=cudagraph"]
    cell = config(*own, arch=SHAPES["gqa3-80"])
    model = load(cell.model, cell.engine).model
    engine: Any = make(cell, model, 60, Draft(shared_copy(model), shares_cache))
    engine.compile()
    for prompt, new in (([1, 2, 3], 31), ([5], 16)):
        found = engine.generate(prompt, new, seed=3)
        assert found.speculation.accepted == found.speculation.drafted
        assert found.speculation.verifications == (new - 1) // 5
    # One for four drafts, one for their verification.
    assert engine.graphs() == Graphs(captured=2, replays=2 * (6 + 3))


def test_the_device_is_asked_once_a_verification(config: MakeConfig) -> None:
    """On a CPU reading the report is no operator; whatever else would wait is one."""
    cell = config(LOOKUP, "decoding.kind=sampling", "decoding.temperature=0.8", "decoding.seed=0")
    engine = make(cell, load(cell.model, cell.engine).model, slots=60)
    engine.generate([1, 2, 3, 1, 2], 20, seed=0)

    class Counted(Operators):
        asked = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.asked += func.overloadpacket.__name__ == "_local_scalar_dense"
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Counted() as found:
        engine.generate([1, 2, 3, 1, 2], 20, seed=0)
    # The first token.
    assert found.asked == 1
    assert not found.seen & {"is_nonzero", "nonzero", "equal", "multinomial"}


SAMPLED = ["decoding.kind=sampling", "decoding.temperature=0.8", "decoding.seed=0"]


def drafted_by(cell: LbiConfig, model: Any, draft: Any, slots: int) -> Any:
    """An engine whose draft is quantized as the cell says."""
    with TemporaryDirectory() as folder:
        phases = Phases(Path(folder))
        steps.quantize_draft(cell, draft, Record(Path(folder), phases), phases)
    return make(cell, model, slots, draft)


@pytest.mark.parametrize("name", ["gqa3-80", "gqa8-128-tied-llama3"])
@pytest.mark.parametrize(
    "knobs",
    [
        ["decoding=speculative_self", "decoding.draft_quantizer=hqq4", "decoding.draft_layers=1"],
        ["decoding=speculative_draft", "decoding.adaptive=true"],
        ["engine=fused", "decoding=speculative_self", "decoding.draft_quantizer=native_w8"],
        ["engine=fused", "decoding=speculative_self", "decoding.draft_quantizer=null", "decoding.draft_layers=1"],
        ["engine=fused", "decoding=speculative_draft", "decoding.adaptive=true"],
        ["engine=fused", "cache=static_int8", "decoding=speculative_self", "decoding.draft_quantizer=native_w8"],
        ["engine=fused", "cache=static_fp8", "decoding=speculative_draft"],
        ["cache=static_int8", "decoding=speculative_self", "decoding.draft_quantizer=native_w8"],
    ],
)
@pytest.mark.slow
def test_drafts_of_a_model_leave_the_text_as_it_is(config: MakeConfig, name: str, knobs: list[str]) -> None:
    arch = SHAPES[name] | {"intermediate_size": 160}
    cell = config(*knobs, arch=arch)
    greedy = config(f"engine={cell.engine.kind}", f"cache={cell.cache.name}", arch=arch)
    model = load(greedy.model, greedy.engine).model
    plain = make(greedy, load(greedy.model, greedy.engine).model, slots=80)
    other = load(replace(greedy.model, seed=5), greedy.engine).model
    draft = load_draft(cell, model) if cell.decoding.speculative == "self" else Draft(other, shares_cache=False)
    engine = drafted_by(cell, model, draft, slots=80)
    for length, new in ((11, 30), (1, 9), (20, 2)):
        prompt = [(7 * index + length) % 300 for index in range(length)]
        wanted = plain.generate(prompt, new, seed=0).tokens
        found = engine.generate(prompt, new, seed=0)
        assert found.tokens == wanted
        assert found.speculation.drafted > 0


@pytest.mark.parametrize(
    ("kind", "compiler", "shares_cache", "knobs"),
    [
        *(
            (kind, "eager", shares_cache, knobs)
            for kind in ("loop", "fused")
            for shares_cache in (True, False)
            for knobs in ([], SAMPLED, [*SAMPLED, "decoding.repetition_penalty=1.5"])
        ),
        pytest.param("loop", "inductor", True, SAMPLED, marks=pytest.mark.by_hand),
        pytest.param("loop", "inductor", False, [], marks=pytest.mark.by_hand),
    ],
)
@pytest.mark.slow
def test_a_draft_that_is_the_model_is_always_right(
    config: MakeConfig, kind: str, compiler: str, shares_cache: bool, knobs: list[str]
) -> None:
    """Which it is only if each of its steps sees what the model sees: caches, positions, what was dropped."""
    arch = SHAPES["gqa3-80"]
    own = [f"engine={kind}", "decoding=speculative_draft", "decoding.draft=tiny_random", f"compiler={compiler}"]
    cell = config(*own, *knobs, arch=arch)
    model = load(cell.model, cell.engine).model
    engine: Any = make(cell, model, 60, Draft(shared_copy(model), shares_cache))
    if compiler != "eager":
        engine.compile()
    for prompt, new in (([1, 2, 3], 31), ([5], 16)):
        found = engine.generate(prompt, new, seed=3)
        assert found.speculation.accepted == found.speculation.drafted
        assert found.speculation.verifications == (new - 1) // 5


@pytest.mark.parametrize("kind", ["loop", "fused"])
def test_a_draft_recovers_from_what_was_wrong(config: MakeConfig, kind: str) -> None:
    """With the model itself as the draft, spoilt now and then, all other drafts stand."""
    own = [f"engine={kind}", "decoding=speculative_draft", "decoding.draft=tiny_random"]
    cell = config(*own, arch=SHAPES["gqa3-80"])
    model = load(cell.model, cell.engine).model
    for shares_cache in (True, False):
        engine: Any = make(cell, model, 90, Draft(shared_copy(model), shares_cache))
        engine.generate([1, 2, 3], 2, seed=0)
        drafter, turns = engine._drafter, []
        propose = drafter.propose

        def spoilt(count: int, propose: Any = propose, turns: list[int] = turns, engine: Any = engine) -> int:
            propose(count)
            turns.append(len(turns) % 5)
            if turns[-1] < 4:
                engine.drafts.tokens[turns[-1]].add_(1).remainder_(301)
            return count

        drafter.propose = spoilt
        found = engine.generate([1, 2, 3], 1 + 3 * (1 + 2 + 3 + 4 + 5), seed=0)
        assert (found.speculation.verifications, found.speculation.accepted) == (15, 3 * (0 + 1 + 2 + 3 + 4))


def test_a_draft_shares_what_it_does_not_quantize(config: MakeConfig, tmp_path: Path) -> None:
    cell = config("decoding=speculative_self", "decoding.draft_quantizer=native_w4", "quantizer=int8_wo")
    model = load(cell.model, cell.engine).model
    draft = load_draft(cell, model)
    assert draft is not None
    original = model.model.layers[0].mlp.up_proj.weight
    assert draft.model.model.layers[0].mlp.up_proj.weight is original
    phases = Phases(tmp_path)
    record = Record(tmp_path, phases)
    steps.quantize(cell, model, [1, 2, 3], tmp_path / "tuning.json", record, phases)
    layers = steps.quantize_draft(cell, draft, record, phases)
    assert draft.model.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert {layer.seen.kind for layer in layers if layer.seen.quantized} == {"NativeLinear[w4, torch]"}
    assert record.effective["draft"]["weights"]["quantized_fraction"] > 0
    assert record.effective["weights"] != record.effective["draft"]["weights"]


def test_a_draft_of_the_first_blocks_on_fused_is_in_memory_once(config: MakeConfig) -> None:
    own = ["engine=fused", "decoding=speculative_self", "decoding.draft_layers=1"]
    cells = [config(*own, f"decoding.draft_quantizer={name}") for name in ("null", "native_w8")]
    for cell, is_shared in zip(cells, (True, False), strict=True):
        model = load(cell.model, cell.engine).model
        engine: Any = drafted_by(cell, model, load_draft(cell, model), slots=40)
        drafts, own_layer = engine._by_model.llama.layers, engine.llama.layers[0]
        assert (drafts[0] is own_layer) == is_shared
        assert drafts[0].keys is own_layer.keys
        assert len(drafts) == 1


def test_a_draft_that_does_not_fit_is_refused(config: MakeConfig) -> None:
    cell = config()
    model = load(cell.model, cell.engine).model
    short = config("decoding=speculative_self", "decoding.draft_quantizer=null", "decoding.draft_layers=2")
    with pytest.raises(InputError, match="is not fewer than the model's 2"):
        load_draft(short, model)
    model.config.vocab_size = 7
    same = config("decoding=speculative_draft", "decoding.draft=tiny_random")
    with pytest.raises(Unsupported, match="tokens in its vocabulary and the model 7"):
        load_draft(same, model)
    with pytest.raises(InputError, match=r"decoding\.draft=no/such/folder: there is no such folder"):
        config("decoding=speculative_draft", "decoding.draft=no/such/folder")


def test_what_drafts_is_part_of_the_identity(plan: MakePlan) -> None:
    knobs = ["engine=loop", "cache=static", "decoding=speculative_self"]
    cells = plan(
        *knobs, "decoding.draft_quantizer=native_w4,native_w2,int8_wo,null", "decoding.draft_layers=1,null"
    ).cells
    wanted = [RUN] * 7 + [PRUNED]
    assert sorted(cell.verdict for cell in cells) == sorted(wanted)
    assert len({cell.run_id for cell in cells if cell.verdict == RUN}) == 7
    (gpu_only,) = plan(*knobs, "decoding.draft_quantizer=gemlite_a16w4").cells
    assert (gpu_only.verdict, gpu_only.rule) == (PRUNED, "hardware_fits")
    (without,) = plan(*knobs[:2], "decoding=speculative_draft", "decoding.draft=null").cells
    assert "needs decoding.draft" in without.reason


@pytest.mark.parametrize(
    "knobs",
    [
        ["decoding=speculative_lookup"],
        ["decoding=speculative_self", "decoding.draft_quantizer=int8_wo"],
        ["engine=fused", "decoding=speculative_lookup"],
        ["engine=fused", "decoding=speculative_self", "decoding.draft_quantizer=native_w8"],
        ["engine=fused", "decoding=speculative_draft", "decoding.draft=tiny_random"],
        ["cache=static_int8", "decoding=speculative_self", "decoding.draft_quantizer=int8_wo"],
        ["engine=fused", "cache=static_int4", "decoding=speculative_lookup"],
    ],
)
@pytest.mark.slow
def test_a_run_says_what_was_accepted(run_lbi: Callable[..., Any], tmp_path: Path, knobs: list[str]) -> None:
    ran = run_lbi(
        *["-m", "model=tiny_random", "model.dtype=float32", "engine=loop", "cache=static", "tracker=none", *knobs],
        *["measure=quick", "workload.new_tokens=12", "sweep.name=drafts", "quality=off"],
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with (tmp_path / "store" / "sweeps" / "drafts" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    effective = json.loads((Path(row["folder"]) / "effective.json").read_text())
    assert effective["lossless"]["verdict"] == "equal"
    low_bit = "cache=static_int" in " ".join(knobs)
    assert effective["lossless"]["against"] == ("greedy over the same cache" if low_bit else "generate()")
    assert float(row["acceptance_length"]) >= 1
    assert float(row["verify_s"]) > 0
    if "lookup" not in " ".join(knobs):
        drafts_itself = "decoding=speculative_self" in knobs
        assert (effective["draft"]["weights"]["quantized_fraction"] > 0) == drafts_itself
        assert ("draft" in effective["cache"]) != drafts_itself
        assert float(row["draft_length"]) == 4
        passes = float(row["bytes_per_token"]) * float(row["acceptance_length"])
        assert passes > 2 * float(row["weight_bytes"]) / 4


def test_what_cannot_forget_is_refused(config: MakeConfig) -> None:
    cell = config(LOOKUP, arch=SHAPES["window"])
    engine = make(cell, load(cell.model, cell.engine).model, slots=60)
    with pytest.raises(Unsupported, match="StaticSlidingWindowLayer has written over older tokens"):
        engine.generate([1, 2, 3], 20, seed=0)
    facts = ModelFacts(None, SHAPES["window"], None)
    reason = knob_rules.speculation_needs_own_loop(cell, facts, rules.Machine("cpu", {}, True))
    assert reason is not None
    assert "sliding window" in reason
    short = config(LOOKUP)
    with pytest.raises(InputError, match="Set it to 19 or more"):
        make(short, load(short.model, short.engine).model, slots=18).generate([1, 2, 3], 9, seed=0)


@pytest.mark.parametrize(
    ("overrides", "rule", "part"),
    [
        ([LOOKUP], "speculation_needs_own_loop", "engine=loop"),
        (
            [LOOKUP, "engine=loop", "cache=static", "compiler=cudagraph", "engine.tokens_per_graph=2"],
            "speculation_needs_own_loop",
            "a graph of its own",
        ),
        ([LOOKUP, "engine=loop", "cache=static", "decoding.ngram=null"], "speculation_is_complete", "decoding.ngram"),
        ([LOOKUP, "engine=loop", "cache=static", "decoding.top_k=3"], "unused_knob", "decoding.top_k"),
        (["+decoding.draft_tokens=3"], "unused_knob", "decoding.draft_tokens"),
        (["decoding=speculative_self"], "speculation_needs_own_loop", "engine=loop"),
        (
            ["decoding=speculative_self", "engine=fused", "cache=static", "decoding.draft_quantizer=int8_wo"],
            "fused_reads_it",
            "the draft's",
        ),
    ],
)
def test_what_cannot_be_is_pruned(plan: MakePlan, overrides: list[str], rule: str, part: str) -> None:
    cell = plan(*overrides).cells[0]
    assert (cell.verdict, cell.rule) == (PRUNED, rule)
    assert part in cell.reason
    cells = plan(LOOKUP + ",speculative_self", "engine=loop,fused", "cache=static").cells
    assert [cell.verdict for cell in cells] == [RUN] * 4


def test_drafts_are_part_of_the_identity_where_they_are_used(plan: MakePlan) -> None:
    cells = plan(LOOKUP, "engine=loop", "cache=static", "decoding.draft_tokens=4,8", "decoding.ngram=2,3").cells
    assert len({cell.run_id for cell in cells}) == 4
    assert cells[0].config is not None
    assert '"speculative":"lookup"' in identity.canonical_decoding(cells[0].config.decoding)


def test_drafts_that_change_greedy_tokens_would_be_found(config: MakeConfig, tmp_path: Any) -> None:
    cell = config(LOOKUP)
    model = load(cell.model, cell.engine).model
    check = steps.plain_path(cell, model, [1, 2, 3], Phases(tmp_path))
    assert check is not None
    found = make(cell, model, slots=60).generate([1, 2, 3], cell.workload.new_tokens, seed=0)
    assert check(found.tokens)["verdict"] == "equal"
    record = Record(tmp_path, Phases(tmp_path))
    measuring.measure(cell, make(cell, model, slots=60), [1, 2, 3], record, Phases(tmp_path))
    assert record.metrics["acceptance_length"] == pytest.approx(
        1 + found.speculation.accepted / found.speculation.verifications  # type: ignore[union-attr]
    )
