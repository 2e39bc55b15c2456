"""LoRA by peft: adapters are matrices like any others, the frozen base costs nothing.

    python examples/peft_lora.py

The optimizer is made of the model that ``get_peft_model`` returns. It finds what requires a
gradient: every adapter's two matrices get a curvature block of their own, each with what it
multiplies.
"""

from __future__ import annotations

import argparse

import peft
import torch
import transformers
from torch import nn

import tekfac


def make_model() -> nn.Module:
    """A small random Llama with adapters in its attention and in its feed-forward layers."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    adapters = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["lm_head"],  # trained whole
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, adapters)


def train(steps: int = 20) -> tuple[nn.Module, tekfac.TEKFAC, list[float]]:
    """Train adapters to count upwards; also the losses."""
    model = make_model()
    optimizer = tekfac.TEKFAC(model, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        start = torch.randint(3, 40, (8, 1), generator=generator)
        words = start + torch.arange(16)
        optimizer.zero_grad()
        loss = model(input_ids=words, labels=words).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return model, optimizer, losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LoRA adapters of a small random Llama.")
    parser.add_argument("--steps", type=int, default=20)
    _, optimizer, losses = train(parser.parse_args().steps)
    print(optimizer)
    print(f"loss {losses[0]:.3f}, then {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
