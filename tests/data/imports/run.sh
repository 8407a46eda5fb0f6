#!/bin/sh
deepspeed train.py --deepspeed configs/zero3.json \
    --offload-optimizer cpu
