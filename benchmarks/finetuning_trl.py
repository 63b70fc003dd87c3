"""TRL's SFTTrainer as a contender of `finetuning.py`, and what both are measured by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

CONTEXT, BATCH, PACKED_BATCH, RATE = 512, 8, 2, 2e-4


def warmup(steps: int) -> int:
    """Steps of warmup of so many."""
    return min(10, steps // 4)


def peak_memory() -> int:
    """Peak resident bytes of this process, not of those that it was started from."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def trl(folder: Path, name: str, epochs: int, steps: int, seed: int) -> dict[str, Any]:
    """TRL's SFTTrainer, with PEFT's adapter unless `trl-full`."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from minillama.device import choose_dtype

    set_seed(seed)  # of the adapter, which is made before the trainer sets its own
    half = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    packed, full = name == "trl-packed", name == "trl-full"
    dtype = torch.bfloat16 if half and not full else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    taken: list[list[float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            taken.append([time.perf_counter(), 0, 0])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken[-1][0] = time.perf_counter() - taken[-1][0]

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *others: Any, **more: Any) -> Any:
            taken[-1][1] += int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())
            taken[-1][2] += int((inputs["labels"] != -100).sum())
            return super().compute_loss(model, inputs, *others, **more)

    config = SFTConfig(
        output_dir=str(folder / name),
        per_device_train_batch_size=PACKED_BATCH if packed else BATCH,
        num_train_epochs=epochs,
        learning_rate=RATE / 10 if full else RATE,
        lr_scheduler_type="cosine",
        warmup_steps=warmup(steps),
        max_grad_norm=1.0,
        max_length=CONTEXT,
        packing=packed,
        bf16=half,
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=seed,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Counting(
        model,
        args=config,
        train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=None if full else adapter,
        callbacks=[Clock()],
    )
    trainer.train()
    peak, out = peak_memory(), folder / name / "model"
    trainer.save_model(str(out))
    return {"taken": taken, "memory": peak, "folder": str(out)}
