"""Our T5 against live transformers: logits, every block's output on both sides, loss, gradients, and generated text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="the live parity tests need torch: pip install torch")
pytest.importorskip("transformers", reason="the live parity tests need transformers: pip install transformers")

from fm_jax.generate import beam, decode  # noqa: E402
from fm_jax.ops.positions import Buckets, bucket  # noqa: E402
from tests.close import close, small  # noqa: E402
from tests.parity import convert, peers, t5_peers, t5_task  # noqa: E402

TOLERANCE = 1e-4  # of the peer's standard deviation, in float32 on CPU


def expected(name, *, perturbed):
    peer = t5_peers.build(name)
    if perturbed:
        peers.perturb(peer, seed=0)
    model = convert.module(peer.config.to_dict())
    return model, convert.params(model, peers.tensors(peer)), peers.in_our_terms(t5_peers.theirs(peer), model)


@pytest.mark.parametrize("name", t5_peers.CASES)
def test_our_t5_computes_what_transformers_does(name, record_property):
    compute = None
    for perturbed in (False, True):
        model, params, peer = expected(name, perturbed=perturbed)
        compute = compute or t5_task.ours(model)
        found = t5_peers.distances(compute(params), peer)
        record_property("perturbed" if perturbed else "fresh", found)
        print(name, "perturbed" if perturbed else "fresh", {key: f"{value:.1e}" for key, value in found.items()})
        small(max(found.values()), TOLERANCE)


@pytest.mark.parametrize(("count", "distance"), [(32, 128), (8, 16), (64, 256)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_transformers_at_every_offset(count, distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = np.arange(-2048, 2049)
    want = T5Attention._relative_position_bucket(torch.from_numpy(offsets), bidirectional, count, distance).numpy()
    for run in (bucket, jax.jit(bucket, static_argnums=1, static_argnames="bidirectional")):
        got = run(jnp.asarray(offsets), Buckets(count, distance), bidirectional=bidirectional)
        np.testing.assert_array_equal(got, want)


def _attend(model, **changes):
    return _change(model, attention=replace(model.cfg.attention, **changes))


def _change(model, **changes):
    return model.clone(cfg=replace(model.cfg, **changes))


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


# name -> (case, change of (model, params))
MUTANTS = {
    "attention scaled": ("t5", lambda m, p: (_attend(m, scale=0.0), p)),
    "tied head not scaled": ("t5", lambda m, p: (_change(m, scale_head=False), p)),
    "own head scaled": ("v1.1", lambda m, p: (_change(m, scale_head=True), p)),
    "tied head of v1.1 scaled": ("v1.1-tied", lambda m, p: (_change(m, scale_head=True), p)),
    "erf instead of tanh GELU": ("v1.1", lambda m, p: (_change(m, mlp=replace(m.cfg.mlp, activation="gelu")), p)),
    "gate and up swapped": (
        "v1.1",
        lambda m, p: (m, _put(p, "encoder/blocks/mlp", lambda n: {**n, "gate": n["up"], "up": n["gate"]})),
    ),
    # 1e-5 moves the states by 6e-5 of their deviation: a residual stream of unit embeddings dwarfs it
    "epsilon 1e-4": ("t5", lambda m, p: (_change(m, norm=replace(m.cfg.norm, epsilon=1e-4)), p)),
    "buckets of another number": ("t5", lambda m, p: (_change(m, buckets=Buckets(8, 24)), p)),
    "tables of encoder and decoder swapped": (
        "t5",
        lambda m, p: (
            m,
            {
                **p,
                "encoder": {**p["encoder"], "bias": p["decoder"]["bias"]},
                "decoder": {**p["decoder"], "bias": p["encoder"]["bias"]},
            },
        ),
    ),
    "cross queries and keys swapped": (
        "t5", lambda m, p: (m, _put(p, "decoder/blocks/cross", lambda n: {**n, "q": n["k"], "k": n["q"]}))
    ),
    "a square kernel not transposed": (
        "t5-uneven",
        lambda m, p: (m, _put(p, "encoder/blocks/attn/o/kernel", lambda w: jnp.swapaxes(w, 1, 2))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_variant_is_seen(mutant):
    name, change = MUTANTS[mutant]
    model, params, peer = expected(name, perturbed=True)
    model, params = change(model, params)
    _seen(mutant, t5_peers.distances(t5_task.ours(model)(params), peer))


CODE = {
    "RMS with mean": _mean_norm,
    "decoder sorts both ways": lambda patch: _both_ways(patch, True),
    "encoder sorts one way": lambda patch: _both_ways(patch, False),
}


@pytest.mark.parametrize("mutant", CODE)
def test_a_wrong_program_is_seen(mutant, monkeypatch):
    model, params, peer = expected("t5", perturbed=True)
    CODE[mutant](monkeypatch)
    _seen(mutant, t5_peers.distances(t5_task.ours(model)(params), peer))


def test_a_bias_in_the_first_layer_alone_is_seen(monkeypatch):
    model, params, peer = expected("t5", perturbed=True)
    _first_layer_only(monkeypatch)
    lower = lambda node: {"scan": node}  # noqa: E731
    for side in ("encoder", "decoder"):
        params = _put(params, f"{side}/blocks", lower)
        peer["gradients"] = _put(peer["gradients"], f"{side}/blocks", lower)
    _seen("first layer alone", t5_peers.distances(t5_task.ours(model)(params), peer))


@pytest.mark.parametrize(
    ("mutant", "changed"),
    [
        ("another start", lambda rows: {"tokens": np.where(np.arange(t5_task.TIME) == 0, 1, rows["tokens"])}),
        ("not shifted", lambda rows: {"tokens": rows["targets"]}),
        ("source's padding seen", lambda rows: {"source_length": np.full(3, t5_task.SOURCE, np.int32)}),
        ("a source one token short", lambda rows: {"source_length": rows["source_length"] - 1}),
    ],
)
def test_a_wrong_batch_is_seen(mutant, changed):
    model, params, peer = expected("t5", perturbed=True)
    rows = t5_task.batch()
    _seen(mutant, t5_peers.distances(t5_task.ours(model, {**rows, **changed(rows)})(params), peer))


def _seen(mutant, found):
    print(mutant, {key: f"{value:.1e}" for key, value in found.items()})
    assert found["logits"] > 3 * TOLERANCE, found
    assert found["gradients"] > TOLERANCE, found


NEW = 12


def generating(name, **options):
    """Return the peer, ours, and an end token that some of the peer's texts hold, and not at once."""
    peer = t5_peers.build(name)
    peers.perturb(peer, seed=0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():  # as it was, the last token is said again and again
            parameter.mul_(0.25 if "shared" in name else 3.0 if "decoder" in name and "norm" not in name else 1.0)
    model = convert.module(peer.config.to_dict())
    free = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    plain = peer.generate(**t5_peers.sources(), **free).numpy()[:, 1:]
    texts = [set(row.tolist()) for row in plain]
    ends = set.union(*texts) - set.intersection(*texts) - set(plain[:, :2].ravel().tolist())
    return peer, model, convert.params(model, peers.tensors(peer)), min(ends)


def _arguments():
    rows = t5_task.batch()
    start = np.zeros((len(t5_task.SOURCES), 1), np.int32), np.ones(len(t5_task.SOURCES), np.int32)
    return start, {"source": rows["source"], "source_length": rows["source_length"]}


@pytest.mark.parametrize("name", ["t5", "v1.1"])
def test_greedy_text_is_transformers(name):
    peer, model, params, end = generating(name)
    want = peer.generate(**t5_peers.sources(), max_new_tokens=NEW, do_sample=False, eos_token_id=end).numpy()[:, 1:]
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
        **t5_peers.sources(), **options, max_new_tokens=NEW, do_sample=False, eos_token_id=end,
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


@pytest.mark.parametrize("name", t5_peers.CASES)
def test_a_folder_of_transformers_loads_and_one_of_ours_opens_there(name, tmp_path):
    """Twice through: transformers 5 rewrites what the config says of the head, and both forms must be read."""
    import transformers

    from fm_jax.hub import pretrained

    peer = t5_peers.build(name)
    peers.perturb(peer, seed=0)
    peer.save_pretrained(tmp_path / "a")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "a", attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "b")
    want = t5_peers.theirs(peer)
    rows = t5_task.batch()
    inside = rows["weights"] > 0
    for folder in ("a", "b"):
        found = pretrained.load(tmp_path / folder)
        inputs = rows["tokens"], rows["source"], rows["source_length"]
        logits = np.asarray(jax.jit(found.module.apply)({"params": found.params}, *inputs))
        close(logits[inside], want["logits"][inside], TOLERANCE, scale=want["logits"].std())
    pretrained.save(tmp_path / "ours", found.module, found.params)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    close(t5_peers.theirs(again)["logits"], want["logits"])
    assert pretrained.load(tmp_path / "ours").module == found.module
