"""The whole LLaMA recipe in one small package. docs/api.md has all that is meant to be imported, with examples.

Shape and cost      ModelConfig.load(name or path), .num_params(), .flops_per_token(seq_len)
Model               Decoder(config), Decoder.from_pretrained(path), .save_pretrained(path); layers in minillama.layers
Tokenizer           Tokenizer.load(path), TokenizerTrainer(kind, vocab_size)(texts)
Data                prepare(sources, tokenizer, cache=folder), Corpus.batch(seed, step, rows, length)
Train               load_run_config(name, words), train(config, out)
Generate            generate(model, tokenizer, prompts, max_new_tokens, sampling), stream(...), Sampling(...)
Evaluate            perplexity(model, tokenizer, text), log_likelihoods(model, context, continuations)
Quantize            quantize(model, kind)
Formats             minillama.convert.convert(source, destination, to), minillama.formats
Errors              InputError

A name is imported when it is first used, so that `import minillama` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minillama.config import ModelConfig
    from minillama.data.corpus import Corpus
    from minillama.data.prepare import prepare
    from minillama.errors import InputError
    from minillama.evaluate.likelihood import log_likelihoods
    from minillama.evaluate.perplexity import perplexity
    from minillama.inference.generate import generate, stream
    from minillama.inference.quantize import quantize
    from minillama.inference.sampling import Sampling
    from minillama.model import Decoder
    from minillama.runs.config import load_run_config
    from minillama.tokenizer import Tokenizer, TokenizerTrainer
    from minillama.training.run import train

__version__ = "0.1.0"
__all__ = [
    "Corpus",
    "Decoder",
    "InputError",
    "ModelConfig",
    "Sampling",
    "Tokenizer",
    "TokenizerTrainer",
    "__version__",
    "generate",
    "load_run_config",
    "log_likelihoods",
    "perplexity",
    "prepare",
    "quantize",
    "stream",
    "train",
]

_HOME = {
    "Corpus": "data.corpus",
    "Decoder": "model",
    "InputError": "errors",
    "ModelConfig": "config",
    "Sampling": "inference.sampling",
    "Tokenizer": "tokenizer",
    "TokenizerTrainer": "tokenizer",
    "generate": "inference.generate",
    "load_run_config": "runs.config",
    "log_likelihoods": "evaluate.likelihood",
    "perplexity": "evaluate.perplexity",
    "prepare": "data.prepare",
    "quantize": "inference.quantize",
    "stream": "inference.generate",
    "train": "training.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
