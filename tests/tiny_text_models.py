"""Tiny untrained models of the package transformers, in folders as people have trained ones."""

from pathlib import Path
from typing import Any

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "square", "circle", "七"]


def of_bert(transformers: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=16, max_position_embeddings=12, **sizes))


def of_t5(transformers: Any) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5Model(transformers.T5Config(vocab_size=16, decoder_start_token_id=0, **sizes))


def of_clip(transformers: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 3}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def save(name: str, folder: Path) -> None:
    """The model, its tokenizer of ten words, and of CLIP how it wants images."""
    import transformers  # takes seconds
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        {"bert": of_bert, "t5": of_t5, "clip": of_clip}[name](transformers).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=12, **special).save_pretrained(folder)
    if name == "clip":
        size = {"height": 8, "width": 8}
        transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
