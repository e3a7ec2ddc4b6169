"""T5 beyond `test_live.py`: buckets, wrong programs and wrong batches, which must be seen, generated text, folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fm_jax.generate import beam, decode
from fm_jax.ops.positions import Buckets, bucket
from tests.close import close
from tests.parity import convert
from tests.parity.comparison import TOLERANCE, expected, shared
from tests.parity.language import t5


@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 16), (64, 256)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_transformers_at_every_offset(count, distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = np.arange(-2048, 2049)
    want = T5Attention._relative_position_bucket(torch.from_numpy(offsets), bidirectional, count, distance).numpy()
    for run in (bucket, jax.jit(bucket, static_argnums=1, static_argnames="bidirectional")):
        got = run(jnp.asarray(offsets), Buckets(count, distance), bidirectional=bidirectional)
        np.testing.assert_array_equal(got, want)


def _put(params, path, change):
    """Return the parameters with `change` made to the node at `path`."""
    first, *rest = path.split("/")
    return {**params, first: _put(params[first], "/".join(rest), change) if rest else change(params[first])}


def _mean_norm(monkeypatch):
    """Let every RMSNorm take the mean off first."""
    from fm_jax.layers import norm

    plain = norm.Norm.__call__
    monkeypatch.setattr(norm.Norm, "__call__", lambda self, x: plain(self, x - x.mean(axis=-1, keepdims=True)))


def _both_ways(monkeypatch, bidirectional):
    """Let both stacks sort distances in the same way."""
    from fm_jax.layers import relative

    one = lambda offset, cfg, **_: bucket(offset, cfg, bidirectional=bidirectional)  # noqa: E731
    monkeypatch.setattr(relative, "bucket", one)


def _first_layer_only(monkeypatch):
    """Add the bias in the first layer of a stack alone, as if each layer had a table and theirs were empty."""
    from fm_jax.models.language import encoder_decoder

    plain = encoder_decoder.stack

    def stack(block, length, remat):
        class Layers(encoder_decoder.nn.Module):
            cfg: encoder_decoder.Config
            causal: bool

            @encoder_decoder.nn.compact
            def __call__(self, x, tap, shared):
                where, memory, length_of = shared
                first = jnp.arange(length) == 0
                bias = where.bias[None] * first.reshape(-1, 1, 1, 1, 1)

                class Own(encoder_decoder.Block):
                    def __call__(self, x, layered, shared):
                        where, *rest = shared
                        return super().__call__(x, layered[0], (where._replace(bias=layered[1]), *rest))

                scanned = plain(Own, length, remat)(self.cfg, self.causal, name="scan")
                return scanned(x, (tap, bias), (where, memory, length_of))

        return Layers

    monkeypatch.setattr(encoder_decoder, "stack", stack)


CODE = {
    "RMS with mean": _mean_norm,
    "decoder sorts both ways": lambda patch: _both_ways(patch, True),
    "encoder sorts one way": lambda patch: _both_ways(patch, False),
}


@pytest.mark.parametrize("mutant", CODE)
def test_a_wrong_program_is_seen(mutant, monkeypatch):
    model, params, peer = expected("t5")
    CODE[mutant](monkeypatch)
    _seen(mutant, shared("t5", t5.ours(model, t5.batch("t5"))(params), peer))


def test_a_bias_in_the_first_layer_alone_is_seen(monkeypatch):
    model, params, peer = expected("t5")
    _first_layer_only(monkeypatch)
    lower = lambda node: {"scan": node}  # noqa: E731
    gradients = peer["gradients"]
    for side in ("encoder", "decoder"):
        params, gradients = (_put(leaves, f"{side}/blocks", lower) for leaves in (params, gradients))
    peer = {**peer, "gradients": gradients}
    _seen("first layer alone", shared("t5", t5.ours(model, t5.batch("t5"))(params), peer))


@pytest.mark.parametrize(
    ("mutant", "changed"),
    [
        ("another start", lambda rows: {"tokens": np.where(np.arange(t5.TIME) == 0, 1, rows["tokens"])}),
        ("not shifted", lambda rows: {"tokens": rows["targets"]}),
        ("source's padding seen", lambda rows: {"source_length": np.full(3, t5.SOURCE, np.int32)}),
        ("a source one token short", lambda rows: {"source_length": rows["source_length"] - 1}),
    ],
)
def test_a_wrong_batch_is_seen(mutant, changed):
    model, params, peer = expected("t5")
    rows = t5.batch("t5")
    _seen(mutant, shared("t5", t5.ours(model, {**rows, **changed(rows)})(params), peer))


def _seen(mutant, found):
    print(mutant, {key: f"{value:.1e}" for key, value in found.items()})
    assert found["logits"] > 3 * TOLERANCE, found
    assert found["gradients"] > TOLERANCE, found


NEW = 12


def generating(name, **options):
    """Return the peer, ours, and an end token that some of the peer's texts hold, and not at once."""
    peer = t5.peer(name)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():  # as it was, the last token is said again and again
            parameter.mul_(0.25 if "shared" in name else 3.0 if "decoder" in name and "norm" not in name else 1.0)
    model = convert.module(peer.config.to_dict())
    free = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    plain = peer.generate(**t5.sources(), **free).numpy()[:, 1:]
    texts = [set(row.tolist()) for row in plain]
    ends = set.union(*texts) - set.intersection(*texts) - set(plain[:, :2].ravel().tolist())
    return peer, model, convert.params(model, t5.tensors(peer)), min(ends)


def _arguments():
    rows = t5.batch("t5")
    start = np.zeros((len(t5.SOURCES), 1), np.int32), np.ones(len(t5.SOURCES), np.int32)
    return start, {"source": rows["source"], "source_length": rows["source_length"]}


@pytest.mark.parametrize("name", ["t5", "v1.1"])
def test_greedy_text_is_transformers(name):
    peer, model, params, end = generating(name)
    want = peer.generate(**t5.sources(), max_new_tokens=NEW, do_sample=False, eos_token_id=end).numpy()[:, 1:]
    start, context = _arguments()
    out = decode.generate(model, params, *start, max_new_tokens=NEW, context=context, eos_id=end)
    np.testing.assert_array_equal(out.tokens[:, : want.shape[1]], want)
    assert 0 < np.asarray(out.finished).sum() < 3 and len(np.unique(want)) > 2


@pytest.mark.parametrize("name", ["t5", "v1.1"])
@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (0.0, True), (2.0, "never")])
def test_beams_are_transformers(name, penalty, early):
    options = {"num_beams": 4, "length_penalty": penalty, "early_stopping": early}
    peer, model, params, end = generating(name, **options)
    want = peer.generate(
        **t5.sources(), **options, max_new_tokens=NEW, do_sample=False, eos_token_id=end,
        num_return_sequences=4, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    start, context = _arguments()
    cfg = beam.Config(**options)
    out = beam.search(model, params, *start, max_new_tokens=NEW, context=context, cfg=cfg, eos_id=end)
    tokens = want.sequences.numpy()[:, 1:]
    lengths = np.asarray(out.lengths).reshape(12, 1)
    inside = np.arange(tokens.shape[1]) < lengths  # beyond it transformers repeats the end token, ours pads
    assert (tokens[np.arange(12), np.minimum(lengths[:, 0], tokens.shape[1]) - 1] == end).any()
    assert np.isin(tokens[~inside], (0, end)).all()
    np.testing.assert_array_equal(
        np.where(inside, np.asarray(out.tokens).reshape(12, NEW)[:, : tokens.shape[1]], 0), np.where(inside, tokens, 0)
    )
    close(np.asarray(out.scores).ravel(), want.sequences_scores.numpy(), 1e-4)


@pytest.mark.parametrize("name", t5.CASES)
def test_a_folder_of_transformers_loads_and_one_of_ours_opens_there(name, tmp_path):
    """Twice through: transformers 5 rewrites what the config says of the head, and both forms must be read."""
    import transformers

    from fm_jax.hub import pretrained

    peer = t5.peer(name)
    peer.save_pretrained(tmp_path / "a")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a", attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "b")
    want = t5.theirs(name, peer)["outputs"]["logits"]
    rows = t5.batch("t5")
    inside = rows["weights"] > 0
    for folder in ("a", "b"):
        found = pretrained.load(tmp_path / folder)
        inputs = rows["tokens"], rows["source"], rows["source_length"]
        logits = np.asarray(jax.jit(found.module.apply)({"params": found.params}, *inputs))
        close(logits[inside], want[inside], TOLERANCE, scale=want.std())
    pretrained.save(tmp_path / "ours", found.module, found.params)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    close(t5.theirs(name, again)["outputs"]["logits"], want)
    assert pretrained.load(tmp_path / "ours").module == found.module
