"""Write decoder.npz: what torch and transformers compute on tiny decoders whose every tensor was moved from its start.

    python -m tests.goldens.make_decoder        (with torch 2.13.0 and transformers 5.23.0 beside the project)

For each case the file holds
  CASE/peer       JSON: the transformers config, the loss, and [name, shape] of every tensor in the order below;
  CASE/weights    all tensors end to end, in float16, to which `peers.perturb` rounded the model's own;
  CASE/logits     float32, on the right-padded rows of `batch/...`;
  CASE/gradients  float32: every fifth number of the mean loss's gradient, tensors end to end.
The default tests read it with numpy alone (test_goldens.py).
"""

from tests.goldens import stored
from tests.parity import peers

NAMES = ("gpt2", "neo", "llama-llama3", "llama-yarn", "mistral", "qwen2-mixed-windows", "qwen3", "gemma")


def main() -> None:
    """Compute and write every case."""
    arrays = {f"batch/{name}": field for name, field in peers.batch().items()}
    for case in NAMES:
        model = peers.build(case)
        peers.perturb(model, seed=0)
        found = peers.theirs(model)
        arrays |= stored.entry(case, model.config, peers.tensors(model), found["gradients"], loss=found["loss"])
        arrays[f"{case}/logits"] = found["logits"]
    stored.write("decoder", arrays)


if __name__ == "__main__":
    main()
