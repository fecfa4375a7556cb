"""The slow, obviously right truth: one sample at a time, plain autograd. Never imported by the package."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


def importance(
    model: nn.Module, batch: object, num_samples: int, run: Callable[[nn.Module, object, int], Tensor]
) -> dict[str, Tensor]:
    """Omega = 1/N sum_k |d ||F(x_k)||^2 / d theta|, by N backward passes; `run` gives the output of sample k."""
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in range(num_samples):
        score = (run(model, batch, k) ** 2).sum()
        gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.to_dense().abs() if gradient.is_sparse else gradient.abs()
    return {name: total / num_samples for name, total in totals.items()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||x - ref|| / max(||ref of the parameter||, 1e-6 ||ref of the model||), per parameter."""
    assert set(found) == set(expected)
    whole = torch.stack([value.double().norm() for value in expected.values()]).norm()
    result = {}
    for name, value in expected.items():
        scale = torch.maximum(value.double().norm(), 1e-6 * whole)
        assert found[name].shape == value.shape, name
        difference = (found[name].double() - value.double()).norm()
        result[name] = float(difference / scale) if scale > 0 else float(difference)
    return result


def local_importance(
    model: nn.Module,
    batch: object,
    num_samples: int,
    run: Callable[[nn.Module, object, int], object],
    activations: dict[str, Callable[[Tensor], Tensor]],
) -> dict[str, Tensor]:
    """Omega = 1/N sum_k |d sum y^2 / d theta| of each layer alone, y = phi(layer(a)) with its inputs a held.

    A layer is a module with parameters of its own; `activations` says by name what phi follows it, nothing by default.
    """
    model.eval()
    layers = {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    names = {id(p): name for name, p in model.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(num_samples):
        calls: list[tuple[str, tuple[object, ...]]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda m, args, name=name, calls=calls: calls.append((name, args)))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            run(model, batch, k)
        for hook in hooks:
            hook.remove()
        own = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for name, args in calls:
            parameters = list(layers[name].parameters(recurse=False))
            held = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
            y = activations.get(name, lambda z: z)(layers[name](*held))
            for parameter, gradient in zip(parameters, torch.autograd.grad((y**2).sum(), parameters), strict=True):
                own[names[id(parameter)]] += gradient
        for name, gradient in own.items():
            totals[name] += gradient.abs()
    return {name: total / num_samples for name, total in totals.items()}


def signs(k: int, size: int) -> Tensor:
    """The signs of sample k: 1 or -1 for each number of its output."""
    bits = []
    for block in range(-(-size // 64)):
        word = (k * 0x9E3779B97F4A7C15 + (block + 1) * 0xB4B82F3A5EB2B3DB) % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
        bits += [word >> place & 1 for place in range(64)]
    return torch.tensor(bits[:size]) * 2 - 1


def _patches(image: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """The windows of one padded image (channels, *spatial), by a loop: (positions, channels * kernel)."""
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    starts = [range(0, size - span + 1, s) for size, span, s in zip(image.shape[1:], spans, stride, strict=True)]
    rows = []
    for start in itertools.product(*starts):
        places = [slice(s, s + n, d) for s, n, d in zip(start, spans, dilation, strict=True)]
        rows.append(image[(slice(None), *places)].flatten())
    return torch.stack(rows)


def _pad(image: Tensor, layer: nn.Module) -> Tensor:
    """An image (channels, *spatial) with the padding of a convolution."""
    totals = (
        [2 * p for p in layer.padding]
        if not isinstance(layer.padding, str)
        else [
            d * (k - 1) if layer.padding == "same" else 0
            for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
    )
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return torch.nn.functional.pad(image.unsqueeze(0), sides, mode=mode).squeeze(0)


def _rows(layer: nn.Module, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs and the output gradients of a layer for one sample: (G, positions, n) and (G, positions, m)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]), d.reshape(1, -1, d.shape[-1])
    groups = layer.groups
    windowed, plain = (d, x) if layer.transposed else (x, d)
    windows, positions = [], []
    for own, other in zip(windowed, plain, strict=True):
        parts = [
            _patches(part, layer.kernel_size, layer.stride, layer.dilation) for part in _pad(own, layer).chunk(groups)
        ]
        windows.append(torch.stack(parts)[:, : other[0].numel()])
        positions.append(torch.stack([part.flatten(1).T for part in other.chunk(groups)]))
    first, second = torch.cat(windows, 1), torch.cat(positions, 1)
    return (second, first) if layer.transposed else (first, second)


def _add_lookup(found: dict[str, Tensor], name: str, layer: nn.Embedding, index: Tensor, d: Tensor) -> None:
    """The lookups of one call: how often each row was read, but the padding row, and the gradients of those reads."""
    for row, own in zip(index.flatten().tolist(), d.reshape(-1, d.shape[-1]), strict=True):
        if row != layer.padding_idx:
            one = torch.zeros(len(layer.weight), dtype=d.dtype)
            one[row] = 1
            for key, part in ((f"inputs/{name}", one), (f"outputs/{name}", torch.outer(own, own).unsqueeze(0))):
                found[key] = found.get(key, 0) + part
            key = f"positions/{name}"
            found[key] = found.get(key, torch.zeros((), dtype=torch.float64)) + 1


def second_moments(
    model: nn.Module, batch: object, num_samples: int, run: Callable[[nn.Module, object, int], Tensor]
) -> dict[str, Tensor]:
    """`inputs/<weight>`, `outputs/<weight>` and `positions/<weight>`, summed over samples, of plain layers of torch.

    One sample at a time: x and d of each call, read by hooks; d is the gradient of the sum of the outputs times signs.
    """
    model.eval()
    kinds = (
        nn.Embedding,
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    layers = [m for m in model.modules() if isinstance(m, kinds) and id(m.weight) in names]
    found: dict[str, Tensor] = {}
    for k in range(num_samples):
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def keep(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor, calls: list = calls) -> Tensor:
            calls.append((layer, (args or tuple(kwargs.values()))[0].detach().clone(), output))
            return output.clone()  # what is written in place after the layer does not reach `output`

        hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
        result = run(model, batch, k).flatten()
        for hook in hooks:
            hook.remove()
        score = (result * signs(k, len(result))).sum()
        calls = [own for own in calls if own[2].requires_grad]
        if not calls:
            continue
        grads = torch.autograd.grad(score, [own for _, _, own in calls], allow_unused=True)
        for (layer, x, output), grad in zip(calls, grads, strict=True):
            d = torch.zeros_like(output) if grad is None else grad
            if isinstance(layer, nn.Embedding):
                is_tied = any(other is not layer and other.weight is layer.weight for other in layers)
                name = names[id(layer.weight)] + (" as table" if is_tied else "")
                _add_lookup(found, name, layer, x, d)
                continue
            inputs, outputs = _rows(layer, x, d)
            if layer.bias is not None and not getattr(layer, "transposed", False):
                inputs = torch.cat([inputs, torch.ones_like(inputs[:, :, :1])], 2)
            name = names[id(layer.weight)]
            for side, rows in (("inputs", inputs), ("outputs", outputs)):
                own = rows.transpose(1, 2) @ rows
                found[f"{side}/{name}"] = found.get(f"{side}/{name}", 0) + own
            count = torch.tensor(float(inputs.shape[1]), dtype=torch.float64)
            found[f"positions/{name}"] = found.get(f"positions/{name}", 0) + count
    return found
