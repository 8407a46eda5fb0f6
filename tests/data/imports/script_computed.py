config = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu" if small else "none"},
    },
}
