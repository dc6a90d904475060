"""Power, energy, clocks and temperature of an NVIDIA GPU, from NVML (package nvidia-ml-py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aicsd_deploy.runtime.driver import gpu_index

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class GpuReading:
    """One look at the counters: energy since the driver was loaded in millijoules, clocks in MHz, temperature in °C."""

    energy_mj: float
    sm_mhz: int
    memory_mhz: int
    temperature_c: int
    memory_used_mb: float
    throttled: bool


@dataclass(frozen=True)
class GpuUse:
    """What a GPU spent on some frames.

    Attributes:
        power_w: mean power.
        energy_mj_per_frame: millijoules per frame.
        sm_mhz, memory_mhz, temperature_c: at the end of the work.
        memory_used_mb: memory in use on the whole GPU.
        throttled: heat or power held the clock back.
    """

    power_w: float
    energy_mj_per_frame: float
    sm_mhz: int
    memory_mhz: int
    temperature_c: int
    memory_used_mb: float
    throttled: bool


class GpuMeter:
    """Reads the counters of one GPU."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._gpu = _handle(nvml, index)
        self.read()  # an old GPU without an energy counter says so here

    @classmethod
    def of(cls, device: str) -> Self | None:
        """Return the meter of "cuda:N"; None for a CPU, or where NVML is missing or knows no such counters."""
        if not device.startswith("cuda"):
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            return cls(pynvml, gpu_index(device))
        except pynvml.NVMLError:
            return None

    def read(self) -> GpuReading:
        """Look at all counters."""
        n, gpu = self._nvml, self._gpu
        reasons = n.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        # Power cap, power brake and heat, in software and hardware; not "idle" or "clocks set by the user".
        slowed = reasons & (
            n.nvmlClocksEventReasonSwPowerCap
            | n.nvmlClocksEventReasonSwThermalSlowdown
            | n.nvmlClocksThrottleReasonHwSlowdown
            | n.nvmlClocksThrottleReasonHwThermalSlowdown
            | n.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        return GpuReading(
            energy_mj=float(n.nvmlDeviceGetTotalEnergyConsumption(gpu)),
            sm_mhz=n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_SM),
            memory_mhz=n.nvmlDeviceGetClockInfo(gpu, n.NVML_CLOCK_MEM),
            temperature_c=n.nvmlDeviceGetTemperature(gpu, n.NVML_TEMPERATURE_GPU),
            memory_used_mb=n.nvmlDeviceGetMemoryInfo(gpu).used / 1e6,
            throttled=bool(slowed),
        )

    def use_since(self, before: GpuReading, *, frames: int, seconds: float) -> GpuUse:
        """Return what `frames` frames in `seconds` took since an earlier reading."""
        now = self.read()
        spent_mj = now.energy_mj - before.energy_mj
        return GpuUse(
            power_w=spent_mj / 1000 / seconds,
            energy_mj_per_frame=spent_mj / frames,
            sm_mhz=now.sm_mhz,
            memory_mhz=now.memory_mhz,
            temperature_c=now.temperature_c,
            memory_used_mb=now.memory_used_mb,
            throttled=now.throttled or before.throttled,
        )


def _handle(nvml: Any, index: int) -> Any:
    """Find the GPU that CUDA counts as `index`; NVML counts in another order, and all cards, whatever CUDA_VISIBLE_DEVICES says."""
    try:
        import torch

        uuid = torch.cuda.get_device_properties(index).uuid
    except (ImportError, AttributeError, AssertionError, RuntimeError):
        # No PyTorch that can tell; with one GPU, all counts are the same.
        return nvml.nvmlDeviceGetHandleByIndex(index)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
