"""T5 and mT5: a tiny config.json of every form."""


def _t5(kind="t5", stem="T5", **more):
    return {
        "model_type": kind, "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "is_encoder_decoder": True,
        "architectures": [f"{stem}ForConditionalGeneration"], **more,
    }  # fmt: skip


FORMS = {
    "t5": _t5(),
    "t5-v1.1": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _t5("mt5", "MT5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}  # fmt: skip

FEW = ("t5",)  # one of each way of naming and storing
