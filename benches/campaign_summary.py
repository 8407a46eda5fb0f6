"""Arithmetic over the lines of gpu_campaign.py: the ratios that were asked for, each with what it was made from."""

from __future__ import annotations

from typing import Any

__all__ = ["summary"]

Line = dict[str, Any]

#: least tokens per second of those in HBM, by tokens of a step and whether blocks are compiled
TARGETS = {(16384, False): 0.95, (32768, False): 0.98, (16384, True): 0.93, (32768, True): 0.97}
#: the same where the gradients are clipped in every step, and of steps with two backwards
CLIPPED = {(16384, False): 0.92, (32768, False): 0.98}
TWICE = 0.95
#: bytes over the link, up and down, for each parameter that the GPU updates on behalf of the host
LANES = (14, 12)
#: bytes over NVMe for each parameter whose states live there
STATES = 20
#: a norm that no gradients reach
FREE = 1e6
#: of a step with checkpointed blocks: forward, then recomputation and backward
FORWARD = 0.25
#: parameters per second of AdamW in HBM, where it was not measured
IN_HBM = 105e9


def summary(lines: list[Line]) -> list[Line]:
    """Lines of their own; what cannot be said for want of others is left out."""
    steps = [x for x in lines if {"part", "system", "seconds"} <= x.keys()]
    # A step whose gradients are all clipped is another workload than one in which they are not.
    runs = {(x["part"], x["system"], full_tokens(x), x["compiled"], x["max_norm"] > FREE): x for x in steps}
    profiles = [x["profile"] for x in lines if "profile" in x]
    rates = profiles[-1] if profiles else None
    return [
        {"summary": line.pop("of"), **line}
        for found in (bits(runs), main(runs, rates), twice(runs), nvme(runs, rates), six(runs, rates), eleven(runs))
        for line in found
    ]


def full_tokens(run: Line) -> int:
    """Tokens of a step, of which toys have fewer."""
    return int(run["tokens"]) * (128 if run["size"] == "toy" else 1)


def digits(a: Line, b: Line) -> Line:
    """How far the losses of the steps that both made are apart, as part of them."""
    pairs = list(zip(a["losses"], b["losses"], strict=False))
    apart = max(abs(x - y) / abs(x) for x, y in pairs)
    return {"losses": len(pairs), "losses_apart": apart, "equal_to_4_digits": apart < 5e-4}


def bits(runs: dict[Any, Line]) -> list[Line]:
    """For each part that updates: the bits of a resident model with the same arithmetic in plain torch, and the losses of torch's own AdamW."""
    of_part = {system: x for (part, system, *_), x in runs.items() if part == "bits"}
    base, fused = of_part.pop("reference", None), of_part.pop("in_hbm", None)
    if base is None:
        return []
    return [
        {
            "of": "bits", "system": system, "steps": len(x["losses"]), "losses_equal": x["losses"] == base["losses"],
            "weights_equal": x["digest"] == base["digest"], "by_gpu": x["updated"]["gpu"], "by_cpu": x["updated"]["cpu"],
        } | ({} if fused is None else digits(fused, x))
        for system, x in of_part.items()
    ]  # fmt: skip


def main(runs: dict[Any, Line], rates: Line | None) -> list[Line]:
    """Against everything in HBM, and against the least time that the measured rates allow."""
    out = []
    for (part, system, tokens, compiled, free), x in runs.items():
        base = runs.get((part, "in_hbm", tokens, compiled, free)) or runs.get((part, "in_hbm", tokens, compiled, False))
        if part == "main" and system != "in_hbm" and base is not None:
            targets = CLIPPED if x["clipped"] == x["steps"] else TARGETS
            target = targets.get((tokens, compiled))
            ratio = base["seconds"] / x["seconds"]
            line = {"of": "main", "system": system, "tokens": tokens, "compiled": compiled, "max_norm": x["max_norm"]}
            line |= {"clipped": f"{x['clipped']} of {x['steps']}", "ratio": round(ratio, 4)}
            line |= {"target": target, "reached": None if target is None else ratio >= target, "seconds": x["seconds"]}
            line |= {"in_hbm": base["seconds"], "binding": x["binding"], "lost": x["lost"]} | bound(base, x, rates)
            # After other steps the weights are others, and the losses with them.
            same = base["max_norm"] == x["max_norm"] and base["steps_before"] == x["steps_before"]
            out.append(line | (digits(base, x) if same else {}))
    return out


def twice(runs: dict[Any, Line]) -> list[Line]:
    """Steps of two backwards against those in HBM."""
    out = []
    for (part, system, tokens, _, free), x in runs.items():
        base = runs.get(("twice", "in_hbm", tokens, False, False))
        if part == "twice" and system != "in_hbm" and base is not None:
            ratio = base["seconds"] / x["seconds"]
            line = {
                "of": "twice",
                "tokens": tokens,
                "clipped": f"{x['clipped']} of {x['steps']}",
                "ratio": round(ratio, 4),
            }
            line |= {"target": TWICE, "reached": ratio >= TWICE} if free else {}
            line |= {"seconds": x["seconds"], "in_hbm": base["seconds"], "binding": x["binding"], "ahead": x["ahead"]}
            out.append(line)
    return out


def bound(base: Line, x: Line, rates: Line | None) -> Line:
    """The least that a step can take at the measured rates, with the best split of the update between processor and GPU.

    Where clipping changes all gradients no update can begin before the norm is known: they and the forward share the time after it.
    """
    moved = x["per_step"]
    if not rates or not moved.get("host_to_device"):
        return {}
    device, memory = rates["device"], rates["memory"]
    up = min(device["host_to_device"], device["bidirectional"] / 2)
    down = min(device["device_to_host"], device["bidirectional"] / 2)
    cpu = memory["adamw_params_beside_copies"] or memory["adamw_params"]
    # Work in vain is not needed.
    params = min(x["params"], 1e9 * (moved.get("params_by_cpu", 0) + moved.get("params_by_gpu", 0)))
    late = x["clipped"] == x["steps"]
    tries = [
        parts(i / 100, base["seconds"], params, moved, (up, down, cpu, memory["bandwidth"]), late) for i in range(101)
    ]
    best = min(tries, key=lambda parts: max(parts.values()))
    least = max(best.values())
    made_from = {k: round(v, 4) for k, v in best.items()}
    return {
        "bound": round(least, 4),
        "of_bound": round(least / x["seconds"], 4),
        "made_from": made_from,
        "gpu_share": tries.index(best) / 100,
    }


def parts(
    gpu: float, compute: float, params: float, moved: Line, rates: tuple[float, float, float, float], late: bool
) -> dict[str, float]:
    """Seconds that a step needs for each part of the machine, where the GPU makes that share of the update."""
    up, down, cpu, memory = rates
    traffic = params * (26 * (1 - gpu) + (LANES[0] + LANES[1]) * gpu) + 1e9 * moved["host_to_device"]
    busy = {
        "cpu_update": (1 - gpu) * params / cpu,
        "host_memory": (traffic + (0 if late else 1e9 * moved["device_to_host"])) / memory,
        "up": (1e9 * moved["host_to_device"] / (2 if late else 1) + LANES[0] * gpu * params) / up,
        "down": ((0 if late else 1e9 * moved["device_to_host"]) + LANES[1] * gpu * params) / down,
    }
    before = (1 - FORWARD) * compute if late else 0.0
    return {"compute": compute} | {name: before + seconds for name, seconds in busy.items()}


def nvme(runs: dict[Any, Line], rates: Line | None) -> list[Line]:
    """Against what the disk and the GPU need at least: each direction alone, and both at once."""
    base = runs.get(("nvme", "in_hbm", 16384, False, False))
    out = []
    for system in ("nvme", "states_nvme"):
        x = runs.get(("nvme", system, 16384, False, False))
        if x is None or base is None or not rates or not rates["nvme"]["read"]:
            continue
        disk, read, write = rates["nvme"], *(1e9 * x["per_step"].get(k, 0) for k in ("nvme_read", "nvme_write"))
        least = {"compute": base["seconds"], "read": read / disk["read"], "write": write / disk["write"]}
        # As updates stream states through, where that was measured: some disks serve it better than block by block.
        together = max(disk["read_write"], STATES * disk.get("adamw_params", 0))
        both = max(*least.values(), (read + write) / together)
        ratio = x["seconds"] / max(least.values())
        line = {
            "of": "nvme",
            "system": system,
            "seconds": x["seconds"],
            "least": {k: round(v, 3) for k, v in least.items()},
        }
        line |= {"ratio": round(ratio, 3), "target": 1.15, "reached": ratio <= 1.15}
        line |= {"both_at_once": round(both, 3), "ratio_of_both": round(x["seconds"] / both, 3)}
        out.append(line | {"read_gb": read / 1e9, "write_gb": write / 1e9, "binding": x["binding"]} | digits(base, x))
    return out


def six(runs: dict[Any, Line], rates: Line | None) -> list[Line]:
    """6.7 B in micro-batches, against all of it in HBM: measured where it fits, else forward, backward, and an update at HBM's rate."""
    compute, fits = (runs.get(("six", system, 32768, False, False)) for system in ("compute", "in_hbm"))
    ran = [runs.get(("six", "host", 32768, False, free)) for free in (False, True)]
    if compute is None and fits is None:
        return []
    base = {} if fits is None else {"in_hbm": fits["seconds"]}
    if compute is not None:
        params = compute["params"] / ((rates or {}).get("device", {}).get("adamw_params") or IN_HBM)
        base |= {"compute": compute["seconds"], "in_hbm_by_arithmetic": round(compute["seconds"] + params, 4)}
    return [six_line(base, x) for x in ran if x is not None]


def six_line(base: Line, x: Line) -> Line:
    """Of one workload."""
    resident = base.get("in_hbm") or base["in_hbm_by_arithmetic"]
    line = {"of": "six", "clipped": f"{x['clipped']} of {x['steps']}", "seconds": x["seconds"], **base}
    line |= {"ratio": round(resident / x["seconds"], 4), "target": 0.95, "reached": resident >= 0.95 * x["seconds"]}
    allowed = round((14 * x["params"] + 2**31) / 2**30, 2)
    host = {"host_gib": x["budgets_gib"]["host"], "allowed_without_spare_gib": allowed}
    return line | host | {"binding": x["binding"], "ahead": x["ahead"]}


def eleven(runs: dict[Any, Line]) -> list[Line]:
    """11 B over three tiers, against the token rate of forward and backward alone."""
    base, x = (
        runs.get(("eleven", "compute", 16384, False, False)),
        runs.get(("eleven", "three_tiers", 65536, False, False)),
    )
    if base is None or x is None:
        return []
    ratio = x["tokens_per_s"] / base["tokens_per_s"]
    line = {"of": "eleven", "seconds": x["seconds"], "tokens_per_s": x["tokens_per_s"], "compute": base["tokens_per_s"]}
    line |= {"ratio": round(ratio, 4), "target": 0.85, "reached": ratio >= 0.85, "tiers_gib": x["budgets_gib"]}
    return [line | {"per_step": x["per_step"], "binding": x["binding"]}]
