"""What is trained in place, as peft's `modules_to_save`: whole modules, by the ends of their names.

peft trains a copy of each such module, and files hold all its tensors. So a module of which only
some are trained is written as a whole, and what was not trained must be the base's when read.
"""

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_peft.carrying.registry import adapters_of
from lightning_peft.delta import SLOT, plain_name
from lightning_peft.errors import AdapterError, CheckpointError
from lightning_peft.files.peft.settings import Settings
from lightning_peft.files.peft.spelling import Copies, Entry, Inexpressible, constant, same
from lightning_peft.structure.anatomy import base_modules, under

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft trains in place by the type of the task, whether a file says so or not."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def owners_of(model: nn.Module, in_place: Collection[str]) -> list[str]:
    """Return the names of the modules that own what is trained, tied ones too."""
    return sorted({name.rpartition(".")[0] for name in _with_ties(model, in_place)})


def saved_modules(
    model: nn.Module, in_place: Collection[str], covered: Collection[str], hosts: Collection[str]
) -> list[str]:
    """Return the modules that hold what is trained in place, as few as cover it.

    Args:
        model: the base.
        in_place: the names of what is trained.
        covered: those that peft's format holds otherwise, where no module is needed for others.
        hosts: the modules that are adapted.

    Raises:
        Inexpressible: peft cannot train that module in place.
    """
    wanted, chosen = _with_ties(model, in_place), list[str]()
    needed, modules = wanted - _with_ties(model, covered), _modules(model)
    for name, module in modules.items():
        every = module.named_parameters(remove_duplicate=False)
        own = {plain_name(f"{name}.{n}") for n, _ in every if SLOT not in n.split(".")}
        whole = own & needed and own <= wanted and not isinstance(module, _CONTAINERS)
        if name and whole and not under(name, tuple(chosen)):
            chosen.append(name)
    left = {owner for n in needed if not under(owner := n.rpartition(".")[0], tuple(chosen))}
    for owner in sorted(left):
        if not owner or isinstance(modules[owner], _CONTAINERS):
            raise Inexpressible(f"peft cannot train the parameters of `{owner or 'the model'}`.")
    chosen += [owner for owner in sorted(left) if not under(owner, tuple(left - {owner}))]
    for name in chosen:
        if inside := [host for host in hosts if under(host, (name,))]:
            raise Inexpressible(
                f"`{name}` is trained in place and `{inside[0]}` inside it is adapted, but peft "
                "does one or the other."
            )
    return chosen


def patterns_of(model: nn.Module, chosen: Sequence[str], hosts: Collection[str]) -> list[str]:
    """Return ends of names by which peft finds the chosen modules, and no others.

    Raises:
        Inexpressible: peft would find others, or leave out a host.
    """
    names = [name for name in _modules(model) if name]
    found = []
    for module in chosen:
        parts = module.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        fits = (e for e in ends if _finds_only(e, names, chosen, hosts))
        end = next(fits, None)
        if end is None:
            raise Inexpressible(f"peft finds further modules by the name of `{module}`.")
        found.append(end)
    return sorted({*found})


def found_in(settings: Settings, keys: Collection[str], model: nn.Module, base: str) -> list[str]:
    """Return the modules that a configuration trains in place.

    Raises:
        CheckpointError: it names one that the model lacks.
    """
    modules = _modules(model)
    stated = [str(end) for end in settings.any_of("modules_to_save", list) or []]
    implied = [end for end in HEADS.get(str(settings.peek("task_type")), ()) if end not in stated]
    chosen = [name for name in modules if name.endswith(tuple(stated))] if stated else []
    given = tuple(key for key in keys)
    chosen += [
        name
        for name in modules
        if implied and name.endswith(tuple(implied))
        if any(key.startswith(f"{base}{name}.") for key in given)
    ]
    own = {end for ends in HEADS.values() for end in ends}  # which peft adds to every model's
    lost = [e for e in stated if e not in own and not _any_ends(modules, e)]
    if lost:
        raise CheckpointError(
            f"`modules_to_save` in `{settings.where}` names `{lost[0]}`, which the model lacks: "
            "load the class of model that it was trained in."
        )
    return [n for n in chosen if n and not under(n, tuple(c for c in chosen if c and c != n))]


def parameters_of(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """Return the names of the parameters of the chosen modules.

    Raises:
        CheckpointError: one is shared with a module that is not chosen.
    """
    first = {id(p): plain_name(n) for n, p in model.named_parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    inside = {n: p for n, p in named.items() if under(n.rpartition(".")[0], tuple(chosen))}
    for name, parameter in named.items():
        if name not in inside and any(parameter is p for p in inside.values()):
            other = next(n for n, p in inside.items() if p is parameter)
            raise CheckpointError(
                f"`{other}` shares its weight with `{name}` in this model, but was trained apart "
                "from it: untie them in the model first (`tie_word_embeddings=False`)."
            )
    return sorted({first[id(p)] for p in inside.values()})


def entries_of(
    model: nn.Module, chosen: Sequence[str], in_place: Collection[str], base: str, inner: str = ""
) -> list[Entry]:
    """Return the entries of the tensors of the chosen modules.

    Args:
        model: the base.
        chosen: the names of the modules.
        in_place: the names of what is trained; the rest must be the base's.
        base: what peft puts before the name of a module.
        inner: what it puts behind.
    """
    first = {id(p): plain_name(n) for n, p in model.named_parameters()}
    trained, owners = set(in_place), {n.rpartition(".")[0] for n in in_place}
    entries, met = list[Entry](), dict[str, Copies]()
    for module in chosen:
        for name, tensor in _tensors(model, module).items():
            own = first.get(id(tensor), name)
            key = f"{base}{module}.{inner}{name.removeprefix(f'{module}.')}"
            buffer = id(tensor) not in first and name.rpartition(".")[0] in owners
            if own not in trained and not buffer:
                entries.append(_fixed(key, model, own))
            elif own in met:
                entries.append(met[own].further(key))
            else:
                met[own] = Copies(same(key, own))
                entries.append(met[own].entry)
    return entries


def _fixed(key: str, model: nn.Module, name: str) -> Entry:
    owner, _, leaf = name.rpartition(".")
    module = _modules(model)[owner]

    def value() -> Tensor:
        for other in adapters_of(model).values():
            if name in other.tensors():  # which may act, with what it has learnt in its place
                kept = other.replaced("a file with the whole module").get(owner, {})
                if leaf in kept:
                    return kept[leaf].detach()
        return (module._parameters | module._buffers)[leaf].detach()  # type: ignore[union-attr]

    return constant(key, value, "the base, in which it was not trained")


def without_copies(
    tensors: Mapping[str, Tensor], modules: Sequence[str], base: str
) -> dict[str, Tensor]:
    """Return tensors without the second copies that peft writes of biases in whole modules.

    Raises:
        AdapterError: a copy differs from the first.
    """
    kept = {}
    for key, tensor in tensors.items():
        firsts = [k for k in _first_copies(key, modules, base) if k in tensors and k != key]
        if not firsts:
            kept[key] = tensor
        elif not torch.equal(tensor, tensors[firsts[0]]):
            raise AdapterError(f"`{key}` differs from `{firsts[0]}`, of which it is a copy.")
    return kept


def _first_copies(key: str, modules: Sequence[str], base: str) -> list[str]:
    """Return keys that may be the same without what peft puts between a module and the rest."""
    for module in modules:
        root = f"{base}{module}."
        if key.startswith(root) and ".original_module." not in key:
            rest = key.removeprefix(root).removeprefix("modules_to_save.")
            return [root + rest, root + rest.partition(".")[2]]
    return []


def base_tensor(model: nn.Module, key: str, base: str) -> Entry | None:
    """Return the entry of a tensor of the base itself, which peft writes beside embeddings."""
    name = re.sub(r"\.(base_layer|original_module)(?=\.)", "", key.removeprefix(base))
    owner, _, leaf = name.rpartition(".")
    module = _modules(model).get(owner)
    if not key.startswith(base) or module is None:
        return None
    tensor = module._parameters.get(leaf)
    return None if tensor is None else constant(key, tensor.detach, "this base")


def _finds_only(
    end: str, names: Sequence[str], chosen: Sequence[str], hosts: Collection[str]
) -> bool:
    within = re.compile(rf"(^|.*\.){end}($|\..*)")
    others = [n for n in names if n.endswith(end) and n not in chosen]
    return not others and not any(within.match(host) for host in hosts)


def _any_ends(names: Collection[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _with_ties(model: nn.Module, in_place: Collection[str]) -> set[str]:
    named = {plain_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    wanted = {id(named[name]) for name in in_place}
    return {name for name, p in named.items() if id(p) in wanted}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    every = model.named_modules(remove_duplicate=False)
    own = {id(module) for _, module in base_modules(model)}
    return {plain_name(name): module for name, module in every if id(module) in own}


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    module = _modules(model)[name]
    tensors = module.state_dict(keep_vars=True).items()
    return {f"{name}.{n}": t for n, t in tensors if SLOT not in n.split(".")}
