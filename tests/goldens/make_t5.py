"""Write t5.npz: what torch and transformers compute on tiny T5s whose every tensor was moved from its start.

    python -m tests.goldens.make_t5        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer       JSON: the transformers config, the loss, and [name, shape] of every tensor in the order below;
  CASE/weights    all tensors end to end, in float16, to which `peers.perturb` rounded the model's own;
  CASE/logits, CASE/encoder
                  float32, on the rows of `t5_task.batch`; the latter are the encoder's final states;
  CASE/gradients  float32: every fifth number of the mean loss's gradient, tensors end to end;
and buckets/COUNT-DISTANCE/both and /causal int8: the bucket of each offset from -2048 to 2048.
The default tests read it with numpy alone (test_goldens.py, tests/ops/test_positions.py).
"""

import numpy as np
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from tests.goldens import stored
from tests.parity import peers, t5_peers

NAMES = ("t5", "t5-uneven", "v1.1", "v1.1-tied", "mt5")
BUCKETS = ((32, 128), (8, 16), (64, 256))


def main() -> None:
    """Compute and write every case."""
    arrays = {}
    for case in NAMES:
        model = t5_peers.build(case)
        peers.perturb(model, seed=0)
        found = t5_peers.theirs(model)
        arrays |= stored.entry(case, model.config, peers.tensors(model), found["gradients"], loss=found["loss"])
        arrays |= {f"{case}/logits": found["logits"], f"{case}/encoder": found["encoder"][-1]}
    offsets = torch.arange(-2048, 2049)
    for count, distance in BUCKETS:
        for name, both in (("both", True), ("causal", False)):
            found = T5Attention._relative_position_bucket(offsets, both, count, distance)
            arrays[f"buckets/{count}-{distance}/{name}"] = found.numpy().astype(np.int8)
    stored.write("t5", arrays)


if __name__ == "__main__":
    main()
