"""Adapter of EleutherAI's lm-evaluation-harness: `lm_eval` with this model registered.

    python -m minillama.evaluate.lm_eval run --model minillama --model_args path=MODEL --tasks piqa

In Python, `import minillama.evaluate.lm_eval` registers it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from minillama.errors import InputError, optional_import
from minillama.evaluate.multiple_choice import encode_pairs, is_truncated, rolling_likelihoods
from minillama.evaluate.perplexity import perplexity
from minillama.inference.engine import Engine
from minillama.inference.generate import blanks_of, generate
from minillama.inference.load import ModelArgs
from minillama.inference.sampling import Sampling

optional_import("lm_eval", "the harness", "eval")
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

# settings of the harness and its own backends that change no result; those that would are refused
HARNESS = ("max_batch_size", "trust_remote_code", "use_fast_tokenizer", "logits_cache", "backend", "parallelize")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("minillama")
class HarnessModel(LM):  # type: ignore[misc]
    """Model of the harness.

    Args:
        path: a model of any format.
        tokenizer: see `ModelArgs`.
        dtype: see `ModelArgs`.
        device: see `ModelArgs`.
        adapter: see `ModelArgs`.
        quantize: int8, int4, auto or none.
        batch_size: sequences that are generated at once; scoring forms its own batches.
        max_gen_toks: new tokens of a task that does not say how many; answers that are cut are counted and said.
        others: those of `HARNESS`, which are not needed here.

    Raises:
        InputError: an argument of another name.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        dtype: Any = "auto",
        device: str | None = "auto",
        adapter: str = "",
        quantize: Any = "none",
        batch_size: int | str = 16,
        max_gen_toks: int = 256,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(others.keys() - set(HARNESS)):
            expected = "path, tokenizer, dtype, device, adapter, quantize, batch_size, max_gen_toks"
            what = "the model has no such argument"
            raise InputError(what, where="--model_args", found=", ".join(unknown), expected=expected)
        if not device or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"  # the harness asks for cuda:0 unless told otherwise
        args = ModelArgs(path, tokenizer, dtype, device, (adapter,) if adapter else ())
        self.model, self._tokenizer = args.load(quantize, scores=True)
        self.blanks, self.max_gen_toks = blanks_of(self.model, self._tokenizer), max_gen_toks
        self.rows = int(batch_size) if str(batch_size).isdigit() else 16
        self.is_chat, self.path = False, path

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the cache of requests."""
        return self.path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, for the harness's records."""
        return self._tokenizer.chat_template or "" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of messages; from here on the names of special tokens in a text are these tokens."""
        self.is_chat = True
        return self._tokenizer.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, is greedy) of each continuation; requests of one context share its prefill."""
        items: dict[tuple[int, ...], list[int]] = {}
        pairs = encode_pairs(self._tokenizer, [request.args for request in requests], self.is_chat)
        most = self.model.config.max_seq_len
        _say(sum(is_truncated(pair, most, self.blanks) for pair in pairs), len(pairs), "contexts were cut on the left")
        for i, (context, _) in enumerate(pairs):
            items.setdefault(tuple(context), []).append(i)
        rows, results = [*items.values()], [(0.0, False)] * len(pairs)
        for item, found in rolling_likelihoods(self.model, [[pairs[i] for i in row] for row in rows], self.blanks):
            for i, likelihood in zip(rows[item], found, strict=True):
                results[i] = likelihood.nats, likelihood.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[i].args, results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, see `perplexity`."""
        results = []
        for request in requests:
            results.append(-perplexity(self.model, self._tokenizer, request.args[0]).nats if request.args[0] else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop string; contexts that are too long lose tokens on the left, and are counted.

        Raises:
            InputError: as many new tokens as the model's context has, or more.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        results, cut, short = [""] * len(requests), 0, 0
        for rows in groups.values():
            settings = normalize_gen_kwargs(requests[rows[0]].args[1], self.max_gen_toks)
            count, stop = settings["max_gen_toks"], [text for text in settings["until"] if text]
            chosen = {name: settings[name] for name in SAMPLING if name in settings}
            greedy = {} if settings["do_sample"] else {"temperature": 0}
            sampling = Sampling(**({"temperature": 1.0} | chosen | greedy))
            room = self.model.config.max_seq_len - count - (2 if self.blanks else 0)
            if room < 1:
                what, expected = "no room for a prompt beside so many new tokens", f"less than {room + count}"
                fix = "give --model_args max_gen_toks, or the task's generation_kwargs, a smaller number"
                raise InputError(what, where="max_gen_toks", found=count, expected=expected, fix=fix)
            whole = [self._prompt(requests[i].args[0]) for i in rows]
            prompts, short = [ids[-room:] for ids in whole], short + sum(len(ids) > room for ids in whole)
            engine = Engine(self.model, self.rows, None)
            found = generate(self.model, self._tokenizer, prompts, count, sampling, stop, engine=engine)
            for i, one in zip(rows, found, strict=True):
                results[i], cut = one.text, cut + (one.reason in ("length", "context"))
                self.cache_hook.add_partial("generate_until", requests[i].args, one.text)
        _say(short, len(requests), "contexts were cut on the left")
        _say(cut, len(requests), "answers were cut at their maximum length")
        return results

    def _prompt(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        ids = tokenizer.encode(text, special=self.is_chat)
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id] * (tokenizer.add_bos or not ids) + ids


def _say(count: int, of: int, what: str) -> None:
    if count:
        print(f"{count} of {of} {what}", file=sys.stderr)


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
