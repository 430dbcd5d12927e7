"""Structured decoding: every text follows its grammar to the end, and is what a mask at each step would give."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from test_loop_engine import shape

from lbi import identity, measuring, steps
from lbi.config import DecodingConfig, LbiConfig
from lbi.engines import Graphs, make
from lbi.engines.grammar_drafter import allowed_only, byte_table
from lbi.errors import NotApplied, Unsupported
from lbi.models import load
from lbi.plan import Plan
from lbi.process import Phases
from lbi.record import Record
from lbi.structured import why_not
from lbi.verdicts import PRUNED, RUN

MakePlan = Callable[..., Plan]
MakeConfig = Callable[..., LbiConfig]

SCHEMAS = json.loads((Path(__file__).parent.parent / "benchmarks" / "schemas.json").read_text())


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for each byte, some for several, and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<end>": 256}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture
def config(plan: MakePlan) -> MakeConfig:
    """A structured cell of engine=loop, or another, in float32, whatever the rules say of it."""

    def made(grammar: Any, *overrides: str, kind: str = "json_schema", option: str = "structured") -> LbiConfig:
        common = ["model.dtype=float32", "engine=loop", "cache=static", "sweep.prune=false", f"decoding={option}"]
        found = plan(*common, *overrides).cells[0].config
        assert found is not None
        text = grammar if isinstance(grammar, str) else json.dumps(grammar)
        arch = shape(4, 2, 32, initializer_range=0.1, max_position_embeddings=1024)
        decoding = replace(found.decoding, grammar=text, grammar_kind=kind)
        return replace(found, decoding=decoding, model=replace(found.model, arch=arch))

    return made


def step_by_step(model: Any, config: LbiConfig, tokenizer: Any, prompt: list[int], most: int) -> list[int]:
    """Greedy tokens under the grammar, one at a time without a cache, by llguidance's own mask."""
    from lbi import structured

    matcher, tokens = structured.matcher(config.decoding, tokenizer, 301), []
    while len(tokens) < most and not matcher.is_stopped():
        bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)[:301]
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        tokens.append(int(logits.masked_fill(bias == 0, float("-inf")).argmax()))
        assert matcher.consume_token(tokens[-1])
    return tokens


LIST = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 6, "maxItems": 9}


@pytest.mark.parametrize("knobs", [["decoding.fast_forward=false"], ["decoding.draft_tokens=5"], []])
@pytest.mark.parametrize("option", ["structured", "structured_lookup"])
@pytest.mark.parametrize("kind", ["loop", "fused"])
@pytest.mark.slow
def test_tokens_are_those_of_a_mask_at_every_step(
    config: MakeConfig, tokenizer: Any, option: str, kind: str, knobs: list[str]
) -> None:
    cell = config(LIST, f"engine={kind}", *knobs, option=option)
    model = load(cell.model, cell.engine).model
    engine = make(cell, model, 160, tokenizer=tokenizer)
    for prompt in ([1, 2, 3], tokenizer("a list of colours: ")["input_ids"]):
        wanted = step_by_step(model, cell, tokenizer, prompt, 120)
        found = engine.generate(prompt, 120, seed=0)
        assert found.tokens == wanted
        assert found.finished
        text = tokenizer.decode(found.tokens, skip_special_tokens=True)
        jsonschema.validate(json.loads(text), LIST)
        assert found.speculation is not None
        assert found.speculation.tokens == len(found.tokens) == len(found.timing.tokens)
        assert (found.speculation.forced > 0) == cell.decoding.fast_forward
        if cell.decoding.fast_forward:
            assert found.speculation.verifications < len(found.tokens)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("kind", ["loop", "fused"])
@pytest.mark.slow
def test_sampled_texts_follow_their_schema(config: MakeConfig, tokenizer: Any, kind: str, name: str) -> None:
    knobs = ["decoding.kind=sampling", "decoding.temperature=1.0", "decoding.seed=0"]
    cell = config(SCHEMAS[name], f"engine={kind}", *knobs)
    model = load(cell.model, cell.engine).model
    engine = make(cell, model, 700, tokenizer=tokenizer)
    texts = set()
    for seed in range(4):
        found = engine.generate([1, 2, 3], 680, seed=seed)
        assert found.finished
        texts.add(tokenizer.decode(found.tokens, skip_special_tokens=True))
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("kind", "grammar", "follows"),
    [
        ("regex", r"[0-9]{3}-[a-f]{2,4}", lambda text: text[:3].isdigit() and text[3] == "-" and len(text) <= 8),
        (
            "lark",
            'start: "(" WORD ("," WORD)~2 ")"\nWORD: /[a-z]{1,3}/',
            lambda text: text[0] == "(" and text.count(",") == 2 and set(text) <= set(string.ascii_lowercase + "(),"),
        ),
    ],
)
def test_other_grammars_are_followed(
    config: MakeConfig, tokenizer: Any, kind: str, grammar: str, follows: Callable[[str], bool]
) -> None:
    cell = config(grammar, kind=kind)
    found = make(cell, load(cell.model, cell.engine).model, 100, tokenizer=tokenizer).generate([5, 6], 60, seed=0)
    assert found.finished
    assert follows(tokenizer.decode(found.tokens, skip_special_tokens=True))


def test_masks_are_unpacked_bit_by_bit() -> None:
    allowed = torch.rand(3, 77) < 0.3
    padded = torch.zeros(3, 96, dtype=torch.long)
    padded[:, :77] = allowed
    words = (padded.view(3, 3, 32) << torch.arange(32)).sum(-1)
    masks = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    found = allowed_only(torch.ones(3, 77), masks, byte_table("cpu"))
    assert torch.equal(found == 1, allowed)
    assert torch.equal(found == float("-inf"), ~allowed)


@pytest.mark.parametrize("kind", ["loop", "fused"])
def test_pass_and_choice_are_a_graph_each(
    config: MakeConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With a stand-in for a CUDA graph, whose output has one place in memory."""

    class Graph:
        def __init__(self, call: Callable[[], Any], restore: Callable[[], None]) -> None:
            self.call, self.replays = call, 0
            self.output = call()
            restore()

        def __call__(self) -> Any:
            self.replays += 1
            fresh = self.call()
            if self.output is not None:
                self.output.copy_(fresh)
            return self.output

    monkeypatch.setattr("lbi.engines.speculative.GraphedCall", Graph)
    own = [f"engine={kind}", "decoding.draft_tokens=4"]
    cells = [config(LIST, f"compiler={name}", *own) for name in ("eager", "cudagraph")]
    model = load(cells[0].model, cells[0].engine).model
    plain, graphed = (make(cell, model, 160, tokenizer=tokenizer) for cell in cells)
    graphed.compile()
    for prompt in ([1, 2, 3], [7, 8]):
        assert graphed.generate(prompt, 120, seed=0).tokens == plain.generate(prompt, 120, seed=0).tokens
    graphs = graphed.graphs()
    assert isinstance(graphs, Graphs)
    # No drafts, one, two and four.
    assert graphs.captured == 8


def test_a_text_that_is_cut_or_cannot_be_timed_is_no_result(config: MakeConfig, tokenizer: Any, tmp_path: Path) -> None:
    phases = Phases(tmp_path)
    cell = config(LIST, "workload.new_tokens=10", "measure=quick")
    model = load(cell.model, cell.engine).model
    engine = make(cell, model, 60, tokenizer=tokenizer)
    with pytest.raises(NotApplied, match="not complete after 10 tokens"):
        measuring.measure(cell, engine, [1, 2], Record(tmp_path, phases), phases)
    with pytest.raises(Unsupported, match="fast tokenizer"):
        make(cell, model, 60, tokenizer=None)
    whole = replace(cell, workload=replace(cell.workload, new_tokens=120))
    record = Record(tmp_path, phases)
    tokens = measuring.measure(whole, make(whole, model, 160, tokenizer=tokenizer), [1, 2], record, phases)
    assert len(tokens) < 120
    assert 0 < record.metrics["mask_s"] < 1
    assert 0 < record.metrics["forced_share"] < 1
    assert steps.plain_path(whole, model, [1, 2], phases) is None


@pytest.mark.parametrize(
    ("kind", "grammar", "part"),
    [
        ("json_schema", "{not json", "Expecting property name"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 2}', "minimum"),
        ("json_schema", '{"type": "nonsense"}', "nonsense"),
        ("regex", "[a-", "regex"),
        ("lark", "start: missing", "missing"),
    ],
)
def test_a_grammar_that_nothing_follows_is_refused_before_any_model_is_loaded(
    kind: str, grammar: str, part: str
) -> None:
    decoding = DecodingConfig(name="s", kind="greedy", grammar=grammar, grammar_kind=kind, draft_tokens=4)  # type: ignore[arg-type]
    reason = why_not(decoding)
    assert reason is not None
    assert part in reason
    assert why_not(replace(decoding, grammar='{"type": "integer"}', grammar_kind="json_schema")) is None


@pytest.mark.model
def test_what_cannot_be_is_pruned(plan: MakePlan, tmp_path: Path) -> None:
    def cell(*overrides: str, model: str = "smollm2_135m") -> Any:
        return plan("engine=loop", "cache=static", *overrides, model=model).cells[0]

    assert cell("decoding=structured").verdict == RUN
    assert cell("decoding=structured", "engine=fused").verdict == RUN
    assert cell("decoding=structured_lookup").verdict == RUN
    for overrides, rule in (
        (["decoding=structured", "decoding.grammar='[a-'", "decoding.grammar_kind=regex"], "grammar_can_be_followed"),
        (["decoding=structured", "decoding.grammar=null"], "speculation_is_complete"),
        (["decoding=structured", "engine=hf"], "speculation_needs_own_loop"),
    ):
        found = cell(*overrides)
        assert (found.verdict, found.rule) == (PRUNED, rule)
    assert "no tokenizer" in cell("decoding=structured", model="tiny_random").reason
    file = tmp_path / "digits.txt"
    for content in ("[0-9]+", "[0-7]+"):
        file.write_text(content)
        found = cell("decoding=structured", f"decoding.grammar={file}", "decoding.grammar_kind=regex")
        assert found.verdict == RUN
        assert json.loads(identity.canonical_decoding(found.config.decoding))["grammar"] == content
