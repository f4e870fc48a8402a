"""What a model keeps as long as it carries adapters."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from lightning_peft.delta import SLOT, Unforgivable, plain_name
from lightning_peft.errors import AdapterError
from lightning_peft.structure.anatomy import is_transformers
from lightning_peft.structure.drift import drifts, recomputing
from lightning_peft.training.modes import HeldInEval, ask_for_gradient, hold_in_eval, release

if TYPE_CHECKING:
    from lightning_peft.adapter import Adapter


class Forgetful(dict[Any, Any]):
    """What is quickly made anew, and neither copied nor pickled."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Forgetful, ()


class Registry(dict[str, "Adapter"]):
    """The adapters of one model by name, and what the model was before the first of them."""

    made: ClassVar[int] = 0
    """How many registries there have been, by which a list of them is known to be out of date."""

    rowless: Mapping[str, str] | None = None  # found when a batch is first mixed
    entered: Any = None  # the scene of the batch that is mixed at this time
    inner: tuple[int, tuple["Registry", ...]] = (-1, ())  # those below, as of a count of registries

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.required = {plain_name(n): p.requires_grad for n, p in model.named_parameters()}
        self.norms = [(plain_name(n), m) for n, m in model.named_modules() if drifts(m)]
        self.held: list[nn.Module] = []
        self.asking = [ask_for_gradient(module) for module in recomputing(model)]
        self.scenes = Forgetful()
        self.guard = model.register_load_state_dict_pre_hook(_refuse_partial)
        Registry.made += 1

    def hold_norms(self) -> None:
        """Keep each normalisation in eval mode that no active adapter trains."""
        if not self.norms:
            return
        trained = {
            name.rpartition(".")[0] for a in self.values() if a.active for name in a.in_place
        }
        for norm in [m for n, m in self.norms if n in trained and m in self.held]:
            self.held.remove(norm)
            release(norm)
        # Another registry may hold the norm already, and a shared one is met twice.
        free = [(n, m) for n, m in self.norms if not isinstance(m, HeldInEval)]
        frozen = [m for n, m in free if n not in trained]
        self.held += [hold_in_eval(norm) for norm in frozen]

    def close(self, model: nn.Module) -> None:
        """Give the model back what it was before the first adapter."""
        for handle in (self.guard, *self.asking):
            handle.remove()
        for module in reversed(self.held):
            release(module)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.required.get(plain_name(name), False))


def carried(model: nn.Module) -> Mapping[str, "Adapter"]:
    """Return what `adapters_of` does, without a walk through the model each time."""
    registry = model.__dict__.get("_adapters")
    if registry is None:
        return adapters_of(model)
    if registry.inner[0] != Registry.made:
        below = (m.__dict__.get("_adapters") for m in model.modules() if m is not model)
        registry.inner = Registry.made, tuple(each for each in below if each is not None)
    return {name: a for each in (registry, *registry.inner[1]) for name, a in each.items()}


def refuse_clash(adapters: Iterable["Adapter"]) -> None:
    """Refuse to let adapters act together that train the same weight in place.

    Raises:
        AdapterError: two of them do.
    """
    owners: dict[str, str] = {}
    for adapter in adapters:
        for name in adapter.in_place:
            if (other := owners.setdefault(name, adapter.name)) != adapter.name:
                raise AdapterError(
                    f"`{name}` is trained in place by `{other}` and by `{adapter.name}`, which "
                    "cannot both act: deactivate one of them, or `switch` to the other."
                )


def adapters_of(model: nn.Module) -> dict[str, "Adapter"]:
    """Return the adapters that `model` or a module inside it carries, by name."""
    return {n: a for m in model.modules() for n, a in m.__dict__.get("_adapters", {}).items()}


def registry_of(model: nn.Module) -> Registry:
    """Return the registry of the adapters that were injected into `model` itself."""
    if "_adapters" not in model.__dict__:
        model.__dict__["_adapters"] = Registry(model)
    return cast(Registry, model.__dict__["_adapters"])


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by their plain names, a shared one under each of its names."""
    named = model.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named}


def tell_transformers(model: nn.Module) -> None:
    """Keep what adapters added out of `save_pretrained`, by transformers' own list for that."""
    for module in model.modules():
        if is_transformers(module):  # before 5.9 the list is the class's, and None when empty
            ignored = getattr(module, "_keys_to_ignore_on_save", None) or ()
            kept = {name for name in ignored if f"{SLOT}." not in name}
            added = {name for name in module.state_dict() if f"{SLOT}." in name}
            module.__dict__["_keys_to_ignore_on_save"] = kept | added


def _refuse_partial(
    model: nn.Module, state: Mapping[str, Any], prefix: str, _: Any, __: bool, *lists: list[str]
) -> None:
    # A state dict of the bare base holds no tensor of an adapter; any other must hold all of them.
    missing = lists[0]
    for adapter in model.__dict__["_adapters"].values():
        own = {f"{prefix}{name}" for name in adapter.added_keys()}
        lost = own - state.keys() - set(missing) if own & state.keys() else ()
        missing.extend(map(Unforgivable, sorted(lost)))
