"""Write vit.npz: what torch and transformers compute on tiny ViTs, DINOv2s and MAEs whose every tensor was moved.

    python -m tests.goldens.make_vit        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer       JSON: the transformers config, the loss, the images' size, and [name, shape] of every tensor of the
                  weights file in the order below;
  CASE/weights    all tensors end to end, in float16, to which `peers.perturb` rounded the model's own;
  CASE/out/NAME   float32: outputs on the images of `vit_task.batch`; of hidden states every seventh number;
  CASE/gradients  float32: every fifth number of the mean loss's gradient, tensors end to end.
The default tests read it with numpy alone (test_goldens.py).
"""

from tests.goldens import stored
from tests.parity import peers, vit_peers

NAMES = (
    "vit-labels", "vit-oblong", "vit-interpolated", "dinov2", "dinov2-gated", "registers-labels", "mae", "mae-pixels",
)  # fmt: skip
STATES = 7


def main() -> None:
    """Compute and write every case."""
    arrays = {}
    for case in NAMES:
        model = vit_peers.build(case)
        peers.perturb(model, seed=0)
        found, weights = vit_peers.theirs(case, model), vit_peers.tensors(model)
        told = {"loss": found["loss"], "size": vit_peers.CASES[case][3]}
        arrays |= stored.entry(case, model.config, weights, found["gradients"], **told)
        for name, value in found["outputs"].items():
            arrays[f"{case}/out/{name}"] = value.ravel()[::STATES] if "states" in name else value
    stored.write("vit", arrays)


if __name__ == "__main__":
    main()
