"""Write decoder.npz: what torch and transformers compute on tiny decoders whose every tensor was moved from its start.

    python -m tests.goldens.make_decoder        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer       JSON: the transformers config, the loss, and [name, shape] of every tensor in the order below;
  CASE/weights    all tensors end to end, in float16, to which `peers.perturb` rounded the model's own;
  CASE/logits     float32, on the right-padded rows of `batch/...`;
  CASE/gradients  float32: every fifth number of the mean loss's gradient, tensors end to end.
The default tests read it with numpy alone (tests/models/test_decoder_golden.py).
"""

import json
from pathlib import Path

import numpy as np

from tests.parity import peers

NAMES = ("gpt2", "neo", "llama-llama3", "llama-yarn", "mistral", "qwen2-mixed-windows", "qwen3", "gemma")
FILE = Path(__file__).with_name("decoder.npz")
EVERY = 5


def main() -> None:
    """Compute and write every case."""
    arrays = {f"batch/{name}": field for name, field in peers.batch().items()}
    for case in NAMES:
        model = peers.build(case)
        peers.perturb(model, seed=0)
        found, weights = peers.theirs(model), peers.tensors(model)
        shapes = [(name, weights[name].shape) for name in sorted(weights)]
        flat = np.concatenate([weights[name].ravel() for name, _ in shapes])
        slopes = np.concatenate([found["gradients"][name].ravel() for name, _ in shapes])
        if (flat != flat.astype(np.float16)).any():
            raise ValueError(f"{case}: weights that float16 cannot hold")
        cfg = json.loads(json.dumps(model.config.to_dict(), default=str))
        arrays[f"{case}/peer"] = np.array(json.dumps({"config": cfg, "loss": found["loss"], "tensors": shapes}))
        arrays[f"{case}/weights"] = flat.astype(np.float16)
        arrays[f"{case}/logits"] = found["logits"]
        arrays[f"{case}/gradients"] = slopes[::EVERY]
    np.savez_compressed(FILE, **arrays)
    print(FILE.name, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
