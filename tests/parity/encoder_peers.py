"""Tiny encoders of transformers with their heads, and what they compute on the batch of `encoder_task`."""

from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import encoder_task
from tests.parity.encoder_task import INSIDE, LABELS, PLACES, VOCAB

_bert = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 28,
    "max_position_embeddings": 32,
}  # fmt: skip
_roberta = {**_bert, "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
_distilbert = {
    "vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 28, "max_position_embeddings": 32,
}  # fmt: skip
_electra = {**_bert, "embedding_size": 8}
_albert = {**_electra, "num_hidden_layers": 3}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-pretraining": ("Bert", "ForPreTraining", _bert),
    "bert-words": ("Bert", "ForMaskedLM", {**_bert, "num_attention_heads": 4}),
    "bert-relu": ("Bert", "ForMaskedLM", {**_bert, "hidden_act": "relu"}),
    "bert-labels": ("Bert", "ForSequenceClassification", _bert),
    "bert-tags": ("Bert", "ForTokenClassification", _bert),
    "bert-span": ("Bert", "ForQuestionAnswering", _bert),
    "roberta-words": ("Roberta", "ForMaskedLM", _roberta),
    "roberta-labels": ("Roberta", "ForSequenceClassification", _roberta),
    "xlm-roberta-tags": ("XLMRoberta", "ForTokenClassification", _roberta),
    "distilbert-words": ("DistilBert", "ForMaskedLM", _distilbert),
    "distilbert-labels": ("DistilBert", "ForSequenceClassification", _distilbert),
    "distilbert-span": ("DistilBert", "ForQuestionAnswering", _distilbert),
    "electra-words": ("Electra", "ForMaskedLM", _electra),
    "electra-replaced": ("Electra", "ForPreTraining", _electra),
    "electra-wide-replaced": ("Electra", "ForPreTraining", {**_electra, "embedding_size": 16}),
    "electra-wide-words": ("Electra", "ForMaskedLM", {**_electra, "embedding_size": 16}),
    "electra-labels": ("Electra", "ForSequenceClassification", _electra),
    "albert-words": ("Albert", "ForMaskedLM", _albert),
    "albert-pretraining": ("Albert", "ForPreTraining", _albert),
    "albert-labels": ("Albert", "ForSequenceClassification", _albert),
}


def build(name: str) -> Any:
    """Return the peer, freshly initialised, in evaluation mode."""
    family, task, options = CASES[name]
    torch.manual_seed(0)
    labelled = {"num_labels": LABELS} if task in ("ForSequenceClassification", "ForTokenClassification") else {}
    cfg = getattr(transformers, f"{family}Config")(**options, **labelled)
    cfg.architectures = [family + task]
    cfg._attn_implementation = "eager"
    return getattr(transformers, family + task)(cfg).eval()


def asked(name: str) -> dict[str, int]:
    """Return what `encoder_task.batch` is to be told of a case; an ELECTRA's labels say which tokens were replaced."""
    options = CASES[name][2]
    labels = 2 if name.endswith("replaced") else LABELS
    return {"pad": options.get("pad_token_id", 0), "num_types": options.get("type_vocab_size", 2), "labels": labels}


def rows(name: str) -> dict[str, np.ndarray]:
    """Return the batch of a case."""
    return encoder_task.batch(**asked(name))


def theirs(name: str, model: Any) -> dict[str, Any]:
    """Return the peer's numbers: outputs, hidden states [1 + L, B, T, D], loss, gradients by name."""
    family, task, _ = CASES[name]
    fields = {key: torch.from_numpy(field) for key, field in rows(name).items()}
    given = {"input_ids": fields["tokens"].long(), "attention_mask": torch.from_numpy(INSIDE.astype(np.int64))}
    if family != "DistilBert":
        given["token_type_ids"] = fields["types"].long()
    states: list[torch.Tensor] = []
    layers = _layers(model)
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]) if not states else None)]
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
        )
    model.zero_grad()
    out = model(**given, **_labels(name, fields))
    outputs, loss = _outputs(task, out), out.loss
    if task == "ForQuestionAnswering":
        # theirs counts padding among the places where an answer may lie: the loss is made from their logits here
        masked = [scores.masked_fill(~torch.from_numpy(INSIDE), -1e30) for scores in outputs.values()]
        asked = (fields["start"].long(), fields["end"].long())
        parts = [torch.nn.functional.cross_entropy(*pair) for pair in zip(masked, asked, strict=True)]
        loss = sum(parts) / 2
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        "outputs": {key: value.detach().numpy() for key, value in outputs.items()},
        "states": torch.stack(states).detach().numpy(),
        "loss": loss.item(),
        "gradients": {key: parameter.grad.numpy().copy() for key, parameter in model.named_parameters()},
    }


def _layers(model: Any) -> list[Any]:
    stem = model.base_model
    if hasattr(stem, "transformer"):
        return list(stem.transformer.layer)
    if hasattr(stem.encoder, "albert_layer_groups"):
        return list(stem.encoder.albert_layer_groups[0].albert_layers)
    return list(stem.encoder.layer)


def _labels(name: str, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the peer wants to be told of the answers."""
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


def _outputs(task: str, out: Any) -> dict[str, torch.Tensor]:
    """Return the peer's outputs under our names."""
    if task == "ForQuestionAnswering":
        return {"start": out.start_logits, "end": out.end_logits}
    if task == "ForMaskedLM":
        return {"words": out.logits}
    if hasattr(out, "prediction_logits"):
        pair = out.sop_logits if "sop_logits" in out else out.seq_relationship_logits
        return {"words": out.prediction_logits, "pair": pair}
    return {"out": out.logits.unsqueeze(-1) if task == "ForPreTraining" else out.logits}
