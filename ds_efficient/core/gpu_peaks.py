"""Peak dense throughput of GPUs, for MFU. Unknown devices have none, and their MFU is "N/A".

Numbers are TFLOP/s of the vendors' data sheets without structured sparsity and with fp32 accumulation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DTYPES = ("bf16", "fp16", "fp32", "tf32")


@dataclass(frozen=True)
class GpuPeak:
    """Dense peaks of one device, TFLOP/s; None where the device lacks the format.

    Attributes:
        name: what the device is called in reports.
        bf16, fp16: matrix units, fp32 accumulation.
        fp32: plain fp32.
        tf32: matrix units on fp32 data, where torch was told to use them.
    """

    name: str
    bf16: float | None
    fp16: float | None
    fp32: float | None
    tf32: float | None


# The first pattern found in the device name decides: more special names stand first.
_TABLE: tuple[tuple[str, GpuPeak], ...] = (
    (r"\bGB200\b", GpuPeak("GB200", 2500.0, 2500.0, 80.0, 1250.0)),
    (r"\bB300\b", GpuPeak("B300", 2250.0, 2250.0, 75.0, 1125.0)),
    (r"\bB200\b", GpuPeak("B200", 2250.0, 2250.0, 75.0, 1125.0)),
    (r"\bB100\b", GpuPeak("B100", 1750.0, 1750.0, 60.0, 875.0)),
    (r"\bGH200\b", GpuPeak("GH200", 989.4, 989.4, 66.9, 494.7)),
    (r"\bH200 NVL\b", GpuPeak("H200 NVL", 835.5, 835.5, 60.0, 417.5)),
    (r"\bH200\b", GpuPeak("H200", 989.4, 989.4, 66.9, 494.7)),
    (r"\bH100 NVL\b", GpuPeak("H100 NVL", 835.5, 835.5, 60.0, 417.5)),
    (r"\bH100 PCIe\b", GpuPeak("H100 PCIe", 756.0, 756.0, 51.2, 378.0)),
    (r"\bH100\b", GpuPeak("H100 SXM", 989.4, 989.4, 66.9, 494.7)),
    (r"\bH800 PCIe\b", GpuPeak("H800 PCIe", 756.0, 756.0, 51.2, 378.0)),
    (r"\bH800\b", GpuPeak("H800 SXM", 989.4, 989.4, 66.9, 494.7)),
    (r"\bH20\b", GpuPeak("H20", 148.0, 148.0, 44.0, 74.0)),
    (r"\bA[18]00\b", GpuPeak("A100", 312.0, 312.0, 19.5, 156.0)),
    (r"\bA40\b", GpuPeak("A40", 149.7, 149.7, 37.4, 74.8)),
    (r"\bA30\b", GpuPeak("A30", 165.0, 165.0, 10.3, 82.0)),
    (r"\bA10\b", GpuPeak("A10", 125.0, 125.0, 31.2, 62.5)),
    (r"\bL40S\b", GpuPeak("L40S", 362.05, 362.05, 91.6, 183.0)),
    (r"\bL40\b", GpuPeak("L40", 181.05, 181.05, 90.5, 90.5)),
    (r"\bL4\b", GpuPeak("L4", 121.0, 121.0, 30.3, 60.0)),
    (r"\bV100S\b", GpuPeak("V100S", None, 130.0, 16.4, None)),
    (r"\bV100[ -]PCIE\b", GpuPeak("V100 PCIe", None, 112.0, 14.0, None)),
    (r"\bV100\b", GpuPeak("V100 SXM2", None, 125.0, 15.7, None)),
    (r"\bT4\b", GpuPeak("T4", None, 65.0, 8.1, None)),
    (r"\bRTX 6000 Ada\b", GpuPeak("RTX 6000 Ada", 364.2, 364.2, 91.1, 182.1)),
    (r"\bRTX A6000\b", GpuPeak("RTX A6000", 154.8, 154.8, 38.7, 77.4)),
    (r"\bRTX 5090(?! D)\b", GpuPeak("RTX 5090", 209.5, 209.5, 104.8, 104.8)),
    (r"\bRTX 4090(?! D)\b", GpuPeak("RTX 4090", 165.2, 165.2, 82.6, 82.6)),
    (r"\bRTX 3090(?! Ti)\b", GpuPeak("RTX 3090", 71.0, 71.0, 35.6, 35.6)),
    (r"\bMI(?:300|325)X\b", GpuPeak("MI300X/MI325X", 1307.4, 1307.4, 163.4, 653.7)),
)
_PART_OF_A_DEVICE = re.compile(r"\bMIG\b|\bLaptop\b|\bMax-Q\b|\bMobile\b", re.IGNORECASE)


def find_gpu(device_name: str | None) -> GpuPeak | None:
    """Return the peaks of a device called as ``torch.cuda.get_device_name`` calls it, or None.

    MIG slices and laptop parts share a name with the full device but not its peak: None.
    """
    if not device_name or _PART_OF_A_DEVICE.search(device_name):
        return None
    for pattern, peak in _TABLE:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def peak_tflops(device_name: str | None, dtype: str) -> float | None:
    """Return the dense peak in TFLOP/s for ``dtype`` in `DTYPES`, or None where it is not known."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(DTYPES)} is needed")
    peak = find_gpu(device_name)
    return None if peak is None else getattr(peak, dtype)


def mfu(model_tflops_per_gpu: float, device_name: str | None, dtype: str) -> float | None:
    """Return model FLOP utilisation, 0 to 1, or None where no peak is known.

    Args:
        model_tflops_per_gpu: model (dense-equivalent) TFLOP/s of one device, never the executed ones.
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype: of the matrix products.
    """
    peak = peak_tflops(device_name, dtype)
    return None if peak is None else model_tflops_per_gpu / peak
