"""The config.json of public checkpoints: names and values of their fields, written compactly, with small vocabularies.

Each stands for the checkpoints of its family: it has every field that those publish, also the old and the odd ones.
Beside each is one change of one field that would be another model.
"""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A published file, and a changed field that must be refused (`said` in the message)."""

    config: dict[str, Any]
    change: dict[str, Any]
    said: str


def _labels(*names: str) -> dict[str, Any]:
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


_SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, **_SUMMARY, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
_BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
_ROBERTA = _BERT | {
    "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1,
    "vocab_size": 50265,
}  # fmt: skip
_DISTILBERT = {
    "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
    "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
    "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522,
}  # fmt: skip
_T5 = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_heads": 8,
    "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "vocab_size": 32128,
    "task_specific_params": {"summarization": {"early_stopping": True, "num_beams": 4, "prefix": "summarize: "}},
}  # fmt: skip
_V11 = _T5 | {
    "classifier_dropout": 0.0, "d_ff": 1024, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu",
    "is_gated_act": True, "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
    "relative_attention_max_distance": 128, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_SMOLLM2 = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
}  # fmt: skip
_LLAMA31 = _LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.40.1", "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_VIT = {
    "architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0, "encoder_stride": 16,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768, "image_size": 224,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "model_type": "vit",
    "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True,
    **_labels("tench, Tinca tinca", "goldfish", "shark"), "transformers_version": "4.13.0.dev0",
}  # fmt: skip
_TOWER = {  # CLIP's first files repeat the settings of generation in both towers
    "add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0, "decoder_start_token_id": None,
    "do_sample": False, "dropout": 0.0, "is_decoder": False, "length_penalty": 1.0, "max_length": 20, "num_beams": 1,
    "output_attentions": False, "pruned_heads": {}, "temperature": 1.0, "top_k": 50, "torchscript": False,
    "transformers_version": "4.16.0.dev0", "use_bfloat16": False,
}  # fmt: skip
_CLIP_TEXT = {
    "attention_dropout": 0.0, "bos_token_id": 0, "hidden_act": "quick_gelu", "hidden_size": 512,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 8, "num_hidden_layers": 12,
    "pad_token_id": 1, "projection_dim": 512, "vocab_size": 49408,
}  # fmt: skip
_CLIP_IMAGE = {
    "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 768, "image_size": 224,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model", "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12,
    "patch_size": 32, "projection_dim": 512,
}  # fmt: skip
_SIGLIP = {
    "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-06, "num_attention_heads": 12, "num_hidden_layers": 12,
}  # fmt: skip

PUBLISHED: dict[str, Published] = {
    "gpt2": Published(_GPT2, {"add_cross_attention": True}, "add_cross_attention"),
    "gpt2-medium": Published(
        _GPT2 | {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True},
        {"n_special": 2}, "n_special",
    ),
    "distilgpt2": Published(
        _GPT2 | {"_num_labels": 1, "n_layer": 6, **_labels("LABEL_0")}, {"n_ctx": 2048}, "n_ctx"
    ),
    "gpt2 without dropout": Published(
        _GPT2 | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "gradient_checkpointing": False, "n_inner": None,
                 "scale_attn_weights": True, "neftune_noise_alpha": 5, "_attn_implementation_autoset": True},
        {"embd_pdrop": 0.1}, "embd_pdrop",
    ),
    "gpt-neo-125m": Published(
        {
            "activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"], "attention_dropout": 0,
            "attention_layers": ["global", "local"] * 6, "attention_types": [[["global", "local"], 6]],
            "bos_token_id": 50256, "embed_dropout": 0, "eos_token_id": 50256, "gradient_checkpointing": False,
            "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 12, "num_layers": 12,
            "resid_dropout": 0, **_SUMMARY, "use_cache": True, "vocab_size": 50257, "window_size": 256,
            "tokenizer_class": "GPT2Tokenizer",
        },
        {"attention_layers": ["global"] * 12}, "attention_layers",
    ),
    "bert-base-uncased": Published(_BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "bert-base-multilingual": Published(
        _BERT | {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
                 "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
                 "vocab_size": 119547},
        {"is_decoder": True}, "is_decoder",
    ),
    "bert-base-NER": Published(
        _BERT | {"_num_labels": 9, "architectures": ["BertForTokenClassification"], "output_past": True,
                 **_labels("O", "B-MISC", "I-MISC")},
        {"add_cross_attention": True}, "add_cross_attention",
    ),
    "ms-marco-MiniLM": Published(
        _BERT | {"architectures": ["BertForSequenceClassification"], "hidden_size": 384, "intermediate_size": 1536,
                 **_labels("LABEL_0"), "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
                 "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}},
        {"pruned_heads": {"0": [1]}}, "pruned_heads",
    ),
    "roberta-base": Published(_ROBERTA, {"adapters": {"a": {}}}, "adapters"),
    "roberta-large-mnli": Published(
        _ROBERTA | {"_num_labels": 3, "architectures": ["RobertaForSequenceClassification"], "output_past": True,
                    **_labels("CONTRADICTION", "NEUTRAL", "ENTAILMENT")},
        {"quantization_config": {"bits": 4}}, "quantization_config",
    ),
    "xlm-roberta-base": Published(
        _ROBERTA | {"architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta", "output_past": True,
                    "vocab_size": 250002},
        {"hidden_act": "mish"}, "hidden_act",
    ),
    "distilbert": Published(_DISTILBERT, {"activation": "mish"}, "activation"),
    "distilbert-sst2": Published(
        _DISTILBERT | {"architectures": ["DistilBertForSequenceClassification"], "finetuning_task": "sst-2",
                       "output_past": True, **_labels("NEGATIVE", "POSITIVE")},
        {"is_encoder_decoder": True}, "is_encoder_decoder",
    ),
    "albert-base-v2": Published(
        _BERT | {"architectures": ["AlbertForMaskedLM"], "attention_probs_dropout_prob": 0, "bos_token_id": 2,
                 "classifier_dropout_prob": 0.1, "down_scale_factor": 1, "embedding_size": 128, "eos_token_id": 3,
                 "gap_size": 0, "hidden_act": "gelu_new", "hidden_dropout_prob": 0, "inner_group_num": 1,
                 "model_type": "albert", "net_structure_type": 0, "num_hidden_groups": 1, "num_memory_blocks": 0,
                 "vocab_size": 30000},
        {"use_bfloat16": True}, "use_bfloat16",
    ),
    "electra-small-discriminator": Published(
        _BERT | {"architectures": ["ElectraForPreTraining"], "embedding_size": 128, "hidden_size": 256,
                 "intermediate_size": 1024, "model_type": "electra", "num_attention_heads": 4,
                 "summary_activation": "gelu", "summary_last_dropout": 0.1, "summary_type": "first",
                 "summary_use_proj": True},
        {"tf_legacy_loss": True}, "tf_legacy_loss",
    ),
    "t5-small": Published(_T5, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj"),
    "flan-t5-small": Published(_V11, {"dense_act_fn": "relu"}, "dense_act_fn"),
    "mt5-small": Published(
        _V11 | {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "tokenizer_class": "T5Tokenizer",
                "vocab_size": 250112},
        {"tie_encoder_decoder": True}, "tie_encoder_decoder",
    ),
    "llama-7b": Published(
        {name: value for name, value in _LLAMA.items() if name not in ("num_key_value_heads", "rope_scaling")}
        | {"max_sequence_length": 2048, "pad_token_id": 0},
        {"rope_scaling": {"type": "unheard", "factor": 2.0}}, "rope_type",
    ),
    "TinyLlama": Published(_LLAMA, {"sliding_window": 4096}, "sliding_window"),
    "Llama-2-13b": Published(_LLAMA | {"pretraining_tp": 2}, {"hidden_act": "gelu"}, "hidden_act"),
    "Llama-3.1-8B": Published(
        _LLAMA31 | {"unsloth_version": "2025.1.5", "unsloth_fixed": True, "use_sliding_window": False},
        {"use_sliding_window": True}, "use_sliding_window",
    ),
    "SmolLM2-135M": Published(_SMOLLM2, {"rope_interleaved": True}, "rope_interleaved"),
    "Mistral-7B-v0.1": Published(
        _LLAMA | {"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
                  "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8,
                  "rope_theta": 10000.0, "sliding_window": 4096},
        {"logit_scale": 2.0}, "logit_scale",
    ),
    "Qwen2.5-0.5B": Published(_QWEN25, {"use_mrope": True}, "use_mrope"),
    "Qwen2.5-7B-1M": Published(
        _QWEN25, {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"
    ),
    "Qwen3-0.6B": Published(
        {name: value for name, value in _QWEN25.items() if name != "use_mrope"}
        | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
           "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
           "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None},
        {"num_experts": 8}, "num_experts",
    ),
    "gemma-2b": Published(
        _LLAMA | {"architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
                  "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
                  "model_type": "gemma", "num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
                  "tie_word_embeddings": True, "vocab_size": 256000},
        {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping",
    ),
    "vit-base-patch16-224": Published(_VIT, {"hidden_act": "mish"}, "hidden_act"),
    "deit-base-patch16-224": Published(
        {name: value for name, value in _VIT.items() if name not in ("encoder_stride", "qkv_bias")},
        {"patch_size": [16, 8]}, "patch_size",
    ),
    "vit-mae-base": Published(
        {name: value for name, value in _VIT.items() if name not in ("encoder_stride", "id2label", "label2id")}
        | {"architectures": ["ViTMAEForPreTraining"], "decoder_hidden_size": 512, "decoder_intermediate_size": 2048,
           "decoder_num_attention_heads": 16, "decoder_num_hidden_layers": 8, "mask_ratio": 0.75,
           "model_type": "vit_mae", "norm_pix_loss": False},
        {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob",
    ),
    "dinov2-base": Published(
        {name: value for name, value in _VIT.items() if name not in ("encoder_stride", "intermediate_size")}
        | {"apply_layernorm": True, "architectures": ["Dinov2Model"], "drop_path_rate": 0.0, "image_size": 518,
           "layer_norm_eps": 1e-06, "layerscale_value": 1.0, "mlp_ratio": 4, "model_type": "dinov2",
           "out_features": ["stage12"], "out_indices": [12], "patch_size": 14, "reshape_hidden_states": True,
           "stage_names": ["stem", "stage1"], "use_swiglu_ffn": False},
        {"num_register_tokens": 4}, "num_register_tokens",
    ),
    "resnet-50": Published(
        {
            "architectures": ["ResNetForImageClassification"], "depths": [3, 4, 6, 3], "embedding_size": 64,
            "downsample_in_first_stage": False, "hidden_act": "relu", "hidden_sizes": [256, 512, 1024, 2048],
            "layer_type": "bottleneck", "model_type": "resnet", "num_channels": 3, "out_features": None,
            "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"], "torch_dtype": "float32",
            **_labels("tench", "goldfish"), "transformers_version": "4.18.0.dev0",
        },
        {"hidden_act": "gelu"}, "hidden_act",
    ),
    "efficientnet-b0": Published(
        {
            "architectures": ["EfficientNetForImageClassification"], "batch_norm_eps": 0.001,
            "batch_norm_momentum": 0.99, "depth_coefficient": 1.0, "depth_divisor": 8, "depthwise_padding": [],
            "drop_connect_rate": 0.2, "dropout_rate": 0.2, "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
            "hidden_act": "swish", "hidden_dim": 1280, "image_size": 224, "model_type": "efficientnet",
            "in_channels": [32, 16, 24, 40, 80, 112, 192], "initializer_range": 0.02, "num_channels": 3,
            "kernel_sizes": [3, 3, 5, 3, 5, 5, 3], "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
            "num_hidden_layers": 64, "out_channels": [16, 24, 40, 80, 112, 192, 320], "pooling_type": "mean",
            "squeeze_expansion_ratio": 0.25, "strides": [1, 2, 2, 2, 1, 2, 1], "width_coefficient": 1.0,
            **_labels("tench", "goldfish"),
        },
        {"pooling_type": "max"}, "pooling_type",
    ),
    "clip-vit-base-patch32": Published(
        {
            "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
            "model_type": "clip", "projection_dim": 512, "text_config": {**_TOWER, **_CLIP_TEXT, "eos_token_id": 2},
            "text_config_dict": None, "torch_dtype": "float32", "transformers_version": None,
            "vision_config": {**_TOWER, **_CLIP_IMAGE}, "vision_config_dict": None,
        },
        {"text_config": {"hidden_act": "tanh"}}, "text_config: hidden_act 'tanh'",
    ),
    "stable-diffusion's text encoder": Published(
        {**_CLIP_TEXT, "architectures": ["CLIPTextModel"], "eos_token_id": 49407, "torch_dtype": "float32"},
        {"is_decoder": True}, "is_decoder is true",
    ),
    "stable-diffusion's image encoder": Published(
        {**_CLIP_IMAGE, "architectures": ["CLIPVisionModelWithProjection"], "dropout": 0.0},
        {"dropout": 0.1}, "dropout is 0.1",
    ),
    "siglip-base-patch16-224": Published(
        {
            "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", "vocab_size": 32000}, "torch_dtype": "float32",
            "transformers_version": "4.37.0.dev0", "vision_config": {"model_type": "siglip_vision_model"},
        },
        {"projection_dim": 512}, "projection_dim",
    ),
    "siglip's text tower": Published(
        {"architectures": ["SiglipTextModel"], "model_type": "siglip_text_model", **_SIGLIP, "vocab_size": 32000,
         "max_position_embeddings": 64, "projection_size": 768},
        {"projection_size": 0}, "projection_size is 0",
    ),
    "siglip's image tower": Published(
        {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **_SIGLIP, "image_size": 224,
         "patch_size": 16, "num_channels": 3},
        {"vision_use_head": False}, "vision_use_head is false",
    ),
}  # fmt: skip
