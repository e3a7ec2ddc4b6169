"""BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA and ALBERT: a tiny config.json of every form, and what live torch is
compared on, heads included."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.layers.tap import Tap
from fm_jax.models.language.classifier import Classifier
from fm_jax.models.language.masked_lm import MaskedLM
from fm_jax.models.language.span import SpanFinder
from fm_jax.objectives import classify, masked_lm, span, tag
from tests.parity import torch_models
from tests.parity.changes import change, edit, part, swap, turned
from tests.parity.labels import LABELS

_distilbert = {
    "model_type": "distilbert", "vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20,
    "max_position_embeddings": 32, "architectures": ["DistilBertForMaskedLM"],
}  # fmt: skip


def _bert(kind="bert", stem="Bert", task="ForMaskedLM", **more):
    return {
        "model_type": kind, "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 20, "max_position_embeddings": 32, "architectures": [stem + task], **more,
    }  # fmt: skip


FORMS = {
    "bert-pretraining": _bert(task="ForPreTraining"),
    "bert-words": _bert(hidden_act="relu"),
    "bert-base": _bert(task="Model"),
    "bert-labels": _bert(task="ForSequenceClassification", **LABELS),
    "bert-tags": _bert(task="ForTokenClassification", **LABELS),
    "bert-span": _bert(task="ForQuestionAnswering"),
    "roberta": _bert("roberta", "Roberta", max_position_embeddings=34, type_vocab_size=1, pad_token_id=1),
    "xlm-roberta-labels": _bert("xlm-roberta", "XLMRoberta", "ForSequenceClassification", max_position_embeddings=34,
                                type_vocab_size=1, pad_token_id=1, **LABELS),
    "distilbert": _distilbert,
    "electra-replaced": _bert("electra", "Electra", "ForPreTraining", embedding_size=8),
    "albert": _bert("albert", "Albert", embedding_size=8),
    "albert-groups": _bert("albert", "Albert", embedding_size=8, num_hidden_groups=2, inner_group_num=2),
}  # fmt: skip

FEW = ("bert-pretraining", "roberta", "distilbert", "albert", "albert-groups")  # one of each way of naming and storing

VOCAB, TIME, LENGTHS, PLACES, CLASSES = 40, 24, (24, 15, 6), 3, 5
INSIDE = np.arange(TIME) < np.array(LENGTHS)[:, None]
TOLERANCE = 5e-5  # of the peer's standard deviation, in float32 on CPU: ten times what was measured
INSIDES = (INSIDE,)

_bert_peer = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 28,
    "max_position_embeddings": 32,
}  # fmt: skip
_roberta_peer = {
    **_bert_peer,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
_distilbert_peer = {
    "vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 28, "max_position_embeddings": 32,
}  # fmt: skip
_electra_peer = {**_bert_peer, "embedding_size": 8}
_albert_peer = {**_electra_peer, "num_hidden_layers": 3}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-pretraining": ("Bert", "ForPreTraining", _bert_peer),
    "bert-words": ("Bert", "ForMaskedLM", {**_bert_peer, "num_attention_heads": 4}),
    "bert-relu": ("Bert", "ForMaskedLM", {**_bert_peer, "hidden_act": "relu"}),
    "bert-labels": ("Bert", "ForSequenceClassification", _bert_peer),
    "bert-tags": ("Bert", "ForTokenClassification", _bert_peer),
    "bert-span": ("Bert", "ForQuestionAnswering", _bert_peer),
    "roberta-words": ("Roberta", "ForMaskedLM", _roberta_peer),
    "roberta-labels": ("Roberta", "ForSequenceClassification", _roberta_peer),
    "xlm-roberta-tags": ("XLMRoberta", "ForTokenClassification", _roberta_peer),
    "distilbert-words": ("DistilBert", "ForMaskedLM", _distilbert_peer),
    "distilbert-labels": ("DistilBert", "ForSequenceClassification", _distilbert_peer),
    "distilbert-span": ("DistilBert", "ForQuestionAnswering", _distilbert_peer),
    "electra-words": ("Electra", "ForMaskedLM", _electra_peer),
    "electra-replaced": ("Electra", "ForPreTraining", _electra_peer),
    "electra-wide-replaced": ("Electra", "ForPreTraining", {**_electra_peer, "embedding_size": 16}),
    "electra-wide-words": ("Electra", "ForMaskedLM", {**_electra_peer, "embedding_size": 16}),
    "electra-labels": ("Electra", "ForSequenceClassification", _electra_peer),
    "albert-words": ("Albert", "ForMaskedLM", _albert_peer),
    "albert-pretraining": ("Albert", "ForPreTraining", _albert_peer),
    "albert-groups": ("Albert", "ForMaskedLM", {**_albert_peer, "num_hidden_groups": 2}),
    "albert-inner": ("Albert", "ForMaskedLM", {**_albert_peer, "num_hidden_groups": 2, "inner_group_num": 2}),
    "albert-labels": ("Albert", "ForSequenceClassification", _albert_peer),
}

tensors = torch_models.tensors


def peer(name: str, *, moved: bool = True) -> Any:
    """Return the peer in evaluation mode, freshly initialised or moved."""
    import torch
    import transformers

    family, task, options = CASES[name]
    torch.manual_seed(0)
    labelled = {"num_labels": CLASSES} if task in ("ForSequenceClassification", "ForTokenClassification") else {}
    cfg = getattr(transformers, f"{family}Config")(**options, **labelled)
    cfg.architectures = [family + task]
    cfg._attn_implementation = "eager"
    model = getattr(transformers, family + task)(cfg).eval()
    return torch_models.perturb(model) if moved else model


def asked(name: str) -> dict[str, int]:
    """Return what `rows` is to be told of a case; an ELECTRA's labels say which tokens were replaced."""
    options = CASES[name][2]
    labels = 2 if name.endswith("replaced") else CLASSES
    return {"pad": options.get("pad_token_id", 0), "num_types": options.get("type_vocab_size", 2), "labels": labels}


def rows(pad: int = 0, num_types: int = 2, labels: int = CLASSES) -> dict[str, np.ndarray]:
    """Return right-padded rows with what every task asks of them; the same number of places in each row.

    No token is 0 or 1: torch gives a padding id's row no gradient, wherever the id stands.
    """
    rng = np.random.default_rng(1)
    rows, length = len(LENGTHS), np.array(LENGTHS, np.int32)
    tokens = np.where(INSIDE, rng.integers(2, VOCAB, (rows, TIME)), pad).astype(np.int32)
    places = np.stack([np.sort(rng.choice(n, PLACES, replace=False)) for n in LENGTHS]).astype(np.int32)
    start = (rng.integers(0, length)).astype(np.int32)
    return {
        "tokens": tokens,
        "length": length,
        "types": (INSIDE & (np.arange(TIME) >= length[:, None] // 3)).astype(np.int32) * (num_types > 1),
        "weights": INSIDE.astype(np.float32),
        "places": places,
        "targets": rng.integers(2, VOCAB, (rows, PLACES)).astype(np.int32),
        "not_next": np.array([1, 0, 0], np.int32),
        "label": rng.integers(0, labels, rows).astype(np.int32),
        "labels": rng.integers(0, labels, (rows, TIME)).astype(np.int32),
        "start": start,
        "end": (start + rng.integers(0, length - start)).astype(np.int32),
    }


def batch(name: str) -> dict[str, np.ndarray]:
    """Return the rows of a case."""
    return rows(**asked(name))


def theirs(name: str, model: Any) -> dict[str, Any]:
    """Return the peer's answer: outputs, states [1 + L, B, T, D], loss, gradients by name."""
    import torch

    family, task, _ = CASES[name]
    fields = {key: torch.from_numpy(field) for key, field in batch(name).items()}
    given = {"input_ids": fields["tokens"].long(), "attention_mask": torch.from_numpy(INSIDE.astype(np.int64))}
    if family != "DistilBert":
        given["token_type_ids"] = fields["types"].long()
    model.zero_grad()
    with torch_models.watched(_layers(model)) as states:
        out = model(**given, **_labels(name, fields))
    outputs, loss = _outputs(task, out), out.loss
    if task == "ForQuestionAnswering":
        # theirs counts padding among the places where an answer may lie: the loss is made from their logits here
        masked = [scores.masked_fill(~torch.from_numpy(INSIDE), -1e30) for scores in outputs.values()]
        asked = (fields["start"].long(), fields["end"].long())
        parts = [torch.nn.functional.cross_entropy(*pair) for pair in zip(masked, asked, strict=True)]
        loss = sum(parts) / 2
    loss.backward()
    return {
        "outputs": {key: value.detach().numpy() for key, value in outputs.items()},
        "states": {"encoder": torch_models.stacked(states)},
        "loss": loss.item(),
        "gradients": torch_models.gradients(model),
    }


def _layers(model: Any) -> list[Any]:
    stem = model.base_model
    if hasattr(stem, "transformer"):
        return list(stem.transformer.layer)
    if hasattr(stem.encoder, "albert_layer_groups"):
        return [layer for group in stem.encoder.albert_layer_groups for layer in group.albert_layers]
    return list(stem.encoder.layer)


def _labels(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return what the peer wants to be told of the answers."""
    import torch

    family, task, _ = CASES[name]
    if task == "ForQuestionAnswering":
        return {"start_positions": fields["start"].long(), "end_positions": fields["end"].long()}
    if task == "ForSequenceClassification":
        return {"labels": fields["label"].long()}
    if task == "ForTokenClassification" or (task == "ForPreTraining" and family == "Electra"):
        ignored = -100 if task == "ForTokenClassification" else 0
        return {"labels": fields["labels"].long().masked_fill(~torch.from_numpy(INSIDE), ignored)}
    words = torch.full(fields["tokens"].shape, -100, dtype=torch.long)
    words.scatter_(1, fields["places"].long(), fields["targets"].long())
    assert (words >= 0).sum() == PLACES * len(words)
    if task == "ForMaskedLM":
        return {"labels": words}
    pair = "sentence_order_label" if family == "Albert" else "next_sentence_label"
    return {"labels": words, pair: fields["not_next"].long()}


def _outputs(task: str, out: Any) -> dict[str, Any]:
    """Return the peer's outputs under our names."""
    if task == "ForQuestionAnswering":
        return {"start": out.start_logits, "end": out.end_logits}
    if task == "ForMaskedLM":
        return {"words": out.logits}
    if hasattr(out, "prediction_logits"):
        pair = out.sop_logits if "sop_logits" in out else out.seq_relationship_logits
        return {"words": out.prediction_logits, "pair": pair}
    return {"out": out.logits.unsqueeze(-1) if task == "ForPreTraining" else out.logits}


def ours(model: Any, rows: Mapping[str, np.ndarray]) -> Any:
    """Return a jitted params -> our answer."""
    inputs = ("tokens", "length", "types") if model.backbone.cfg.num_types else ("tokens", "length")
    types = jnp.asarray(rows["types"]) if model.backbone.cfg.num_types else None
    loss_fn, fields = _loss(model, inputs), {name: jnp.asarray(field) for name, field in rows.items()}
    if isinstance(model, Classifier | SpanFinder):
        fields["weights"] = jnp.ones(len(LENGTHS))
    if types is None:
        fields.pop("types")
    if not isinstance(model, MaskedLM) or not model.next_sentence:
        fields.pop("not_next")
    tap = Tap(read=("embed", "block.resid_post"))

    def forward(params: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        variables, options = {"params": params}, {"tap": tap, "mutable": ["taps"]}
        if isinstance(model, MaskedLM):
            where = {"types": types, "segments": jnp.asarray(INSIDE, jnp.int32)}
            hidden, kept = model.apply(variables, fields["tokens"], **where, **options, method="hidden")
            outputs = {"words": model.apply(variables, hidden, method="logits")}
            if model.next_sentence:
                outputs["pair"] = model.apply(variables, hidden, method="pair")
        else:
            given = (fields["tokens"], fields["length"], types)
            found, kept = model.apply(variables, *given, **options)
            outputs = dict(zip(("start", "end"), found, strict=True)) if isinstance(found, tuple) else {"out": found}
        return outputs, {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept["taps"])}

    @jax.jit
    def compute(params: Any) -> dict[str, Any]:
        outputs, read = forward(params)

        def mean(params: Any) -> jax.Array:
            total, weight, *_ = loss_fn(params, fields, None)
            return total / weight

        loss, gradients = jax.value_and_grad(mean)(params)
        states = jnp.concatenate([read["site:embed"][None], read["site:block.resid_post"]])
        return {"outputs": outputs, "states": {"encoder": states}, "loss": loss, "gradients": gradients}

    return compute


def _loss(model: Any, inputs: tuple[str, ...]) -> Any:
    if isinstance(model, MaskedLM):
        return masked_lm.masked_lm(model.apply, _given)
    if isinstance(model, SpanFinder):
        return span.span(model.apply, inputs)
    if isinstance(model, Classifier):
        return classify.softmax(model.apply, inputs)
    return (tag.replaced if model.hidden != "none" else tag.tag)(model.apply, inputs)


def _given(_: jax.Array, rows: Mapping[str, jax.Array]) -> masked_lm.Masked:
    """Ask for the batch's own places, and take nothing out."""
    return masked_lm.Masked(rows["tokens"], rows["places"], rows["targets"], jnp.ones(rows["places"].shape))


MUTANTS = {
    "tanh instead of erf GELU": ("bert-words", lambda m, p: (part(m, "mlp", activation="gelu_tanh"), p)),
    "erf instead of tanh GELU": ("albert-words", lambda m, p: (part(m, "mlp", activation="gelu"), p)),
    "q and k swapped": ("bert-words", lambda m, p: (m, swap(p, "attn/q/", "attn/k/"))),
    "k and v swapped": ("distilbert-words", lambda m, p: (m, swap(p, "attn/k/", "attn/v/"))),
    "a square kernel not transposed": ("electra-replaced", lambda m, p: (m, edit(p, "attn/o/kernel", turned))),
    "the two norms of a layer swapped": ("albert-words", lambda m, p: (m, swap(p, "norm_attn", "norm_mlp"))),
    "the embedding's norm without its scale": (
        "electra-words",
        lambda m, p: (m, edit(p, "norm_embed/scale", np.ones_like)),
    ),
    "positions one off": ("roberta-words", lambda m, p: (change(m, position_offset=1, max_length=33), p)),
    "token types lost": ("bert-labels", lambda m, p: (m, edit(p, "backbone/types", np.zeros_like))),
    "one layer fewer": ("albert-pretraining", lambda m, p: (change(m, num_layers=2), p)),
    "mean instead of first": ("roberta-labels", lambda m, p: (m.clone(pool="mean"), p)),
    "groups of copies in another order": ("albert-inner", lambda m, p: (m, swap(p, "block/1/", "block/2/"))),
    "the layers of a group one after the other": ("albert-inner", lambda m, p: (change(m, shared=(4, 1)), p)),
    "a pooler with gelu": ("bert-labels", lambda m, p: (m.clone(hidden="gelu"), p)),
    "a pooler with relu": ("albert-labels", lambda m, p: (m.clone(hidden="relu"), p)),
    "a discriminator with relu": ("electra-replaced", lambda m, p: (m.clone(hidden="relu"), p)),
    "the words' bias lost": ("bert-words", lambda m, p: (m, edit(p, "head/bias", np.zeros_like))),
    "the head's norm lost": (
        "distilbert-words",
        lambda m, p: (m, edit(p, "head/norm/scale", np.ones_like)),
    ),
}  # fmt: skip
