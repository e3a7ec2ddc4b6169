"""Encoders and their heads beyond `test_live.py`: wrong programs, which must be seen, and folders."""

import jax
import numpy as np
import pytest
import torch
import transformers

from fm_jax.hub import pretrained
from fm_jax.models.language import encoder, masked_lm
from tests.close import close, small
from tests.parity.changes import part
from tests.parity.comparison import TOLERANCE, expected, in_our_terms, shared
from tests.parity.language import bert


def differs(name, change=lambda m, p: (m, p), *, scale=1.0):
    """Return the distances of a changed model or program, where the peer's embeddings were made `scale` as large."""
    peer = bert.peer(name)
    for table in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        getattr(peer.base_model.embeddings, table).weight.data *= scale
    module, params, answer = in_our_terms(name, peer)
    module, params = change(module, params)
    found = shared(name, bert.ours(module, bert.batch(name))(params), answer)
    return {key: value for key, value in found.items() if key != "loss"}


def _seen(found):
    """Every output tells a mutant from rounding, and so does the gradient, which some of them move less."""
    outputs = [error for name, error in found.items() if name != "gradients"]
    assert min(outputs) > 3 * TOLERANCE and found["gradients"] > TOLERANCE, found


def test_a_wrong_epsilon_is_seen_where_variances_are_small():
    """At unit scale 1e-12 and 1e-5 are 5e-6 apart; with embeddings of 1e-2 the first norm tells them apart."""
    right = differs("bert-words", scale=1e-2)
    wrong = differs(
        "bert-words",
        lambda m, p: (part(m, "norm", epsilon=1e-5), p),
        scale=1e-2,
    )
    small(max(right.values()), TOLERANCE)
    _seen(wrong)


def test_padding_that_is_attended_to_is_seen(monkeypatch):
    real = masked_lm.MaskedLM.hidden
    monkeypatch.setattr(
        masked_lm.MaskedLM, "hidden", lambda self, tokens, **where: real(self, tokens, **{**where, "segments": None})
    )
    found = differs("bert-words")
    _seen(found)


def test_no_norm_after_the_embedding_is_seen(monkeypatch):
    class Same(encoder.Norm):
        def __call__(self, x):
            super().__call__(x)
            return x

    real = encoder.Norm
    monkeypatch.setattr(encoder, "Norm", lambda cfg, dtype, name=None: (real if name else Same)(cfg, dtype, name=name))
    found = differs("bert-words")
    assert found["words"] > 3 * TOLERANCE, found


@pytest.mark.parametrize("name", bert.CASES)
def test_folders_go_both_ways(name, tmp_path):
    """What transformers saved opens here, and what is saved here opens there, with equal numbers."""
    peer = bert.peer(name)
    peer.save_pretrained(tmp_path / "theirs")
    found = pretrained.load(tmp_path / "theirs")
    model, params, _ = expected(name)
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
    model, params, _ = expected("bert-labels")
    pretrained.save(tmp_path / "bare", model.backbone, params["backbone"])
    again, said = transformers.BertModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(said["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}  # there is none to give
    assert not said["unexpected_keys"]
    mine = model.backbone.apply({"params": params["backbone"]}, bert.batch("bert-labels")["tokens"][:1])
    tokens = torch.from_numpy(bert.batch("bert-labels")["tokens"][:1]).long()
    theirs = again.eval()(tokens).last_hidden_state.detach().numpy()
    close(mine, theirs, TOLERANCE, scale=theirs.std())
