"""Small configurations of the architectures of transformers that are in the zoo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model class, its configuration, and the kind of call that it takes."""

    family: str
    model: str
    config: str
    call: str
    options: dict[str, Any] = field(default_factory=dict)
    image: int = 32
    likelihood: str = "categorical"


_WIDTHS = {"hidden_size": 32, "intermediate_size": 37}
_DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
_ENCODER = {**_WIDTHS, **_DEPTH, **_TEXT, "num_labels": 3}
_DECODER = {**_ENCODER, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_PATCHES = {**_WIDTHS, **_DEPTH, "image_size": 32, "patch_size": 8, "num_labels": 3}
_TWO_STACKS = {
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
_WHISPER = {
    **{k: v for k, v in _TWO_STACKS.items() if k != "max_position_embeddings"},
    "num_mel_bins": 20,
    "max_source_positions": 30,
    "max_target_positions": 20,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_SPEECH = {
    **_WIDTHS,
    **_DEPTH,
    "vocab_size": 32,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 4, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.1,
    "mask_time_length": 2,
    "mask_time_min_masks": 1,
    "ctc_zero_infinity": True,
}
_STAGES = {"num_labels": 3, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}
_SEGMENTS = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 24,
    "num_labels": 3,
}
_TWO_TOWERS = {
    "text_config": {**_WIDTHS, **_DEPTH, **_TEXT, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**_WIDTHS, **_DEPTH, "image_size": 32, "patch_size": 8},
    "projection_dim": 24,
}

ARCHITECTURES = (
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
        {**_GROUPED, "num_local_experts": 4},
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
        "bart", "BartForConditionalGeneration", "BartConfig", "sequence_to_sequence", _TWO_STACKS
    ),
    Architecture(
        "pegasus",
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        "sequence_to_sequence",
        _TWO_STACKS,
    ),
    # images
    Architecture("vit", "ViTForImageClassification", "ViTConfig", "image_classes", _PATCHES),
    Architecture("deit", "DeiTForImageClassification", "DeiTConfig", "image_classes", _PATCHES),
    Architecture(
        "beit",
        "BeitForImageClassification",
        "BeitConfig",
        "image_classes",
        {**_PATCHES, "vocab_size": 99},
    ),
    Architecture(
        "dinov2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        "image_classes",
        {**_DEPTH, "hidden_size": 32, "image_size": 32, "patch_size": 8, "num_labels": 3},
    ),
    Architecture("swin", "SwinForImageClassification", "SwinConfig", "image_classes", _WINDOWS),
    Architecture(
        "swinv2", "Swinv2ForImageClassification", "Swinv2Config", "image_classes", _WINDOWS
    ),
    Architecture(
        "convnext", "ConvNextForImageClassification", "ConvNextConfig", "image_classes", _STAGES
    ),
    Architecture(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        "image_classes",
        _STAGES,
    ),
    Architecture(
        "resnet",
        "ResNetForImageClassification",
        "ResNetConfig",
        "image_classes",
        {**_STAGES, "embedding_size": 8},
        image=64,
    ),
    Architecture(
        "poolformer",
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        "image_classes",
        {**_STAGES},
        image=64,
    ),
    Architecture(
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        "image_segments",
        _SEGMENTS,
        image=64,
    ),
    Architecture(
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        "image_boxes",
        {**_PATCHES, "image_size": [32, 32], "num_detection_tokens": 4},
    ),
    Architecture(
        "vit_mae",
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        "masked_image",
        {
            **_PATCHES,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        likelihood="gaussian",
    ),
    # images and text
    Architecture("clip", "CLIPModel", "CLIPConfig", "image_and_text", _TWO_TOWERS),
    Architecture(
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        "image_and_text",
        {k: v for k, v in _TWO_TOWERS.items() if k != "projection_dim"},
    ),
    # sound
    Architecture("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", "speech", _SPEECH),
    Architecture("hubert", "HubertForCTC", "HubertConfig", "speech", _SPEECH),
    Architecture(
        "whisper", "WhisperForConditionalGeneration", "WhisperConfig", "speech_to_text", _WHISPER
    ),
    Architecture(
        "ast",
        "ASTForAudioClassification",
        "ASTConfig",
        "spectrogram_classes",
        {
            **_WIDTHS,
            **_DEPTH,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 32,
            "num_labels": 3,
        },
    ),
)
