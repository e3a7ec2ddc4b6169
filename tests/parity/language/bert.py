"""BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA and ALBERT: a tiny config.json of every form."""

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
}  # fmt: skip

FEW = ("bert-pretraining", "roberta", "distilbert", "albert")  # one of each way of naming and storing
