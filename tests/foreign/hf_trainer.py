"""Pretrain a tiny GPT-2 on sums ("3+4=7") with the Hugging Face Trainer."""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

VOCAB = "0123456789+= "


class Sums(torch.utils.data.Dataset):
    def __init__(self, size, seed):
        rng = np.random.default_rng(seed)
        a, b = rng.integers(0, 50, size=(2, size))
        texts = [f"{x}+{y}={x + y}".ljust(10) for x, y in zip(a, b)]
        self.input_ids = torch.tensor([[VOCAB.index(c) for c in text] for text in texts])

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        input_ids = self.input_ids[i]
        labels = input_ids.clone()
        labels[input_ids == VOCAB.index(" ")] = -100
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def compute_metrics(eval_pred):
    logits, labels = eval_pred
    predicted, labels = logits.argmax(-1)[:, :-1], labels[:, 1:]
    mask = labels != -100
    return {"accuracy": float((predicted == labels)[mask].mean())}


def main(
    learning_rate: float = 3e-3,
    per_device_train_batch_size: int = 16,
    gradient_accumulation_steps: int = 2,
    weight_decay: float = 0.01,
    max_steps: int = 60,
    n_layer: int = 2,
    n_embd: int = 32,
    seed: int = 42,
):
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCAB), n_positions=16, n_embd=n_embd, n_layer=n_layer, n_head=2, bos_token_id=0, eos_token_id=12
    )
    model = GPT2LMHeadModel(config)
    args = TrainingArguments(
        output_dir="gpt2-sums",
        learning_rate=learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=gradient_accumulation_steps,
        weight_decay=weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=6,
        max_steps=max_steps,
        eval_strategy="steps",
        eval_steps=15,
        save_strategy="steps",
        save_steps=15,
        save_total_limit=2,
        logging_steps=5,
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Sums(2048, seed=seed),
        eval_dataset=Sums(256, seed=seed + 1),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
