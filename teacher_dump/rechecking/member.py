"""Which teacher of an ensemble store is asked again."""

from __future__ import annotations

import torch

from ...store import ConfigError, TeacherStore
from ..tasks import task_class
from ..teachers.given import lent, teacher_of
from .config import RecheckConfig
from .stored import config_of

_WEIGHTS = ("weights_sha256", "state_sha256", "commit")


def member_asked(whole: TeacherStore, config: RecheckConfig, model: torch.nn.Module | None) -> TeacherStore:
    """That of --member, else the one with the weights of this teacher; a store that is no ensemble is its own.

    Raises ConfigError where there is none.
    """
    members = whole.members
    names = [str(one.member) for one in members]
    if whole in members:
        if config.member is not None:
            raise ConfigError(f"--member is for an ensemble store; {whole.path} is of one teacher: leave it away")
        return whole
    if config.member is not None:
        numbers = {str(number): one for number, one in enumerate(members, 1)}
        found = dict(zip(names, members, strict=True)).get(config.member) or numbers.get(config.member)
        if found is None:
            raise ConfigError(f"--member {config.member}: the teachers of {whole.path} are {', '.join(names)}")
        return found
    asked = config_of(whole, config)
    with lent(asked, model):
        ours = teacher_of(asked, task_class(whole.task).model_class, model).identity()["teacher"]
    for one in members:
        if any(ours.get(name) and ours[name] == one.identity["teacher"].get(name) for name in _WEIGHTS):
            return one
    raise ConfigError(
        f"{whole.path} is an ensemble store, and none of its teachers has these weights: say with --member which of "
        f"{', '.join(names)} this teacher should be"
    )
