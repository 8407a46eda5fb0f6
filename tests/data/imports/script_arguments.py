from transformers import Trainer, TrainingArguments

args = TrainingArguments(
    output_dir="out",
    bf16=True,
    deepspeed={
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "offload_optimizer": {"device": "cpu"},
        },
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
    },
)
trainer = Trainer(model, args=args)
