"""Tiny random models that look at pictures: transformers' Mask2Former, CLIP and ViLT, with real processors and tokenizers."""

from __future__ import annotations

import string
from typing import Any

import torch


def mask2former(classes: int = 80) -> Any:
    """6 queries; widths of 32, which its group norms need."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    swin = SwinConfig(embed_dim=4, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=8, num_queries=6, num_labels=classes,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def clip() -> tuple[Any, Any, Any]:
    """A model, its tokenizer, which spells, and its image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    torch.manual_seed(0)
    letters = [*string.ascii_lowercase, "-"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    text = CLIPTextConfig(**small, vocab_size=len(vocabulary), max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    return (
        CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)),
        CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]),
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )


def vilt() -> tuple[Any, Any]:
    """A model that answers no, yes or red, and its processor, which takes questions of 6 tokens."""
    from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "a", "dog", "?"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=6)
    config = ViltConfig(
        vocab_size=len(words), max_position_embeddings=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, image_size=32, patch_size=16, id2label={0: "no", 1: "yes", 2: "red"},
    )  # fmt: skip
    processor = ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16), tokenizer)
    return ViltForQuestionAnswering(config), processor
