"""How the session of a study begins: signals only ask to stop, its folder is there."""

import functools
from collections.abc import Callable
from typing import Any

from language_model.checkpoints import delete_run
from language_model.training import Stop, stop_signals

from . import output


def stoppable[Options](
    body: Callable[[Options, Stop], None],
) -> Callable[[Options], None]:
    """Of `body(options, stop)`, what a script calls: `run(options)`.

    `options.out` is made, and emptied of an earlier run if `options.fresh` asks for it.
    """

    @functools.wraps(body)
    def run(options: Any) -> None:
        with stop_signals() as stop:
            output.make_folder(options.out)
            if getattr(options, "fresh", False):
                delete_run(options.out)
            body(options, stop)

    return run
