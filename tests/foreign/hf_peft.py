"""Fine-tune a tiny BERT with LoRA: which of two words is more frequent in a sentence?"""

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

PAD, CLS, FIRST, SECOND = 0, 1, 2, 3


def make_split(size, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(size):
        length = int(rng.integers(8, 16))
        words = rng.choice([FIRST, SECOND, *range(4, 20)], size=length, p=[0.25, 0.25] + [0.5 / 16] * 16)
        first, second = int((words == FIRST).sum()), int((words == SECOND).sum())
        rows.append({"input_ids": [CLS, *words.tolist()], "label": int(first > second)})
    return rows


def collate(features):
    """Pad to the longest sentence of the batch."""
    longest = max(len(f["input_ids"]) for f in features)
    ids = torch.tensor([f["input_ids"] + [PAD] * (longest - len(f["input_ids"])) for f in features])
    labels = torch.tensor([f["label"] for f in features])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def compute_metrics(p):
    return {"accuracy": (p.predictions.argmax(axis=-1) == p.label_ids).mean().item()}


def train(config):
    set_seed(config["seed"])
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=20,
            num_labels=2,
        )
    )
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config["r"],
        lora_alpha=2 * config["r"],
        lora_dropout=config.get("lora_dropout", 0.05),
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    args = TrainingArguments(
        output_dir="./results",
        num_train_epochs=config["epochs"],
        learning_rate=config["lr"],
        per_device_train_batch_size=config["batch_size"],
        per_device_eval_batch_size=128,
        lr_scheduler_type=config.get("schedule", "linear"),
        max_grad_norm=config.get("max_grad_norm", 1.0),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_strategy="epoch",
        report_to=[],
        seed=config["seed"],
    )
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=make_split(768, config["seed"]),
        eval_dataset=make_split(256, config["seed"] + 1),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print(train({"lr": 5e-3, "batch_size": 32, "r": 8, "epochs": 4, "seed": 0}))
