"""Speed of SFT, DPO, GRPO, PPO and rollouts beside TRL: every contender a process of its own, on the same model.

CPU seconds per step (median after two) of one thread, tokens per CPU second, peak memory; a random LLaMA or --model.
SFT: 8 records of 128 tokens; DPO: 8 pairs of them, 2,048 tokens of the policy (trl-dpo computes the reference in every
step, trl-dpo-kept once, as ours); GRPO: completion tokens of 16 answers of 64 tokens to 2 prompts of 32; PPO the same
with 4 epochs over the rollout and four models. TRL's PPO needs TRL 1.12: --ppo-peer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

CONTENDERS = ["sft", "trl-sft", "dpo", "trl-dpo", "trl-dpo-kept"]
CONTENDERS += ["grpo", "trl-grpo", "ppo", "ppo-shared", "trl-ppo", "rollout"]
VOCABULARY, PROMPT, ANSWER, ROWS, GROUP = 4096, 32, 64, 16, 8
RECORDS = 8  # of 128 tokens, half of them the prompt's; SFT and DPO


def prepare(folder: Path, source: str) -> None:
    """A model and a reward model on it; prompts, conversations and pairs of random words.

    Args:
        source: folder of a model with its tokenizer; a random LLaMA of words w0 ... w4095 if empty.
    """
    import random

    import torch

    from minillama.model import Decoder
    from minillama.model.heads import with_score
    from minillama.tokenizer import Tokenizer

    if source:
        for name in ("policy", "reward"):
            shutil.copytree(source, folder / name)
        with_score(Decoder.from_pretrained(source), torch.Generator().manual_seed(1)).save_pretrained(folder / "reward")
        tokenizer = Tokenizer.load(folder / "policy")
        single = (tokenizer.decode([i]) for i in range(1000, 8000))
        words = [word for word in single if word.startswith(" ") and len(tokenizer.encode(word)) == 1]
    else:
        _random_models(folder)
        words = [f" w{i}" for i in range(2, VOCABULARY)]
    drawn = random.Random(1)

    def text(count: int) -> str:
        return "".join(drawn.choices(words, k=count))

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("prompts.jsonl", [{"prompt": text(PROMPT)} for _ in range(256)])
    write("sft.jsonl", [{"prompt": text(64), "completion": text(63)} for _ in range(256)])
    write("dpo.jsonl", [{"prompt": text(64), "chosen": text(63), "rejected": text(63)} for _ in range(256)])


def _random_models(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from minillama.config import ModelConfig
    from minillama.model import Decoder
    from minillama.model.heads import with_score

    words = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    shape = ModelConfig(
        dim=256, n_layers=4, n_heads=8, n_kv_heads=4, hidden_dim=688, vocab_size=VOCABULARY, max_seq_len=128
    )
    generator = torch.Generator().manual_seed(1)
    for name in ("policy", "reward"):
        model = Decoder(shape)
        model.init_weights(generator)
        (model if name == "policy" else with_score(model, generator)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def even(prompt: str, ids: list[int], text: str, record: Mapping[str, Any]) -> float:
    """Share of even ids."""
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


class Clock:
    """CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.times = [time.process_time()]
        self.tokens: list[float] = []

    def tick(self) -> None:
        self.times.append(time.process_time())

    def result(self, tokens: float) -> dict[str, float]:
        steps = [b - a for a, b in zip(self.times[2:], self.times[3:], strict=False)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": median(steps), "tokens_per_second": tokens / median(steps), "memory": peak}


def ours(folder: Path, name: str, steps: int, dtype: str) -> dict[str, float]:
    """`minillama train` in this process."""
    from minillama.device import keep_freed_pages
    from minillama.runs.config import load_run_config
    from minillama.training.run import train

    keep_freed_pages()  # as the command does
    clock, seen, kind = Clock(), [], name.partition("-")[0]

    class Report:
        def start(self, step: int, steps: int) -> None:
            clock.times = [time.process_time()]

        def step(self, record: Mapping[str, Any]) -> None:
            seen.append(record)
            if ("reward" in record or kind in ("sft", "dpo")) and len(seen) > 1:
                clock.tick()

        def say(self, text: str = "") -> None:
            pass

        def stop(self) -> None:
            pass

    (folder / "empty.toml").write_text("", encoding="utf-8")
    epochs = 4 if kind == "ppo" else 1
    file, rows, tokens = {
        "sft": ("sft.jsonl", RECORDS, 128 * RECORDS),
        "dpo": ("dpo.jsonl", RECORDS, 256 * RECORDS),
    }.get(kind, ("prompts.jsonl", ROWS, 0))
    words = [
        *("--data.sources", str(folder / file), "--data.template", "plain", "--train.dtype", dtype),
        *("--train.init_from", str(folder / "policy"), "--train.batch_size", str(rows)),
        *("--train.steps", str((steps + 2) * epochs + 1), "--validate.every", "100000", "--checkpoint.every", "100000"),
        *("--validate.tokens", "64", "--optim.lr", "1e-6", "--train.context", "128", "--sample.max_new_tokens", "0"),
        *_objective(folder, name, kind),
    ]
    config = load_run_config(str(folder / "empty.toml"), words)
    train(config, str(folder / name), overwrite=True, report=Report())
    return clock.result(tokens or seen[0]["rollout_tokens"])


def _objective(folder: Path, name: str, kind: str) -> list[str]:
    """Settings of an objective as TRL has them."""
    if kind == "sft":
        return ["--data.packing", "none"]
    words = ["--objective.name", kind]
    if kind == "dpo":
        return words
    words += ["--objective.max_new_tokens", str(ANSWER), "--objective.samples", str(GROUP)]
    if kind == "grpo":
        return [*words, "--objective.kl", "k3", "--objective.rewards", f"{__file__}:even"]
    words += ["--objective.rewards", str(folder / "reward"), "--objective.epochs", "4"]
    words += ["--objective.critic", "shared" if name == "ppo-shared" else "own"]
    return [*words, "--objective.critic_from", str(folder / "reward")] if name == "ppo" else words


def trl_settings(dtype: str) -> dict[str, Any]:
    """Settings of all of TRL's trainers."""
    return {
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": [],
        "disable_tqdm": True,
    }


def ticking(clock: Clock) -> Any:
    """Callback of TRL's trainers that ticks at the end of each step."""
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **given: Any) -> None:
            clock.tick()

    return Tick()


def trl_pairs(folder: Path, name: str, steps: int, dtype: str) -> dict[str, float]:
    """TRL's SFTTrainer or DPOTrainer."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    clock, kind = Clock(), name.split("-")[1]

    make, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (DPOConfig, DPOTrainer)
    more = {"precompute_ref_log_probs": True} if name.endswith("kept") else {}
    config = make(
        output_dir=str(folder / name),
        per_device_train_batch_size=RECORDS,
        max_length=128,
        max_steps=steps + 2,
        **trl_settings(dtype),
        **more,
    )
    count = {"split": f"train[:{RECORDS * (steps + 2)}]"}
    trained = trainer(
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32"),
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / f"{kind}.jsonl"), **count),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[ticking(clock)],
    )
    trained.train()
    return clock.result(128.0 * RECORDS * (1 if kind == "sft" else 2))


def trl_grpo(folder: Path, steps: int, dtype: str) -> dict[str, float]:
    """TRL's GRPOTrainer."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    clock, tokens = Clock(), []

    def reward(completion_ids: list[list[int]], **given: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [even("", ids, "", {}) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    config = GRPOConfig(
        output_dir=str(folder / "trl-grpo"),
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=ANSWER,
        beta=0.04,
        max_steps=steps + 2,
        **trl_settings(dtype),
    )
    trainer = GRPOTrainer(
        str(folder / "policy"),
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=tokenizer,
        callbacks=[ticking(clock)],
    )
    trainer.train()
    return clock.result(median(tokens))


def trl_ppo(folder: Path, steps: int, dtype: str) -> dict[str, float]:
    """PPOTrainer of TRL 1.12."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    clock = Clock()

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    rows = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
    config = PPOConfig(
        output_dir=str(folder / "trl-ppo"),
        per_device_train_batch_size=ROWS,
        num_mini_batches=1,
        num_ppo_epochs=4,
        response_length=ANSWER,
        total_episodes=ROWS * (steps + 2),
        local_rollout_forward_batch_size=ROWS,
        num_sample_generations=0,
        temperature=1.0,
        **trl_settings(dtype),
    )
    lm = [AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2)]
    scored = [AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1) for _ in range(2)]
    models = lm[0], lm[1], scored[0], rows, scored[1]
    trainer = PPOTrainer(config, tokenizer, *models, eval_dataset=rows.select(range(4)), callbacks=[ticking(clock)])
    trainer.train()
    return clock.result(float(ROWS * ANSWER))


def rollout(folder: Path, dtype: str) -> dict[str, float]:
    """64 answers by the engine, 8 to each prompt, over the same one by one."""
    import torch

    from minillama.inference.rollout import DecodingCopy, answers
    from minillama.inference.sampling import Sampling
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

    model, tokenizer = (
        Decoder.from_pretrained(folder / "policy", getattr(torch, dtype)),
        Tokenizer.load(folder / "policy"),
    )
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    prompts = [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
    decoder = DecodingCopy(model).refresh()

    def cpu(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    def single() -> None:
        for prompt in prompts:
            for seed in range(8):
                answers(decoder, [prompt], 1, ANSWER, Sampling(1.0), [], [seed])

    def together() -> None:
        answers(decoder, prompts, 8, ANSWER, Sampling(1.0), [], range(0, 64, 8))

    one, all_ = (median(cpu(work) for _ in range(3)) for work in (single, together))
    found = {"seconds": all_, "tokens_per_second": 64 * ANSWER / all_, "one_by_one": 64 * ANSWER / one}
    return found | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def child(name: str, folder: Path, steps: int, dtype: str) -> dict[str, float]:
    """One contender."""
    from minillama.threads import adapt

    adapt()
    import torch

    torch.set_num_threads(1)
    if name == "rollout":
        return rollout(folder, dtype)
    if name in ("trl-grpo", "trl-ppo"):
        return (trl_grpo if name == "trl-grpo" else trl_ppo)(folder, steps, dtype)
    return (trl_pairs if name.startswith("trl") else ours)(folder, name, steps, dtype)


def compare(args: argparse.Namespace) -> None:
    """All contenders, one after the other."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, args.model)
        for name in args.contenders:
            if name == "trl-ppo" and not args.ppo_peer:
                print("trl-ppo: give --ppo-peer", flush=True)
                continue
            first = [args.ppo_peer] if name == "trl-ppo" else []
            path = os.pathsep.join([*first, *(entry for entry in sys.path if entry)])
            environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
            words = [sys.executable, __file__, name, place, str(args.steps), args.dtype]
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            beside = f", one by one {found['one_by_one']:.0f}" if "one_by_one" in found else ""
            print(
                f"{name:12} {found['seconds']:.3f} CPU s a step, {found['tokens_per_second']:.0f} tokens per CPU second"
                f"{beside}, {found['memory'] / 2**30:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
