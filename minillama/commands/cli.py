"""Command-line entry point `minillama NAME ...`: dispatch, argument parsing, one clear message per error."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from minillama import __version__
from minillama.commands.streams import open_closed, system_errors
from minillama.commands.usage import UsageError, own_errors
from minillama.config.command_line import refuse_repeated
from minillama.config.loader import say_renamed
from minillama.errors import InputError, printable
from minillama.threads import adapt

COMMANDS = {
    "train": "train a model; writes a run folder: configuration, metrics, checkpoints, final model",
    "generate": "text generation from prompts: sampling, batching, speculative decoding",
    "chat": "conversation with a model in the terminal",
    "infill": "infilling of masked spans with a GLM or ChatGLM model",
    "classify": "cloze classification with an infilling model: pattern and verbalizers",
    "eval": "accuracy on LLaMA's nine sets, perplexity, comparison by a judge",
    "show": "summary of a run folder: state, figures, loss curve, provenance, configuration",
    "runs": "list of runs with their best figures",
    "compare": "comparison of runs: configuration, metrics, loss curves",
    "convert": "model conversion to another format: Hugging Face, Meta, GGUF",
    "inspect": "format, configuration, metadata and tensors of a model, without loading it",
    "data": "clean and decontaminate text; show fine-tuning records as a model reads them; grade; best of n",
    "tokenizer": "train, merge, encode, decode, explain, compare tokenizers",
    "doctor": "environment report: versions, processor, kernels, compiler, extras, folders",
    "plan": "parameter counts, memory and FLOPs of a model, without building it",
    "scaling": "scaling laws: fit finished runs, plan a run for a budget, sweep tiny runs",
}
# names that others have for them
CALLED = {
    "resume": "train --out RUN --resume",
    "presets": "plan, which lists them",
    "models": "plan, which lists them",
    "sample": "generate",
    "finetune": "train sft --train.init_from MODEL",
    "export": "convert SRC DST --to gguf",
    "encode": "tokenizer encode",
}
# options since the last release
RENAMED = {
    "classify": {"--verbalisers": "--verbalizers"},
    "plan": {"--seq-len": "--context", "--batch-size": "--batch", "--devices": "--gpus"},
}


WORDS = 3.0  # seconds
NARROWEST = 20  # columns; with five tyro never ends


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments after `minillama`; those of the process by default. `--debug` anywhere among them
            lets a traceback through.
        prog: the program's name in `--help`, `minillama NAME` by default.

    Returns:
        0, or 1 for an error, 2 for a command line that cannot be parsed, 130 after Ctrl-C, 141 for a closed pipe.

    Raises:
        SystemExit: from tyro, for `--help` (0).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    adapt()  # before the import of torch, which reads some of it once
    open_closed()
    if os.environ.get("NO_COLOR"):
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # read when tyro is imported
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    try:
        with system_errors():
            _refuse_no_folder()
            return _dispatch([word for word in words if word != "--debug"], prog)
    except BrokenPipeError:
        return 141
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            return 130
        internal = f"internal error: {type(error).__name__}: {printable(str(error))}; --debug shows the traceback"
        rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
        if rank != "0":  # of processes that torchrun started the first one speaks
            time.sleep(WORDS)
            internal = f"process {rank}: {internal}"
            if isinstance(error, InputError) and not isinstance(error, UsageError):
                error = InputError(f"process {rank}: {error}")
        if "--json" in words:  # for whoever reads standard output
            print(json.dumps({"error": error.parts() if isinstance(error, InputError) else {"what": internal}}))
        else:
            print(f"error: {error}" if isinstance(error, InputError) else internal, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _refuse_no_folder() -> None:
    """Refuse a current folder that was removed, where MKL would end the process as soon as it computes.

    Raises:
        InputError: it was.
    """
    try:
        os.getcwd()
    except OSError as error:
        fix = "change to another one, for instance cd ~"
        raise InputError("the current folder cannot be read", found=error.strerror, fix=fix) from None


def _dispatch(words: list[str], prog: str | None) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help", "help"):
        if rest and rest[0] in COMMANDS:
            return _dispatch([rest[0], *rest[1:], "--help"], prog)
        if not rest or name != "help":
            print(_usage())
            return 0
        name = rest[0]
    if name == "--version":
        print(f"minillama {__version__}")
        return 0
    if name not in COMMANDS:
        near = [CALLED[name]] if name in CALLED else [repr(one) for one in get_close_matches(name, COMMANDS, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    command = import_module(f"minillama.commands.{name}")
    with own_errors(command, rest, tuple(COMMANDS)):
        if hasattr(command, "parse"):
            args = command.parse(rest)
        else:
            import tyro

            renamed = RENAMED.get(name, {})
            for old in renamed.keys() & set(rest):
                say_renamed(old, renamed[old])
            rest = [renamed.get(word, word) for word in rest]
            refuse_repeated(rest)
            args = tyro.cli(command.Args, args=rest, prog=prog or f"minillama {name}", description=command.__doc__)
    status: int = command.run(args)
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    head = ["usage: minillama COMMAND [ARGUMENTS]", "", "commands:"]
    tail = ["", "minillama COMMAND --help, or help COMMAND, lists its arguments; --version; --debug shows tracebacks."]
    return "\n".join([*head, *lines, *tail])
