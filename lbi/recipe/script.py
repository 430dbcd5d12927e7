"""`lbi recipe RUN`: a result's setting as a script of its own.

It needs torch, transformers and the quantizer's package; lbi only where its engine, its caches
or its packed weights are what was measured. With `--check` it compares its tokens with the run's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lbi.cells import find_result
from lbi.config import LbiConfig
from lbi.errors import InputError, Unsupported
from lbi.files import write_text
from lbi.model_files import inspect
from lbi.prompts import read_text
from lbi.recipe import generating, loading, quantizing
from lbi.recipe.part import Part, literal
from lbi.store import Result, Store
from lbi.typed import build

LONGEST_PROMPT = 10_000
"""Characters of a prompt that stand in the script; a longer one is made by lbi."""

HEAD = '''"""{name}: the setting of lbi's run {run_id}, on its own.

{speed}Measured with {packages}.
    python THIS_FILE              generate from the run's prompt
    python THIS_FILE "A prompt"   from another one
    python THIS_FILE --check      from the run's prompt, and compare the tokens with the run's
"""
'''

MAIN = """
def prompt_tokens(tokenizer, text):
    ids = encode(tokenizer, text)
    if text is not PROMPT or PROMPT_TOKENS is None:
        return ids
    return (ids * (PROMPT_TOKENS // len(ids) + 1))[:PROMPT_TOKENS]


def run(text=PROMPT):
    model, tokenizer = load()
{steps}
    ids = prompt_tokens(tokenizer, text)
    return generate(model, tokenizer, ids{draft}), tokenizer


def check(tokens):
    other = next((place for place, pair in enumerate(zip(tokens, RUN_TOKENS)) if len(set(pair)) > 1), None)
    if other is None and len(tokens) == len(RUN_TOKENS):
        print(f"the same {len(tokens)} tokens as the run's")
        return 0
    print(f"token {other} is {tokens[other]}, and was {RUN_TOKENS[other]}" if other is not None else "another length")
    return 1


def main():
    given = [text for text in sys.argv[1:] if text != "--check"]
    tokens, tokenizer = run(*given[:1])
    print(decode(tokenizer, tokens))
    return check(tokens) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
"""


def show(store: Store, sweep: str, run: str, file: str | None) -> int:
    """Print the recipe of a run, or write it to `file`. Raises `InputError` where there is no such result."""
    text = of_result(store, find_result(store, sweep, run))
    if file is None:
        print(text, end="")
    else:
        write_text(Path(file).absolute(), text)
        print(f"{file}: run it with python {file} --check")
    return 0


def of_result(store: Store, result: Result) -> str:
    """The script. Raises `InputError` for a result whose setting a script cannot have."""
    request, generated = store.read(result, "config.json"), store.read(result, "text.json") or {}
    if not request or not result.ok:
        raise InputError("run", result.run_id, f"is {result.status}: {result.reason}", "Name a run that is ok")
    config = build(LbiConfig, request["config"])
    known = {name: store.read(result, f"{name}.json") or {} for name in ("effective", "env", "metrics")}
    try:
        return _script(config, result, generated.get("tokens") or [], known)
    except Unsupported as error:
        raise InputError("run", result.run_id, str(error), "The files that it was made from must be there") from error


def _script(config: LbiConfig, result: Result, tokens: list[int], known: dict[str, dict[str, Any]]) -> str:
    choices: dict[str, str] = {}
    for shape in (known["effective"].get("choices") or {}).get("by_shape", []):
        choices |= shape["by_layer"]
    facts = inspect(config.model)
    prompt, prompt_imports = _prompt(config)
    parts = [
        Part(("import sys", "import torch", *prompt_imports), _constants(config, tokens, prompt, known["effective"])),
        loading.part(config.model, config.engine, facts),
        quantizing.part(config.quantizer, choices, config.engine.device),
        generating.part(config),
    ]
    lines = dict.fromkeys(line for part in parts for line in part.imports)
    head = _head(config, result, known)
    setup = _before_imports(config, lines)
    steps, draft = _steps(config)
    main = MAIN.replace("{steps}", steps).replace("{draft}", draft)
    body = "\n".join("\n" + part.code.strip("\n") + "\n" for part in parts)
    return f"{head}\n{setup}{_imports(lines)}\n{body}\n\n{main.strip()}\n"


def _steps(config: LbiConfig) -> tuple[str, str]:
    """The lines between loading and generating, and how a draft is handed on."""
    drafts = config.decoding.speculative in ("draft", "self")
    steps = ["draft = standalone.drafter(model, SETTING)"] if drafts else []
    steps.append("quantize(model)")
    if config.compiler.backend == "inductor" and not generating.own_engine(config):
        steps.append("compile_decode_step(model)")
    return "\n".join(f"    {step}" for step in steps), ", draft" if drafts else ""


def _head(config: LbiConfig, result: Result, known: dict[str, dict[str, Any]]) -> str:
    names = " ".join(getattr(config, group).name for group in ("model", "engine", "quantizer", "compiler", "cache"))
    versions = known["env"].get("packages") or {}
    wanted = ["torch", "transformers", *({"torchao": ["torchao"], "hqq": ["hqq"]}.get(config.quantizer.family, []))]
    listed = ", ".join(f"{name} {versions[name]}" for name in wanted if name in versions)
    speed = (known["metrics"].get("metrics") or {}).get("decode_tok_s")
    where = _device(known["env"]) if config.engine.device == "cuda" else known["env"].get("cpu", "a CPU")
    said = f"It decoded {speed:.1f} tokens/s on {where}.\n" if isinstance(speed, int | float) else ""
    return HEAD.format(name=names, run_id=result.run_id, speed=said, packages=listed or "versions that are not known")


def _device(environment: dict[str, Any]) -> str:
    cards = environment.get("gpus") or [{}]
    return str(cards[0].get("name", "a GPU"))


def _before_imports(config: LbiConfig, lines: dict[str, None]) -> str:
    """Settings that libraries read when they are imported."""
    if config.engine.device != "cpu" or not any("torchao" in line for line in lines):
        return ""
    reason = "# torchao would try to load its CUDA libraries, and print pages.\n"
    return f'import os\n\n{reason}os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")\n\n'


def _imports(lines: dict[str, None]) -> str:
    """The import lines, the standard library's first, with the names of one module on one line."""
    names: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("from "):
            module, _, listed = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, set()).update(listed.split(", "))
    made = sorted(line for line in lines if line.startswith("import "))
    made += [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]
    own = [line for line in made if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
    return "\n".join([*own, "", *(line for line in made if line not in own)]) + "\n"


def _prompt(config: LbiConfig) -> tuple[str, tuple[str, ...]]:
    """The prompt as an expression, and what it imports."""
    text = read_text(config.workload.prompt)
    if len(text) > LONGEST_PROMPT and not Path(config.workload.prompt).expanduser().is_file():
        return f"read_text({config.workload.prompt!r})", ("from lbi.prompts import read_text",)
    plain = '"""' not in text and "\\" not in text and not text.endswith('"')
    return (f'"""\\\n{text}"""' if plain and "\n" in text else repr(text)), ()


def _constants(config: LbiConfig, tokens: list[int], prompt: str, effective: dict[str, Any]) -> str:
    threads = effective.get("threads") if config.engine.device == "cpu" else None
    lines = ["torch.set_grad_enabled(False)"]
    if threads:
        lines.append(f"torch.set_num_threads({threads})")
    lines += [
        "",
        f'DEVICE, DTYPE = "{config.engine.device}", torch.{config.model.dtype}',
        f"NEW_TOKENS, PROMPT_TOKENS = {config.workload.new_tokens}, {config.workload.prompt_tokens}",
        f"PROMPT = {prompt}",
        f"RUN_TOKENS = {literal(tokens)}",
    ]
    return "\n".join(lines)
