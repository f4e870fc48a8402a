"""peft's on-disk format, both ways: one spelling, one file.

A folder of peft's holds `adapter_config.json` and `adapter_model.safetensors`. A file of this
package that defines `SPELLING`, an object of a class derived from `Spelling`, teaches us one kind
of such folder; it is found by being here, so that adding one touches nothing else. It says

- `peft_type`: which configurations it reads, narrowed by `reads` where several spellings share one;
- `kinds`: which methods it writes, by `Method.kind`, or by what their deltas are (`writes`);
- `method(settings, hosts, model)`: the method, or methods, that a configuration describes;
- `config(part)`: the configuration of a method; what all have in common is added to it;
- `entries(part)`: for each tensor of peft's file how it is written from our tensors, and how ours
  is read back.

Entries are computed from an adapter that is already injected, when reading too. They are the one
place where names and shapes are translated, so that what is written and what is read cannot differ;
a tensor that no entry accounts for is refused, whichever side has it.

| file | what is in it |
|---|---|
| `spelling.py` | `Spelling`, `Part`, `Entry` |
| `settings.py` | a configuration being read: each setting is taken, refused or harmless |
| `names.py` | which modules peft's patterns mean, and the shortest patterns for a set of modules |
| `carrying/in_place.py` | what is trained in place, as `modules_to_save` |
| `exchange.py` | whole folders, by the spellings |
"""

import functools
import importlib
import pkgutil

from lightning_peft.files.peft.spelling import Spelling


@functools.cache
def spellings() -> tuple[Spelling, ...]:
    """Return the spelling of each file of this package that has one, by the files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(m.SPELLING for m in modules if hasattr(m, "SPELLING"))
