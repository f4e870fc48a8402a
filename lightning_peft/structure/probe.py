"""What the attention modules of a model really see: found by running it once on a few tokens.

Names and attributes tell wrongly which modules attend (a decoder-only variant keeps unused
cross-attention) and how their keys are shaped (grouped, latent or shared heads). So each pretrained
model inside runs once, in eval mode and without a graph, and every attention module that is called
writes down its keys and values. Outside of pretrained models only `nn.MultiheadAttention` is found,
which says all by its attributes.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.delta import Attending, Delta, attach, detach, only
from lightning_peft.deltas.attention import uses_interface
from lightning_peft.deltas.passing import first_input
from lightning_peft.errors import TargetError
from lightning_peft.structure.anatomy import Named, base_modules, is_transformers, under

TOKENS = 17
"""How many tokens a probe takes, where nobody asks for certain ones: as many as heads never are."""

_NAME = "probe"
_AUDIO = 16_000


@dataclass(frozen=True)
class Attention:
    """What an attention module saw in a probe."""

    width: int
    """The width of all query heads together."""

    key: Tensor
    """`(key_heads, keys, d_head)`."""

    value: Tensor
    """`(key_heads, keys, d_value)`."""

    key_spread: float
    """The root mean square of the keys."""

    value_spread: float
    """The root mean square of the values."""

    input_width: int = 0
    """The width of what the module receives, 0 where that is not one state for each query."""

    tokens_first: bool = False
    """Whether it receives `(tokens, batch, d_model)` instead of `(batch, tokens, d_model)`."""


class _Recorder(Delta):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Attention | None = None
        self.received = torch.empty(0)

    def note(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the first input; by a hook of its own, which leaves no trace on a host."""
        self.received = first_input(args, kwargs)

    def attend(
        self,
        host: nn.Module,
        base: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Write down what comes in, and change nothing."""
        output = base(host, query, key, value, mask, **kwargs)
        width = query.shape[1] * query.shape[-1]
        if self.seen is None or width > self.seen.width:  # LiLT attends twice, to text and layout
            k, v = key[0].detach(), value[0].detach()
            inputs = _inputs_by_query(self.received, output[0])
            self.seen = Attention(width, k, v, spread(k), spread(v), *inputs)
        return output


def _inputs_by_query(x: Any, output: Tensor) -> tuple[int, bool]:
    """Return the width of an input that has a state for each query, and how it is laid out."""
    rows, queries = output.shape[:2]
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        return 0, False
    folded = rows == 1 < x.shape[0]
    if x.shape[1:-1].numel() == queries and (x.shape[0] == rows or folded):
        return x.shape[-1], False
    tokens_first = x.dim() == 3 and x.shape[0] == queries and x.shape[1] == rows
    return (x.shape[-1], True) if tokens_first else (0, False)


def probe(model: nn.Module, ids: Sequence[int] = ()) -> dict[str, Attention]:
    """Return what each attention module saw, by name, of the modules that a forward pass reaches.

    Args:
        model: any model; it is left as it was, and so are the random generators.
        ids: the ids of the tokens to run, where the model takes tokens.

    Raises:
        TargetError: the model has no attention, or cannot be run.
    """
    models = pretrained(model)
    roots = tuple(name for name, _ in models)
    outside = [(n, m) for n, m in base_modules(model) if "" not in roots and not under(n, roots)]
    found = {n: _of_torch(m) for n, m in outside if isinstance(m, nn.MultiheadAttention)}
    for name, inner in models:
        found |= {f"{name}.{n}".lstrip("."): seen for n, seen in _run(inner, ids).items()}
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no attention that learned keys and values could enter: "
            "none of its modules computes a softmax over the product of queries and keys."
        )
    return found


def _of_torch(module: nn.MultiheadAttention) -> Attention:
    none = module.out_proj.weight.new_empty(module.num_heads, 0, module.head_dim)
    if module.in_proj_weight is None:
        weights = (module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)[1:]
    # Of inputs with unit variance, as a normalisation gives them.
    k, v = (spread(weight) * weight.shape[1] ** 0.5 for weight in weights)
    width = module.embed_dim
    return Attention(width, none, none, k, v, width, not module.batch_first)


def spread(x: Tensor) -> float:
    """Return the root mean square of a tensor."""
    # On the meta device there are no values: what a normalised layer typically gives.
    return 1.0 if x.is_meta or not x.numel() else x.detach().float().square().mean().sqrt().item()


def pretrained(model: nn.Module) -> list[Named]:
    """Return the outermost models of transformers."""
    if is_transformers(model):
        return [("", model)]
    found: list[Named] = []
    for name, module in base_modules(model):
        if is_transformers(module) and not under(name, tuple(n for n, _ in found)):
            found.append((name, module))
    return found


def run(
    model: nn.Module,
    ids: Sequence[int] = (),
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    """Return what a pretrained model gives for a few tokens, in eval mode and without a graph.

    Args:
        model: a model of transformers; it is left as it was, and so are the random generators.
        ids: the ids of the tokens, where the model takes tokens; empty takes some of its own.
        around: makes a context for each attempt, of which the first that succeeds counts.

    Raises:
        TargetError: the model refuses all inputs that are tried.
    """
    error: Exception | None = None
    for make in _inputs(model, ids):
        with around(), untouched(model), _on_paper(model):
            try:
                return model(**make())
            except Exception as raised:  # whatever the model's code raises on inputs it refuses
                error = raised
    raise TargetError(
        f"{type(model).__name__} cannot be run on a few tokens, by which is found what it does "
        f"with them: {type(error).__name__}: {error}"
    ) from error


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in what a model gives, the logits or the states first."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [x for x in values if isinstance(x, Tensor)]


def _run(model: Any, ids: Sequence[int]) -> dict[str, Attention]:
    hosts = dict(_candidates(model))
    recorders = {name: _Recorder() for name in hosts}
    if hosts:
        run(model, ids, lambda: _attached(model, hosts, recorders))
    seen = {name: r.seen for name, r in recorders.items() if r.seen is not None}
    return {
        name: s
        for name, s in seen.items()
        if not any(other.startswith(f"{name}.") for other in seen)
        # With a head for each token it attends to something else: to layers below, for instance.
        and (ids or len(s.key) % TOKENS)
    }


def _candidates(model: nn.Module) -> Iterator[Named]:
    """Yield the modules that may attend; of those inside one another all."""
    modules = base_modules(model)
    asking = [n for n, m in modules if _asks(m)]
    for name, module in modules:
        named = any(word in type(module).__name__.lower() for word in ("attention", "attn"))
        around = any(n.startswith(f"{name}.") for n in asking)
        if name in asking or (named and not around and not isinstance(module, nn.ModuleList)):
            yield name, module


def _asks(module: nn.Module) -> bool:
    known = isinstance(module, (nn.MultiheadAttention, Attending))
    return known or uses_interface(type(module))


@contextlib.contextmanager
def _attached(
    model: nn.Module, hosts: dict[str, nn.Module], recorders: dict[str, _Recorder]
) -> Iterator[None]:
    hooks = []
    try:
        for name, host in hosts.items():
            recorders[name].seen = None
            attach(host, _NAME, recorders[name])
            hooks.append(host.register_forward_pre_hook(recorders[name].note, with_kwargs=True))
        with only(model, recorders.values()):  # other adapters may add keys, or tokens
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for host in reversed(hosts.values()):
            detach(host, _NAME)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run without a graph, in eval mode, and leave modes, buffers and generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, value in buffers:
                buffer.copy_(value)


def _on_paper(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Run a model on the meta device with fake tensors, which transformers asks for no values."""
    if model.device.type != "meta":
        return contextlib.nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _inputs(model: Any, ids: Sequence[int]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield makers of the inputs to try: the main one alone, all of text, then all there are."""
    taken = inspect.signature(model.forward).parameters
    made = {name: maker for name, maker in _MAKERS.items() if name in taken}
    settings = {"use_cache": False} if "use_cache" in taken else {}
    for wanted in ([model.main_input_name], ["input_ids", "decoder_input_ids"], list(made)):

        def make(names: list[str] = wanted) -> dict[str, Any]:
            inputs = {name: made[name](model, ids) for name in names if name in made}
            return {key: x for key, x in inputs.items() if x is not None} | settings

        yield make


def words_of(model: Any) -> list[int]:
    """Return ids of a short text for a model of transformers."""
    config = model.config.get_text_config()
    # From the middle of the vocabulary, away from special tokens; some heads look for the end.
    words, end = getattr(config, "vocab_size", 256), getattr(config, "eos_token_id", None)
    last = end if isinstance(end, int) and end < words else words // 2
    return [*(words // 2 + i % (words // 2) for i in range(TOKENS - 1)), last]


def _ids(model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids or words_of(model))], device=model.device)


def _pixels(model: Any, ids: Sequence[int]) -> Tensor | None:
    config = getattr(model.config, "vision_config", model.config)
    if (shape := _patches(model, ids)) is not None:
        count, width = int(shape.prod()), config.num_channels * config.patch_size**2
        return torch.randn(1, count, width, device=model.device, dtype=model.dtype)
    size = getattr(config, "image_size", None) or 224
    size = tuple(size.values()) if isinstance(size, dict) else size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels: int = getattr(config, "num_channels", 3)
    return _noise(model, channels, height, width)


def _patches(model: Any, ids: Sequence[int]) -> Tensor | None:
    """Return how many rows and columns of patches there are, where a model takes patches."""
    config = getattr(model.config, "vision_config", model.config)
    if "spatial_shapes" not in inspect.signature(model.forward).parameters:
        return None
    return torch.full((1, 2), math.isqrt(config.num_patches), device=model.device)


def _patch_mask(model: Any, ids: Sequence[int]) -> Tensor | None:
    shape = _patches(model, ids)
    return None if shape is None else shape.new_ones(1, int(shape.prod()))


def _noise(model: Any, *shape: int) -> Tensor:
    return torch.randn(1, *shape, device=model.device, dtype=model.dtype)


def _features(model: Any, ids: Sequence[int]) -> Tensor:
    config = getattr(model.config, "audio_config", model.config)
    default: int = getattr(config, "input_feat_per_channel", 80)
    mels: int = getattr(config, "num_mel_bins", default)
    frames = 2 * getattr(config, "max_source_positions", 1500)
    return _noise(model, mels, frames)


def _boxes(model: Any, ids: Sequence[int]) -> Tensor:
    return torch.zeros(1, len(ids) or TOKENS, 4, dtype=torch.long, device=model.device)


_MAKERS: dict[str, Callable[[Any, Sequence[int]], Tensor | None]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_attention_mask": _patch_mask,
    "spatial_shapes": _patches,
    "bbox": _boxes,
    "visual_feats": lambda model, _: _noise(model, 4, model.config.visual_feat_dim),
    "visual_pos": lambda model, _: _noise(model, 4, model.config.visual_pos_dim),
    "input_values": lambda model, _: _noise(model, _AUDIO),
    "input_features": _features,
    "decoder_input_ids": lambda model, ids: (
        _ids(model, ids) if model.config.is_encoder_decoder else None
    ),
}
