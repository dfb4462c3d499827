"""``eulerforge train``: check a preset, look at what it would train, or train it.

What needs no model (``--validate-only``, ``--print-config``) is done before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eulerforge.cli.collector import uncollected_imports
from eulerforge.cli.numbers import at_least
from eulerforge.cli.output import emit_json, say, tell, warn
from eulerforge.cli.plugin_options import registry_from
from eulerforge.cli.streams import unbreakable_output
from eulerforge.cli.train_config import add_config_options, load_from_args, validate
from eulerforge.errors import ConfigError, UsageError, as_stopped
from eulerforge.training.bigblocks import align_big_blocks
from eulerforge.training.kernelcache import bound_kernel_caches

if TYPE_CHECKING:
    from eulerforge.config import LoadedConfig
    from eulerforge.config.schema import RunConfig
    from eulerforge.plugins import Registry

MODES = ("validate_only", "preflight", "print_config")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``train``."""
    parser.description = "Fine-tune a model as a preset describes it."
    add_config_options(parser, debug_help="show tracebacks, and gradient norms of each group")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint of the run")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that a run has used")
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="with --resume: go on although this key has changed, and record it; may be given often",
    )
    parser.add_argument(
        "--validate-only", action="store_true", help="check all that needs no model, without importing torch"
    )
    parser.add_argument(
        "--preflight", action="store_true", help="load, inject, show what would train and check its gradients"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole configuration with where each value came from"
    )
    parser.add_argument("--debug-trainable-names", action="store_true", help="list every tensor that trains")
    parser.add_argument(
        "--debug-every", type=at_least(1), metavar="N", help="show each group's norms every N steps (default 10)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Check, print, preflight or train; gives back the exit code.

    Raises:
        EulerForgeError: the preset, the data, a plugin, the device or the run is at fault.
    """
    _refuse_ignored_flags(args)
    registry = registry_from(args)
    loaded = load_from_args(args, registry)
    if args.print_config:
        return _print_config(args, loaded)
    validate(loaded, registry)
    if args.validate_only:
        if args.json:
            emit_json({"preset": loaded.preset_name, "valid": True})
        else:
            tell(f"{loaded.preset_name}: the configuration is valid")
        return 0
    return _preflight(args, loaded, registry) if args.preflight else _train(args, loaded, registry)


def _refuse_ignored_flags(args: argparse.Namespace) -> None:
    """A flag that would do nothing is an error, not a silence."""
    chosen = [mode for mode in MODES if getattr(args, mode)]
    names = ["--" + mode.replace("_", "-") for mode in chosen]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other", hint="give one of them")
    if args.resume and args.overwrite:
        raise UsageError(
            "--resume and --overwrite exclude each other", hint="--resume goes on, --overwrite starts anew"
        )
    if args.allow_changed and not args.resume:
        raise UsageError("--allow-changed does nothing without --resume", hint="give --resume too")
    if chosen:
        idle = [flag for flag in ("resume", "overwrite", "debug_every") if getattr(args, flag)]
        if args.debug_trainable_names and chosen != ["preflight"]:
            idle.append("debug_trainable_names")
        if idle:
            flag = idle[0].replace("_", "-")
            raise UsageError(f"--{flag} does nothing with {names[0]}, which trains nothing", hint="leave it out")
    if args.debug_every is not None and not args.debug:
        raise UsageError("--debug-every does nothing without --debug", hint="give --debug too")


def _print_config(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    if args.json:
        from eulerforge.config.structure import as_tree

        emit_json({"config": as_tree(loaded.run), "provenance": dict(loaded.provenance)})
    else:
        tell(loaded.to_toml(), end="")
    return 0


def _preflight(args: argparse.Namespace, loaded: LoadedConfig, registry: Registry) -> int:
    _ready_libraries(loaded.run)
    with uncollected_imports():
        import transformers.modeling_utils  # noqa: F401 - transformers imports most of itself late, outside of this

        from eulerforge.training.assemble import assemble
        from eulerforge.training.debug import trainable_lines
        from eulerforge.training.memory import out_of_memory_advice
        from eulerforge.training.preflight import preflight, preflight_lines

    out = Path(str(loaded.run.output_dir))
    # whatever a plugin's layers print
    with out_of_memory_advice(loaded.run) as shortage, contextlib.redirect_stdout(sys.stderr):
        made = assemble(loaded.run, registry, out=out, need_data=False, estimates=True, shortage=shortage, say=say)
        result = preflight(made)
    names = trainable_lines(made.model, made.phases) if args.debug_trainable_names else []
    if args.json:
        emit_json({**result, "trainable": names} if args.debug_trainable_names else result)
    else:
        tell("\n".join([*preflight_lines(result, made), *names]))
    return 0


def _train(args: argparse.Namespace, loaded: LoadedConfig, registry: Registry) -> int:
    if not loaded.run.data.path:
        raise ConfigError(
            "no training data is named", key="data.path", hint="--set data.path=rows.jsonl; see the guide to your data"
        )
    if loaded.run.training.max_train_steps is None and loaded.run.training.num_epochs is None:
        warn("neither training.max_train_steps nor training.num_epochs is set: training for 1 epoch")
    with unbreakable_output():
        try:
            summary = _trained(args, loaded, registry)
        except KeyboardInterrupt as error:  # one that comes later is the session's own to word
            raise as_stopped(error, "while loading: nothing was written", "the same command starts anew") from None
        from eulerforge.training.summary import summary_lines

        if args.json:
            emit_json(summary)
        else:
            tell("\n".join(summary_lines(summary)))
    return 0


def _trained(args: argparse.Namespace, loaded: LoadedConfig, registry: Registry) -> dict[str, Any]:
    _ready_libraries(loaded.run)
    with uncollected_imports():
        import transformers.modeling_utils  # noqa: F401 - transformers imports most of itself late, outside of this

        from eulerforge.training.session import SessionOptions, run_training

    options = SessionOptions(
        resume=args.resume,
        overwrite=args.overwrite,
        allow_changed=tuple(args.allow_changed),
        debug_every=(args.debug_every or 10) if args.debug else 0,
        debug_names=args.debug_trainable_names,
        resume_command=_resume_command(),
    )
    with contextlib.redirect_stdout(sys.stderr):  # whatever a plugin's layers print
        return run_training(loaded, registry, Path(str(loaded.run.output_dir)), options, say)


def _resume_command() -> str:
    """The command that was typed, with --resume in place of --overwrite."""
    typed = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return shlex.join(["eulerforge", *typed, "--resume"])


def _ready_libraries(run: RunConfig) -> None:
    """What must be said before they are imported; their own bars and telemetry would interleave with ours."""
    bound_kernel_caches()
    align_big_blocks(run)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
