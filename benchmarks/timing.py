"""The one way a call is timed.

On a GPU a sample is: [spin] [read a buffer four times the size of L2] [event] [the call] [event], all enqueued before
the spin ends. So the caches are cold and hold no dirty lines (a flush by writing would charge the next kernel with
the write-back), and the CPU's launch time never shows: a sample whose first event had already passed when the CPU had
enqueued the last one is thrown away, and the spin made longer. Variants take turns, sample by sample, in rotating
order; the median counts.

On a CPU a sample is the wall time of one call, variants taking turns likewise.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Callable[[], Any]


@dataclass(frozen=True)
class Samples:
    """Times of one variant in microseconds: median, 10th and 90th percentile, how many, and how many were thrown away as late."""

    us: float
    us_p10: float
    us_p90: float
    samples: int
    late: int = 0

    @classmethod
    def of(cls, times: Sequence[float], late: int = 0) -> Samples:
        low, middle, high = np.percentile(np.asarray(times, dtype=np.float64), (10, 50, 90))
        return cls(float(middle), float(low), float(high), len(times), late)


class no_gc:
    """Keep Python's garbage collector out of a timed region."""

    def __enter__(self) -> None:
        # No gc.collect() here: with torch, Numba and FlashInfer loaded one takes 0.5 s, longer than most measurements.
        self._was_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *exception: object) -> None:
        if self._was_on:
            gc.enable()


class CpuTimer:
    """Times calls on the CPU."""

    device = "cpu"

    def __init__(self, quick: bool = False) -> None:
        self.min_samples, self.max_samples, self.seconds = (2, 3, 0.2) if quick else (9, 60, 4.0)

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def measure(self, runs: Sequence[Run]) -> list[Samples]:
        """Time several calls in turns."""
        for run in runs:
            run()
        first = [_wall(run) for run in runs]
        count = int(np.clip(self.seconds / max(sum(first), 1e-9), self.min_samples, self.max_samples))
        times: list[list[float]] = [[] for _ in runs]
        with no_gc():
            for sample in range(count):
                for i in _rotation(len(runs), sample):
                    times[i].append(_wall(runs[i]) * 1e6)
        return [Samples.of(t) for t in times]


class CudaTimer:
    """Times calls on the current CUDA device, on torch's current stream."""

    device = "cuda"

    def __init__(self, quick: bool = False) -> None:
        import torch

        self._torch = torch
        self.min_samples, self.max_samples, self.seconds = (3, 5, 0.2) if quick else (15, 51, 1.5)
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self._flush_buffer = torch.randn(max(4 * l2, 256 << 20) // 4, device="cuda")
        self._flush_sum = torch.empty((), device="cuda")
        self._cycles_per_us = self._calibrate_spin()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        self._torch.cuda.synchronize()

    def _calibrate_spin(self) -> float:
        """Cycles of torch's spin kernel per microsecond."""
        torch = self._torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first loads the module
            begin.record()
            torch.cuda._sleep(20_000_000)
            end.record()
            end.synchronize()
        return 20_000_000 / (begin.elapsed_time(end) * 1e3)

    def spin(self, us: float) -> None:
        """Keep the GPU busy, without touching memory."""
        self._torch.cuda._sleep(max(int(us * self._cycles_per_us), 1))

    def flush(self) -> None:
        """Fill L2 with clean lines of a buffer nobody else reads."""
        self._torch.sum(self._flush_buffer, dim=0, out=self._flush_sum)

    def _sample(self, run: Run, spin_us: float) -> tuple[Any, Any, bool]:
        event = self._torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        self.spin(spin_us)
        self.flush()
        begin.record()
        run()
        end.record()
        return begin, end, begin.query()  # True: the GPU had caught up, the interval may hold launch time

    def measure(self, runs: Sequence[Run]) -> list[Samples]:
        """Time several calls in turns."""
        estimates, host = [], []
        for run in runs:
            for _ in range(3):
                run()
            self.synchronize()
            start = time.perf_counter()
            begin, end, _ = self._sample(run, 2000.0)
            host.append((time.perf_counter() - start) * 1e6)
            self.synchronize()
            estimates.append(begin.elapsed_time(end) * 1e3)
        spins = [3.0 * h + 50.0 for h in host]
        round_us = sum(estimates) + sum(spins) + 100.0 * len(runs)
        count = int(np.clip(self.seconds * 1e6 / round_us, self.min_samples, self.max_samples))
        times: list[list[float]] = [[] for _ in runs]
        late = [0] * len(runs)
        with no_gc():
            for sample in range(count + self.max_samples):
                wanting = [i for i in _rotation(len(runs), sample) if len(times[i]) < count]
                if not wanting:
                    break
                pending = [(i, *self._sample(runs[i], spins[i])) for i in wanting]
                self.synchronize()
                for i, begin, end, was_late in pending:
                    if was_late:
                        late[i] += 1
                        spins[i] *= 1.5
                    if (
                        not was_late or late[i] > self.max_samples // 2
                    ):  # a call that waits for the GPU itself is always late: keep what there is, `late` tells
                        times[i].append(begin.elapsed_time(end) * 1e3)
        return [Samples.of(t, n) for t, n in zip(times, late, strict=True)]


def _rotation(n: int, start: int) -> list[int]:
    return [(start + i) % n for i in range(n)]


def _wall(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_times(run: Run, calls: int, prepare: Run | None = None) -> Samples:
    """CPU time of each of `calls` calls of `run`, in microseconds; `prepare` runs untimed before each."""
    clock = time.perf_counter_ns
    times = []
    with no_gc():
        for _ in range(calls):
            if prepare is not None:
                prepare()
            start = clock()
            run()
            times.append((clock() - start) / 1e3)
    return Samples.of(times)


def measure_limits(timer: CpuTimer | CudaTimer, quick: bool = False) -> dict[str, float]:
    """What this machine can do now: copy (TB/s, bytes read plus written) and matmul (TFLOP/s; 8192³ bf16 on a GPU, float32 on a CPU)."""
    import torch

    cuda = timer.device == "cuda"
    size = (1 << 30) if cuda and not quick else (1 << 24 if quick else 1 << 27)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    n = 512 if quick else (8192 if cuda else 2048)
    a, b = (torch.randn((n, n), device=timer.device).to(torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    c = torch.empty_like(a)
    copy, matmul = timer.measure([lambda: target.copy_(source), lambda: torch.matmul(a, b, out=c)])
    return {
        "copy_tb_s": 2.0 * size / copy.us / 1e6,
        "matmul_tflop_s": 2.0 * n**3 / matmul.us / 1e6,
        "copy_bytes": 2.0 * size,
        "matmul_n": n,
    }
