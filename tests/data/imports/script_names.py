import deepspeed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

NVME = "/mnt/fast"
offload = dict(device="nvme", nvme_path=NVME)
base = {"bf16": {"enabled": True}, "gradient_clipping": 1.0}
ds_config = {**base, "zero_optimization": {"stage": 3, "offload_optimizer": offload}}
ds_config["zero_optimization"]["offload_param"] = {"device": "cpu"}


def main(args):
    """Trains: DeepSpeedStrategy(stage=1) is only a word here."""
    trainer = Trainer(
        strategy=DeepSpeedStrategy(config=ds_config),
        devices=1,
        max_steps=args.steps,  # from the command line
    )
    trainer.fit(build(args), load([x for x in args.files if x]))
