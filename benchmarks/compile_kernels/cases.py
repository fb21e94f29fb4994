"""All cases, from the modules `cases_*` beside this one."""

import importlib
import pkgutil

from .case import Case
from .targets import TARGETS


def all_cases() -> list[Case]:
    package = __package__ or ""
    folder = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folder))
    found = []
    for name in names:
        if name.startswith("cases_"):
            found += importlib.import_module(f"{package}.{name}").cases()
    return found


def chosen(
    family: str, name: str, target: str | None = None, every: int = 1
) -> list[Case]:
    """Those of a family, or all of ours if it is empty, with `name` in theirs.

    Of a target, every so many-th: others of each target, so that all are met.
    """
    found = [
        case
        for case in all_cases()
        if (case.family == family or (family in ("", "all") and (family or case.ours)))
        and name in case.name
        and (target is None or target in case.targets)
    ]
    start = TARGETS.index(target) % every if target else 0
    return found[start::every]
