"""Which parameters an optimizer holds: exactly those that are trained, in a fixed order."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft.delta import SLOT
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter
    from lightning_peft.carrying.group import AdapterGroup


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form `configure_optimizers` returned them."""
    return list(dict.fromkeys(_walk(configured)))


def keep_trainable(configured: Any, trained: Mapping[str, nn.Parameter]) -> None:
    """Leave in the optimizers only `trained` parameters, sorted by name, and all of them.

    A restored state is matched by position, so an order by name is the same in every run. What no
    group holds (the module listed its parameters before the injection) joins the first group.

    Raises:
        ConfigError: it is open which optimizer a parameter belongs to, or it cannot join.
    """
    optimizers = optimizers_in(configured)
    if not optimizers:
        return
    closed = len(optimizers) > 1 or bool(optimizers[0].state)
    held = {name for optimizer in optimizers for name in _keep(optimizer, trained)}
    absent = sorted(trained.keys() - held)
    if absent and closed:
        raise ConfigError(
            f"`{absent[0]}` is trained, but no optimizer of `configure_optimizers` holds it, and "
            "it cannot join one later: list the parameters there (`self.parameters()`), not before."
        )
    _join(optimizers[0].param_groups[0], absent, trained)


def parameter_groups(
    adapter: "Adapter | AdapterGroup", lr: float, weight_decay: float, head_lr: float | None
) -> list[dict[str, Any]]:
    """Group by learning rate and by whether the weight decays, each sorted by name.

    Args:
        adapter: what is trained.
        lr: learning rate of what the methods train, which one may scale.
        weight_decay: of matrices; biases and norms have none.
        head_lr: learning rate of the head and of what is trained in place beside the methods; None
            takes `lr`.
    """
    beside, scales = adapter.beside_methods, adapter.lr_scales
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters().items():
        rate = lr if head_lr is None or name not in beside else head_lr
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate * scales.get(name, 1.0), decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": wd} for (rate, wd), p in groups.items()]


def lr_scales(adapter: "Adapter") -> dict[str, float]:
    """Return by name how many times faster a parameter learns, where it is not once."""
    methods = {f"{adapter.name}_{method.kind}": method for method in adapter.methods}
    scales = {}
    for name in adapter.named_parameters():
        key, _, rest = name.partition(f"{SLOT}.")[2].partition(".")
        if key in methods:
            scales[name] = methods[key].lr_scale(rest)
    return {name: scale for name, scale in scales.items() if scale != 1}


def check_scales(configured: Any, adapter: "Adapter | AdapterGroup") -> None:
    """Refuse optimizers that give one rate to what a method lets learn at different ones.

    Raises:
        ConfigError: such parameters share a group, or a scheduler has levelled their groups.
    """
    if not (scales := adapter.lr_scales):
        return
    named = {id(p): name for name, p in adapter.named_parameters().items()}
    peaks: dict[str, float] = {}
    for group in (group for o in optimizers_in(configured) for group in o.param_groups):
        names = [named.get(id(p), "") for p in group["params"]]
        if len({scales.get(name, 1.0) for name in names}) > 1:
            faster = next(name for name in names if name in scales)
            raise ConfigError(
                f"`{faster}` must learn {scales[faster]:g} times as fast as others, but "
                "shares an optimizer's group with them: build the optimizer in "
                "`configure_optimizers` from `self.peft_adapter.parameter_groups(lr=...)`."
            )
        peaks |= dict.fromkeys(names, group.get("max_lr", group.get("initial_lr", group["lr"])))
    _refuse_levelled(scales, peaks)


def _refuse_levelled(scales: Mapping[str, float], peaks: Mapping[str, float]) -> None:
    siblings = {name.rpartition(".")[0]: name for name in peaks if name not in scales}
    for name, scale in scales.items():
        beside = siblings.get(name.rpartition(".")[0], "")
        if beside and name in peaks and peaks[name] == peaks[beside]:
            raise ConfigError(
                f"`{name}` must learn {scale:g} times as fast as `{beside}`, but has the same "
                f"rate, {peaks[name]:g}: a scheduler with one `max_lr` for all (OneCycleLR, "
                "CyclicLR) needs a list, `max_lr=[group['lr'] for group in "
                "optimizer.param_groups]`."
            )


def group_names(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Return the names that each parameter group of `optimizer` holds."""
    names = {id(parameter): name for name, parameter in trained.items()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


def _keep(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in trained.items()}
    held: set[str] = set()
    for group in optimizer.param_groups:
        kept = sorted({names[id(p)] for p in group["params"] if id(p) in names} - held)
        held.update(kept)
        for parameter in group["params"]:
            if id(parameter) not in names:  # some (Adagrad) have a state from the start
                optimizer.state.pop(parameter, None)
        _fill(group, kept, trained)
    return held


def _join(group: dict[str, Any], absent: list[str], trained: Mapping[str, nn.Parameter]) -> None:
    names = {id(parameter): name for name, parameter in trained.items()}
    _fill(group, sorted([*absent, *(names[id(p)] for p in group["params"])]), trained)


def _fill(group: dict[str, Any], names: Sequence[str], trained: Mapping[str, nn.Parameter]) -> None:
    # In place: some optimizers (LBFGS) keep a reference to the list itself.
    group["params"][:] = [trained[name] for name in names]
    group.pop("param_names", None)


def _walk(value: Any) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, Mapping):
        yield from _walk(value.get("optimizer"))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)
