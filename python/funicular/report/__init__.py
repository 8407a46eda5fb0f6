"""What is told of a run: the time of a step, log lines, NVTX ranges."""
