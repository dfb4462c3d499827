"""Which plugin's code was running when a run fell over.

Notable: the traceback decides, not the message. The innermost frame that lies in a plugin's package is the one that a
user can do something about, even when the exception was raised deeper, inside torch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import TYPE_CHECKING

from eulerforge.errors import EulerForgeError, PluginError, first_line
from eulerforge.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from eulerforge.plugins import Registry

# what a run is made of anyway; a fault in them is not a plugin's
_OURS = frozenset({"eulerforge", "torch", "transformers", "numpy", "huggingface_hub", "safetensors", "tokenizers"})


@contextmanager
def plugin_blamed(registry: Registry, step: Callable[[], int]) -> Iterator[None]:
    """Turn an exception out of a plugin's code into one that names the plugin, the place and the step.

    ``step`` gives the number of finished steps. Any other exception passes as it is.

    Raises:
        PluginError: a plugin's code was running.
    """
    try:
        yield
    except EulerForgeError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            owner = _owner(frame, registry)
            if owner is not None:
                first = first_line(error, "no message")
                code = frame.f_code
                raise PluginError(
                    f"{owner} raised {type(error).__name__} in step {step() + 1}: {first}"
                    f" ({frame.f_globals.get('__name__')}.{code.co_qualname}, {code.co_filename}:{line})",
                    hint="the step was not applied; --debug shows the traceback; report it to the plugin's author, and"
                    " --resume goes on from the last checkpoint",
                ) from error
        raise


def _owner(frame: FrameType, registry: Registry) -> str | None:
    """The plugin, or else the distribution, whose code a frame runs; None for our own and for what we build on."""
    package = str(frame.f_globals.get("__name__") or "").partition(".")[0]
    if not package or package in _OURS or package == "__main__":
        return None
    for record in registry.records:
        if record.module.partition(".")[0] == package:
            return f"plugin {record.qualified_name} {record.version}"
    owners = metadata.packages_distributions().get(package)
    return f"the package {owners[0]} {metadata.version(owners[0])}" if owners else None
