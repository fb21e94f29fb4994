"""Checkpoints with Orbax that resume to the bit, or say why they cannot.

A checkpoint holds the model, the optimiser, the step (which is also the position in the
stream of batches, whose shuffling depends on nothing else but the seed), the history
of the metrics and the settings. Orbax writes into a temporary folder and renames it, so
that a killed process leaves the previous checkpoint valid. A seal (digests of all
files) finds damage before Orbax reads: array files carry no checksum of their own, and
a flipped bit would silently become a wrong weight.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from .failures import Failure, reason

Record = dict[str, int | float]
KEPT = 2
SEAL = "seal.json"


@dataclasses.dataclass
class Progress:
    """Where a run stands: optimiser steps done and one record for each of them."""

    step: int = 0
    history: list[Record] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: Made if absent.
        identity: What has to be equal for a run to go on: settings and data.
    """

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any]):
        _quieten_orbax()
        self.folder = folder.absolute()
        self.identity = identity
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT,
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=True,  # of a run that was killed
                ),
            )
        except (OSError, ValueError) as error:
            raise Failure(
                f"cannot use {folder} for checkpoints: {reason(error)}."
            ) from error

    def save(
        self, progress: Progress, model: nnx.Module, optimizer: nnx.Optimizer
    ) -> None:
        """Writes the state after `progress.step` steps, once."""
        if progress.step in self._manager.all_steps():
            return
        arrays = _arrays(model, optimizer)
        about = {
            "identity": self.identity,
            "step": progress.step,
            "history": progress.history,
        }
        try:
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    about=ocp.args.JsonSave(about),
                    arrays=ocp.args.StandardSave(arrays),
                ),
            )
            self._manager.wait_until_finished()
            _write_seal(self.folder / str(progress.step))
        except Exception as error:  # Orbax has no common base class for its errors
            # Written but not sealed: the next run would start from it all the same.
            shutil.rmtree(self.folder / str(progress.step), ignore_errors=True)
            earlier = [s for s in self._manager.all_steps() if s != progress.step]
            raise Failure(
                f"cannot write the checkpoint of step {progress.step} in {self.folder}:"
                f" {reason(error)}; "
                + (
                    f"the one of step {max(earlier)} is whole, and the same command "
                    "resumes from it."
                    if earlier
                    else "there is no earlier one."
                )
            ) from error

    def restore(self, model: nnx.Module, optimizer: nnx.Optimizer) -> Progress:
        """Puts the latest checkpoint into both; a new `Progress` if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return Progress()
        self._check_seal(step)
        about = self._read(step, about=ocp.args.JsonRestore()).about
        stored = about.get("identity") if isinstance(about, dict) else None
        if not isinstance(stored, dict):
            raise self._corrupt(step, "it does not say which run it belongs to")
        # Through JSON a tuple comes back as a list.
        wanted = {k: _plain(v) for k, v in self.identity.items()}
        differing = [k for k in wanted if stored.get(k) != wanted[k]]
        if differing:
            what = ", ".join(f"{k} {stored.get(k)}, not {wanted[k]}" for k in differing)
            raise Failure(
                f"{self.folder.parent} holds a run with other settings ({what}); use "
                "them again, choose another --out, or start anew with --fresh."
            )
        arrays = _arrays(model, optimizer)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        restored = self._read(step, arrays=ocp.args.StandardRestore(target)).arrays
        for name, module in (("model", model), ("optimizer", optimizer)):
            state = nnx.state(module)
            paths, structure = jax.tree.flatten_with_path(state)
            leaves = [restored[_name(name, path)] for path, _ in paths]
            nnx.update(module, jax.tree.unflatten(structure, leaves))
        return Progress(about["step"], about["history"])

    def close(self) -> None:
        self._manager.close()

    def _check_seal(self, step: int) -> None:
        folder = self.folder / str(step)
        try:
            sealed = json.loads((folder / SEAL).read_text("utf-8"))
            found = _digests(folder)
        except FileNotFoundError:
            return  # killed between Orbax's rename and the seal
        except (OSError, ValueError) as error:
            raise self._corrupt(step, f"{SEAL}: {reason(error)}") from error
        if differing := sorted(dict(found.items() ^ sealed.items())):
            raise self._corrupt(step, f"{differing[0]} is not as it was written")

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever a damaged file provokes
            raise self._corrupt(step, reason(error)) from error

    def _corrupt(self, step: int, why: str) -> Failure:
        earlier = [s for s in self._manager.all_steps() if s < step]
        instead = f"to resume from step {max(earlier)}, or " if earlier else "and "
        return Failure(
            f"the checkpoint {self.folder / str(step)} is damaged ({why}); delete that "
            f"folder {instead}start anew with --fresh."
        )


def delete_run(out: pathlib.Path) -> None:
    """Removes what a run wrote into `out`, and nothing else."""
    try:
        shutil.rmtree(out / "checkpoints", ignore_errors=False)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise Failure(
            f"cannot delete {out / 'checkpoints'}: {reason(error)}."
        ) from error
    for name in ("metrics.csv", "metrics.json", "report.png"):
        (out / name).unlink(missing_ok=True)


def _name(owner: str, path: tuple) -> str:
    return f"{owner}.{jax.tree_util.keystr(path, simple=True, separator='.')}"


def _arrays(model: nnx.Module, optimizer: nnx.Optimizer) -> dict[str, jax.Array]:
    return {
        _name(owner, path): leaf
        for owner, module in (("model", model), ("optimizer", optimizer))
        for path, leaf in jax.tree.leaves_with_path(nnx.state(module))
    }


def _quieten_orbax() -> None:
    """Leaves the words to `Failure`: Orbax logs each error with several tracebacks."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # A failed save leaves tasks behind whose errors asyncio reports once more.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        # Orbax reads and writes all arrays at once. When one fails, the others come
        # back to an event loop that is gone, and Python reports each of them.
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook


def _write_seal(folder: pathlib.Path) -> None:
    """Under another name first: half a seal would call what it seals damaged."""
    part = folder / f"{SEAL}.part"
    part.write_text(json.dumps(_digests(folder), indent=1), "utf-8")
    part.replace(folder / SEAL)


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """Digest of every file of a checkpoint, by its path inside it."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not path.name.startswith(SEAL):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
