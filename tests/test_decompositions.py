"""What hides several layers, written out: it must give what the original gives."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn.engine.decompositions import DECOMPOSITIONS, PLAIN_DECOMPOSITIONS

T, S, B, E, H = 5, 6, 3, 8, 2
attention = DECOMPOSITIONS[F.multi_head_attention_forward]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def masks(attn: str | None, padded: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if attn is not None:
        causal = torch.ones(T, S, dtype=torch.bool).triu(2)
        shaped = causal if attn != "each" else causal.expand(B * H, T, S).contiguous()
        found["attn_mask"] = shaped if attn == "bool" else torch.zeros(shaped.shape).masked_fill(shaped, -1e3)
    if padded is not None:
        where = torch.arange(S)[None] >= torch.tensor([6, 4, 5])[:, None]
        found["key_padding_mask"] = where if padded == "bool" else torch.zeros(B, S).masked_fill(where, -1e3)
    return found


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize(
    ("inputs", "options"),
    list(
        itertools.product(
            ("self", "cross", "three"),
            (
                {},
                {"bias": False},
                {"add_bias_kv": True},
                {"add_zero_attn": True},
                {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
            ),
        )
    ),
    ids=str,
)
def test_attention_is_torchs_to_the_bit(inputs: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, H, **options).eval()
    query = normal(T if inputs != "self" else S, B, E)
    key = query if inputs == "self" else normal(S, B, E)
    value = key if inputs != "three" else normal(S, B, E + 0) + 1
    for attn, padded, need, average in itertools.product(
        (None, "bool", "float", "each"), (None, "bool", "float"), (False, True), (False, True)
    ):
        if inputs == "self" and attn is not None:
            continue
        kwargs = dict(training=False, need_weights=need, average_attn_weights=average, **masks(attn, padded))
        args = (
            query, key, value, E, H, layer.in_proj_weight, layer.in_proj_bias, layer.bias_k, layer.bias_v,
            layer.add_zero_attn, 0.1, layer.out_proj.weight, layer.out_proj.bias,
        )  # fmt: skip
        expected = F.multi_head_attention_forward(*args, **kwargs)
        found = attention(*args, **kwargs)
        assert torch.equal(found[0], expected[0]), (attn, padded, need)
        assert (found[1] is None) == (expected[1] is None)
        assert expected[1] is None or torch.equal(found[1], expected[1])


def test_attention_of_other_widths_of_one_sample_and_causal_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, H, kdim=5, vdim=7).eval()
    separate = {
        "use_separate_proj_weight": True,
        "q_proj_weight": layer.q_proj_weight,
        "k_proj_weight": layer.k_proj_weight,
        "v_proj_weight": layer.v_proj_weight,
    }
    rest = (E, H, None, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight, layer.out_proj.bias)
    for query, key, value in (
        (normal(T, B, E), normal(S, B, 5), normal(S, B, 7)),
        (normal(T, E), normal(S, 5), normal(S, 7)),
    ):
        for need in (False, True):
            kwargs = {"training": False, "need_weights": need, **separate}
            expected = F.multi_head_attention_forward(query, key, value, *rest, **kwargs)
            found = attention(query, key, value, *rest, **kwargs)
            assert torch.equal(found[0], expected[0])
            assert expected[1] is None or torch.equal(found[1], expected[1])
    plain, x = nn.MultiheadAttention(E, H).eval(), normal(T, B, E)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    args = (
        x, x, x, E, H, plain.in_proj_weight, plain.in_proj_bias, None, None, False, 0.0,
        plain.out_proj.weight, plain.out_proj.bias,
    )  # fmt: skip
    for need in (False, True):
        causal = {"training": False, "need_weights": need, "attn_mask": mask, "is_causal": True}
        assert torch.equal(attention(*args, **causal)[0], F.multi_head_attention_forward(*args, **causal)[0])


def test_what_is_not_written_out_is_left_to_torch() -> None:
    static = {"training": False, "static_k": normal(B * H, S, E // H)}
    args = (normal(T, B, E),) * 3 + (E, H, None, None, None, None, False, 0.0, normal(E, E), None)
    assert attention(*args, **static) is NotImplemented
    assert attention(*args, training=True) is NotImplemented


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("decompositions", [DECOMPOSITIONS, PLAIN_DECOMPOSITIONS], ids=["fast", "plain"])
def test_recurrent_networks_are_torchs_up_to_rounding(kind: type[nn.RNNBase], decompositions: Any) -> None:
    torch.manual_seed(0)
    network = kind(4, 6, num_layers=2, bidirectional=True).double().eval()
    x = normal(T, B, 4).double()
    start = torch.zeros(4, B, 6, dtype=torch.float64)
    state = (start, start) if kind is nn.LSTM else start
    function = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[kind]
    weights = list(network.parameters())
    found = decompositions[function](x, state, weights, True, 2, 0.0, False, True, False)
    expected = function(x, state, weights, True, 2, 0.0, False, True, False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
