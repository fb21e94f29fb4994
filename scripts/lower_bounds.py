"""Prints pip constraints that pin each core dependency to its lower bound."""

import pathlib
import re
import tomllib


def lower_bounds(pyproject: str) -> list[str]:
    """`name==version` for each dependency; one without a plain bound is an error."""
    pins = []
    for requirement in tomllib.loads(pyproject)["project"]["dependencies"]:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise SystemExit(
                f"write {requirement!r} in pyproject.toml as name>=version"
            )
        pins.append("{}=={}".format(*match.groups()))
    return pins


if __name__ == "__main__":
    root = pathlib.Path(__file__).parent.parent
    print(*lower_bounds((root / "pyproject.toml").read_text()), sep="\n")
