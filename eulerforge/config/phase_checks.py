"""What can be said of a run's phases, and of which checkpoints it keeps, before it begins and without a model."""

from __future__ import annotations

from collections.abc import Collection

from eulerforge.config.schema import RunConfig, TrainingConfig
from eulerforge.config.suggest import nearest
from eulerforge.errors import Problem


def warmup_problems(training: TrainingConfig, steps: int) -> list[Problem]:
    """The warning about a warm-up that leaves nothing of a run of ``steps`` steps."""
    if not training.warmup_steps or training.warmup_steps < steps:
        return []
    message = f"the warm-up of {training.warmup_steps} steps fills the run, which ends at {steps}"
    return [
        Problem(
            key="training.warmup_steps",
            message=f"{message}: training.lr is reached at its last step or never",
            hint="a tenth of the steps is usual",
        )
    ]


def best_problems(run: RunConfig) -> list[Problem]:
    """Why not every checkpoint would have the held-out loss that ``checkpoint.keep_best`` goes by.

    Asked where a run begins: one that is finished is read whatever it kept.
    """
    held_out, save, val = run.data.validation, run.training.save_steps, run.training.val_steps
    if not run.checkpoint.keep_best:
        return []
    if not (held_out.size or held_out.fraction or held_out.path):
        return [
            Problem(
                key="checkpoint.keep_best",
                message="no checkpoint would have a held-out loss: data.validation holds no rows out",
                hint="--set data.validation.size=50, or keep_last instead",
            )
        ]
    if save and val and save % val == 0:
        return []
    return [
        Problem(
            key="checkpoint.keep_best",
            message="not every checkpoint would have a held-out loss:"
            f" training.save_steps ({save}) is no multiple of training.val_steps ({val})",
            hint="give both the same number, or keep_last instead",
        )
    ]


def phase_problems(
    training: TrainingConfig, *, strategy: str, own: Collection[str], offered: Collection[str]
) -> tuple[list[Problem], list[Problem]]:
    """Errors and warnings about ``training.phases``.

    Args:
        strategy: its name, for the message.
        own: the groups that the strategy's parameters fall into.
        offered: the groups that the installed resolvers offer.
    """
    errors: list[Problem] = []
    warnings: list[Problem] = []
    if training.max_train_steps is not None:
        warnings += warmup_problems(training, training.max_train_steps)
    last = -1
    for index, phase in enumerate(training.phases):
        key = f"training.phases.{index}"
        if index == 0 and phase.step != 0:
            errors.append(Problem(key=f"{key}.step", message="the first phase must start at step 0", hint="step = 0"))
        elif phase.step <= last:
            errors.append(
                Problem(
                    key=f"{key}.step",
                    message=f"the steps of phases must increase, {phase.step} does not",
                    hint=f"write a step above {last}",
                )
            )
        last = phase.step
        if training.max_train_steps is not None and phase.step >= training.max_train_steps:
            warnings.append(
                Problem(
                    key=f"{key}.step",
                    message=f"the phase never begins: the run ends at {training.max_train_steps}",
                    hint="raise training.max_train_steps, or take the phase away",
                )
            )
        if not phase.trainable:
            errors.append(
                Problem(
                    key=f"{key}.trainable",
                    message="No trainable parameters: the phase names no group",
                    hint=f"known groups: {', '.join(sorted({*own, *offered}))}",
                )
            )
        for group in phase.trainable:
            if group not in own and group not in offered:
                near = nearest(group, [*own, *offered])
                known = ", ".join(sorted({*own, *offered}))
                hint = f"did you mean {near}?" if near else f"known groups: {known}"
                errors.append(Problem(key=f"{key}.trainable", message=f"there is no group {group!r}", hint=hint))
            elif group == "router" and group not in own:
                warnings.append(
                    Problem(
                        key=f"{key}.trainable",
                        message=f"{strategy} typically has no router params",
                        hint="take router out of trainable, unless the base has experts",
                    )
                )
    return errors, warnings
