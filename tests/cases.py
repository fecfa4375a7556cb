"""The table of models x data on which measuring must be exact."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn, weight_norm

from memsyn.engine.routes import BY_OPERATION, BY_SAMPLE, UNUSED


@dataclass(frozen=True)
class Case:
    """A model, how to make a batch of n samples in a dtype, and which route its parameters are expected to take."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, torch.dtype], Any]
    routes: Mapping[str, str] = field(default_factory=dict)
    """The parameters that are expected to take another route than a rule, by pattern."""
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    float32: float = 1e-4
    """The largest error in float32."""


def normal(*shape: int) -> Callable[[int, torch.dtype], Tensor]:
    def make(count: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)

    return make


def integers(high: int, *shape: int) -> Callable[[int, torch.dtype], Tensor]:
    def make(count: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(high, (count, *shape), generator=torch.Generator().manual_seed(count))

    return make


class Lambda(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def conv_net(conv: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A convolution between others, so that its input carries a gradient and its output is changed in place."""

    def build() -> nn.Module:
        layer = conv()
        kind = type(layer)
        return nn.Sequential(
            kind(2, layer.in_channels, 1), nn.Tanh(), layer, nn.ReLU(inplace=True), kind(layer.out_channels, 2, 1)
        )

    return build


def norm_net(
    make_norm: Callable[[], nn.Module], *, channels: int, conv: type[nn.Module] | None = None
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = (
            (conv(3, channels, 1), conv(channels, 2, 1)) if conv else (nn.Linear(3, channels), nn.Linear(channels, 2))
        )
        norm = make_norm()
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.normal_()
            for buffer in norm.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 2)
        return nn.Sequential(layers[0], norm, nn.ReLU(inplace=True), layers[1])

    return build


class Attention(nn.Module):
    """A pre-norm transformer block made of plain layers; its key bias has a gradient of zero in exact arithmetic."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(norm: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Lambda(
        lambda m, ids: m.head(m.blocks(m.tokens(ids) + m.places(torch.arange(ids.shape[1]).expand_as(ids)))),
        tokens=nn.Embedding(11, 8, padding_idx=0),
        places=nn.Embedding(5, 8),
        blocks=nn.Sequential(Attention(8, 2, norm), Attention(8, 2, norm)),
        head=nn.Linear(8, 11),
    )


def residual() -> nn.Module:
    def block(m: nn.Module, x: Tensor) -> Tensor:
        x = m.relu(m.bn1(m.conv1(x)))
        y = m.bn3(m.conv3(m.relu(m.bn2(m.conv2(x)))))
        y += m.short(x)
        return m.head(m.relu(y).mean((2, 3)))

    return Lambda(
        block,
        conv1=nn.Conv2d(3, 6, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        bn2=nn.BatchNorm2d(8),
        conv3=nn.Conv2d(8, 8, 3, padding=1, bias=False),
        bn3=nn.BatchNorm2d(8),
        short=nn.Conv2d(6, 8, 1, stride=2, bias=False),
        relu=nn.ReLU(inplace=True),
        head=nn.Linear(8, 5),
    )


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def tied() -> nn.Module:
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    return Lambda(lambda m, ids: m.head(torch.tanh(m.embedding(ids))), embedding=embedding, head=head)


def windows(model: nn.Module, x: Tensor) -> Tensor:
    """Each sample is cut in four windows that are folded into the batch, as windowed attention does."""
    folded = model.inner(x.reshape(-1, 2, 3))
    return model.head(folded.reshape(len(x), -1))


class Hidden(torch.autograd.Function):
    """x W^T, out of sight of torch's function modes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


def hidden(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.tanh(Hidden.apply(torch.tanh(m.a(x)), m.w)))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _roll(m: nn.Module, ids: Tensor) -> Tensor:
    state = m.head.weight.new_zeros(len(ids), 4)
    for x in m.tokens(ids).unbind(1):
        state = torch.tanh(m.cell(torch.cat([x, state], 1)))
    return m.head(state)


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


def sequences(lengths: list[int]) -> Callable[[int, torch.dtype], dict[str, Tensor]]:
    return lambda n, dtype: {"x": normal(6, 3)(n, dtype), "lengths": torch.tensor(lengths)[:n]}


def packed(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = rnn.pack_padded_sequence(batch["x"], batch["lengths"], batch_first=True, enforce_sorted=False)
    return rnn.pad_packed_sequence(m(x)[0], batch_first=True, total_length=6)[0]


def experts(m: nn.Module, x: Tensor) -> Tensor:
    """Every token goes through the expert that its sign chooses, all samples' tokens together."""
    tokens = torch.tanh(m.a(x)).flatten(0, 1)
    mixed = torch.zeros_like(tokens)
    for index, expert in enumerate((m.b, m.c)):
        chosen = (tokens[:, 0] > 0).long() == index
        mixed[chosen] = expert(tokens[chosen])
    return mixed.unflatten(0, x.shape[:2])


def _write(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = m.p
    y += m.q
    return y * y


def windows_first(m: nn.Module, x: Tensor) -> Tensor:
    """Windows folded into the batch, neighbours in it from different samples."""
    folded = m.inner(x.unflatten(1, (4, 2)).transpose(0, 1).flatten(0, 1))
    return m.head(folded.unflatten(0, (4, -1)).transpose(0, 1).flatten(1))


def places(kind: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        if kind == "expanded":
            rows = m.table(steps.expand(len(x), -1))
        elif kind == "of one row":
            rows = m.table(steps.unsqueeze(0))
        else:
            rows = m.table.weight[steps]
        return m.head(torch.tanh(x + rows))

    return run


def relative(m: nn.Module, x: Tensor) -> Tensor:
    """A table of relative positions, read by a buffer-like index and added to attention scores of all heads."""
    step = torch.arange(x.shape[1])
    bias = m.table[(step[:, None] - step[None, :]) + 4].permute(2, 0, 1).unsqueeze(0)
    q, k = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in m.qk(x).chunk(2, -1))
    weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
    return (weights @ x.unsqueeze(1)).transpose(1, 2).flatten(2)


def state_space(m: nn.Module, x: Tensor) -> Tensor:
    """What Mamba does with bare parameters."""
    decay = torch.exp(-torch.exp(m.log_a)[None, :, :] * F.softplus(m.dt(x)).cumsum(1)[..., None])
    return (decay.sum(-1) * x + x * m.d[None, None, :]) - m.e


MORE: dict[str, Case] = {
    "out of sight": Case(
        lambda: Lambda(hidden, a=nn.Linear(4, 5), b=nn.Linear(3, 2), w=parameter(3, 5)),
        normal(6, 4),
        {"w": BY_SAMPLE},
    ),
    "experts": Case(
        lambda: Lambda(experts, a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 5)),
        normal(6, 4),
        {"[bc].*": BY_SAMPLE},
    ),
    "a sample at a time by hand": Case(
        lambda: Lambda(
            lambda m, x: torch.stack([m.a(torch.tanh(m.b(row))) for row in x]), a=nn.Linear(5, 3), b=nn.Linear(4, 5)
        ),
        normal(4),
        {"*": BY_SAMPLE},
    ),
    "lstm": Case(
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        normal(5, 3),
        forward=lambda m, x: m(x)[0],
    ),
    "lstm, time first, projected": Case(
        lambda: nn.LSTM(3, 4, proj_size=2),
        normal(5, 3),
        forward=lambda m, x: torch.cat([part.transpose(0, 1).flatten(1) for part in m(x.transpose(0, 1))[1]], 1),
    ),
    "gru": Case(lambda: nn.GRU(3, 4, num_layers=2, batch_first=True), normal(5, 3), forward=lambda m, x: m(x)[0]),
    "rnn": Case(
        lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False, bidirectional=True),
        normal(5, 3),
        forward=lambda m, x: m(x.transpose(0, 1))[0].transpose(0, 1),
    ),
    "rnn with tanh": Case(lambda: nn.RNN(3, 4, batch_first=True), normal(5, 3), forward=lambda m, x: m(x)[0]),
    "lstm, packed": Case(
        lambda: nn.LSTM(3, 4, bidirectional=True, batch_first=True),
        sequences([4, 6, 1, 5, 2, 6, 3]),
        {"*": BY_SAMPLE},
        forward=packed,
    ),
    "gru, packed": Case(
        lambda: nn.GRU(3, 4, batch_first=True), sequences([6, 6, 5, 4, 3, 1, 1]), {"*": BY_SAMPLE}, forward=packed
    ),
    "cells": Case(
        lambda: Lambda(
            lambda m, x: m.b(m.c(x, m.a(x)[0])), a=nn.LSTMCell(3, 4), b=nn.RNNCell(4, 4), c=nn.GRUCell(3, 4)
        ),
        normal(3),
    ),
    "cross attention": Case(
        lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=5, add_bias_kv=True),
        lambda n, dtype: {"q": normal(4, 6)(n, dtype), "k": normal(7, 3)(n, dtype), "v": normal(7, 5)(n, dtype)},
        forward=lambda m, b: m(*(b[name].transpose(0, 1) for name in "qkv"))[0].transpose(0, 1),
    ),
    "attention of memory": Case(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda n, dtype: {"x": normal(4, 6)(n, dtype), "memory": normal(3, 6)(n, dtype)},
        forward=lambda m, b: m(b["x"], b["memory"], b["memory"], need_weights=False)[0],
    ),
    "transformer": Case(
        lambda: Lambda(
            lambda m, x: m.b(m.a(x.transpose(0, 1), torch.tanh(x).transpose(0, 1))).transpose(0, 1),
            a=nn.Transformer(8, 2, 1, 1, 12),
            b=nn.Linear(8, 3),
        ),
        normal(4, 8),
    ),
    "transposed convolution, strided": Case(
        conv_net(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)), normal(2, 4, 3)
    ),
    "transposed convolution, dilated": Case(conv_net(lambda: nn.ConvTranspose1d(4, 3, 3, dilation=2)), normal(2, 6)),
    "embedding bag": Case(lambda: nn.EmbeddingBag(5, 3), integers(5, 6), {"weight": BY_OPERATION}),
    "bilinear": Case(
        lambda: Lambda(lambda m, x: m.b(torch.tanh(m.a(x)), x), a=nn.Linear(4, 3), b=nn.Bilinear(3, 4, 2)),
        normal(4),
        {"b.weight": BY_OPERATION},
    ),
    "instance norm": Case(
        norm_net(lambda: nn.InstanceNorm2d(6, affine=True), channels=6, conv=nn.Conv2d),
        normal(3, 4, 4),
        float32=0.05,  # the bias before it is without influence: there is rounding alone
    ),
    "instance norm with statistics": Case(
        norm_net(lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), channels=6, conv=nn.Conv1d),
        normal(3, 5),
    ),
    "weight norm of a convolution": Case(
        conv_net(lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2)),
        normal(2, 6),
        {"*original?": BY_OPERATION},
    ),
    "spectral norm": Case(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        normal(4),
        {"*original": BY_OPERATION},
    ),
    "low-rank adapter": Case(
        lambda: Lambda(
            lambda m, x: F.linear(x, m.base.weight + m.up @ m.down, m.base.bias),
            base=frozen(nn.Linear(4, 3), "weight"),
            up=parameter(3, 2),
            down=parameter(2, 4),
        ),
        normal(5, 4),
        {"up": BY_OPERATION, "down": BY_OPERATION},
    ),
    "class token and places": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.places),
            token=parameter(1, 1, 4),
            places=parameter(1, 6, 4),
            head=nn.Linear(4, 3),
        ),
        normal(5, 4),
    ),
    "token without a sample's dimension": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.cat([m.token.repeat(len(x), 1, 1), x], 1)),
            token=parameter(4),
            head=nn.Linear(4, 3),
        ),
        normal(5, 4),
    ),
    "elementwise parameters": Case(
        lambda: Lambda(
            lambda m, x: (
                ((x * m.scale - m.shift) / x.abs().add(1) + m.gain * x).div(2) + torch.div(m.shift, x.abs() + 1)
            ),
            scale=parameter(4),
            shift=parameter(5, 1),
            gain=parameter(),
        ),
        normal(5, 4),
    ),
    "written into activations": Case(
        lambda: Lambda(_write, a=nn.Linear(4, 3), p=parameter(3), q=parameter(3)), normal(5, 4), {"p": BY_OPERATION}
    ),
    "matrices on either side": Case(
        lambda: Lambda(
            lambda m, x: torch.einsum("bts,sd->btd", m.left @ (x @ m.right), m.third),
            left=parameter(6, 5),
            right=parameter(4, 3),
            third=parameter(3, 2),
        ),
        normal(5, 4),
        {"left": BY_OPERATION, "third": BY_OPERATION},
    ),
    "addmm on folded tokens": Case(
        lambda: Lambda(
            lambda m, x: torch.addmm(m.bias, torch.tanh(m.a(x)).view(-1, 3), m.weight).view(*x.shape[:2], 2),
            a=nn.Linear(4, 3),
            weight=parameter(3, 2),
            bias=parameter(2),
        ),
        normal(5, 4),
    ),
    **{
        f"places {kind}": Case(
            lambda kind=kind: Lambda(places(kind), table=nn.Embedding(9, 4), head=nn.Linear(4, 3)),
            normal(5, 4),
            {} if kind == "expanded" else {"table.weight": BY_OPERATION},
        )
        for kind in ("expanded", "of one row", "sliced")
    },
    "relative positions": Case(
        lambda: Lambda(relative, table=parameter(9, 2), qk=nn.Linear(4, 12)), normal(5, 4), {"table": BY_OPERATION}
    ),
    "state space": Case(
        lambda: Lambda(state_space, log_a=parameter(4, 2), d=parameter(4), e=parameter(1), dt=nn.Linear(4, 4)),
        normal(5, 4),
        {"log_a": BY_OPERATION},
    ),
    "windows, neighbours from different samples": Case(
        lambda: Lambda(windows_first, inner=nn.Linear(3, 5), head=nn.Linear(40, 2)), normal(8, 3)
    ),
    "convolution over windows": Case(
        lambda: Lambda(
            lambda m, x: m.c(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh(), c=nn.Conv2d(2, 3, 3, padding=1)
        ),
        normal(4, 2, 5, 5),
    ),
    "tied by a transpose": Case(
        lambda: Lambda(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=nn.Linear(4, 3)),
        normal(5, 4),
        {"a.weight": BY_OPERATION},
    ),
    "halves of a weight": Case(
        lambda: Lambda(lambda m, x: F.linear(x, m.w[:3]) * torch.tanh(F.linear(x, m.w[3:])), w=parameter(6, 4)),
        normal(5, 4),
    ),
}


CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(4, 3), normal(4)),
    "linear without bias, scalar output": Case(
        lambda: Lambda(lambda m, x: m.a(x)[:, 0], a=nn.Linear(4, 1, bias=False)), normal(4)
    ),
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)),
        normal(4),
    ),
    "token linear": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3, bias=False)), normal(5, 4)),
    "pixel linear": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), normal(2, 3, 4)),
    "linear, wider than a tile": Case(
        lambda: nn.Sequential(nn.Linear(3, 2100), nn.Tanh(), nn.Linear(2100, 900)), normal(2, 3)
    ),
    "bias only": Case(lambda: frozen(nn.Linear(4, 3), "weight"), normal(4)),
    "conv1d": Case(conv_net(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)), normal(2, 9)),
    "conv1d, groups larger than a tile": Case(
        lambda: nn.Conv1d(256, 2048, 3, padding=1, groups=2, bias=False), normal(256, 4)
    ),
    "conv1d causal": Case(conv_net(lambda: nn.Conv1d(40, 4, 3, dilation=2, padding=4)), normal(2, 9)),
    "conv2d": Case(conv_net(lambda: nn.Conv2d(9, 4, 3, padding=1)), normal(2, 6, 5)),
    "conv2d small": Case(conv_net(lambda: nn.Conv2d(3, 4, 3, padding=1)), normal(2, 6, 5)),
    "conv2d pointwise": Case(conv_net(lambda: nn.Conv2d(5, 4, 1)), normal(2, 6, 5)),
    "conv2d strided pointwise": Case(conv_net(lambda: nn.Conv2d(5, 4, 1, stride=2)), normal(2, 6, 5)),
    "conv2d patches": Case(conv_net(lambda: nn.Conv2d(9, 4, (2, 3), stride=(2, 3))), normal(2, 6, 6)),
    "conv2d oblong": Case(
        conv_net(lambda: nn.Conv2d(9, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2))), normal(2, 6, 7)
    ),
    "conv2d depthwise": Case(conv_net(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6)), normal(2, 5, 5)),
    "conv2d depthwise, two each": Case(conv_net(lambda: nn.Conv2d(4, 8, 3, groups=4)), normal(2, 5, 5)),
    "conv2d groups without bias": Case(
        conv_net(lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False)), normal(2, 5, 5)
    ),
    "conv2d same": Case(conv_net(lambda: nn.Conv2d(9, 4, (4, 3), padding="same", dilation=(1, 2))), normal(2, 6, 6)),
    "conv2d valid": Case(conv_net(lambda: nn.Conv2d(9, 4, 3, padding="valid")), normal(2, 6, 6)),
    **{
        f"conv2d {mode}": Case(
            conv_net(lambda mode=mode: nn.Conv2d(9, 4, 3, padding=(1, 2), padding_mode=mode)), normal(2, 6, 6)
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv3d": Case(
        conv_net(lambda: nn.Conv3d(4, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2)), normal(2, 3, 4, 5)
    ),
    "layer norm": Case(norm_net(lambda: nn.LayerNorm(6), channels=6), normal(4, 3)),
    "layer norm without tokens": Case(norm_net(lambda: nn.LayerNorm(6), channels=6), normal(3)),
    "layer norm over two dimensions": Case(norm_net(lambda: nn.LayerNorm((4, 6)), channels=6), normal(2, 4, 3)),
    "layer norm without bias": Case(norm_net(lambda: nn.LayerNorm(6, bias=False), channels=6), normal(4, 3)),
    "rms norm": Case(norm_net(lambda: nn.RMSNorm(6), channels=6), normal(4, 3)),
    "rms norm with eps": Case(norm_net(lambda: nn.RMSNorm((4, 6), eps=0.1), channels=6), normal(2, 4, 3)),
    "group norm": Case(norm_net(lambda: nn.GroupNorm(2, 6), channels=6, conv=nn.Conv2d), normal(3, 4, 4)),
    "group norm without pixels": Case(norm_net(lambda: nn.GroupNorm(2, 6), channels=6), normal(3)),
    "batch norm 1d": Case(norm_net(lambda: nn.BatchNorm1d(6), channels=6), normal(3)),
    "batch norm over tokens": Case(norm_net(lambda: nn.BatchNorm1d(6), channels=6, conv=nn.Conv1d), normal(3, 5)),
    "batch norm 2d": Case(norm_net(lambda: nn.BatchNorm2d(6), channels=6, conv=nn.Conv2d), normal(3, 4, 4)),
    "batch norm 3d": Case(norm_net(lambda: nn.BatchNorm3d(6), channels=6, conv=nn.Conv3d), normal(3, 2, 3, 4)),
    "prelu": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3)), normal(4)),
    "prelu per channel": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 5, 1), nn.PReLU(5), nn.Conv2d(5, 2, 1)), normal(2, 3, 3)
    ),
    "embedding": Case(lambda: nn.Embedding(5, 3), integers(5, 6)),
    "embedding of single tokens": Case(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), integers(5)),
    "embedding with padding": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 2)), integers(5, 6)
    ),
    "embedding with negative padding": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=-1), nn.Linear(3, 2)), integers(5, 6)
    ),
    "embedding with max_norm": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2)), integers(5, 6)
    ),
    "sparse embedding": Case(lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)), integers(5, 6)),
    "residual network": Case(residual, normal(3, 8, 8)),
    "transformer, layer norm": Case(transformer(nn.LayerNorm), integers(11, 5)),
    "transformer, rms norm": Case(transformer(nn.RMSNorm), integers(11, 5)),
    "layer used twice": Case(
        lambda: Lambda(lambda m, x: m.b(torch.tanh(m.b(torch.relu(m.a(x))))), a=nn.Linear(4, 5), b=nn.Linear(5, 5)),
        normal(4),
    ),
    "siamese": Case(
        lambda: Lambda(lambda m, x: m.a(x[:, 0]) * torch.tanh(m.a(x[:, 1])), a=nn.Linear(4, 3)), normal(2, 4)
    ),
    "convolution on two scales": Case(
        lambda: Lambda(
            lambda m, x: m.c(x).mean((2, 3)) * m.c(F.avg_pool2d(x, 2)).mean((2, 3)), c=nn.Conv2d(9, 4, 3, padding=1)
        ),
        normal(9, 6, 6),
    ),
    "norms used twice": Case(
        lambda: Lambda(lambda m, x: m.n(torch.tanh(m.n(x))) * m.n(x), n=nn.LayerNorm(4)), normal(5, 4)
    ),
    "recurrent by hand": Case(
        lambda: Lambda(_roll, cell=nn.Linear(6, 4), head=nn.Linear(4, 2), tokens=nn.Embedding(5, 2)), integers(5, 6)
    ),
    "one of two uses counts": Case(
        lambda: Lambda(lambda m, x: (m.a(x), torch.tanh(m.a(2 * x)))[1], a=nn.Linear(4, 3)), normal(4)
    ),
    "layer without part": Case(
        lambda: Lambda(lambda m, x: m.a(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3), c=nn.LSTM(2, 2)),
        normal(4),
        {"b.*": UNUSED, "c.*": UNUSED},
    ),
    "frozen body": Case(
        lambda: frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), "0.weight", "0.bias"),
        normal(4),
    ),
    "frozen head": Case(
        lambda: frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), "2.weight", "2.bias"),
        normal(4),
    ),
    "keyword call of a layer": Case(lambda: Lambda(lambda m, x: m.a(input=x), a=nn.Linear(4, 3)), normal(4)),
    "logits in a mapping": Case(
        lambda: Lambda(lambda m, x: {"hidden": x, "logits": m.a(x)}, a=nn.Linear(4, 3)), normal(4)
    ),
    "only tensor of a tuple": Case(lambda: Lambda(lambda m, x: (m.a(x), None), a=nn.Linear(4, 3)), normal(4)),
    "mapping as keyword arguments": Case(
        lambda: Lambda(lambda m, left, right: m.a(left) * m.b(right), a=nn.Linear(4, 3), b=nn.Linear(2, 3)),
        lambda n, dtype: {"left": normal(4)(n, dtype), "right": normal(2)(n, dtype), "labels": torch.zeros(n)},
    ),
    "forward=": Case(
        lambda: nn.GRU(3, 4, batch_first=True),
        normal(5, 3),
        forward=lambda m, x: m(x)[1][0],
    ),
    "two inputs through forward=": Case(
        lambda: nn.Bilinear(3, 2, 4),
        lambda n, dtype: (normal(3)(n, dtype), normal(2)(n + 1, dtype)[1:]),
        {"weight": BY_OPERATION},
        forward=lambda m, pair: m(*pair),
    ),
    "bare parameter": Case(
        lambda: Lambda(lambda m, x: m.a(x + m.p), a=nn.Linear(4, 3), p=nn.Parameter(torch.randn(4))),
        normal(4),
    ),
    "tied embedding and head": Case(tied, integers(7, 5)),
    "weight used outside its layer": Case(
        lambda: Lambda(lambda m, x: m.a(x) + F.linear(torch.tanh(x), m.a.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        normal(4),
        {"b.*": UNUSED},
    ),
    "windows folded into the batch": Case(
        lambda: Lambda(windows, inner=nn.Linear(3, 5), head=nn.Linear(40, 2)),
        normal(8, 3),
    ),
    "time before samples": Case(
        lambda: Lambda(lambda m, x: torch.cumsum(m.a(x.transpose(0, 1)), 0).transpose(0, 1), a=nn.Linear(3, 2)),
        normal(4, 3),
    ),
    "multi-head attention": Case(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        normal(4, 6),
        forward=lambda m, x: m(x, x, x)[0],
    ),
    "parametrized weight norm": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)),
        normal(4),
        {"0.parametrizations.*": BY_OPERATION},
    ),
    "transposed convolution": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Conv2d(3, 2, 1)),
        normal(2, 3, 3),
    ),
    "older weight norm": Case(
        lambda: nn.Sequential(_old_weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)),
        normal(4),
        {"0.weight_?": BY_OPERATION},
    ),
    **MORE,
}
