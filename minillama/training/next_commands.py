"""Commands that may follow a run, as they are typed."""

from __future__ import annotations

import shlex

from minillama.errors import missing
from minillama.formats.gguf import architecture
from minillama.formats.model_file import ModelFile
from minillama.runs.config import RunConfig
from minillama.runs.folder import RunFolder
from minillama.runs.objectives import typed
from minillama.runs.report import Report
from minillama.tokenizer import Tokenizer


def resume(folder: RunFolder) -> list[str]:
    """Command that goes on with a run."""
    return [*typed("train"), "--out", str(folder.path), "--resume"]


def uses(config: RunConfig, model: str, prompt: str = "") -> dict[str, list[str]]:
    """Commands that use a model of the run."""
    if config.data.template and config.objective.head == "lm":
        return {"chat": ["minillama", "chat", model]}
    return config.objective.commands(model, prompt or next(iter(config.sample.prompts), "The"))


def say_next(
    folder: RunFolder,
    config: RunConfig,
    report: Report,
    initial: ModelFile | None,
    prompt: str = "",
    best: int | None = None,
) -> None:
    """Commands that may follow, with a prompt for the model, and the step of a better one than the last.

    With an adapter on the initial model.
    """
    model, tokenizer = str(folder.model), Tokenizer.load(folder.model)
    export, remark = [f"{model}.gguf", "--to", "gguf"], "for llama.cpp"
    if absent := missing("gguf"):
        remark += f", after pip install '{absent[0]}'"
    if not architecture(config.model) or (tokenizer.pieces is None and tokenizer.pre is None):  # not in GGUF
        export, remark = [f"{model}-bf16", "--to", "hf", "--dtype", "bf16"], "in bfloat16, half of the size"
    models = {"": model} | ({} if best is None else {"best ": str(folder.checkpoints / f"step-{best}")})
    own = None if config.lora is None or initial is None else str(initial.path)
    commands: dict[str, list[str]] = {}
    for rank, path in models.items():
        base, adapter = (path, []) if own is None else (own, ["--adapter", path])
        commands |= {rank + name: [*words, *adapter] for name, words in uses(config, base, prompt).items()}
    commands["resume"] = [*resume(folder), "--train.steps", str(2 * config.train.steps)]
    if config.lora is None:
        commands["export"] = ["minillama", "convert", model, *export]
        commands["plan"] = ["minillama", "plan", str(folder.path)]
    else:  # the folder has the adapter alone
        base = own or config.train.init_from
        commands["merge"] = ["minillama", "convert", base, f"{model}-merged", "--to", "hf", "--merge", model]
    for name, words in commands.items():
        report.say(f"  {name:13} {shlex.join(words)}" + (f"  # {remark}" if name == "export" else ""))
