"""Everything that is measured on a GPU, within a time: parts in processes of their own, ended when they take too long. JSON lines.

    python benches/gpu_campaign.py                                     on a machine with one GPU, which must have nothing else to do
    python benches/gpu_campaign.py --parts six,eleven --read a.jsonl   some parts; the summary sees the lines of earlier runs too
    python benches/gpu_campaign.py --device host                       the same at toy size on the processor: tries the script

What is timed runs alone, in the order below, until the time is up. Every line of theirs gets the names of its part and case; what does not fit, is
refused, fails or takes too long is a line that says so. The summary at the end is arithmetic over the lines: the ratios asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign_summary import summary
from fresh_memory import touch

HERE = Path(__file__).resolve().parent
TRAIN = str(HERE / "train_step.py")
#: parts whose times do not matter: they run at once, before the others
UNTIMED = ("kernels", "bits")


@dataclass(frozen=True)
class Case:
    """One process."""

    part: str
    name: str
    argv: list[str]
    #: seconds that it takes as a rule; with fewer left it is not begun
    needs: float
    #: seconds after which it is ended
    limit: float


class Scale:
    """Sizes as they are, or as toys."""

    def __init__(self, device: str) -> None:
        self.device, self.toy = device, device == "host"

    def tokens(self, *counts: int, free: tuple[int, ...] = ()) -> str:
        """Workloads whose gradients are clipped to norm 1, and those in which they never are."""
        scaled = [str(count // 128 if self.toy else count) for count in (*counts, *free)]
        return ",".join(scaled[: len(counts)] + [f"{count}@1e9" for count in scaled[len(counts) :]])

    def train(self, size: str, *options: str, hbm: str = "16GiB", host: str = "", disk: str = "") -> list[str]:
        if self.toy:
            size, hbm, host = "toy", "8MiB", "1GiB"
        argv = [TRAIN, "--device", self.device, "--size", size, *options, "--hbm", hbm, "--host", host]
        return argv + (["--seq", "64"] if self.toy else []) + (["--disk", disk] if disk else [])


def cases(device: str, out: Path, disk: str) -> list[Case]:
    """All there is to run, the most important first."""
    s = Scale(device)
    # The norm makes no difference to what is in HBM.
    base = [
        "--tokens",
        s.tokens(16384, 32768, 8192),
        "--compiled",
        s.tokens(16384, 32768),
        "--warmup",
        "2",
        "--steps",
        "3",
    ]
    main = ["--tokens", s.tokens(16384, 32768, free=(16384, 32768, 8192)), "--compiled", s.tokens(free=(16384, 32768))]
    # After three steps it is known whether they are clipped.
    main += ["--warmup", "3", "--steps", "3"]
    twice = ["--backwards", "2", "--tokens", s.tokens(16384, free=(16384, 8192)), "--warmup", "3", "--steps", "3"]
    twice_in_hbm = ["--backwards", "2", "--tokens", s.tokens(16384, 8192), "--warmup", "2", "--steps", "3"]
    planned = ["--tokens", s.tokens(16384, free=(16384, 8192)), "--warmup", "3", "--steps", "3"]
    few = ["--warmup", "1", "--steps", "2"]
    systems = "reference,in_hbm,host_cpu,host_gpu,host,host_poison"
    bits = [
        "--systems",
        systems,
        "--tokens",
        s.tokens(8192),
        "--warmup",
        "1",
        "--steps",
        "19",
        "--digest",
        "--deterministic",
    ]
    rows = "2" if s.toy else "8"
    bench = ["-m", "funicular", "bench", "--quick", "--no-sweep", "--device", device, "--path", disk]
    bench += ["--force", "--save", str(out / "profile.toml"), "--json", str(out / "bench.json")]
    # The update of one step ends in the next, and the first of all reads nothing.
    nvme = ["--systems", "in_hbm,nvme,states_nvme", "--tokens", s.tokens(16384), "--warmup", "2", "--steps", "1"]
    # Where not all of it fits, what it is compared with is forward and backward, and arithmetic.
    base_of_six = "in_hbm" if s.toy or hbm_bytes() > 18 * 6.74e9 else "compute"
    six = ["--systems", base_of_six, "--tokens", s.tokens(32768), *few]
    both = ["--tokens", s.tokens(32768, free=(32768,)), *few]
    available = limits()[0]
    most = int(available * 0.94)
    # What masters, moments, weights and waiting gradients leave of the machine lets updates run during backward.
    both += [] if s.toy else ["--spare", f"{int(most - 14.3 * 6.74e9)}B"]
    eleven = ["--tokens", s.tokens(65536), "--micro-batch", rows, *few]
    # Less than it could have, so that the disk gets its part, and room for activations.
    host, hbm = f"{int(available * 0.565)}B", f"{int(hbm_bytes() * 0.55)}B" if device == "cuda" else ""
    check = ["compute-sanitizer", "--error-exitcode", "1", sys.executable]
    return [
        Case("kernels", "compute-sanitizer", [*check, str(HERE.parent / "tests" / "gpu" / "check_adamw_cuda.py")], 15, 90),
        Case("bits", "bits", s.train("0.4", *bits), 40, 90),
        Case("main", "in_hbm", s.train("3.14", "--systems", "in_hbm", *base), 40, 90),
        Case("main", "host", s.train("3.14", "--systems", "host", *main), 60, 120),
        Case("twice", "in_hbm", s.train("3.14", "--systems", "in_hbm", *twice_in_hbm), 25, 60),
        Case("twice", "host", s.train("3.14", "--systems", "host", *twice), 40, 90),
        Case("six", "in_hbm", s.train("6.7", *six), 15, 40),
        Case("six", "host", s.train("6.7", "--systems", "host", "--micro-batch", rows, *both, host=f"{most}B"), 60, 120),
        Case("eleven", "compute", s.train("11", "--systems", "compute", "--tokens", s.tokens(16384), *few), 15, 40),
        Case("eleven", "tiers", s.train("11", "--systems", "three_tiers", *eleven, hbm=hbm, host=host, disk=disk), 70, 150),
        # A virtual disk is another one ten minutes later.
        Case("rates", "bench", bench, 15, 40),
        Case("nvme", "nvme", s.train("1.35", *nvme, disk=disk), 70, 150),
        Case("main", "auto", s.train("3.14", "--systems", "auto", *planned), 25, 60),
    ]  # fmt: skip


class Campaign:
    """Runs cases until the time is up."""

    def __init__(self, seconds: float, out: Path) -> None:
        self.end = time.monotonic() + seconds
        self.lines: list[dict[str, Any]] = []
        self.file = (out / "campaign.jsonl").open("a")
        self.lock = threading.Lock()

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, line: dict[str, Any]) -> None:
        """Print a line and keep it."""
        with self.lock:
            self.lines.append(line)
            text = json.dumps(line)
            print(text, flush=True)
            print(text, file=self.file, flush=True)

    def run(self, case: Case) -> None:
        """One process, to its end or to the end of its time."""
        named = {"part": case.part, "case": case.name}
        program = case.argv[0] if case.argv[0] == "compute-sanitizer" else sys.executable
        if shutil.which(program) is None:
            return self.say(named | {"skipped": f"{program} is not installed"})
        if self.left() < case.needs:
            return self.say(named | {"skipped": f"takes about {case.needs:.0f} s, {self.left():.0f} s are left"})
        argv = case.argv if program != sys.executable else [sys.executable, *case.argv]
        began, limit = time.monotonic(), min(case.limit, self.left())
        child = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        errors: list[str] = []
        readers = [
            threading.Thread(target=self._lines, args=(child.stdout, named)),
            threading.Thread(target=lambda: errors.extend(child.stderr or ())),
        ]
        for reader in readers:
            reader.start()
        end: dict[str, Any] = {}
        try:
            end["status"] = child.wait(limit)
        except subprocess.TimeoutExpired:
            end["ended"] = f"after {limit:.0f} s"
        finally:
            # The whole group, also when this program is interrupted; only what this function started is in it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for reader in readers:
                reader.join()
        if end.get("status") != 0:
            end["stderr"] = "".join(errors)[-1500:]
        self.profile(case)
        self.say(named | end | {"took_s": round(time.monotonic() - began, 1), "left_s": round(self.left())})

    def profile(self, case: Case) -> None:
        """Keep the rates that a case has measured."""
        file = Path(self.file.name).with_name("profile.toml")
        if "--save" not in case.argv or not file.exists():
            return
        try:
            import tomllib
        except ImportError:  # Python 3.10
            return
        self.say({"part": case.part, "case": "profile", "profile": tomllib.loads(file.read_text())})

    def _lines(self, stream: Any, named: dict[str, Any]) -> None:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            self.say(named | (line if isinstance(line, dict) else {"says": text.rstrip()}))


def hbm_bytes() -> int:
    """Of the first GPU."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def limits() -> tuple[int, int]:
    """Bytes of memory that are available, and of the machine or container in all."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(facts[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    for file, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((Path("/sys/fs/cgroup") / file).read_text())
            total = min(total, most)
            available = min(available, most - int((Path("/sys/fs/cgroup") / used).read_text()))
    return available, total


def untimed(campaign: Campaign, found: list[Case], device: str) -> None:
    """Run those whose times do not matter, at once."""
    if device == "host":
        for case in found:
            if case.part == "kernels":
                campaign.say({"part": case.part, "case": case.name, "skipped": "needs a GPU"})
        found = [case for case in found if case.part != "kernels"]
    if not found:
        return
    with touched(campaign, 0.75) if device == "cuda" else contextlib.nullcontext():
        runs = [threading.Thread(target=campaign.run, args=(case,)) for case in found]
        for run in runs:
            run.start()
        for run in runs:
            run.join()


@contextlib.contextmanager
def touched(campaign: Campaign, share: float) -> Iterator[None]:
    """Beside a part whose times do not matter, have the memory that later parts will take touched once."""
    size = int(limits()[0] * share)
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, __file__, "--touch", str(size)], start_new_session=True)
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(min(30, campaign.left()))
    finally:
        status = child.poll()
        child.kill()
        child.wait()
        line = {"touched_gib": round(size / 2**30, 1), "status": status, "s": round(time.monotonic() - began, 1)}
        campaign.say({"part": "bits", "case": "touch"} | line)


def machine(device: str, disk: str) -> dict[str, Any]:
    """What it runs on."""
    gpu = None
    if device == "cuda":
        ask = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max",
            "--format=csv,noheader",
        ]
        gpu = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    ).stdout.strip()
    available, total = limits()
    return {
        "campaign": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "gpu": gpu, "commit": commit,
        "cores": len(os.sched_getaffinity(0)), "memory_gib": round(total / 2**30, 1), "available_gib": round(available / 2**30, 1),
        "disk": disk, "disk_free_gib": round(shutil.disk_usage(disk).free / 2**30, 1), "kernel": os.uname().release,
    }  # fmt: skip


def main() -> None:
    """Run the parts, then sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for everything together")
    parser.add_argument("--parts", default="", help="names of parts, or part/case; all without it")
    parser.add_argument("--device", default="cuda", choices=["cuda", "host"])
    parser.add_argument("--disk", default="/var/tmp", help="folder on the disk to measure")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT"), help="folder for lines and rates; $OUT, or a new one"
    )
    parser.add_argument("--read", type=Path, nargs="*", default=[], help="lines of earlier runs, for the summary")
    parser.add_argument("--touch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.touch:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        touch(args.touch, spared=2)
        return
    out = args.out or Path(tempfile.mkdtemp(prefix="gpu-campaign-"))
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "python"), os.environ.get("PYTHONPATH", "")])
    campaign = Campaign(args.seconds, out)
    earlier = [json.loads(line) for file in args.read for line in file.read_text().splitlines()]
    chosen = set(args.parts.split(",")) if args.parts else set()
    disk = tempfile.mkdtemp(prefix="gpu-campaign-", dir=args.disk)
    try:
        campaign.say(machine(args.device, disk))
        wanted = [c for c in cases(args.device, out, disk) if not chosen or chosen & {c.part, f"{c.part}/{c.name}"}]
        untimed(campaign, [case for case in wanted if case.part in UNTIMED], args.device)
        for case in wanted:
            if case.part not in UNTIMED:
                campaign.run(case)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
    for line in summary(earlier + campaign.lines):
        campaign.say(line)


if __name__ == "__main__":
    main()
