"""Write conv_nets.npz: what torch and transformers compute on tiny ResNets and EfficientNets with every tensor drawn.

    python -m tests.goldens.make_conv_nets        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer        JSON: the transformers config, the images' size, the losses, and [name, shape] of every tensor in the
                   order below, running moments among them;
  CASE/weights     all tensors end to end, in float16, to which `conv_peers.draw` rounded the model's own;
  CASE/logits      float32: of the images of `conv_task.batch`, in evaluation;
  CASE/gradients   float32: every third number of the mean loss's gradient, tensors end to end;
  CASE/train/...   the same for a ResNet in training, and "after": every tensor's running moments after the step.
The default tests read it with numpy alone (tests/models/test_conv_nets_golden.py).
"""

import json
from pathlib import Path

import numpy as np

from tests.parity import conv_peers

NAMES = ("resnet-basic", "resnet-v1", "resnet-bottleneck", "efficientnet-even", "efficientnet-odd")
FILE = Path(__file__).with_name("conv_nets.npz")
EVERY = 3


def main() -> None:
    """Compute and write every case."""
    arrays = {}
    for case in NAMES:
        model = conv_peers.build(case)
        conv_peers.draw(model, seed=0)
        weights = conv_peers.tensors(model)
        names = sorted(weights)

        def flat(found: dict[str, np.ndarray], names: list[str] = names) -> np.ndarray:
            return np.concatenate([found[name].ravel() for name in names])

        if (flat(weights) != flat(weights).astype(np.float16)).any():
            raise ValueError(f"{case}: weights that float16 cannot hold")
        arrays[f"{case}/weights"] = flat(weights).astype(np.float16)
        losses = []
        for prefix in ("", "train/") if case.startswith("resnet") else ("",):
            found = conv_peers.theirs(case, model, train=bool(prefix))
            losses.append(found["loss"])
            arrays[f"{case}/{prefix}logits"] = found["logits"]
            arrays[f"{case}/{prefix}gradients"] = flat(found["gradients"])[::EVERY]
            if prefix:
                moments = [name for name in names if "running_" in name]
                arrays[f"{case}/{prefix}after"] = flat(found["after"], moments)
        told = {
            "config": json.loads(json.dumps(model.config.to_dict(), default=str)),
            "size": conv_peers.CASES[case][2],
            "losses": losses,
            "tensors": [(name, weights[name].shape) for name in names],
        }
        arrays[f"{case}/peer"] = np.array(json.dumps(told))
    np.savez_compressed(FILE, **arrays)
    print(FILE.name, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
