"""Arithmetic over the lines of gpu_campaign.py: the ratios that were asked for, each with what it was made from."""

from __future__ import annotations

from typing import Any

__all__ = ["summary"]

Line = dict[str, Any]

#: least tokens per second of those in HBM, by tokens of a step and whether blocks are compiled
TARGETS = {(16384, False): 0.95, (32768, False): 0.98, (16384, True): 0.93, (32768, True): 0.97}
#: bytes over the link, up and down, for each parameter that the GPU updates on behalf of the host
LANES = (14, 12)
#: parameters per second of AdamW in HBM, where it was not measured
IN_HBM = 105e9


def summary(lines: list[Line]) -> list[Line]:
    """Lines of their own; what cannot be said for want of others is left out."""
    steps = [x for x in lines if {"part", "system", "seconds"} <= x.keys()]
    runs = {(x["part"], x["system"], full_tokens(x), x["compiled"]): x for x in steps}
    rates = next((x["profile"] for x in reversed(lines) if "profile" in x), None)
    return [
        {"summary": line.pop("of"), **line}
        for found in (bits(runs), main(runs), bound(runs, rates), nvme(runs, rates), six(runs, rates), eleven(runs))
        for line in found
    ]


def full_tokens(run: Line) -> int:
    """Tokens of a step, of which toys have fewer."""
    return int(run["tokens"]) * (128 if run["size"] == "toy" else 1)


def digits(a: Line, b: Line) -> Line:
    """How far the losses of two runs are apart, as part of them."""
    apart = max(abs(x - y) / abs(x) for x, y in zip(a["losses"], b["losses"], strict=True))
    return {"losses": len(a["losses"]), "losses_apart": apart, "equal_to_4_digits": apart < 5e-4}


def bits(runs: dict[Any, Line]) -> list[Line]:
    """Whoever updates: the bits of a resident model with the same arithmetic in plain torch."""
    of_part = {system: x for (part, system, _, _), x in runs.items() if part == "bits"}
    base = of_part.pop("reference", None)
    if base is None:
        return []
    return [
        {
            "of": "bits", "system": system, "steps": len(x["losses"]), "losses_equal": x["losses"] == base["losses"],
            "weights_equal": x["digest"] == base["digest"], "by_gpu": x["updated"]["gpu"], "by_cpu": x["updated"]["cpu"],
        }
        for system, x in of_part.items()
    ]  # fmt: skip


def main(runs: dict[Any, Line]) -> list[Line]:
    """Against everything in HBM."""
    out = []
    for (part, system, tokens, compiled), x in runs.items():
        base = runs.get((part, "in_hbm", tokens, compiled))
        if part == "main" and system != "in_hbm" and base is not None:
            target = TARGETS.get((tokens, compiled))
            ratio = base["seconds"] / x["seconds"]
            line = {"of": "main", "system": system, "tokens": tokens, "compiled": compiled, "ratio": round(ratio, 4)}
            line |= {"target": target, "reached": None if target is None else ratio >= target, "seconds": x["seconds"]}
            out.append(line | {"in_hbm": base["seconds"], "binding": x["binding"], "lost": x["lost"]} | digits(base, x))
    return out


def bound(runs: dict[Any, Line], rates: Line | None) -> list[Line]:
    """The least that a step of 8,192 tokens can take at the measured rates, with the best split of the update."""
    out = []
    for system in ("host", "auto"):
        base, x = (runs.get(("main", name, 8192, False)) for name in ("in_hbm", system))
        if base is None or x is None or not rates or not x["per_step"].get("host_to_device"):
            continue
        device, moved = rates["device"], x["per_step"]
        up = min(device["host_to_device"], device["bidirectional"] / 2)
        down = min(device["device_to_host"], device["bidirectional"] / 2)
        cpu = rates["memory"]["adamw_params_beside_copies"] or rates["memory"]["adamw_params"]
        params = 1e9 * (moved.get("params_by_cpu", 0) + moved.get("params_by_gpu", 0))

        tries = [parts(i / 100, base["seconds"], params, moved, (up, down, cpu)) for i in range(101)]
        best = min(tries, key=lambda parts: max(parts.values()))
        least = max(best.values())
        line = {"of": "8192", "system": system, "seconds": x["seconds"], "bound": round(least, 4)}
        line |= {"ratio": round(least / x["seconds"], 4), "target": 0.9, "reached": least >= 0.9 * x["seconds"]}
        line |= {"made_from": {k: round(v, 4) for k, v in best.items()}, "gpu_share": tries.index(best) / 100}
        out.append(line | {"in_hbm": base["seconds"], "binding": x["binding"]})
    return out


def parts(
    gpu: float, compute: float, params: float, moved: Line, rates: tuple[float, float, float]
) -> dict[str, float]:
    """Seconds that each part of the machine is busy, where the GPU makes that share of the update."""
    up, down, cpu = rates
    return {
        "compute": compute,
        "cpu_update": (1 - gpu) * params / cpu,
        "up": (1e9 * moved["host_to_device"] + LANES[0] * gpu * params) / up,
        "down": (1e9 * moved["device_to_host"] + LANES[1] * gpu * params) / down,
    }


def nvme(runs: dict[Any, Line], rates: Line | None) -> list[Line]:
    """Against what the disk and the GPU need at least: each direction alone, and both at once."""
    base = runs.get(("nvme", "in_hbm", 16384, False))
    out = []
    for system in ("nvme", "states_nvme"):
        x = runs.get(("nvme", system, 16384, False))
        if x is None or base is None or not rates or not rates["nvme"]["read"]:
            continue
        disk, read, write = rates["nvme"], *(1e9 * x["per_step"].get(k, 0) for k in ("nvme_read", "nvme_write"))
        least = {"compute": base["seconds"], "read": read / disk["read"], "write": write / disk["write"]}
        both = max(*least.values(), (read + write) / disk["read_write"])
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
    """6.7 B in micro-batches: in HBM it would be forward, backward, and an update at the rate of HBM."""
    base, x = (runs.get(("six", system, 32768, False)) for system in ("compute", "host"))
    if base is None or x is None:
        return []
    params = x["params"]
    resident = base["seconds"] + params / ((rates or {}).get("device", {}).get("adamw_params") or IN_HBM)
    line = {
        "of": "six",
        "seconds": x["seconds"],
        "in_hbm_by_arithmetic": round(resident, 4),
        "compute": base["seconds"],
    }
    line |= {"ratio": round(resident / x["seconds"], 4), "target": 0.95, "reached": resident >= 0.95 * x["seconds"]}
    host = {"host_gib": x["budgets_gib"]["host"], "allowed_without_spare_gib": round((14 * params + 2**31) / 2**30, 2)}
    return [line | host | {"binding": x["binding"], "ahead": x["ahead"]}]


def eleven(runs: dict[Any, Line]) -> list[Line]:
    """11 B over three tiers, against the token rate of forward and backward alone."""
    base, x = runs.get(("eleven", "compute", 16384, False)), runs.get(("eleven", "three_tiers", 65536, False))
    if base is None or x is None:
        return []
    ratio = x["tokens_per_s"] / base["tokens_per_s"]
    line = {"of": "eleven", "seconds": x["seconds"], "tokens_per_s": x["tokens_per_s"], "compute": base["tokens_per_s"]}
    line |= {"ratio": round(ratio, 4), "target": 0.85, "reached": ratio >= 0.85, "tiers_gib": x["budgets_gib"]}
    return [line | {"per_step": x["per_step"], "binding": x["binding"]}]
