"""All cases, from the modules `cases_*` beside this one."""

import importlib
import pkgutil

from .case import Case


def all_cases() -> list[Case]:
    package = __package__ or ""
    folder = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folder))
    found = []
    for name in names:
        if name.startswith("cases_"):
            found += importlib.import_module(f"{package}.{name}").cases()
    return found


def chosen(family: str, name: str, target: str | None = None) -> list[Case]:
    """Those of a family, or all of ours if it is empty, with `name` in theirs."""
    return [
        case
        for case in all_cases()
        if (case.family == family or (family in ("", "all") and (family or case.ours)))
        and name in case.name
        and (target is None or target in case.targets)
    ]
