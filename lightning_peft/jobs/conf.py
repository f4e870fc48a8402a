"""The folders of configuration files, ours and the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

import lightning_peft


@dataclass(frozen=True)
class Conf:
    """Where configuration files lie, in the order in which Hydra looks for them."""

    own: Path
    """Our files."""
    users: tuple[Path, ...] = ()
    """The user's folders, from `--config-dir`."""

    def groups(self) -> list[str]:
        """Return the names of the groups: `model`, `method` and so on."""
        return sorted({p.name for place in self._places() for p in place.iterdir() if p.is_dir()})

    def options(self, group: str) -> dict[str, Path]:
        """Return the options of a group and their files."""
        files = [p for place in reversed(self._places()) for p in (place / group).glob("*.yaml")]
        return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}

    def shadowed(self) -> list[Path]:
        """Return the user's files that Hydra does not read, since ours have the same name."""
        files = [(place, path) for place in self.users for path in sorted(place.rglob("*.yaml"))]
        return [path for place, path in files if (self.own / path.relative_to(place)).is_file()]

    def compose(self, name: str, overrides: Sequence[str] = ()) -> DictConfig:
        """Compose the primary configuration `name` as the command line would."""
        search = ",".join(f"file://{place.resolve()}" for place in self.users)
        with initialize_config_dir(str(self.own), version_base="1.3"):
            return compose(name, [*overrides, f"hydra.searchpath=[{search}]"])

    def _places(self) -> tuple[Path, ...]:
        return (self.own, *self.users)


def own_folder() -> Path:
    """Return the folder of our files: inside the installed package, or at the sources' top."""
    package = Path(lightning_peft.__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


def in_use() -> Conf:
    """Return the folders that Hydra has composed the running job from."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    return Conf(own_folder(), tuple(folder for folder in folders if folder != own_folder()))


def key_of(override: str) -> str:
    """Return the setting or group that an override is about; empty when it cannot be read."""
    try:
        return OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        return ""


def description(file: Path) -> str:
    """Return what an option's file says of itself: its first comment."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    return ""
