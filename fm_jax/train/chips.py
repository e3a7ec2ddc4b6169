"""What the vendors state of their chips: the one table that MFU, plans and rooflines read.

A chip is one JAX device: a chip of TPU v4 and later, or a GPU.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Dense bfloat16 peak, memory and links of one chip; 0 where no figure is listed here."""

    kind: str  # pattern of `jax.Device.device_kind`, whole and in any case
    bfloat16: float  # FLOP/s, without sparsity
    memory: float = 0.0  # bytes of HBM
    bandwidth: float = 0.0  # bytes/s of HBM
    link: float = 0.0  # bytes/s that one chip sends in a ring of its neighbours
    network: float = 0.0  # bytes/s that one chip sends to another host


# Google: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e: "peak compute per chip (bf16)", HBM and its bandwidth,
# "bidirectional inter-chip interconnect bandwidth (per chip)" 400, 1200, 800 GB/s over 4, 6, 4 ports. A ring along one
# axis of the torus sends through two ports, one in each direction, so `link` is the bidirectional figure of one port.
# NVIDIA: data sheets of A100 (2021), L4 (2023), H100 (2023), H200 (2024), HGX B200 and GB200 NVL72 (2024); they state
# most peaks with sparsity, which are twice these, and NVLink (900 GB/s for H100, H200) as the sum of both directions.
# `network`: the eight 400 Gb/s adapters of a DGX H100 or H200, one for each GPU (data sheets).
CHIPS = {
    "v4": Chip(r"TPU v4", 275e12),
    "v5e": Chip(r"TPU v5 lite|TPU v5e", 197e12, 16e9, 819e9, 100e9),
    "v5p": Chip(r"TPU v5|TPU v5p", 459e12, 95e9, 2765e9, 200e9),
    "v6e": Chip(r"TPU v6 lite|TPU v6e", 918e12, 32e9, 1638e9, 200e9),
    "a100": Chip(r".*\bA100\b.*", 312e12),
    "l4": Chip(r".*\bL4\b.*", 121e12),
    "h100-pcie": Chip(r".*\bH100\b.*\bPCIe\b.*", 756e12),
    "h100-nvl": Chip(r".*\bH[12]00\b.*\bNVL\b.*", 835.5e12),
    "h200": Chip(r".*\bG?H200\b.*", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "h100": Chip(r".*\bG?H100\b.*", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "gb200": Chip(r".*\bGB200\b.*", 2500e12),
    "b200": Chip(r".*\bB200\b.*", 2250e12),
}


def of_kind(device_kind: str) -> Chip | None:
    """Return the chip of a `jax.Device.device_kind`; None if it is unknown, or a slice of a GPU."""
    if re.search(r"\bMIG\b", device_kind):
        return None
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device_kind, re.IGNORECASE)), None)
