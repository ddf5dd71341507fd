"""Small configurations of transformers' language models."""

from __future__ import annotations

from kfc_fx.tools.zoo.architecture import DEPTH, TEXT, WIDTHS, Architecture

_ENCODER = {**WIDTHS, **DEPTH, **TEXT, "num_labels": 3}
_DECODER = {**_ENCODER, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
TWO_STACKS = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
TEXT_ARCHITECTURES: tuple[Architecture, ...] = (
    # decoders
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        "language_model",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
        },
    ),
    Architecture(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        "language_model",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", "language_model", _DECODER),
    Architecture(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        "language_model",
        {**_DECODER, "ffn_dim": 37, "word_embed_proj_dim": 32},
    ),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        "language_model",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        "language_model",
        {**_DECODER, "new_decoder_architecture": False, "multi_query": True},
    ),
    Architecture("llama", "LlamaForCausalLM", "LlamaConfig", "language_model", _GROUPED),
    Architecture("mistral", "MistralForCausalLM", "MistralConfig", "language_model", _GROUPED),
    Architecture(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        "language_model",
        {**_GROUPED, "num_local_experts": 4, "intermediate_size": 48},
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config", "language_model", _GROUPED),
    Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", "language_model", _GROUPED),
    Architecture("gemma", "GemmaForCausalLM", "GemmaConfig", "language_model", _GROUPED),
    Architecture("gemma2", "Gemma2ForCausalLM", "Gemma2Config", "language_model", _GROUPED),
    Architecture("phi", "PhiForCausalLM", "PhiConfig", "language_model", _DECODER),
    Architecture(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        "language_model",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "use_cache": False,
        },
    ),
    # encoders
    Architecture("bert", "BertForSequenceClassification", "BertConfig", "token_classes", _ENCODER),
    Architecture(
        "roberta", "RobertaForSequenceClassification", "RobertaConfig", "token_classes", _ENCODER
    ),
    Architecture(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        "token_classes",
        {
            "vocab_size": 99,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 37,
            "max_position_embeddings": 64,
            "num_labels": 3,
        },
    ),
    Architecture(
        "albert",
        "AlbertForSequenceClassification",
        "AlbertConfig",
        "token_classes",
        {**_ENCODER, "embedding_size": 16},
    ),
    Architecture(
        "electra",
        "ElectraForSequenceClassification",
        "ElectraConfig",
        "token_classes",
        {**_ENCODER, "embedding_size": 16},
    ),
    Architecture(
        "deberta_v2",
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        "token_classes",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    Architecture(
        "modernbert",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        "token_classes",
        _DECODER,
    ),
    # encoder and decoder
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        "sequence_to_sequence",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
    ),
    Architecture(
        "bart", "BartForConditionalGeneration", "BartConfig", "sequence_to_sequence", TWO_STACKS
    ),
    Architecture(
        "pegasus",
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        "sequence_to_sequence",
        TWO_STACKS,
    ),
)
