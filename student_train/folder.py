"""The folder of a run: is it free, from where does a run go on, and is it the same run?

A recipe of several stages has a folder for each but the last, `stage-1-intermediate`, with its checkpoints and, once
it is done, its student and metrics; the last has the run's own folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..store.errors import ConfigError, StoreMismatch
from ..store.identity import canonical, short
from .card import METRICS, PROVENANCE
from .losses.presets import Stage
from .settings import TrainConfig
from .sharded import is_main_process

STATE = "trainer_state.json"  # of a checkpoint, written last (trainer.py)


class Start(NamedTuple):
    """Where a run begins. done: stages that an earlier call has ended; checkpoint: of the next one, if there is any."""

    done: int = 0
    checkpoint: str | None = None

    @property
    def resumed(self) -> bool:
        return self.done > 0 or self.checkpoint is not None


def stage_folder(output: Path, stages: Sequence[Stage], number: int) -> Path:
    last = number == len(stages) - 1
    return output if last else output / f"stage-{number + 1}-{stages[number].name}"


def prepare_folder(config: TrainConfig, output: Path, stages: Sequence[Stage]) -> Start:
    """Raises ConfigError where the folder holds another run, or nothing to go on from."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output-dir {output} is a file; give a folder that is new or empty")
    folders = [stage_folder(output, stages, number) for number in range(len(stages))]
    asked = str(config.resume_from_checkpoint or "false")
    if asked.lower() == "true":
        ended = (number for number, one in enumerate(folders[:-1]) if not (one / METRICS).is_file())
        done = next(ended, len(stages) - 1)
        found = last_checkpoint(folders[done])
        if not done and found is None:
            raise ConfigError(
                f"--resume-from-checkpoint true: {output} holds no checkpoint that is whole; start without it"
            )
        return Start(done, found)
    if asked.lower() != "false":
        if not is_whole_checkpoint(Path(asked)):
            raise ConfigError(f"--resume-from-checkpoint {asked}: a checkpoint-… folder with a whole {STATE} expected")
        at = [number for number, one in enumerate(folders) if one.resolve() == Path(asked).resolve().parent]
        return Start(at[0] if at else len(stages) - 1, asked)
    empty(config, output)
    return Start()


def last_checkpoint(folder: Path) -> str | None:
    """The one of the most steps that was written to its end; where a run was killed while it wrote, the one before."""
    steps = {
        int(number): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal() and is_whole_checkpoint(path)
    }  # fmt: skip
    return str(steps[max(steps)]) if steps else None


def is_whole_checkpoint(path: Path) -> bool:
    try:
        return isinstance(json.loads((path / STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def empty(config: TrainConfig, output: Path) -> None:
    """Another run's students, checkpoints and stages go, where that is asked for; else ConfigError is raised."""
    held = [*output.glob("checkpoint-*"), *output.glob("stage-*")]
    held += [output / name for name in (PROVENANCE, METRICS, "model.safetensors") if (output / name).exists()]
    if held and is_main_process():
        if not config.overwrite_output_dir:
            raise ConfigError(
                f"--output-dir {output} holds another run ({sorted(held)[0].name}): give another folder, "
                "--resume-from-checkpoint true to go on, or --overwrite-output-dir to start anew"
            )
        for path in held:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def given_back(output: Path) -> Iterator[None]:
    """Where training ends before anything of a student is there, the folder is free for the next run."""
    try:
        yield
    except BaseException:
        stages = list(output.glob("stage-*"))
        made = [*output.glob("checkpoint-*"), *(path for folder in stages for path in folder.iterdir())]
        if not made and is_main_process():
            for folder in stages:
                folder.rmdir()
            (output / PROVENANCE).unlink(missing_ok=True)
        raise


def check_same_run(output: Path, made: Mapping[str, Any]) -> None:
    """Raises StoreMismatch where a run is continued from another store, with other rows or another loss."""
    if not (output / PROVENANCE).is_file():
        return
    before = json.loads((output / PROVENANCE).read_text(encoding="utf-8"))
    for what, value in _resumed(made).items():
        stored = _resumed(before)[what]
        if canonical(stored) != canonical(value):
            had, has = _apart(stored, value)
            raise StoreMismatch(
                f"{what} differs from the run in {output}: it had {short(had)}, this one has {short(has)}: "
                "go on with the same, or start anew with --overwrite-output-dir"
            )


def _resumed(made: Mapping[str, Any]) -> dict[str, Any]:
    arguments = made.get("training_arguments", {})
    order = (
        "seed",
        "data_seed",
        "gradient_accumulation_steps",
        "train_sampling_strategy",
    )
    return {
        "store": [store["sha256"] or store["fingerprint"] for store in made["stores"]],
        "student": made["student"],
        "loss terms": [stage["terms"] for stage in made["stages"]] if "stages" in made else [made["terms"]],
        "number of rows": made["rows"],
        "rows a batch (--per-device-train-batch-size times ranks)": made.get("batch_rows"),
        **{name: arguments.get(name) for name in order},
    }


def _apart(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """What differs of two values that do: entries of dicts, the first entry of lists that are as long."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = [name for name in {**ours, **theirs} if canonical(ours.get(name)) != canonical(theirs.get(name))]
        return {name: ours.get(name) for name in names}, {name: theirs.get(name) for name in names}
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = zip(ours, theirs, strict=True)
        return next(_apart(*pair) for pair in pairs if canonical(pair[0]) != canonical(pair[1]))
    return ours, theirs
