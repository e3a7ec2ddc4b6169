"""Write conv_nets.npz: what torch and transformers compute on tiny ResNets and EfficientNets with every tensor drawn.

    python -m tests.goldens.make_conv_nets        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer        JSON: the transformers config, the images' size, the losses, and [name, shape] of every tensor in the
                   order below, running moments among them;
  CASE/weights     all tensors end to end, in float16, to which `conv_peers.draw` rounded the model's own;
  CASE/logits      float32: of the images of `conv_task.batch`, in evaluation;
  CASE/gradients   float32: every third number of the mean loss's gradient, tensors end to end;
  CASE/train/...   the same for a ResNet in training, and "after": every tensor's running moments after the step.
The default tests read it with numpy alone (test_goldens.py).
"""

from tests.goldens import stored
from tests.parity import conv_peers

NAMES = ("resnet-basic", "resnet-v1", "resnet-bottleneck", "efficientnet-even", "efficientnet-odd")
EVERY = 3


def main() -> None:
    """Compute and write every case."""
    arrays = {}
    for case in NAMES:
        model = conv_peers.build(case)
        conv_peers.draw(model, seed=0)
        weights = conv_peers.tensors(model)
        still = conv_peers.theirs(case, model)
        losses = [still["loss"]]
        arrays[f"{case}/logits"] = still["logits"]
        if case.startswith("resnet"):
            found = conv_peers.theirs(case, model, train=True)
            losses.append(found["loss"])
            arrays[f"{case}/train/logits"] = found["logits"]
            arrays[f"{case}/train/gradients"] = stored.flat(found["gradients"], sorted(weights))[::EVERY]
            moments = [name for name in sorted(weights) if "running_" in name]
            arrays[f"{case}/train/after"] = stored.flat(found["after"], moments)
        told = {"size": conv_peers.CASES[case][2], "losses": losses}
        arrays |= stored.entry(case, model.config, weights, still["gradients"], every=EVERY, **told)
    stored.write("conv_nets", arrays)


if __name__ == "__main__":
    main()
