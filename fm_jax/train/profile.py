"""Hardware utilisation: FLOPs of a model by formula, peak FLOP/s of devices (`chips.py`), profiler traces.

Model FLOPs utilisation (MFU) is the model's FLOPs a second over the devices' peak. Model FLOPs are those of one
forward and one backward pass as the mathematics needs them; recomputation by rematerialisation does not
count. PaLM (Chowdhery et al. 2022, arXiv:2204.02311), section 4.1 and appendix B.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from fm_jax.core import tree
from fm_jax.core.types import Params
from fm_jax.train import chips

# V100 has no bfloat16; float16 with float32 accumulation, NVIDIA data sheet (2020).
_PEAK_FLOAT16_ONLY = ((r".*\bV100\b.*\bPCIE\b.*", 112.0), (r".*\bV100\b.*", 125.0))


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Return the dense peak FLOP/s of a device by `jax.Device.device_kind`, or None if it is unknown.

    `dtype` is the dtype of the multiplications: bfloat16 or float16. There is no single figure for float32 (it depends
    on the precision setting), for CPUs or for a slice of a GPU: for these no MFU should be reported.
    """
    if dtype not in ("bfloat16", "float16") or re.search(r"\bMIG\b", device_kind):
        return None
    if (chip := chips.of_kind(device_kind)) is not None:
        return chip.bfloat16
    for pattern, teraflops in _PEAK_FLOAT16_ONLY if dtype == "float16" else ():
        if re.fullmatch(pattern, device_kind, re.IGNORECASE):
            return teraflops * 1e12
    return None


def total_peak_flops(devices: Iterable[jax.Device], dtype: str = "bfloat16") -> float | None:
    """Return the sum of the devices' peak FLOP/s, or None if one of them is unknown."""
    peaks = [peak_flops(device.device_kind, dtype) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


def decoder_flops_per_token(
    num_params: int, num_layers: int, attention_width: int, seq_len: int, *, causal: bool = False
) -> float:
    """Return training FLOPs a token of a dense decoder: 6 N + 12 L (H K) T.

    N is the number of parameters used in multiplications (`multiplied_params`), L of layers, H K the width of all query
    heads together, T the sequence length. A multiply-add is two FLOPs, and the backward pass costs twice the forward:
    6 N. Scores and weighted sum are 2 T H K multiply-adds a token and layer: 12 L H K T. This counts the full matrix of
    scores, as PaLM's appendix B and published MFUs do; `causal=True` halves that term, to the work that a causal kernel
    cannot avoid, and gives the lower figure.
    """
    attention = 12.0 * num_layers * attention_width * seq_len
    return 6.0 * num_params + (attention / 2 if causal else attention)


def multiplied_params(params: Params) -> int:
    """Count a decoder's parameters except those that are only looked up.

    Embedding tables are only looked up, except a token embedding that is tied to the output head.
    """
    flat = tree.flatten(params)
    tied = not any(path.startswith("head/") for path in flat)
    return sum(
        leaf.size for path, leaf in flat.items() if not path.startswith("embed/") or (tied and path == "embed/tokens")
    )


class Trace:
    """A profiler trace of steps `first_step` to `first_step + num_steps - 1`, for XProf or Perfetto; none if 0.

        with Trace(10, 3, workdir / "trace") as trace:
            for step in range(start, stop):
                trace.before(step)

    A run resumed after `first_step` traces nothing. Each process writes its own file.
    """

    def __init__(self, first_step: int, num_steps: int = 3, directory: Path | str = "trace") -> None:
        self.first_step, self.num_steps, self.directory = first_step, num_steps, Path(directory)
        self._tracing = False

    def before(self, step: int, wait_for: Any = None) -> None:
        """Start or stop the trace if it is due; call it before `step` is dispatched (the first step is 0).

        The device may be behind the host: give the newest state as `wait_for`, so that the trace is complete.
        """
        if self.first_step and step == self.first_step:
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.directory))
            self._tracing = True
        elif self._tracing and step >= self.first_step + self.num_steps:
            jax.block_until_ready(wait_for)
            self._stop()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
