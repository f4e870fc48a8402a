"""Deltas inside an attention that is written out: what the host calls of torch is watched.

While the host's forward runs, a `TorchFunctionMode` sees each function of torch. A call of scaled
dot product attention passes through the deltas as it is. Else a product whose result, scaled and
masked, goes into a softmax over the keys, and from there into a second product, is attention:

    S = q kᵀ,    P = softmax(f(S)),    y = g(P) v

With further keys K and values V before k and v, whose scores are E = f(q Kᵀ) (masks and biases left
out), and shares W = exp(E - logaddexp(logsumexp f(S), logsumexp E)), attention over all of them is

    y' = (1 - Σ W) y + g(W) V

so nothing of the host's own computation is repeated. An operation between the two products that is
not known to be one of f or g ends the watch: such a host gives nothing to its deltas.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_peft.delta import Attending, through_deltas

Step = Callable[[Tensor], Tensor]

_SCALES = ("mul", "multiply", "div", "divide", "truediv")
_SHIFTS = ("add", "sub", "radd", "rsub")
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "dropout")
_SHAPES = ("view", "reshape")
_MASKS = ("where", "masked_fill", "max", "maximum", "clamp", "clip")


class Intercepted(Attending):
    """Mixin of a host whose calls of torch are watched for attention."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the host's forward, watched if a delta wants to attend."""
        if through_deltas(_nothing, self) is _nothing:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with _Watch(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Product(NamedTuple):
    """A product of two activations, the second one brought to `(batch, heads, keys, d)`."""

    first: Tensor
    second: Tensor
    with_second: Callable[[Tensor, Tensor], Tensor]
    """The same product of other operands, the second one `(batch, heads, keys, d)`."""
    order: tuple[int, ...]
    """How the dimensions of the result are brought to `(..., queries, d)`."""


@dataclass(frozen=True, eq=False)
class _Chain:
    """One attention under way."""

    product: _Product
    last: Tensor
    """What became of the scores so far."""
    steps: tuple[Step, ...] = ()
    """What was done to them since the product, or since the softmax."""
    reshaped: tuple[Step, ...] = ()
    """Those of the steps that gave them another shape."""
    soft: "_Chain | None" = None
    """The chain up to the softmax, once that was seen."""


class _Watch(TorchFunctionMode):
    def __init__(self, host: Any) -> None:
        super().__init__()
        self.host = host
        self.chains: list[_Chain] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (*args, kwargs.get("query"))[0].dim() == 4:
            return _scaled(self.host, *args, **kwargs)
        name, result = func.__name__.strip("_"), func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        # The first argument counts: a bias that is a product itself is added to the scores.
        chain = next((c for a in _flat(args) for c in self.chains if c.last is a), None)
        product = _PRODUCTS[name](func, args, kwargs) if name in _PRODUCTS else None
        if chain and chain.soft and product:
            self.chains.remove(chain)
            return _attended(self.host, chain, product(False), result)
        if chain and (longer := _followed(chain, name, func, args, kwargs, result)):
            self.chains[self.chains.index(chain)] = longer
        elif product and (start := product(True)):
            self.chains.append(_Chain(start, result))
        return result


def _nothing() -> None:
    """Stand for an attention: does a delta change it?"""


def _scaled(
    host: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> Tensor:
    def base(
        _: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool
    ) -> tuple[Tensor, None]:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **settings)
        return y.transpose(1, 2), None

    attend = through_deltas(base, host)
    output, _ = attend(host, query, key, value, attn_mask, is_causal=is_causal)
    return output.transpose(1, 2)


def _attended(host: Any, chain: _Chain, weighted: _Product | None, result: Tensor) -> Tensor:
    """Return `result`, the weighted sum of the host's values, as the deltas change it."""
    scores = chain.soft
    if weighted is None or scores is None:
        return result
    present = scores.product.second.shape[-2]

    def base(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> Any:
        if (count := key.shape[-2] - present) == 0:
            return _by_tokens(result, weighted.order), None
        further = scores.product.with_second(scores.product.first, key[..., :count, :])
        share = _share(scores, further)
        kept = 1 - share.sum(-1, keepdim=True)
        for step in chain.steps:
            share, kept = step(share), step(kept) if step in chain.reshaped else kept
        one = value.new_ones(*value.shape[:-2], 1, value.shape[-1])
        own = result * weighted.with_second(kept.to(value.dtype), one)
        further = weighted.with_second(share.to(value.dtype), value[..., :count, :])
        return _by_tokens(own + further, weighted.order), None

    base.whole = True  # type: ignore[attr-defined]  # it takes no part of the batch
    inputs = (scores.product.first, scores.product.second, weighted.second)
    output = through_deltas(base, host)(host, *inputs, None, is_causal=False)[0]
    return _as_like(output.transpose(1, 2), result).permute(_inverse(weighted.order))


def _by_tokens(result: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return what a host computed as `(batch, tokens, heads, d_value)`."""
    return _by_heads(result.permute(order)).transpose(1, 2)


def _by_heads(x: Tensor) -> Tensor:
    """Return rows folded into heads, or windows behind heads, as `(batch, heads, tokens, d)`."""
    if x.dim() == 5:
        return x.transpose(1, 2).flatten(0, 1)
    return x if x.dim() == 4 else x[None]


def _as_like(x: Tensor, like: Tensor) -> Tensor:
    """Undo `_by_heads`."""
    if like.dim() == 5:
        return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
    return x if like.dim() == 4 else x[0]


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _share(scores: _Chain, further: Tensor) -> Tensor:
    """Return the share of the attention that each of the further keys gets."""
    for step in scores.steps:
        further = step(further)
    own = scores.last.float() if scores.last.dtype.itemsize < 4 else scores.last
    further = further.to(own.dtype)
    total = own.logsumexp(-1, True).logaddexp(further.logsumexp(-1, True))
    return (further - total).exp()


def _followed(
    chain: _Chain, name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Tensor
) -> _Chain | None:
    """Return the chain after this operation, or None where it is not part of attention."""
    if name == "softmax":
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        over_keys = dim in (-1, result.dim() - 1)
        ours = over_keys and chain.soft is None and args[0] is chain.last
        return _Chain(chain.product, result, soft=chain) if ours else None
    if (step := _step(chain.last, name, func, args, kwargs, result)) is None:
        return None
    reshaped = (*chain.reshaped, step) if name in _SHAPES else chain.reshaped
    return replace(chain, last=result, steps=(*chain.steps, step), reshaped=reshaped)


def _step(
    last: Tensor, name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Tensor
) -> Step | None:
    """Return what an operation on the scores does to the scores of further keys."""

    def again(x: Tensor) -> Tensor:
        changed: Tensor = func(*[x if a is last else a for a in args], **kwargs)
        return changed

    name = name.removeprefix("i") if name[1:] in _SCALES + _SHIFTS else name
    if result.shape[-1] != last.shape[-1]:
        return None
    if name in _SHAPES:
        return lambda x: x.reshape(*result.shape[:-1], x.shape[-1])
    if name in _CASTS:
        return again
    if name in _MASKS:
        return _unchanged
    if name not in _SCALES + _SHIFTS:
        return None
    other = next((a for a in args if a is not last), None)
    if name in _SHIFTS and _is_by_key(other, last):
        return _unchanged
    inverse = name in ("div", "divide", "truediv") and args[0] is not last
    if _is_by_key(other, None):  # a product with zeros and ones is a mask
        mask: Any = (other == 0) | (other == 1)
        return _unchanged if bool(mask.all()) else None
    return None if inverse else again


def _unchanged(x: Tensor) -> Tensor:
    return x


def _is_by_key(other: Any, scores: Tensor | None) -> bool:
    """Whether an operand has a value for each key, as masks and biases have."""
    if not isinstance(other, Tensor) or other.dim() == 0:
        return False
    return other.shape[-1] > 1 or (scores is not None and scores.shape[-1] == 1)


def _flat(args: Any) -> list[Any]:
    return [x for a in args for x in (a if isinstance(a, (list, tuple)) else (a,))]


def _fits(*operands: Any, dims: tuple[int, ...] = (3, 4)) -> bool:
    return all(
        isinstance(x, Tensor) and x.dim() in dims and not isinstance(x, nn.Parameter)
        for x in operands
    )


def _matmul(func: Any, args: Any, kwargs: dict[str, Any]) -> Callable[[bool], _Product | None]:
    def product(by_keys: bool) -> _Product | None:
        operands = (*args, *kwargs.values())
        if len(operands) != 2 or not _fits(*operands, dims=(3, 4, 5)):
            return None
        return _as_product(*operands, by_keys, func)

    return product


def _baddbmm(func: Any, args: Any, kwargs: dict[str, Any]) -> Callable[[bool], _Product | None]:
    def product(by_keys: bool) -> _Product | None:
        given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
        first, second, alpha = given["batch1"], given["batch2"], given.get("alpha", 1)
        if not _fits(first, second):
            return None
        return _as_product(first, second, by_keys, lambda a, b: (a @ b) * alpha)

    return product


def _as_product(
    first: Tensor, second: Tensor, by_keys: bool, multiply: Callable[[Tensor, Tensor], Tensor]
) -> _Product:
    """Return a product over the last dimension of the first operand; `by_keys` for q kᵀ."""

    def with_second(a: Tensor, rows: Tensor) -> Tensor:
        rows = _as_like(rows, second)
        return multiply(a, rows.transpose(-2, -1) if by_keys else rows)

    rows = _by_heads(second.transpose(-2, -1) if by_keys else second)
    return _Product(first, rows, with_second, tuple(range(max(first.dim(), second.dim()))))


def _einsum(func: Any, args: Any, kwargs: dict[str, Any]) -> Callable[[bool], _Product | None]:
    def product(by_keys: bool) -> _Product | None:
        equation, operands = args[0].replace(" ", ""), _flat(args[1:])
        if len(operands) != 2 or not _fits(*operands) or "." in equation:
            return None
        (a, b), out = equation.split("->")[0].split(","), equation.split("->")[1]
        free, summed = set(b) - set(a), set(a) & set(b) - set(out)
        if len(free) != 1 or len(summed) != 1:
            return None
        batch = [letter for letter in out if letter in a and letter in b]
        rows_then_columns = (*free, *summed) if by_keys else (*summed, *free)
        order = tuple(b.index(letter) for letter in (*batch, *rows_then_columns))
        queries = set(a) - set(b)
        if len(queries) != 1:
            return None

        def with_second(first: Tensor, rows: Tensor) -> Tensor:
            rows = rows if len(b) == 4 else rows[0]
            return func(equation, first, rows.permute(_inverse(order)))

        rows = operands[1].permute(order)
        rows = rows if rows.dim() == 4 else rows[None]
        by_tokens = tuple(out.index(letter) for letter in (*batch, *queries, *free))
        return _Product(operands[0], rows, with_second, by_tokens)

    return product


_PRODUCTS = {"matmul": _matmul, "bmm": _matmul, "baddbmm": _baddbmm, "einsum": _einsum}
