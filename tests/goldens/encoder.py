"""How encoders and their heads are compared with what torch computed once.

The file also holds
  CASE/peer      with the padding id, the number of types and of labels;
  CASE/out/NAME  float32: the outputs on the right-padded rows of `bert.rows`.
"""

from tests.goldens.stored import Golden
from tests.parity.changes import part
from tests.parity.distances import distances as apart
from tests.parity.language import bert

TOLERANCE = 1e-4  # of the standard deviation of torch's outputs, or of its gradient's norm; float32 on CPU
GOLDEN = Golden("encoder")
CASES = (
    "bert-pretraining", "bert-labels", "bert-tags", "bert-span", "roberta-words", "roberta-labels", "distilbert-words",
    "electra-replaced", "electra-words", "albert-words", "albert-inner",
)  # fmt: skip
load = GOLDEN.load


def kept(case, peer, answer):
    """Return what is told and kept of a case beside its weights and gradients."""
    outputs = {f"out/{name}": array for name, array in answer["outputs"].items()}
    return {"loss": answer["loss"], "asked": bert.asked(case)}, outputs


def distances(case, model, params, places):
    """Return the largest differences of outputs and gradients, in units of the peer's."""
    about = GOLDEN.peers[case]
    mine = bert.ours(model, bert.rows(**about["asked"]))(params)
    found = apart(mine, {"outputs": GOLDEN.under(f"{case}/out"), "loss": about["loss"]}, bert.INSIDES)
    return found | {"gradients": GOLDEN.steepest(case, mine["gradients"], places)}


WRONG = {
    "tanh": ("bert-tags", lambda model: part(model, "mlp", activation="gelu_tanh"), {"out": 3, "gradients": 1}, ())
}


def covered(models):
    """Assert that the cases differ where the families do: types, positions, embeddings, shared layers, heads."""
    configs = [model.backbone.cfg for model in models]
    assert {cfg.num_types for cfg in configs} == {0, 1, 2}
    assert {cfg.position_offset for cfg in configs} == {0, 2}
    assert {bool(cfg.embed_size) for cfg in configs} == {False, True}
    assert {cfg.shared for cfg in configs} == {False, True, (2, 2)}
    assert {cfg.norm.epsilon for cfg in configs} == {1e-12, 1e-5}
    assert {type(model).__name__ for model in models} == {"MaskedLM", "Classifier", "Tagger", "SpanFinder"}
