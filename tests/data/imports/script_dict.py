"""A configuration in a module; see zero_optimization in DeepSpeed's documentation."""

import os

STEPS = int(1e4)

deepspeed_config = {
    "zero_allow_untested_optimizer": True,
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": STEPS}},
    "zero_optimization": {
        "stage": 2,  # partitions gradients
        "offload_optimizer": {
            "device": "cpu",
            "pin_memory": True,
        },
        "reduce_bucket_size": 2e8,
    },
    "fp16": {"enabled": True, "loss_scale": 0},
    "steps_per_print": int(os.environ.get("STEPS", 100)),
}
