Trainer(devices=1, max_epochs=3, strategy="deepspeed_stage_3_nvme")
