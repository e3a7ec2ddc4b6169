"""Our encoders and heads against live transformers: outputs, every block's output, the loss and its gradient.

Fresh weights alone would prove little (at initialisation a lost bias changes nothing), so every case is also run with
every tensor moved, and the mutants below must fail.
"""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="the live parity tests need torch: pip install torch")
transformers = pytest.importorskip(
    "transformers", reason="the live parity tests need transformers: pip install transformers"
)

from fm_jax.core import tree  # noqa: E402
from fm_jax.hub import pretrained  # noqa: E402
from fm_jax.models.language import encoder, masked_lm  # noqa: E402
from tests.close import close, small  # noqa: E402
from tests.parity import convert, encoder_peers, encoder_task, peers  # noqa: E402

TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU


@cache
def expected(name, *, perturbed, scale=1.0):
    """Return our module and parameters, and the peer's numbers in our terms."""
    model = encoder_peers.build(name)
    if perturbed:
        peers.perturb(model, seed=0)
    if scale != 1.0:
        _shrink(model, scale)
    ours = convert.module(model.config.to_dict())
    peer = encoder_peers.theirs(name, model)
    peer["gradients"] = convert.params(ours, peer["gradients"])
    return ours, convert.params(ours, peers.tensors(model)), peer


def _shrink(model, scale):
    """Make the embeddings so small that the first norm's epsilon is seen."""
    for table in (model.base_model.embeddings.word_embeddings, model.base_model.embeddings.position_embeddings):
        table.weight.data *= scale
    model.base_model.embeddings.token_type_embeddings.weight.data *= scale


@pytest.mark.parametrize("name", encoder_peers.CASES)
def test_our_encoder_and_head_compute_what_transformers_do(name, record_property):
    compute = None
    for perturbed in (False, True):
        model, params, peer = expected(name, perturbed=perturbed)
        compute = compute or encoder_task.ours(model, encoder_peers.rows(name))
        found = encoder_task.distances(compute(params), peer)
        record_property("perturbed" if perturbed else "fresh", found)
        print(name, "perturbed" if perturbed else "fresh", {key: f"{value:.1e}" for key, value in found.items()})
        small(max(found.values()), TOLERANCE)


def _backbone(model, **changes):
    return model.clone(backbone=model.backbone.clone(cfg=replace(model.backbone.cfg, **changes)))


def _act(model, activation):
    return _backbone(model, mlp=replace(model.backbone.cfg.mlp, activation=activation))


def _edit(params, function):
    return tree.map_with_path(function, params)


def _swap(params, one, two):
    flat = tree.flatten(params)

    def other(path, leaf):
        return flat[path.replace(one, "?").replace(two, one).replace("?", two)]

    return _edit(params, other)


def _transpose(params, name):
    return _edit(params, lambda path, leaf: leaf.swapaxes(-1, -2) if path.endswith(f"{name}/kernel") else leaf)


def _zero(params, name):
    return _edit(params, lambda path, leaf: np.zeros_like(leaf) if name in path else leaf)


MUTANTS = {
    "tanh instead of erf GELU": ("bert-words", lambda m, p: (_act(m, "gelu_tanh"), p)),
    "erf instead of tanh GELU": ("albert-words", lambda m, p: (_act(m, "gelu"), p)),
    "q and k swapped": ("bert-words", lambda m, p: (m, _swap(p, "attn/q/", "attn/k/"))),
    "k and v swapped": ("distilbert-words", lambda m, p: (m, _swap(p, "attn/k/", "attn/v/"))),
    "a square kernel not transposed": ("electra-replaced", lambda m, p: (m, _transpose(p, "attn/o"))),
    "the two norms of a layer swapped": ("albert-words", lambda m, p: (m, _swap(p, "norm_attn", "norm_mlp"))),
    "the embedding's norm without its scale": (
        "electra-words",
        lambda m, p: (m, _edit(p, lambda path, leaf: np.ones_like(leaf) if "norm_embed/scale" in path else leaf)),
    ),
    "positions one off": ("roberta-words", lambda m, p: (_backbone(m, position_offset=1, max_length=33), p)),
    "token types lost": ("bert-labels", lambda m, p: (m, _zero(p, "backbone/types"))),
    "one layer fewer": ("albert-pretraining", lambda m, p: (_backbone(m, num_layers=2), p)),
    "mean instead of first": ("roberta-labels", lambda m, p: (m.clone(pool="mean"), p)),
    "a pooler with gelu": ("bert-labels", lambda m, p: (m.clone(hidden="gelu"), p)),
    "a pooler with relu": ("albert-labels", lambda m, p: (m.clone(hidden="relu"), p)),
    "a discriminator with relu": ("electra-replaced", lambda m, p: (m.clone(hidden="relu"), p)),
    "the words' bias lost": ("bert-words", lambda m, p: (m, _zero(p, "head/bias"))),
    "the head's norm lost": (
        "distilbert-words",
        lambda m, p: (m, _edit(p, lambda path, leaf: np.ones_like(leaf) if "head/norm/scale" in path else leaf)),
    ),
}  # fmt: skip


def differs(name, change, *, scale=1.0):
    model, params, peer = expected(name, perturbed=True, scale=scale)
    model, params = change(model, params)
    peer = {key: value for key, value in peer.items() if key != "states"}
    found = encoder_task.distances(encoder_task.ours(model, encoder_peers.rows(name))(params), peer)
    return {key: value for key, value in found.items() if key != "loss"}


def _seen(found):
    """Every output tells a mutant from rounding, and so does the gradient, which some of them move less."""
    outputs = [error for name, error in found.items() if name != "gradients"]
    assert min(outputs) > 3 * TOLERANCE and found["gradients"] > TOLERANCE, found


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_variant_is_seen(mutant):
    found = differs(*MUTANTS[mutant])
    print(mutant, {key: f"{value:.1e}" for key, value in found.items()})
    _seen(found)


def test_a_wrong_epsilon_is_seen_where_variances_are_small():
    """At unit scale 1e-12 and 1e-5 are 5e-6 apart; with embeddings of 1e-2 the first norm tells them apart."""
    right = differs("bert-words", lambda m, p: (m, p), scale=1e-2)
    wrong = differs(
        "bert-words",
        lambda m, p: (_backbone(m, norm=replace(m.backbone.cfg.norm, epsilon=1e-5)), p),
        scale=1e-2,
    )
    small(max(right.values()), TOLERANCE)
    _seen(wrong)


def test_padding_that_is_attended_to_is_seen(monkeypatch):
    real = masked_lm.MaskedLM.hidden
    monkeypatch.setattr(
        masked_lm.MaskedLM, "hidden", lambda self, tokens, **where: real(self, tokens, **{**where, "segments": None})
    )
    found = differs("bert-words", lambda m, p: (m, p))
    _seen(found)


def test_no_norm_after_the_embedding_is_seen(monkeypatch):
    class Same(encoder.Norm):
        def __call__(self, x):
            super().__call__(x)
            return x

    real = encoder.Norm
    monkeypatch.setattr(encoder, "Norm", lambda cfg, dtype, name=None: (real if name else Same)(cfg, dtype, name=name))
    found = differs("bert-words", lambda m, p: (m, p))
    assert found["words"] > 3 * TOLERANCE, found


@pytest.mark.parametrize("name", encoder_peers.CASES)
def test_folders_go_both_ways(name, tmp_path):
    """What transformers saved opens here, and what is saved here opens there, with equal numbers."""
    peer = encoder_peers.build(name)
    peers.perturb(peer, seed=0)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    model, params, _ = expected(name, perturbed=True)
    assert found.module == model
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    pretrained.save(tmp_path / "ours", found.module, found.params)
    if name == "electra-wide-words":  # an ELECTRA of BERT's form is written as the BERT that it is
        again = pretrained.load(tmp_path / "ours")
        assert again.module == model
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
        return
    again, said = type(peer).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    for (one, want), (other, got) in zip(
        sorted(peer.state_dict().items()), sorted(again.state_dict().items()), strict=True
    ):
        assert one == other
        np.testing.assert_array_equal(got, want, err_msg=one)
    for key in (
        "layer_norm_eps",
        "hidden_act",
        "activation",
        "max_position_embeddings",
        "pad_token_id",
        "embedding_size",
    ):
        assert getattr(again.config, key, None) == getattr(peer.config, key, None), key


def test_a_bare_model_of_ours_opens_there(tmp_path):
    model, params, _ = expected("bert-labels", perturbed=True)
    pretrained.save(tmp_path / "bare", model.backbone, params["backbone"])
    again, said = transformers.BertModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(said["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}  # there is none to give
    assert not said["unexpected_keys"]
    mine = model.backbone.apply({"params": params["backbone"]}, encoder_peers.rows("bert-labels")["tokens"][:1])
    tokens = torch.from_numpy(encoder_peers.rows("bert-labels")["tokens"][:1]).long()
    theirs = again.eval()(tokens).last_hidden_state.detach().numpy()
    close(mine, theirs, TOLERANCE, scale=theirs.std())
