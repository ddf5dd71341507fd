"""Small configurations of transformers' models of images and sound."""

from __future__ import annotations

from kfc_fx.tools.zoo.architecture import DEPTH, TEXT, WIDTHS, Architecture
from kfc_fx.tools.zoo.transformers_text import TWO_STACKS

_PATCHES = {**WIDTHS, **DEPTH, "image_size": 32, "patch_size": 8, "num_labels": 3}
_WHISPER = {
    **{k: v for k, v in TWO_STACKS.items() if k != "max_position_embeddings"},
    "num_mel_bins": 20,
    "max_source_positions": 30,
    "max_target_positions": 20,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_SPEECH = {
    **WIDTHS,
    **DEPTH,
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
    "text_config": {**WIDTHS, **DEPTH, **TEXT, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**WIDTHS, **DEPTH, "image_size": 32, "patch_size": 8},
    "projection_dim": 24,
}

MEDIA_ARCHITECTURES: tuple[Architecture, ...] = (
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
        {**DEPTH, "hidden_size": 32, "image_size": 32, "patch_size": 8, "num_labels": 3},
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
            **WIDTHS,
            **DEPTH,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 32,
            "num_labels": 3,
        },
    ),
)
