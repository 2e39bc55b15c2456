"""Hugging Face's Trainer, unchanged: the optimizer goes in by ``optimizers=``.

    python examples/huggingface_trainer.py gpt2 --bf16 --accumulate 2

The models are small and random, the data is made up: what matters is where the optimizer goes in.
It is made of the model that the Trainer gets, before it gets it. The model's own loss inside of
``forward``, accumulation, ``bf16=True``, ``gradient_checkpointing=True``, ``torch_compile=True``
and ``resume_from_checkpoint`` are the Trainer's business and stay so.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

import tekfac

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}
WORDS = {"vocab_size": 64, "max_position_embeddings": 32}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **HEADS, **WORDS, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, **HEADS, **WORDS, num_labels=3)
    )


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, **HEADS, image_size=16, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


OPTIONS = ["bf16", "gradient_checkpointing", "torch_compile"]
MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit, "t5": t5}


class MadeUp(Dataset[dict[str, Tensor]]):
    """Sentences that count upwards, or pictures, with what a model of this family is to say."""

    def __init__(self, family: str, size: int = 96) -> None:
        self.family, self.size = family, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        label = torch.tensor(index % 3)
        if self.family == "vit":
            picture = torch.randn(3, 16, 16, generator=generator)
            picture[index % 3] += 0.5
            return {"pixel_values": picture, "labels": label}
        length = int(torch.randint(8, 17, (), generator=generator))
        start = int(torch.randint(3, 40, (), generator=generator))
        words = torch.zeros(16, dtype=torch.long)
        words[:length] = start + torch.arange(length) % (index % 3 + 2)
        labels = words.masked_fill(words == 0, -100)  # padding is no part of the loss
        item = {"input_ids": words, "attention_mask": (words != 0).long(), "labels": labels}
        if self.family == "bert":
            item["labels"] = label
        return item


def make_trainer(
    family: str, folder: str, steps: int = 30, by_class: bool = False, **arguments: Any
) -> transformers.Trainer:
    """A Trainer with TEKFAC.

    Args:
        family: the key of `MODELS`.
        folder: for checkpoints.
        steps: to take.
        by_class: give the optimizer's class and arguments, and leave its making to the Trainer.
        **arguments: of ``TrainingArguments``.
    """
    transformers.set_seed(0)  # of the model, and of the labels that the optimizer draws
    model = MODELS[family]()
    settings = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 10,
        "seed": 0,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": True,
    }
    given: dict[str, Any] = {}
    if by_class:
        # The Trainer would give it parameter groups, which is refused; "model" takes their place.
        given["optimizer_cls_and_kwargs"] = (tekfac.TEKFAC, {"model": model, "lr": 3e-3})
    else:
        # None: the scheduler is made by the Trainer, for this optimizer and its learning rate.
        given["optimizers"] = (tekfac.TEKFAC(model, lr=3e-3), None)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**(settings | arguments)),
        train_dataset=MadeUp(family),
        **given,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small random model by the Trainer.")
    parser.add_argument("family", nargs="?", choices=MODELS, default="gpt2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accumulate", type=int, default=1)
    for option in OPTIONS:
        parser.add_argument(f"--{option}", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            given.family,
            folder,
            given.steps,
            gradient_accumulation_steps=given.accumulate,
            **{option: True for option in OPTIONS if getattr(given, option)},
        )
        trainer.train()
    print(trainer.optimizer.optimizer)


if __name__ == "__main__":
    main()
