"""The table of models x data on which measuring must be exact."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm


@dataclass(frozen=True)
class Case:
    """A model, how to make a batch of n samples in a dtype, and which parameters are expected to go by a rule."""

    model: Callable[[], nn.Module]
    batch: Callable[[int, torch.dtype], Any]
    slow: frozenset[str] = frozenset()
    """Parameters expected to be measured one sample at a time."""
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


ALL_LSTM = frozenset({"weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"})

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
        frozenset(f"c.{name}" for name in ALL_LSTM),
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
    "input changed in place afterwards": Case(
        lambda: Lambda(lambda m, x: _change_in_place(m, x), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        normal(4),
        frozenset({"b.weight", "b.bias"}),
    ),
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
        ALL_LSTM,
        forward=lambda m, x: m(x)[1][0],
    ),
    "two inputs through forward=": Case(
        lambda: nn.Bilinear(3, 2, 4),
        lambda n, dtype: (normal(3)(n, dtype), normal(2)(n + 1, dtype)[1:]),
        frozenset({"weight", "bias"}),
        forward=lambda m, pair: m(*pair),
    ),
    "bare parameter": Case(
        lambda: Lambda(lambda m, x: m.a(x + m.p), a=nn.Linear(4, 3), p=nn.Parameter(torch.randn(4))),
        normal(4),
        frozenset({"p"}),
    ),
    "tied embedding and head": Case(tied, integers(7, 5), frozenset({"embedding.weight"})),
    "weight used outside its layer": Case(
        lambda: Lambda(lambda m, x: m.a(x) + F.linear(torch.tanh(x), m.a.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        normal(4),
        frozenset({"a.weight"}),
    ),
    "windows folded into the batch": Case(
        lambda: Lambda(windows, inner=nn.Linear(3, 5), head=nn.Linear(40, 2)),
        normal(8, 3),
        frozenset({"inner.weight", "inner.bias"}),
    ),
    "time before samples": Case(
        lambda: Lambda(lambda m, x: torch.cumsum(m.a(x.transpose(0, 1)), 0).transpose(0, 1), a=nn.Linear(3, 2)),
        normal(4, 3),
        frozenset({"a.weight", "a.bias"}),
    ),
    "multi-head attention": Case(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        normal(4, 6),
        frozenset({"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}),
        forward=lambda m, x: m(x, x, x)[0],
    ),
    "parametrized weight norm": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)),
        normal(4),
        frozenset({"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}),
    ),
    "transposed convolution": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Conv2d(3, 2, 1)),
        normal(2, 3, 3),
        frozenset({"0.weight", "0.bias"}),
    ),
    "older weight norm": Case(
        lambda: nn.Sequential(_old_weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)),
        normal(4),
        frozenset({"0.weight_g", "0.weight_v"}),
    ),
}


def _roll(m: nn.Module, ids: Tensor) -> Tensor:
    state = m.head.weight.new_zeros(len(ids), 4)
    for x in m.tokens(ids).unbind(1):
        state = torch.tanh(m.cell(torch.cat([x, state], 1)))
    return m.head(state)


def _change_in_place(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        constant = torch.sin(x)
    y = m.b(constant.clone() if any(p.requires_grad for p in m.b.parameters()) else constant)
    constant.mul_(3)
    return m.a(x).sum(1, keepdim=True) * y


def _old_weight_norm(layer: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)
