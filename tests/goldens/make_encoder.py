"""Write encoder.npz: what torch and transformers compute on tiny encoders whose every tensor was moved from its start.

    python -m tests.goldens.make_encoder        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer       JSON: the transformers config, the loss, the padding id, the number of types and of labels, and
                  [name, shape] of every tensor in the order below;
  CASE/weights    all tensors end to end, in float16, to which `peers.perturb` rounded the model's own;
  CASE/out/NAME   float32: the outputs on the right-padded rows of `encoder_task.batch`;
  CASE/gradients  float32: every fifth number of the mean loss's gradient, tensors end to end.
The default tests read it with numpy alone (test_goldens.py).
"""

from tests.goldens import stored
from tests.parity import encoder_peers, peers

NAMES = (
    "bert-pretraining", "bert-labels", "bert-tags", "bert-span", "roberta-words", "roberta-labels", "distilbert-words",
    "electra-replaced", "electra-words", "albert-words",
)  # fmt: skip


def main() -> None:
    """Compute and write every case."""
    arrays = {}
    for case in NAMES:
        model = encoder_peers.build(case)
        peers.perturb(model, seed=0)
        found, weights = encoder_peers.theirs(case, model), peers.tensors(model)
        told = {"loss": found["loss"], "asked": encoder_peers.asked(case)}
        arrays |= stored.entry(case, model.config, weights, found["gradients"], **told)
        arrays |= {f"{case}/out/{name}": value for name, value in found["outputs"].items()}
    stored.write("encoder", arrays)


if __name__ == "__main__":
    main()
