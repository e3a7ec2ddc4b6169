"""Fields of published config.json files that change neither a logit nor a gradient of the families here, and why.

A field that a family's file reads is judged there, whatever stands here. Of the others a field is bookkeeping with any
value, or only with one: `use_mrope: false` says nothing, and `use_mrope: true` is another model.
"""

from typing import Any, NamedTuple


class Bookkeeping(NamedTuple):
    """Fields that say nothing for the same reason."""

    why: str
    names: str  # separated by spaces


ANY = (
    Bookkeeping(
        "where the file comes from, and which class it was written for",
        """_commit_hash _from_model_config _name_or_path architectures auto_map is_composition is_llama_config language
        license model_type name_or_path tokenizer_class transformers.js_config transformers_version unsloth_fixed
        unsloth_version vocab_file vocabulary_size_note""",
    ),
    Bookkeeping(
        "the labels, whose number a classifier reads from id2label",
        "_num_labels finetuning_task id2label label2id num_labels problem_type task_specific_params",
    ),
    Bookkeeping(
        "the stored dtype, and the kernel or the split by which the same products are computed",
        """_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled chunk_size_feed_forward dtype
        gradient_checkpointing pretraining_tp torch_dtype torchscript use_cache use_flash_attention xla_device""",
    ),
    Bookkeeping(
        "the initialisation of new weights, and what is added in training only",
        "initializer_factor initializer_range neftune_noise_alpha",
    ),
    Bookkeeping(
        "which of the computed values are returned",
        "output_attentions output_hidden_states output_past return_dict return_dict_in_generate use_return_dict",
    ),
    Bookkeeping(
        "what others do with the logits: sentence-transformers' activation of a score",
        "sbert_ce_default_activation_function sentence_transformers",
    ),
    Bookkeeping(
        "the longest training text, which no layer reads; the table of positions is max_position_embeddings long",
        "max_seq_length max_sequence_length model_max_length",
    ),
    Bookkeeping(
        "settings of GPT-1, whose file GPT-2's was copied from",
        "predict_special_tokens",
    ),
    Bookkeeping(
        "ids that the tokenizer's files and the generation repeat; a family that needs one reads it",
        """bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id
        mask_token_id pad_token_id prefix sep_token_id unk_token_id""",
    ),
    Bookkeeping(
        "generation, which reads its own options",
        """bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
        epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_decoder_ids guidance_scale length_penalty
        max_length max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_beam_groups
        num_beams num_return_sequences output_scores penalty_alpha remove_invalid_values renormalize_logits
        repetition_penalty suppress_tokens temperature top_k top_p typical_p""",
    ),
)

ONLY: dict[str, Any] = {
    "add_cross_attention": False,  # layers that read another sequence
    "is_decoder": False,  # a causal mask in an encoder
    "is_encoder_decoder": False,
    "n_special": 0,  # further rows of GPT-1's token table
    "pruned_heads": {},  # heads that are cut out of the layers
    "rope_interleaved": False,  # pairs of neighbouring features are rotated, instead of the two halves
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,  # one stack for both sides
    "use_bfloat16": False,
    "use_mrope": False,  # positions in three dimensions
    "use_sliding_window": False,
    "vocab_size_or_config_json_file": -1,  # vocab_size under the name of an argument of 2018
}
"""The value with which a field says nothing; with any other it changes what the model computes."""

NAMES = frozenset(name for kind in ANY for name in kind.names.split())
"""Names of all fields that say nothing with any value."""
