"""Where recipes are found."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from vcpo.errors import ConfigError


def recipe_folder() -> Path:
    """``vcpo/recipes`` of an installed package, else ``recipes`` of the checkout it is imported from."""
    package = Path(str(files("vcpo")))
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with vcpo."""
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def find_recipe(recipe: Path | str) -> Path:
    """The file that ``recipe`` names: a path, else a recipe that comes with vcpo (``maze``,
    ``maze.toml`` or ``recipes/maze.toml``).

    Raises ConfigError that suggests the nearest recipe.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = recipe_folder() / f"{path.name.removesuffix('.toml')}.toml"
    if path.parent in (Path(), Path("recipes")) and shipped.is_file():
        return shipped
    beside = [str(p) for p in path.parent.glob("*.toml") if p.is_file()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), beside, 1) or difflib.get_close_matches(
        path.stem, recipe_names(), 1
    )
    meant = (
        f"did you mean {near[0]}?" if near else f"recipes that come with vcpo: {', '.join(recipe_names())}"
    )
    raise ConfigError(f"no recipe {str(recipe)!r}; {meant}")
