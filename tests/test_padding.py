"""Padding: the same sample counts the same however it is padded, or the error says how to go on."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from tests import reference
from tests.cases import Lambda, normal
from tests.reference import errors
from tests.zoo import transformer

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SPEECH = {
    **SMALL,
    "vocab_size": 11,
    "conv_dim": (8, 12),
    "conv_kernel": (5, 3),
    "conv_stride": (3, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "conv_bias": True,
}
TEXT = {**SMALL, "vocab_size": 23, "max_position_embeddings": 16}


def clip(padded: int, length: int = 120) -> dict[str, Tensor]:
    """Two clips of `length` samples, and `padded` zeros after them."""
    sound = torch.cat([normal(length)(2, torch.float64), torch.zeros(2, padded, dtype=torch.float64)], 1)
    mask = (torch.arange(length + padded) < length).long().expand(2, -1).contiguous()
    return {"input_values": sound, "attention_mask": mask}


def sentences(length: int) -> dict[str, Tensor]:
    """Two sentences of 4 tokens, padded to `length`."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[:, :4] = torch.tensor([[4, 7, 2, 9], [1, 1, 3, 5]])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < 4).long().expand(2, -1).contiguous()}


def build_of(kind: str, configuration: str, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformer(kind, configuration, **sizes)("eager").eval()


def measured(model: nn.Module, *batches: Any, **options: Any) -> dict[str, Tensor]:
    return memsyn.measure(model, batches, progress=False, **options).mean()


@pytest.mark.parametrize(
    ("kind", "head"), [("Wav2Vec2", "ForCTC"), ("Wav2Vec2", "Model"), ("Hubert", "ForCTC"), ("WavLM", "ForCTC")]
)
@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning", "ignore:Support for mismatched:UserWarning")
def test_a_clip_counts_the_same_however_it_is_padded(kind: str, head: str) -> None:
    model = build_of(f"{kind}{head}", f"{kind}Config", **SPEECH, feat_extract_norm="layer").double()
    plain = measured(model, {"input_values": clip(0)["input_values"]})
    for padded in (100, 400, 1200):
        assert max(errors(measured(model, clip(padded)), plain).values()) <= 1e-6


def test_frames_of_padding_do_not_count_where_padding_changes_the_other_frames() -> None:
    """Group norm takes its statistics over the whole clip: right is the model's own output on its own frames."""
    model = build_of("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH, feat_extract_norm="group").double()
    batch = clip(100)
    num_frames = int(model._get_feat_extract_output_lengths(torch.tensor(120)))

    def own_frames(model: nn.Module, batch: Any, k: int) -> Tensor:
        return model(**{key: value[k : k + 1] for key, value in batch.items()}).logits[:, :num_frames]

    expected = reference.importance(model, batch, 2, own_frames)
    assert max(errors(measured(model, batch), expected).values()) <= 1e-9


def test_a_classifier_of_padded_clips_has_no_frames_to_leave_out() -> None:
    model = build_of(
        "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SPEECH, feat_extract_norm="layer", num_labels=3
    ).double()
    plain = measured(model, {"input_values": clip(0)["input_values"]})
    assert max(errors(measured(model, clip(400)), plain).values()) <= 1e-6


def test_frames_of_whisper_after_the_end_of_a_clip_do_not_count() -> None:
    model = build_of(
        "WhisperModel",
        "WhisperConfig",
        vocab_size=23,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=6,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ).encoder.double()
    features, lengths = normal(6, 40)(2, torch.float64), torch.tensor([24, 9])
    batch = {"input_features": features, "attention_mask": (torch.arange(40) < lengths[:, None]).long()}

    def own_frames(model: nn.Module, batch: Any, k: int) -> Tensor:
        return model(batch["input_features"][k : k + 1]).last_hidden_state[:, : (12, 5)[k]]

    expected = reference.importance(model, batch, 2, own_frames)
    assert max(errors(measured(model, batch), expected).values()) <= 1e-9


@pytest.mark.parametrize("estimator", ["mas-local", "kronecker", "inputs"])
def test_padding_of_clips_is_refused_where_every_layer_counts(estimator: str) -> None:
    model = build_of("Wav2Vec2Model", "Wav2Vec2Config", **SPEECH, feat_extract_norm="layer").double()
    with pytest.raises(memsyn.OutputError, match=r"other positions than its inputs.*batches without padding"):
        measured(model, clip(100), estimator=estimator)


def test_clips_that_are_padded_in_front_are_refused() -> None:
    model = build_of("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH, feat_extract_norm="layer").double()
    batch = {key: value.flip(1).contiguous() for key, value in clip(100).items()}
    with pytest.raises(memsyn.OutputError, match=r"mask is for 220 tokens.*not known which outputs are padding"):
        measured(model, batch)


def prompted(kind: str) -> nn.Module:
    """GPT-2 with virtual tokens in front, which are all that learns, beside the norms."""
    import peft

    base = build_of("GPT2LMHeadModel", "GPT2Config", vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=24)
    torch.manual_seed(1)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "ln_" in name)
    return model


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_a_prompted_sentence_counts_the_same_however_it_is_padded(kind: str) -> None:
    model = prompted(kind)
    plain = measured(model, sentences(4))
    for length in (6, 12):
        assert max(errors(measured(model, sentences(length)), plain).values()) <= 1e-9


def test_virtual_tokens_are_refused_where_every_layer_counts() -> None:
    with pytest.raises(memsyn.OutputError, match="virtual tokens in front"):
        measured(prompted("PromptTuningConfig"), sentences(6), estimator="inputs")


def test_one_number_for_each_token_is_no_class() -> None:
    """ELECTRA's discriminator gives (samples, tokens), which looks like (samples, classes)."""
    model = build_of("ElectraForPreTraining", "ElectraConfig", **TEXT, embedding_size=8).double()
    plain = measured(model, sentences(4))
    for length in (6, 12):
        assert max(errors(measured(model, sentences(length)), plain).values()) <= 1e-9


def test_as_many_rows_of_an_output_as_tokens_are_no_tokens() -> None:
    """Six queries read sentences of six tokens."""

    def read(m: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = m.table(input_ids)
        weights = (m.queries @ x.transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(-1)
        return weights @ x

    model = Lambda(read, table=nn.Embedding(10, 4), queries=nn.Parameter(torch.randn(6, 4))).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
        plain = measured(model, sentences(4))
        for length in (6, 12):
            assert max(errors(measured(model, sentences(length)), plain).values()) <= 1e-9


WRONG: dict[str, tuple[Any, Any, str]] = {
    "every second token": (
        lambda m, input_ids, attention_mask: m.table(input_ids)[:, ::2],
        lambda mask: mask,
        r"batch 0: the attention mask is for 6 tokens, and the output has the shape \(2, 3, 4\).*forward=lambda",
    ),
    "flat": (
        lambda m, input_ids, attention_mask: m.table(input_ids).flatten(1),
        lambda mask: mask,
        r"for 6 tokens, and the output has the shape \(2, 24\)",
    ),
    "a mask of pairs": (
        lambda m, input_ids, attention_mask: m.table(input_ids),
        lambda mask: mask[:, None, None] * mask[:, None, :, None],
        r"of shape \(2, 1, 6, 6\), not \(samples, tokens\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mask_that_cannot_be_applied_is_an_error(name: str) -> None:
    run, change, message = WRONG[name]
    batch = sentences(6)
    batch["attention_mask"] = change(batch["attention_mask"])
    model = Lambda(run, table=nn.Embedding(10, 4))
    with pytest.raises(memsyn.OutputError, match=message):
        measured(model, batch)


def test_a_mask_without_padding_needs_no_rule() -> None:
    model = Lambda(lambda m, input_ids, attention_mask: m.table(input_ids)[:, ::2], table=nn.Embedding(10, 4))
    batch = sentences(4)
    plain = Lambda(lambda m, input_ids: m.table(input_ids)[:, ::2], table=model.table)
    assert errors(measured(model, batch), measured(plain, {"input_ids": batch["input_ids"]})) == {"table.weight": 0.0}
